//! What the process behind a device gives up before it serves the first byte,
//! so that whoever takes it over through a hostile image or a hostile guest
//! finds the open files of that image, and nothing else.
//!
//! In this order, while a device is made:
//!
//! 1. [`harden`], before anything is opened: no core dumps, nobody but root may
//!    trace it or look into its memory, and all of its memory is locked, since
//!    keys and guest data are in it and the swap may be on the very device.
//! 2. A [steward](crate::ublk::Steward) starts: it keeps the right to command
//!    the driver.
//! 3. The chain is opened and its headers read. This has to be outside: only
//!    the headers say which files there are to be opened.
//! 4. Each queue's thread makes its ring, which is restricted to the operations
//!    it needs from the start (`runtime::restrict`: io_uring passes by
//!    seccomp), and asks the driver for requests, with its rights: the driver
//!    keeps the kernel from reading partition tables that come from somebody
//!    without CAP_SYS_ADMIN. Then it [enters](Sandbox::enter) the sandbox: all
//!    capabilities dropped, no new ones by any program file, and with Landlock
//!    no path can be opened, made, renamed or executed, no TCP port used and no
//!    foreign process signalled.
//! 5. The main thread does the same and [closes](Sandbox::close) it: a filter
//!    for system calls holds for every thread there is or will be. Nothing can
//!    be opened by any call, no socket and no ring made, no process started,
//!    traced or signalled; no memory becomes executable.
//! 6. The disk is started, and the first request comes.
//!
//! A refused call fails with EPERM and does not kill: a dead process fails all
//! I/O of the device, and loses what was acknowledged but not flushed; a call
//! that we forgot, of a new C library in a rare moment, must not do that. An
//! intruder gains nothing by trying again.
//!
//! Left open: the image's files and the device (they are what is served); the
//! folder of records, where files can be removed (where there is Landlock;
//! nowhere without); names and attributes of files, which `stat` shows;
//! datagrams to sockets with a path, which the journal needs, before Linux 7.1;
//! the steward's few commands for this one device. Workers that the kernel made
//! for a ring before its thread dropped its capabilities keep them until they
//! end: they run no code of ours, and only what the ring may do.
//!
//! Every part is best effort, by what the kernel has; [`Parts`] says what holds.

mod calls;
mod files;
mod process;

use std::fmt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::{Arc, PoisonError};

use crate::block::{BlockHandler, Limits, Request};
use crate::error::Result;
use crate::runtime::sys;

pub use process::harden;

/// What of the sandbox holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// All memory is locked, and none of it dumped.
    pub memory: bool,
    /// All capabilities are gone.
    pub capabilities: bool,
    /// Landlock: no path can be used.
    pub landlock: bool,
    /// seccomp: only the system calls that serving needs.
    pub seccomp: bool,
    /// Rings have only the operations that serving needs.
    pub rings: bool,
}

impl Parts {
    /// What this kernel can do.
    pub fn available() -> Self {
        Self {
            memory: true,
            capabilities: true,
            landlock: files::is_available(),
            seccomp: calls::is_available(),
            rings: sys::has_restricted_rings(),
        }
    }

    /// The names of those that hold.
    pub fn held(self) -> impl Iterator<Item = &'static str> {
        self.iter()
            .filter(|&(_, holds)| holds)
            .map(|(name, _)| name)
    }

    /// Their names, and whether they hold.
    fn iter(self) -> impl Iterator<Item = (&'static str, bool)> {
        [
            ("locked memory", self.memory),
            ("no capabilities", self.capabilities),
            ("Landlock", self.landlock),
            ("seccomp", self.seccomp),
            ("restricted io_uring", self.rings),
        ]
        .into_iter()
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |wanted| {
            let parts = self.iter().filter(move |&(_, holds)| holds == wanted);
            parts.map(|(name, _)| name).collect::<Vec<_>>().join(", ")
        };
        match (named(true), named(false)) {
            (active, missing) if missing.is_empty() => f.write_str(&active),
            (active, missing) if active.is_empty() => write!(f, "none; missing: {missing}"),
            (active, missing) => write!(f, "{active}; missing: {missing}"),
        }
    }
}

/// A sandbox that threads can enter.
#[derive(Debug)]
pub struct Sandbox {
    files: Option<files::Rules>,
    parts: Mutex<Parts>,
}

impl Sandbox {
    /// Prepares one in which files can be removed from the folder `records`.
    /// `memory` is what [`harden`] says.
    pub fn new(records: &Path, memory: bool) -> Self {
        let files = files::Rules::new(records)
            .inspect_err(|e| tracing::warn!("Landlock: {e}"))
            .ok()
            .flatten();
        Self {
            parts: Mutex::new(Parts {
                memory,
                capabilities: true,
                landlock: files.is_some(),
                seccomp: false,
                rings: sys::has_restricted_rings(),
            }),
            files,
        }
    }

    /// The calling thread, and those it starts from now on, are in it, but for
    /// the system calls.
    pub fn enter(&self) {
        let has_dropped = process::drop_capabilities()
            .inspect_err(|e| tracing::warn!("cannot drop capabilities: {e}"))
            .is_ok();
        let has_landlock = self.files.as_ref().is_some_and(|rules| {
            let restricted = rules.restrict_thread();
            restricted
                .inspect_err(|e| tracing::warn!("Landlock: {e}"))
                .is_ok()
        });
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.capabilities &= has_dropped;
        parts.landlock &= has_landlock;
    }

    /// Every thread is in it, with all of its parts, as far as they hold.
    pub fn close(&self) -> Parts {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        match calls::filter(parts.landlock) {
            Ok(()) => parts.seccomp = true,
            Err(error) => tracing::warn!("seccomp: {error}"),
        }
        *parts
    }
}

/// A handler whose queues are in the sandbox.
#[derive(Debug)]
pub(super) struct Confined<H> {
    pub(super) handler: Arc<H>,
    pub(super) sandbox: Option<Arc<Sandbox>>,
}

impl<H: BlockHandler> BlockHandler for Confined<H> {
    fn limits(&self) -> Limits {
        self.handler.limits()
    }

    fn queue_started(&self, queue: u16) -> Result<()> {
        self.handler.queue_started(queue)
    }

    fn queue_ready(&self, queue: u16) {
        self.handler.queue_ready(queue);
        if let Some(sandbox) = &self.sandbox {
            sandbox.enter();
        }
    }

    fn handle(&self, queue: u16, request: Request) -> impl Future<Output = Result<()>> {
        self.handler.handle(queue, request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_said_in_words() {
        let mut parts = Parts {
            memory: true,
            capabilities: true,
            landlock: true,
            seccomp: true,
            rings: true,
        };
        assert_eq!(
            parts.to_string(),
            "locked memory, no capabilities, Landlock, seccomp, restricted io_uring"
        );
        parts.landlock = false;
        let text = parts.to_string();
        assert!(text.ends_with("restricted io_uring; missing: Landlock"));
        let none = Parts::default().to_string();
        assert!(none.starts_with("none; missing: locked memory"), "{none}");
    }
}
