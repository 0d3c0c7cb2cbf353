//! Opening: what may be opened, its locks, and what direct I/O asks of us.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::{Backend, HostFile, Unsupported};
use super::sim::SimDisk;
use super::{Alignment, CacheMode, Durability, Locks, OpenOptions, Storage, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Buf, sys};

/// What is zeroed or given back under direct I/O, in bytes, is whole pages:
/// parts of them the file system zeroes in the page cache, and a direct write
/// that finds its page dirty there makes the next sync fail.
const PAGE: u32 = 4096;

impl Storage {
    /// Opens a regular file or a block device, and takes its locks before
    /// anything is read.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        // Opening some things has effects or never returns (tapes, FIFOs), so
        // the kind is looked at first, and again when the file is open.
        let metadata =
            std::fs::metadata(path).map_err(|e| Error::io("open the file", e).path(path))?;
        check_kind(&metadata, path)?;
        // O_NONBLOCK: a FIFO that took the file's place just now must not
        // hang us.
        let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        if options.writable && metadata.file_type().is_block_device() {
            // Refuses devices in use by the host: mounted, swap, part of RAID.
            flags |= libc::O_EXCL;
        }
        let file = File::options()
            .read(true)
            .write(options.writable)
            .custom_flags(flags)
            .open(path)
            .map_err(|e| open_error(e, options).path(path))?;
        Self::from_fd(file.into(), path, options)
    }

    /// Opens a regular file or a block device for reading and writing, and
    /// makes the file if there is none. A file that is there keeps its content,
    /// and is not touched while somebody else has it locked.
    pub fn create(path: &Path) -> Result<Self> {
        let made = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path);
        let options = OpenOptions::read_write();
        match made {
            Ok(file) => Self::from_fd(file.into(), path, &options),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Self::open(path, &options),
            Err(e) => Err(Error::io("make the file", e).path(path)),
        }
    }

    /// Wraps a file that is already open, and takes its locks before anything
    /// is read. `path` is its name for messages.
    ///
    /// Locks belong to the open file description: where `fd` is a duplicate
    /// of one that holds them, they are simply held on, and not given up with
    /// this object. See [`Self::leave_locks`] for the other side.
    pub fn from_fd(fd: OwnedFd, path: &Path, options: &OpenOptions) -> Result<Self> {
        let file = File::from(fd);
        let named = |doing: &str, e: io::Error| Error::io(doing, e).path(path);
        let metadata = file.metadata().map_err(|e| named("examine the file", e))?;
        check_kind(&metadata, path)?;
        let block_device = metadata.file_type().is_block_device();
        let alignment = set_up(&file, block_device, path, options)?;
        let locks = lock::Held::inherited(&file);
        if options.locks != Locks::None {
            locks.exchange(&file, path, options.locks, options.writable)?;
        }
        let alignment = match alignment {
            Some(known) => known,
            None => probe(&file).map_err(|e| named("find out the alignment of direct I/O", e))?,
        };
        let len = file_len(&file, block_device).map_err(|e| named("find out the length", e))?;
        let identity = if block_device {
            (0, metadata.rdev())
        } else {
            (metadata.dev(), metadata.ino())
        };
        Ok(Self {
            backend: Backend::Host(HostFile::new(file, block_device)),
            path: path.to_owned(),
            identity,
            len: AtomicU64::new(len),
            writable: options.writable,
            alignment,
            locks,
            durability: Durability::default(),
            unsupported: Unsupported::default(),
        })
    }

    /// A simulated disk, opened for reading and writing, that takes offsets
    /// and lengths in units of `alignment` bytes only, like direct I/O; 1 is
    /// like the page cache.
    ///
    /// # Panics
    /// When `alignment` is not a power of two.
    pub fn simulated(disk: &SimDisk, alignment: u32) -> Self {
        assert!(alignment.is_power_of_two());
        Self {
            path: PathBuf::from(disk.name()),
            identity: disk.identity(),
            len: AtomicU64::new(disk.len()),
            backend: Backend::Sim(disk.backend(alignment)),
            writable: true,
            alignment: Alignment {
                offset: alignment,
                memory: alignment,
                allocation: 1,
            },
            locks: lock::Held::default(),
            durability: Durability::default(),
            unsupported: Unsupported::default(),
        }
    }

    /// As [`Self::simulated`], opened for reading only.
    pub fn simulated_read_only(disk: &SimDisk, alignment: u32) -> Self {
        let mut storage = Self::simulated(disk, alignment);
        storage.writable = false;
        storage
    }
}

/// The length of a file or block device.
pub(super) fn file_len(mut file: &File, block_device: bool) -> io::Result<u64> {
    if block_device {
        // Its metadata say 0.
        file.seek(SeekFrom::End(0))
    } else {
        file.metadata().map(|metadata| metadata.len())
    }
}

fn check_kind(metadata: &Metadata, path: &Path) -> Result<()> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "neither"
    };
    Err(Error::new(
        ErrorKind::Usage,
        format!("an image is a regular file or a block device, and this is {what}"),
    )
    .path(path))
}

fn open_error(error: io::Error, options: &OpenOptions) -> Error {
    let errno = error.raw_os_error();
    let error = Error::io("open the file", error);
    match errno {
        Some(libc::EBUSY) => {
            error.cure("unmount the device or stop what uses it, or open it read-only")
        }
        Some(libc::EROFS | libc::EACCES | libc::EPERM) if options.writable => {
            error.cure("get permission to write to it, or open it read-only")
        }
        _ => error,
    }
}

/// Brings the descriptor's flags in line with `options`. The alignment it
/// needs then, unless only reading can tell.
fn set_up(
    file: &File,
    block_device: bool,
    path: &Path,
    options: &OpenOptions,
) -> Result<Option<Alignment>> {
    let failed = |doing: &str, e: io::Error| Error::io(doing, e).path(path);
    let sector = if block_device {
        sys::logical_block_size(file).map_err(|e| failed("find out the sector size", e))?
    } else {
        1
    };
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|e| failed("examine the file", e.into()))?;
    let mut flags = OFlag::from_bits_retain(flags);
    if options.writable && flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            "the file was opened read-only by whoever passed it on",
        )
        .path(path));
    }
    if options.writable
        && block_device
        && sys::is_read_only_device(file).map_err(|e| failed("examine the device", e))?
    {
        return Err(Error::new(ErrorKind::ReadOnly, "the device is read-only")
            .path(path)
            .cure("open it read-only"));
    }
    // io_uring fails operations on a non-blocking file with EAGAIN.
    flags.remove(OFlag::O_NONBLOCK);
    flags.set(OFlag::O_DIRECT, options.cache == CacheMode::None);
    let unable = || {
        Error::new(
            ErrorKind::Unsupported,
            "the file system cannot do direct I/O on this file",
        )
        .path(path)
        .cure("use the page cache (cache mode writeback)")
    };
    fcntl(file, FcntlArg::F_SETFL(flags)).map_err(|e| match e {
        nix::Error::EINVAL => unable(),
        e => failed("set the cache mode", e.into()),
    })?;
    if options.cache == CacheMode::Writeback {
        return Ok(Some(Alignment {
            offset: 1,
            memory: 1,
            allocation: sector,
        }));
    }
    match sys::direct_io(file) {
        Some(needs) if needs.offset == 0 => Err(unable()),
        Some(needs) => Ok(Some(Alignment {
            offset: needs.offset,
            memory: needs.memory.max(1),
            allocation: if block_device { sector } else { PAGE },
        })),
        None if block_device => Ok(Some(Alignment {
            offset: sector,
            memory: sector,
            allocation: sector,
        })),
        None => Ok(None),
    }
}

/// Finds the alignment that a file system does not tell, by trying: the
/// smallest unit with which a direct read succeeds.
fn probe(file: &File) -> io::Result<Alignment> {
    const LARGEST: u32 = 4096;
    let mut unit = 512;
    // An empty file reads as empty with any alignment, and tells nothing.
    if file.metadata()?.len() < u64::from(LARGEST) {
        unit = LARGEST;
    }
    let mut buf = Buf::take(LARGEST as usize);
    loop {
        match file.read_at(&mut buf[..unit as usize], 0) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && unit < LARGEST => unit *= 2,
            Err(e) => return Err(e),
            Ok(_) => break,
        }
    }
    Ok(Alignment {
        offset: unit,
        // Not probed: our own buffers are aligned to more than this.
        memory: LARGEST,
        allocation: PAGE,
    })
}
