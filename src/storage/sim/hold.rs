//! Operations kept from happening until the test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::runtime::sync::WaitList;

/// Holds back the operations that a predicate chose; see
/// [`SimDisk::hold`](super::SimDisk::hold). Dropping it lets them go.
#[derive(Debug)]
#[must_use = "a hold dropped at once holds nothing"]
pub struct Hold {
    pub(super) gate: Arc<Gate>,
}

impl Hold {
    /// How many operations have been held so far, whether let go since or not.
    pub fn arrived(&self) -> u64 {
        self.gate.arrived.load(Ordering::SeqCst)
    }

    /// Waits until `count` operations have been held so far.
    pub async fn wait_for(&self, count: u64) {
        self.gate
            .changed
            .wait_until(|| (self.arrived() >= count).then_some(()))
            .await;
    }

    /// Lets the operation go that has been held longest, or the next one to
    /// arrive.
    pub fn release_one(&self) {
        self.gate.released.fetch_add(1, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// Lets all go, and holds no more.
    pub fn release(&self) {
        self.gate.open.store(true, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.release();
    }
}

#[derive(Debug, Default)]
pub(super) struct Gate {
    arrived: AtomicU64,
    released: AtomicU64,
    open: AtomicBool,
    changed: WaitList,
}

impl Gate {
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// An operation arrives; its place in the line.
    pub(super) fn arrive(&self) -> u64 {
        let ticket = self.arrived.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_all();
        ticket
    }

    pub(super) async fn pass(&self, ticket: u64) {
        self.changed
            .wait_until(|| {
                (self.is_open() || self.released.load(Ordering::SeqCst) > ticket).then_some(())
            })
            .await;
    }
}
