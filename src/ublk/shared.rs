//! What the queue threads and the device's owner tell each other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::error::Error;

/// The state of a device's queue threads.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    queues: Box<[Counter]>,
    /// Requests are not waited for any more.
    giving_up: AtomicBool,
    /// The tasks that serve requests.
    servers: Mutex<Vec<Waker>>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Queues whose tags have all been offered to the driver.
    pub(super) fetching: usize,
    /// Queues whose thread has finished.
    pub(super) ended: usize,
    /// The first thing that went wrong.
    pub(super) failure: Option<Error>,
    /// Somebody wants the device stopped.
    pub(super) stop_asked: bool,
}

/// A line of its own for each queue, so that counting costs nothing.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter {
    served: AtomicU64,
}

impl Shared {
    pub(super) fn new(queues: u16) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            queues: (0..queues).map(|_| Counter::default()).collect(),
            giving_up: AtomicBool::new(false),
            servers: Mutex::default(),
        }
    }

    /// Counts a request. Only the queue's own thread calls it.
    pub(super) fn count(&self, queue: u16) {
        let served = &self.queues[usize::from(queue)].served;
        served.store(served.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Requests served so far, by all queues.
    pub(super) fn served(&self) -> u64 {
        let count = |queue: &Counter| queue.served.load(Ordering::Relaxed);
        self.queues.iter().map(count).sum()
    }

    /// Makes every task that serves requests look at [`Self::is_giving_up`].
    pub(super) fn give_up(&self) {
        self.giving_up.store(true, Ordering::SeqCst);
        let servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        servers.iter().for_each(Waker::wake_by_ref);
    }

    pub(super) fn is_giving_up(&self) -> bool {
        self.giving_up.load(Ordering::Relaxed)
    }

    /// Adds the current task to those that serve requests.
    pub(super) fn add_server(&self, waker: &Waker) {
        self.servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(waker.clone());
    }

    pub(super) fn queues(&self) -> usize {
        self.queues.len()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes whoever waits for that.
    pub(super) fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Notes a failure; the first one stays.
    pub(super) fn fail(&self, error: Error) {
        tracing::error!("{error}");
        self.change(|state| {
            state.failure.get_or_insert(error);
        });
    }

    /// Waits until `done` gives something.
    pub(super) fn wait<T>(&self, mut done: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.lock();
        loop {
            if let Some(value) = done(&mut state) {
                return value;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// [`Self::wait`], for so long.
    pub(super) fn wait_for<T>(
        &self,
        limit: Duration,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(value) = done(&mut state) {
                return Some(value);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::sync::Arc;

    #[test]
    fn waits_end_with_the_change_or_with_the_limit() {
        let shared = Arc::new(Shared::new(2));
        let other = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            other.count(1);
            other.fail(Error::new(ErrorKind::Io, "first"));
            other.fail(Error::new(ErrorKind::Io, "second"));
            other.change(|state| state.ended = 2);
        });
        let failure = shared.wait(|state| (state.ended == 2).then(|| state.failure.take()));
        assert_eq!(failure.unwrap().to_string(), "first");
        assert_eq!((shared.served(), shared.queues()), (1, 2));
        let nothing: Option<()> = shared.wait_for(Duration::from_millis(10), |_| None);
        assert!(nothing.is_none());
        thread.join().unwrap();
    }
}
