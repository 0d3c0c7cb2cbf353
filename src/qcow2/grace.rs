//! Grace periods: knowing when no request uses an old mapping any more.
//!
//! A request looks a mapping up and then does I/O on the host cluster it
//! found. If that cluster is unmapped meanwhile it must not be given to
//! somebody else before the request is over. Requests therefore count
//! themselves in under the current generation; what is freed in generation g
//! may be reused from generation g + 2 on, because the generation advances
//! only when nobody of the one before is left. `tests/loom` tries every order.

use crate::runtime::primitives::{AtomicU64, Ordering};

/// One queue's counts, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counts([AtomicU64; 2]);

/// The generations of one image.
#[derive(Debug)]
pub(crate) struct Grace {
    generation: AtomicU64,
    counts: Box<[Counts]>,
}

/// A request's presence; it ends when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Presence<'a>(&'a AtomicU64);

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Grace {
    /// `slots` is how many queues count apart from each other.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            generation: AtomicU64::new(0),
            counts: (0..slots.max(1)).map(|_| Counts::default()).collect(),
        }
    }

    /// Counts a request of queue `slot` in. Mappings looked up while the
    /// presence lives stay valid.
    #[inline]
    pub(crate) fn enter(&self, slot: usize) -> Presence<'_> {
        let counts = &self.counts[slot % self.counts.len()].0;
        loop {
            let generation = self.generation.load(Ordering::SeqCst);
            let count = &counts[generation as usize % 2];
            count.fetch_add(1, Ordering::SeqCst);
            // Unchanged: whoever advances from here on sees the count.
            if self.generation.load(Ordering::SeqCst) == generation {
                return Presence(count);
            }
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The current generation: the tag of what is freed now.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Advances as far as present requests allow; the current generation.
    ///
    /// The caller is alone: the flush lock is held.
    pub(crate) fn advance(&self) -> u64 {
        let mut generation = self.generation();
        for _ in 0..2 {
            let before = (generation as usize + 1) % 2;
            if self
                .counts
                .iter()
                .any(|c| c.0[before].load(Ordering::SeqCst) != 0)
            {
                break;
            }
            generation += 1;
            self.generation.store(generation, Ordering::SeqCst);
        }
        generation
    }

    /// True when what was freed under `tag` has no users left.
    pub(crate) fn is_over(&self, tag: u64) -> bool {
        self.generation() >= tag + 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_present_request_delays_reuse_and_a_later_one_does_not() {
        let grace = Grace::new(2);
        let early = grace.enter(0);
        let tag = grace.generation();
        grace.advance();
        grace.advance();
        assert!(!grace.is_over(tag));
        let late = grace.enter(1);
        drop(early);
        grace.advance();
        assert!(grace.is_over(tag), "nobody from before the tag is left");
        drop(late);
    }

    #[test]
    fn without_requests_two_steps_suffice() {
        let grace = Grace::new(1);
        let tag = grace.generation();
        grace.advance();
        assert!(grace.is_over(tag));
    }
}
