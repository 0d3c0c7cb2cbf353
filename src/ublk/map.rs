//! Mapped memory: the driver's request descriptors, and the buffers requests
//! are copied through.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use super::uapi::{UBLK_MAX_QUEUE_DEPTH, UBLKSRV_CMD_BUF_OFFSET, ublksrv_io_desc};

/// Memory of our own that is unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(len: usize, protection: i32, flags: i32, fd: RawFd, offset: i64) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice,
        // replaces nothing.
        let start =
            unsafe { libc::mmap64(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, and used by nobody else.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn page_size() -> usize {
    // SAFETY: no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// The descriptors of one queue's requests, written by the driver before it
/// delivers one.
#[derive(Debug)]
pub(super) struct Descriptors {
    mapping: Mapping,
    depth: u16,
}

impl Descriptors {
    pub(super) fn map(char_device: RawFd, queue: u16, depth: u16) -> io::Result<Self> {
        let page = page_size();
        let size = |count: usize| (count * size_of::<ublksrv_io_desc>()).next_multiple_of(page);
        // The queues' descriptors are as far apart as the deepest queue needs.
        let stride = size(UBLK_MAX_QUEUE_DEPTH as usize);
        let offset = UBLKSRV_CMD_BUF_OFFSET as usize + usize::from(queue) * stride;
        let mapping = Mapping::new(
            size(usize::from(depth)),
            libc::PROT_READ,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            char_device,
            offset as i64,
        )?;
        // A child must not keep the device alive.
        // SAFETY: advice about the mapping just made.
        let advised = unsafe {
            let start = mapping.start.as_ptr().cast();
            libc::madvise(start, mapping.len, libc::MADV_DONTFORK)
        };
        if advised != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { mapping, depth })
    }

    /// The descriptor of a request that has been delivered.
    pub(super) fn get(&self, tag: u16) -> ublksrv_io_desc {
        assert!(tag < self.depth);
        // SAFETY: inside the mapping, which is page-aligned and as long as
        // `depth` descriptors. Volatile: the driver writes it between our
        // reads, and not while a request is delivered.
        unsafe {
            self.mapping
                .start
                .cast::<ublksrv_io_desc>()
                .add(usize::from(tag))
                .read_volatile()
        }
    }
}

/// One buffer per tag, page-aligned. Memory is taken as it is first used.
#[derive(Debug)]
pub(super) struct Buffers {
    mapping: Mapping,
    each: usize,
}

impl Buffers {
    pub(super) fn new(count: u16, each: u32) -> io::Result<Self> {
        let each = (each as usize).next_multiple_of(page_size());
        let mapping = Mapping::new(
            each * usize::from(count),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )?;
        Ok(Self { mapping, each })
    }

    /// The buffer of a tag.
    pub(super) fn get(&self, tag: u16) -> *mut u8 {
        let start = usize::from(tag) * self.each;
        assert!(start + self.each <= self.mapping.len);
        // SAFETY: inside the mapping.
        unsafe { self.mapping.start.as_ptr().add(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap() {
        let buffers = Buffers::new(4, 5000).unwrap();
        for tag in 0..4 {
            let buffer = buffers.get(tag);
            assert_eq!(buffer as usize % 4096, 0);
            // SAFETY: each buffer has at least the size asked for.
            unsafe { std::ptr::write_bytes(buffer, tag as u8 + 1, 5000) };
        }
        for tag in 0..4 {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(buffers.get(tag), 5000) };
            assert!(bytes.iter().all(|&b| b == tag as u8 + 1));
        }
    }
}
