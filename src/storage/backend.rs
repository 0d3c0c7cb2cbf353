//! The operations of the two kinds of storage, with the system calls' own
//! results: what they mean is settled above.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use super::sim::{SimBackend, SimOp};
use crate::runtime::ops::{self, Op};
use crate::runtime::{self, Payload};

pub(super) enum Backend {
    Host(HostFile),
    Sim(SimBackend),
}

/// A file or block device of the host.
pub(super) struct HostFile {
    file: File,
    block_device: bool,
}

impl HostFile {
    pub(super) fn new(file: File, block_device: bool) -> Self {
        Self { file, block_device }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        runtime::closing_file(self.fd());
    }
}

/// One operation under way; resolves to what the system call would return.
pub(super) enum RawOp {
    Kernel(Op<'static>),
    Sim(SimOp),
}

impl Future for RawOp {
    type Output = io::Result<u32>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Kernel(op) => Pin::new(op).poll(context),
            Self::Sim(op) => Pin::new(op).poll(context),
        }
    }
}

/// How often in a row an operation may ask to be tried again.
const RETRIES: u32 = 100;

/// Counts how often an operation has asked to be tried again.
#[derive(Debug, Default)]
pub(super) struct Retries(u32);

impl Retries {
    /// True if the error says no more than that, and not for ever. Not for
    /// syncs: whatever else they say, they have failed.
    pub(super) fn allow(&mut self, error: &io::Error) -> bool {
        self.0 += 1;
        let again = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
        again && self.0 <= RETRIES
    }
}

/// How to change the contents of a range without sending bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allocation {
    /// The range reads as zeros and keeps its space; the file grows as needed.
    ZeroRange,
    /// The range reads as zeros and its space is given back; the file keeps
    /// its length.
    PunchHole,
}

impl Allocation {
    /// The bits of `linux/falloc.h`. Mode 0 is not among them: it allocates,
    /// and leaves what is there.
    fn mode(self) -> i32 {
        match self {
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// Allocations that the file system was found not to support.
#[derive(Debug, Default)]
pub(super) struct Unsupported {
    zero_range: AtomicBool,
    punch_hole: AtomicBool,
}

impl Unsupported {
    fn flag(&self, what: Allocation) -> &AtomicBool {
        match what {
            Allocation::ZeroRange => &self.zero_range,
            Allocation::PunchHole => &self.punch_hole,
        }
    }

    pub(super) fn is(&self, what: Allocation) -> bool {
        self.flag(what).load(Ordering::Relaxed)
    }

    pub(super) fn remember(&self, what: Allocation) {
        self.flag(what).store(true, Ordering::Relaxed);
    }
}

impl Backend {
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Host(file) => Some(file.fd()),
            Self::Sim(_) => None,
        }
    }

    pub(super) fn is_block_device(&self) -> bool {
        matches!(self, Self::Host(file) if file.block_device)
    }

    /// The length at this moment, asked of the file.
    pub(super) fn current_len(&self) -> io::Result<u64> {
        match self {
            Self::Host(file) => super::open::file_len(&file.file, file.block_device),
            Self::Sim(disk) => Ok(disk.current_len()),
        }
    }

    /// Starts reading into memory that needs no bounce buffer.
    pub(super) fn read(&self, payload: &Payload, offset: u64) -> RawOp {
        match self {
            Self::Host(file) => RawOp::Kernel(payload.read_from(file.fd(), offset)),
            Self::Sim(disk) => RawOp::Sim(disk.read(payload, offset)),
        }
    }

    /// Starts writing from memory that needs no bounce buffer.
    pub(super) fn write(&self, payload: &Payload, offset: u64) -> RawOp {
        match self {
            Self::Host(file) => RawOp::Kernel(payload.write_to(file.fd(), offset)),
            Self::Sim(disk) => RawOp::Sim(disk.write(payload, offset)),
        }
    }

    pub(super) fn allocate(&self, what: Allocation, offset: u64, len: u64) -> RawOp {
        match self {
            Self::Host(file) => RawOp::Kernel(ops::fallocate(file.fd(), what.mode(), offset, len)),
            Self::Sim(disk) => RawOp::Sim(disk.allocate(what, offset, len)),
        }
    }

    /// Gives the range its space and leaves its bytes; a simulated disk has all
    /// of its space.
    pub(super) async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Host(file) => ops::fallocate(file.fd(), 0, offset, len).await.map(drop),
            Self::Sim(_) => Ok(()),
        }
    }

    /// Tells the file system not to copy this file's blocks on writing.
    pub(super) fn set_no_cow(&self) -> io::Result<()> {
        match self {
            Self::Host(file) => runtime::sys::set_no_cow(&file.file),
            Self::Sim(_) => Ok(()),
        }
    }

    pub(super) fn sync(&self) -> RawOp {
        match self {
            Self::Host(file) => RawOp::Kernel(ops::fsync(file.fd(), true)),
            Self::Sim(disk) => RawOp::Sim(disk.sync()),
        }
    }

    pub(super) async fn set_len(&self, len: u64) -> io::Result<()> {
        match self {
            // A blocking call: rare, and short on every file system.
            Self::Host(file) => file.file.set_len(len),
            Self::Sim(disk) => disk.set_len(len).await.map(drop),
        }
    }
}
