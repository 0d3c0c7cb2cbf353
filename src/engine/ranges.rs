//! Who is changing the mapping of which guest clusters.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::race::Guard;
use crate::runtime::sync::WaitList;

/// Ranges of guest clusters held by requests; at most one per request in
/// flight, so a plain list is searched faster than a tree.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    held: Mutex<Vec<(u64, u64)>>,
    freed: WaitList,
}

/// A held range; free again when dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct RangeGuard<'a> {
    ranges: &'a Ranges,
    range: (u64, u64),
}

impl Ranges {
    fn held(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes clusters `first..end` if nobody holds one of them. Otherwise
    /// waits until that somebody is done and gives None: the caller looks the
    /// mapping up again, which by then often needs no lock.
    pub(super) async fn take_or_wait(&self, first: u64, end: u64) -> Option<RangeGuard<'_>> {
        let free = |held: &[(u64, u64)]| {
            held.iter().all(|&(a, b)| b <= first || end <= a) || Guard::Ranges.is_away()
        };
        {
            let mut held = self.held();
            if free(&held) {
                held.push((first, end));
                return Some(RangeGuard {
                    ranges: self,
                    range: (first, end),
                });
            }
        }
        self.freed
            .wait_until(|| free(&self.held()).then_some(()))
            .await;
        None
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        {
            let mut held = self.ranges.held();
            if let Some(index) = held.iter().position(|range| *range == self.range) {
                held.swap_remove(index);
            }
        }
        self.ranges.freed.notify_all();
    }
}
