//! Waking a task from any thread.
//!
//! A thread asleep in `io_uring_enter` notices nothing but completions, so a
//! waker on another thread completes a standing read of the sleeper's eventfd.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::task::Wake;

use super::inbox::{Inbox, Queued};

/// The part of a reactor that other threads may touch.
pub(super) struct Remote {
    inbox: Inbox,
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
            inbox: Inbox::new(),
            // SAFETY: fd was just made and is owned by nobody else.
            event: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    fn wake(&self, task: u32) {
        if self.inbox.add(task) {
            self.signal();
        }
    }

    fn signal(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array. The counter cannot
        // overflow: one signal per sleep.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
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
    pub(super) queued: Queued,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.set() {
            self.remote.wake(self.task);
        }
    }
}
