//! Who is there: requests count themselves in and out, and others wait until
//! none is left that could do harm. `tests/loom` tries every order.
//!
//! A request looks a mapping up and then does I/O on the host cluster it
//! found. If that cluster is unmapped meanwhile it must not be given to
//! somebody else before the request is over: that is a grace period. Requests
//! count themselves in under the current generation; what is freed in
//! generation g may be reused from generation g + 2 on, because the generation
//! advances only when nobody of the one before is left.
//!
//! Where all mappings change at once, the gate is closed: requests that come
//! wait until it opens, and whoever closed it waits until none is left. A
//! request that finds itself alone can close it for a moment, too.

use crate::runtime::primitives::{AtomicU64, Ordering};
use crate::runtime::sync::WaitList;

/// Beside the generation: the gate is closed.
const CLOSED: u64 = 1 << 63;

/// One queue's counts, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counts([AtomicU64; 2]);

/// The generations of one image, and its gate.
#[derive(Debug)]
pub(crate) struct Grace {
    generation: AtomicU64,
    counts: Box<[Counts]>,
    /// The gate has opened.
    opened: WaitList,
    /// The gate is closed, and a request is over.
    left: WaitList,
}

/// A request's presence; it ends when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Presence<'a> {
    grace: &'a Grace,
    count: &'a AtomicU64,
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        if self.grace.is_closed() {
            self.grace.left.notify_all();
        }
    }
}

/// No request is under way but perhaps the holder's, and none begins until
/// this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Quiet<'a>(&'a Grace);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.generation.fetch_sub(CLOSED, Ordering::SeqCst);
        self.0.opened.notify_all();
    }
}

impl Grace {
    /// `slots` is how many queues count apart from each other.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            generation: AtomicU64::new(0),
            counts: (0..slots.max(1)).map(|_| Counts::default()).collect(),
            opened: WaitList::default(),
            left: WaitList::default(),
        }
    }

    /// Counts a request of queue `slot` in, as soon as the gate is open.
    /// Mappings looked up while the presence lives stay valid.
    #[inline]
    pub(crate) async fn enter(&self, slot: usize) -> Presence<'_> {
        match self.try_enter(slot) {
            Some(presence) => presence,
            None => self.opened.wait_until(|| self.try_enter(slot)).await,
        }
    }

    /// As [`Self::enter`]; None while the gate is closed.
    #[inline]
    fn try_enter(&self, slot: usize) -> Option<Presence<'_>> {
        let counts = &self.counts[slot % self.counts.len()].0;
        loop {
            let generation = self.generation.load(Ordering::SeqCst);
            if generation & CLOSED != 0 {
                return None;
            }
            let count = &counts[generation as usize % 2];
            count.fetch_add(1, Ordering::SeqCst);
            let presence = Presence { grace: self, count };
            // Unchanged: whoever advances or closes the gate from here on sees
            // the count.
            if self.generation.load(Ordering::SeqCst) == generation {
                return Some(presence);
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.generation.load(Ordering::SeqCst) & CLOSED != 0
    }

    /// Closes the gate, unless it is.
    fn close(&self) -> Option<Quiet<'_>> {
        let before = self.generation.fetch_or(CLOSED, Ordering::SeqCst);
        (before & CLOSED == 0).then(|| Quiet(self))
    }

    /// Closes the gate and waits until no request is under way; not inside of
    /// a request.
    pub(crate) async fn quiet(&self) -> Quiet<'_> {
        // Opens the gate again, too, if nobody waits to the end.
        let quiet = self.opened.wait_until(|| self.close()).await;
        self.left
            .wait_until(|| (self.present() == 0).then_some(()))
            .await;
        quiet
    }

    /// For a request: closes the gate if it is the only one under way. Who
    /// gets this does not wait for long: everybody else does, for the gate.
    pub(crate) fn alone(&self) -> Option<Quiet<'_>> {
        if self.present() > 1 {
            return None;
        }
        let quiet = self.close()?;
        // Who came before it was closed is counted by now.
        (self.present() == 1).then_some(quiet)
    }

    /// How many requests are under way, or look whether the gate is open.
    fn present(&self) -> u64 {
        let counts = self.counts.iter().flat_map(|counts| &counts.0);
        counts.map(|count| count.load(Ordering::SeqCst)).sum()
    }

    /// The current generation: the tag of what is freed now.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst) & !CLOSED
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
            // Added: the gate may be closed or opened meanwhile.
            self.generation.fetch_add(1, Ordering::SeqCst);
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
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn a_present_request_delays_reuse_and_a_later_one_does_not() {
        let grace = Grace::new(2);
        let early = grace.try_enter(0);
        let tag = grace.generation();
        grace.advance();
        grace.advance();
        assert!(!grace.is_over(tag));
        let late = grace.try_enter(1);
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

    #[test]
    fn a_closed_gate_waits_for_those_inside_and_holds_up_others() {
        let grace = Grace::new(2);
        let mut context = Context::from_waker(Waker::noop());
        let early = grace.try_enter(1);
        let tag = grace.generation();
        let mut quiet = pin!(grace.quiet());
        assert!(quiet.as_mut().poll(&mut context).is_pending());
        assert!(grace.try_enter(0).is_none());
        let mut late = pin!(grace.enter(0));
        assert!(late.as_mut().poll(&mut context).is_pending());
        drop(early);
        grace.advance();
        assert!(grace.is_over(tag), "frees come through while it is closed");
        let Poll::Ready(quiet) = quiet.as_mut().poll(&mut context) else {
            panic!("nobody is inside");
        };
        assert!(late.as_mut().poll(&mut context).is_pending());
        drop(quiet);
        assert!(late.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn only_the_last_request_is_alone_and_others_wait_for_it() {
        let grace = Grace::new(2);
        let mut context = Context::from_waker(Waker::noop());
        let early = grace.try_enter(0);
        let own = grace.try_enter(1);
        assert!(grace.alone().is_none());
        drop(early);
        let alone = grace.alone();
        assert!(alone.is_some() && grace.try_enter(0).is_none());
        let mut quiet = pin!(grace.quiet());
        assert!(quiet.as_mut().poll(&mut context).is_pending());
        drop(alone);
        assert!(quiet.as_mut().poll(&mut context).is_pending());
        assert!(grace.alone().is_none(), "somebody else has closed the gate");
        drop(own);
        assert!(quiet.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn who_gives_up_waiting_opens_the_gate_again() {
        let grace = Grace::new(1);
        let early = grace.try_enter(0);
        {
            let mut quiet = pin!(grace.quiet());
            let mut context = Context::from_waker(Waker::noop());
            assert!(quiet.as_mut().poll(&mut context).is_pending());
        }
        assert!(grace.try_enter(0).is_some());
        drop(early);
    }
}
