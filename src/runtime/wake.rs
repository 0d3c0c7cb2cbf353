//! Waking a task from any thread.
//!
//! A thread asleep in `io_uring_enter` notices nothing but completions, so a
//! waker on another thread completes a standing read of the sleeper's eventfd.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Wake;

/// The part of a reactor that other threads may touch.
pub(super) struct Remote {
    woken: Mutex<Vec<u32>>,
    /// True when `woken` may be non-empty: one load instead of a lock per turn.
    any: AtomicBool,
    sleeping: AtomicBool,
    event: OwnedFd,
}

impl Remote {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointers; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            woken: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            // SAFETY: fd was just made and is owned by nobody else.
            event: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn wake(&self, task: u32) {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(task);
        self.any.store(true, Ordering::SeqCst);
        // SeqCst pairs with `sleep`: either the sleeper sees `any`, or we see
        // `sleeping`.
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.signal();
        }
    }

    fn signal(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array. The counter cannot
        // overflow: one signal per sleep.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Moves the woken tasks to `into`.
    pub(super) fn drain(&self, mut into: impl FnMut(u32)) {
        if self.any.load(Ordering::Acquire) {
            let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::SeqCst);
            woken.drain(..).for_each(&mut into);
        }
    }

    /// Announces that the thread is going to sleep; false when it must not,
    /// because something was woken meanwhile.
    pub(super) fn sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            self.sleeping.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Sleeps until [`Self::signal`], for a reactor without ring.
    pub(super) fn wait_for_signal(&self) {
        let mut count = [0_u8; 8];
        // SAFETY: reads 8 bytes into a live array.
        unsafe { libc::read(self.event.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
    }
}

/// The waker of one task.
pub(super) struct TaskWaker {
    pub(super) remote: Arc<Remote>,
    pub(super) task: u32,
    /// Set while the task is on its way to being polled.
    pub(super) queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.remote.wake(self.task);
        }
    }
}
