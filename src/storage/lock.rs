//! QEMU's image locks: who has the right to do what with a file.
//!
//! They are read locks, of the kind that belongs to an open file description
//! (OFD), on single bytes. Byte 100 + i says "I use right i"; byte 200 + i
//! says "while I am here nobody else may use right i". To open a file one
//! locks one's own bytes, and then looks whether somebody else's stand in the
//! way. Locking first means that of two who race both may fail, but never
//! both win.
//!
//! The locks are gone when the last duplicate of the descriptor is closed, in
//! whatever process that is. An io_uring the file is registered with counts as
//! one, and the kernel takes it down only a while after its process has ended;
//! so whoever took locks gives them up by hand, unless they are left to another
//! duplicate, and somebody's that belong to no living process are waited for a
//! little.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::lock_holder;
use crate::error::{Error, ErrorKind, Result};

/// Which locks to take on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// None, and none are looked at.
    None,
    /// Only the mark of a reader who can live with writers. For reading an
    /// image that is in use, at the risk of seeing it half-changed.
    ForceShare,
    /// Those of a role.
    Normal(Role),
}

/// What an opener does with a file, whether it is an image, a backing file,
/// an external data file or a raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Reads, and shares the file with readers only.
    ReadOnly,
    /// Reads and writes, and shares the file with nobody but
    /// [`Locks::ForceShare`].
    ReadWrite,
}

const READ: u16 = 1 << 0;
const WRITE: u16 = 1 << 1;
const RESIZE: u16 = 1 << 3;
const RIGHTS: u16 = 4;

/// First byte of the rights in use.
const USED_BASE: u16 = 100;
/// First byte of the rights that others must not use.
const UNSHARED_BASE: u16 = 200;

/// How long locks that belong to no living process are waited for.
const LINGER: Duration = Duration::from_millis(500);

/// A set of lock bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bytes {
    /// Bit i: right i is used.
    used: u16,
    /// Bit i: right i is not shared.
    unshared: u16,
}

impl Bytes {
    fn of(locks: Locks) -> Self {
        let (used, unshared) = match locks {
            Locks::None => (0, 0),
            Locks::ForceShare => (READ, 0),
            Locks::Normal(Role::ReadOnly) => (READ, WRITE | RESIZE),
            Locks::Normal(Role::ReadWrite) => (READ | WRITE | RESIZE, WRITE | RESIZE),
        };
        Self { used, unshared }
    }

    fn without(self, other: Self) -> Self {
        Self {
            used: self.used & !other.used,
            unshared: self.unshared & !other.unshared,
        }
    }

    /// The bytes of the file.
    fn positions(self) -> impl Iterator<Item = u16> {
        (0..RIGHTS)
            .filter(move |i| self.used >> i & 1 != 0)
            .map(|i| USED_BASE + i)
            .chain(
                (0..RIGHTS)
                    .filter(move |i| self.unshared >> i & 1 != 0)
                    .map(|i| UNSHARED_BASE + i),
            )
    }

    /// The bytes which nobody else may have locked for these to be good.
    fn conflicting(self) -> impl Iterator<Item = u16> {
        Self {
            used: self.unshared,
            unshared: self.used,
        }
        .positions()
    }
}

/// The locks that one object holds.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<Holding>);

#[derive(Clone, Copy, Debug, Default)]
struct Holding {
    bytes: Bytes,
    /// Those of them that belong to other duplicates of the descriptor too,
    /// and stay when this object goes.
    common: Bytes,
}

impl Held {
    /// What the open file description holds already, for those who gave us a
    /// duplicate of it.
    pub(super) fn inherited(file: &File) -> Self {
        let all = Bytes {
            used: (1 << RIGHTS) - 1,
            unshared: (1 << RIGHTS) - 1,
        };
        let mut bytes = Bytes::default();
        for byte in lock_holder::own(file, all.positions()) {
            if byte < UNSHARED_BASE {
                bytes.used |= 1 << (byte - USED_BASE);
            } else {
                bytes.unshared |= 1 << (byte - UNSHARED_BASE);
            }
        }
        Self(Mutex::new(Holding {
            bytes,
            common: bytes,
        }))
    }

    /// Takes the bytes of `locks`, and gives back those of before that are
    /// not among them. After a failure those of before are still held.
    pub(super) fn exchange(
        &self,
        file: &File,
        path: &Path,
        locks: Locks,
        writable: bool,
    ) -> Result<()> {
        if writable && locks == Locks::ForceShare {
            return Err(Error::new(
                ErrorKind::Usage,
                "force-share is for reading: nobody may write beside a writer",
            )
            .path(path)
            .cure("open the file read-only"));
        }
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Bytes::of(locks);
        let added = wanted.without(held.bytes);
        let deadline = Instant::now() + LINGER;
        let taken = loop {
            let taken = take(file, added).and_then(|()| test(file, wanted));
            match &taken {
                Err(Refusal::Conflict(byte))
                    if Instant::now() < deadline
                        && lock_holder::describe(file, *byte).is_none() =>
                {
                    release(file, added);
                    std::thread::sleep(LINGER / 10);
                }
                _ => break taken,
            }
        };
        match taken {
            Ok(()) => {
                let dropped = held.bytes.without(wanted);
                release(file, dropped);
                held.bytes = wanted;
                held.common = held.common.without(dropped);
                Ok(())
            }
            Err(Refusal::Unsupported(errno)) => {
                tracing::warn!(
                    file = %path.display(),
                    %errno,
                    "the file system has no locks: nothing keeps others from using the file"
                );
                Ok(())
            }
            Err(refusal) => {
                release(file, added);
                Err(refusal.explain(file, path))
            }
        }
    }

    /// Leaves them to other duplicates of the descriptor.
    pub(super) fn leave(&self) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.common = held.bytes;
    }

    /// Gives up those that are only ours.
    pub(super) fn give_up(&self, file: &File) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = std::mem::take(&mut *held);
        release(file, held.bytes.without(held.common));
    }
}

enum Refusal {
    /// Somebody's lock on this byte stands in the way.
    Conflict(u16),
    /// The file system has no such locks. QEMU does without them then, unless
    /// told otherwise, and so do we.
    Unsupported(Errno),
    Failed(Errno),
}

impl Refusal {
    fn of(errno: Errno, byte: u16) -> Self {
        match errno {
            Errno::EAGAIN | Errno::EACCES => Self::Conflict(byte),
            Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL => {
                Self::Unsupported(errno)
            }
            errno => Self::Failed(errno),
        }
    }

    fn explain(self, file: &File, path: &Path) -> Error {
        let byte = match self {
            Self::Conflict(byte) => byte,
            Self::Failed(errno) | Self::Unsupported(errno) => {
                return Error::io("lock the file", errno.into()).path(path);
            }
        };
        let who = lock_holder::describe(file, byte)
            .unwrap_or_else(|| "another program, which could not be found".to_owned());
        let right = match byte % 100 {
            0 => "read",
            1 => "write",
            2 => "write unchanged",
            _ => "resize",
        };
        let why = if byte >= UNSHARED_BASE {
            format!("which does not share the \"{right}\" permission")
        } else {
            format!("which holds the \"{right}\" permission")
        };
        Error::new(ErrorKind::Busy, format!("locked by {who}, {why}"))
            .path(path)
            .cure(
                "stop that program or detach the image from it; \
                 what only reads can ignore the lock with force-share",
            )
    }
}

fn flock(kind: libc::c_int, byte: u16) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte.into(),
        l_len: 1,
        l_pid: 0, // must be zero for OFD locks
    }
}

/// Makes the call, again if a signal interrupted it.
fn retry(mut call: impl FnMut() -> nix::Result<libc::c_int>) -> nix::Result<()> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

fn take(file: &File, bytes: Bytes) -> Result<(), Refusal> {
    for byte in bytes.positions() {
        let lock = flock(libc::F_RDLCK, byte);
        retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&lock))).map_err(|e| Refusal::of(e, byte))?;
    }
    Ok(())
}

/// Looks whether somebody else has a byte locked that conflicts with ours.
fn test(file: &File, bytes: Bytes) -> Result<(), Refusal> {
    for byte in bytes.conflicting() {
        // Would a write lock be possible? Ours do not count against it.
        let mut lock = flock(libc::F_WRLCK, byte);
        retry(|| fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)))
            .map_err(|e| Refusal::of(e, byte))?;
        if lock.l_type != libc::F_UNLCK as libc::c_short {
            return Err(Refusal::Conflict(byte));
        }
    }
    Ok(())
}

fn release(file: &File, bytes: Bytes) {
    for byte in bytes.positions() {
        let lock = flock(libc::F_UNLCK, byte);
        // Nothing can be done about a failure; closing the file releases it.
        let _ = retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&lock)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(locks: Locks) -> Vec<u16> {
        Bytes::of(locks).positions().collect()
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let writer = positions(Locks::Normal(Role::ReadWrite));
        assert_eq!(writer, [100, 101, 103, 201, 203]);
        assert_eq!(positions(Locks::Normal(Role::ReadOnly)), [100, 201, 203]);
        assert_eq!(positions(Locks::ForceShare), [100]);
        assert!(positions(Locks::None).is_empty());
        let tested: Vec<u16> = Bytes::of(Locks::Normal(Role::ReadOnly))
            .conflicting()
            .collect();
        assert_eq!(tested, [101, 103, 200]);
    }
}
