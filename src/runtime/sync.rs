//! Waiting for other tasks, on this thread or another.
//!
//! Waiters retry after every notification: simple, and never a lost wake-up.
//! None of this is on the path of a request that meets no other. That no
//! wake-up is lost is tried in `tests/loom`.

use std::cell::UnsafeCell;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::task::{Poll, Waker};

use super::primitives::{self, AtomicBool, Ordering};

/// Tasks waiting for something to change.
#[derive(Debug, Default)]
pub struct WaitList {
    waiting: primitives::Mutex<Vec<Waker>>,
    any: AtomicBool,
}

impl WaitList {
    /// Waits until `attempt` gives something; it is tried at once, and again
    /// after each [`Self::notify_all`]. Whatever makes it succeed has to be
    /// done before the notification.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| {
            if let Some(value) = attempt() {
                return Poll::Ready(value);
            }
            // Register, then try again: a notification between the first try
            // and the registration is not missed.
            self.waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(context.waker().clone());
            self.any.store(true, Ordering::SeqCst);
            match attempt() {
                Some(value) => Poll::Ready(value),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Makes every waiter try again.
    pub fn notify_all(&self) {
        // SeqCst: pairs with the store in `wait_until`, against the caller's
        // own change (made visible by a lock or a SeqCst store).
        primitives::fence(Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            let waiting = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                self.any.store(false, Ordering::SeqCst);
                std::mem::take(&mut *waiting)
            };
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

/// A lock that may be held across an await.
#[derive(Default)]
pub struct Mutex<T> {
    locked: AtomicBool,
    waiters: WaitList,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only through a guard, of which there is one at
// a time.
unsafe impl<T: Send> Send for Mutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> std::fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.locked.load(Ordering::Relaxed) {
            "Mutex(locked)"
        } else {
            "Mutex"
        })
    }
}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Self {
            locked: AtomicBool::new(false),
            waiters: WaitList::default(),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        self.waiters.wait_until(|| self.try_lock()).await
    }

    /// The lock, if nobody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.locked
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst)
            .ok()
            .map(|_| MutexGuard { mutex: self })
    }
}

/// Unlocks when dropped.
#[derive(Debug)]
#[must_use]
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.locked.store(false, Ordering::SeqCst);
        self.mutex.waiters.notify_all();
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard is the only access.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard is the only access, borrowed mutably.
        unsafe { &mut *self.mutex.value.get() }
    }
}
