//! Safe faces of the few system calls that have none.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What direct I/O on a file needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectIo {
    /// Alignment of buffers.
    pub memory: u32,
    /// Alignment of offsets and lengths.
    pub offset: u32,
}

/// What the kernel says about direct I/O on `file` (Linux 6.1 and later).
///
/// `None` when the kernel or the file system does not say; alignments of zero
/// mean that the file cannot do direct I/O.
pub fn direct_io(file: &File) -> Option<DirectIo> {
    // SAFETY: statx is plain integers, for which zeros are a valid value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty C string, and a live structure that the call fills.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    (result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0).then_some(DirectIo {
        memory: stat.stx_dio_mem_align,
        offset: stat.stx_dio_offset_align,
    })
}

/// The logical block size of a block device, in bytes.
pub fn logical_block_size(device: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int, into a live one.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET, &raw mut size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
}

/// Whether a block device takes no writes. Many can be opened for writing all
/// the same.
pub fn is_read_only_device(device: &File) -> io::Result<bool> {
    const BLKROGET: libc::Ioctl = nix::request_code_none!(0x12, 94) as libc::Ioctl;
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET stores one int, into a live one.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut read_only) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(read_only != 0)
}

/// Sets the attribute that `chattr +C` sets: no copy-on-write of a file that
/// is empty still.
pub fn set_no_cow(file: &File) -> io::Result<()> {
    /// linux/fs.h
    const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
    let mut flags: libc::c_long = 0;
    // SAFETY: FS_IOC_GETFLAGS stores at most a long, into a live one.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    flags |= FS_NOCOW_FL;
    // SAFETY: FS_IOC_SETFLAGS reads at most a long, from a live one.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Tells the kernel that this thread, and those it starts, serve a block
/// device: when they need memory, it must not wait for that device to write.
///
/// Needs CAP_SYS_RESOURCE.
pub fn become_io_flusher() -> io::Result<()> {
    /// linux/prctl.h; since Linux 5.6, not in libc for every target.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: no pointers.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// True when the kernel can restrict a ring to some operations; every ring of
/// ours is restricted then.
pub fn has_restricted_rings() -> bool {
    super::Runtime::uring(1).is_ok()
}
