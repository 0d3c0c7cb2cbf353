//! What other threads want polled on a thread, and whether that thread sleeps.
//!
//! Everything here may be called in any order by several threads; that no
//! wake-up is lost is tried in `tests/loom`.

use std::sync::PoisonError;

use super::primitives::{AtomicBool, Mutex, Ordering};

/// The tasks of a thread that were woken.
#[derive(Debug)]
pub(crate) struct Inbox {
    woken: Mutex<Vec<u32>>,
    /// True when `woken` may be non-empty: one load instead of a lock per turn.
    any: AtomicBool,
    sleeping: AtomicBool,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            woken: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
        }
    }

    /// Adds a task; true when the thread sleeps, and the caller, alone, has to
    /// wake it.
    #[must_use]
    pub(crate) fn add(&self, task: u32) -> bool {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(task);
        self.any.store(true, Ordering::SeqCst);
        // SeqCst pairs with `sleep`: either the sleeper sees `any`, or we see
        // `sleeping`.
        self.sleeping.swap(false, Ordering::SeqCst)
    }

    /// Moves the woken tasks to `into`.
    pub(crate) fn drain(&self, mut into: impl FnMut(u32)) {
        if self.any.load(Ordering::Acquire) {
            let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::SeqCst);
            woken.drain(..).for_each(&mut into);
        }
    }

    /// Announces that the thread is going to sleep; false when it must not,
    /// because something was woken meanwhile.
    pub(crate) fn sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            self.sleeping.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(crate) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

/// Whether a task is on its way to being polled.
#[derive(Debug)]
pub(crate) struct Queued(AtomicBool);

impl Queued {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// True for the one who has to put it on its way.
    #[must_use]
    pub(crate) fn set(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// It is polled now. Whoever has found it set before is seen by the poll: a
    /// swap, since a store would not wait for what they did.
    pub(crate) fn clear(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}
