//! Image files: a host file, a block device or a simulated disk, read and
//! written at any offset through the thread's [`runtime`](crate::runtime).
//!
//! What is settled here, so that nothing above has to think of it: short
//! transfers, the end of the file, the alignment of direct I/O, zeroing that
//! really zeroes, a failed fsync that stays failed, and QEMU's image locks.
//! What is in the file, storage does not know.

mod backend;
mod durable;
mod holes;
mod lock;
mod lock_holder;
mod open;
pub mod sim;
#[cfg(test)]
mod tests;
mod transfer;
mod zeroes;

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Payload;
use backend::{Backend, Retries, Unsupported};
use durable::Durability;
pub use holes::FileExtent;
pub use lock::{Locks, Role};
pub use transfer::Transfer;

/// Whether transfers go through the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Direct I/O (`O_DIRECT`): the host caches nothing.
    None,
    /// The host's page cache, written back when the host likes and at
    /// [`Storage::sync`].
    #[default]
    Writeback,
}

/// How a [`Storage`] is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Writes are possible.
    pub writable: bool,
    /// Direct I/O or page cache.
    pub cache: CacheMode,
    /// Which of QEMU's image locks to take.
    pub locks: Locks,
}

impl OpenOptions {
    /// For reading, through the page cache, with a reader's locks.
    pub fn read_only() -> Self {
        Self {
            writable: false,
            cache: CacheMode::Writeback,
            locks: Locks::Normal(Role::ReadOnly),
        }
    }

    /// For reading and writing, through the page cache, with a writer's locks.
    pub fn read_write() -> Self {
        Self {
            writable: true,
            cache: CacheMode::Writeback,
            locks: Locks::Normal(Role::ReadWrite),
        }
    }

    /// With another cache mode.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// With other locks.
    #[must_use]
    pub fn locks(mut self, locks: Locks) -> Self {
        self.locks = locks;
        self
    }
}

/// Smallest alignments with which the storage transfers, in bytes.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    /// Of offsets and lengths.
    offset: u32,
    /// Of memory.
    memory: u32,
    /// Of ranges that are zeroed or given back by fallocate.
    allocation: u32,
}

/// An open image file. Shared by all queue threads.
pub struct Storage {
    backend: Backend,
    path: PathBuf,
    identity: (u64, u64),
    /// Where the file ends, as far as this object's own operations go.
    len: AtomicU64,
    writable: bool,
    alignment: Alignment,
    locks: lock::Held,
    durability: Durability,
    unsupported: Unsupported,
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Backend::Host(file) = &self.backend {
            self.locks.give_up(file.file());
        }
    }
}

impl Storage {
    /// The file's name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells this file from every other one of the host, whatever its
    /// name: device and inode, or zero and the device number of a block
    /// device.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Length in bytes. Changes with [`Self::set_len`] and with writes past
    /// the end; what other programs do to the file does not show.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// True when the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when it was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// True for a block device, whose length is fixed.
    pub fn is_block_device(&self) -> bool {
        self.backend.is_block_device()
    }

    /// The unit, in bytes, of offsets and lengths that transfer without
    /// detour: 1 with the page cache, the host's block size with direct I/O.
    ///
    /// Other transfers work too, but a write that covers a unit in part reads
    /// it, changes it and writes it back: the caller sees to it that nobody
    /// writes to the same unit meanwhile.
    pub fn alignment(&self) -> u32 {
        self.alignment.offset
    }

    /// The alignment, in bytes, of memory that transfers without being copied.
    pub fn memory_alignment(&self) -> u32 {
        self.alignment.memory
    }

    /// The file descriptor, to be registered with a ring. None for a
    /// simulated disk.
    pub fn fd(&self) -> Option<RawFd> {
        self.backend.fd()
    }

    /// Fills `buf` from `offset` on. What lies past the end of the file reads
    /// as zeros.
    pub async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.start_read(offset, &Payload::of_slice_mut(buf)).await
    }

    /// Stores `buf` at `offset`; the file grows as needed. See
    /// [`Self::alignment`] for who may write beside it meanwhile.
    pub async fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.start_write(offset, &Payload::of_slice(buf)).await
    }

    /// Starts filling `payload` from `offset` on: queued at once, complete
    /// when awaited. Several may be started before the first is awaited.
    ///
    /// The memory of `payload` stays valid, and unused by others, until the
    /// transfer is awaited or dropped.
    pub fn start_read(&self, offset: u64, payload: &Payload) -> Transfer<'_> {
        Transfer::read(self, offset, payload)
    }

    /// Starts storing `payload` at `offset`; see [`Self::start_read`] and
    /// [`Self::write`].
    pub fn start_write(&self, offset: u64, payload: &Payload) -> Transfer<'_> {
        Transfer::write(self, offset, payload)
    }

    /// Makes the file `len` bytes long; new bytes are zeros.
    ///
    /// The caller excludes writes past the shorter of both lengths meanwhile.
    /// A block device keeps its length, and a `len` beyond it is an error.
    pub async fn set_len(&self, len: u64) -> Result<()> {
        self.check_writable()?;
        if self.is_block_device() {
            return if len <= self.len() {
                Ok(())
            } else {
                Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("the block device has {} bytes, not {len}", self.len()),
                )
                .path(&self.path)
                .cure("grow the device first"))
            };
        }
        let shrinks = len < self.len();
        if shrinks {
            // Before the file: a read in between takes its end for the end.
            self.len.store(len, Ordering::Release);
        }
        let mut retries = Retries::default();
        while let Err(e) = self.backend.set_len(len).await {
            if !retries.allow(&e) {
                return Err(Error::io(format!("set the length to {len}"), e).path(&self.path));
            }
        }
        if !shrinks {
            self.grown_to(len);
        }
        Ok(())
    }

    /// Exchanges the locks that were taken for others. When somebody else's
    /// stand in the way, those taken before stay.
    pub fn set_locks(&self, locks: Locks) -> Result<()> {
        match &self.backend {
            Backend::Host(file) => {
                self.locks
                    .exchange(file.file(), &self.path, locks, self.writable)
            }
            Backend::Sim(_) => Ok(()),
        }
    }

    /// Leaves the locks to those who have a duplicate of the descriptor, such
    /// as a successor: dropping this object does not give them up then. They
    /// are gone with the last duplicate.
    pub fn leave_locks(&self) {
        self.locks.leave();
    }

    /// Refuses what would change a file that is open for reading, or one that
    /// a sync has failed on.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(
                Error::new(ErrorKind::ReadOnly, "the file was opened read-only").path(&self.path),
            );
        }
        self.durability.check(&self.path)
    }

    /// A range that is a file offset at its end.
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("{len} bytes end past the largest file offset"),
            )
            .path(&self.path)
            .at(offset)),
        }
    }

    /// Something was stored up to `end`.
    fn grown_to(&self, end: u64) {
        // The load first: on the hot path the file does not grow.
        if end > self.len.load(Ordering::Acquire) && !self.is_block_device() {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storage")
            .field("path", &self.path)
            .field("len", &self.len())
            .field("writable", &self.writable)
            .field("alignment", &self.alignment)
            .finish_non_exhaustive()
    }
}
