//! Operations as futures: one submission entry, or one system call where the
//! thread has no ring.
//!
//! An operation is queued when its future is made, not when it is first
//! polled: make several, then await each, and they run side by side. Dropping
//! one waits until the kernel no longer uses its buffer.

use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::reactor::Reactor;
use super::with_current;

/// An operation under way. Resolves to the system call's result; borrows its
/// buffer for `'a`.
#[must_use = "an operation dropped at once is cancelled"]
pub struct Op<'a> {
    state: State,
    buffer: PhantomData<&'a mut [u8]>,
}

enum State {
    Ring { reactor: Rc<Reactor>, slot: u32 },
    Ready(io::Result<u32>),
    Taken,
}

impl std::fmt::Debug for Op<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Op")
    }
}

impl Op<'_> {
    fn ready(result: io::Result<u32>) -> Self {
        Self {
            state: State::Ready(result),
            buffer: PhantomData,
        }
    }
}

impl Future for Op<'_> {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::Ring { reactor, slot } = &self.state {
            // Completions find the task by the reactor's record of who polled
            // last, without going through a waker.
            let Some(result) = reactor.take(*slot) else {
                return Poll::Pending;
            };
            self.state = State::Taken;
            return Poll::Ready(to_result(result));
        }
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Ready(result) => Poll::Ready(result),
            _ => unreachable!("an operation polled after completion"),
        }
    }
}

impl Drop for Op<'_> {
    fn drop(&mut self) {
        if let State::Ring { reactor, slot } = &self.state {
            reactor.abandon(*slot);
        }
    }
}

fn to_result(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// Queues what `entry` builds, or calls `syscall` on a thread without ring.
fn submit<'a>(
    entry: impl FnOnce(&Reactor) -> squeue::Entry,
    syscall: impl Fn() -> isize,
) -> Op<'a> {
    with_current(|reactor| {
        if reactor.has_ring() {
            let slot = reactor.start(entry(reactor));
            return Op {
                state: State::Ring {
                    reactor: Rc::clone(reactor),
                    slot,
                },
                buffer: PhantomData,
            };
        }
        loop {
            let result = syscall();
            if result >= 0 {
                return Op::ready(Ok(result as u32));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Op::ready(Err(error));
            }
        }
    })
}

/// Builds an entry for a file that may be registered with the ring.
macro_rules! with_file {
    ($reactor:expr, $fd:expr, |$target:ident| $build:expr) => {
        match $reactor.file_slot($fd) {
            Some(slot) => {
                let $target = types::Fixed(slot);
                $build
            }
            None => {
                let $target = types::Fd($fd);
                $build
            }
        }
    };
}

/// The longest transfer in one operation; longer buffers transfer short.
const MAX_TRANSFER: usize = 1 << 30;

/// Reads at `offset`; the result is the number of bytes, less than asked at
/// the end of the file.
pub fn read(fd: RawFd, buf: &mut [u8], offset: u64) -> Op<'_> {
    // SAFETY: the slice is borrowed by the Op.
    unsafe { read_raw(fd, buf.as_mut_ptr(), buf.len(), offset) }
}

/// Writes at `offset`; the result is the number of bytes.
pub fn write(fd: RawFd, buf: &[u8], offset: u64) -> Op<'_> {
    // SAFETY: the slice is borrowed by the Op.
    unsafe { write_raw(fd, buf.as_ptr(), buf.len(), offset) }
}

/// [`read`] to a pointer.
///
/// # Safety
/// `ptr` is valid for writes of `len` bytes until the operation is complete or
/// dropped.
pub unsafe fn read_raw<'a>(fd: RawFd, ptr: *mut u8, len: usize, offset: u64) -> Op<'a> {
    let len = len.min(MAX_TRANSFER);
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::Read::new(file, ptr, len as u32)
                .offset(offset)
                .build())
        },
        // SAFETY: by this function's contract.
        || unsafe { libc::pread64(fd, ptr.cast(), len, offset as i64) },
    )
}

/// [`write`] from a pointer.
///
/// # Safety
/// `ptr` is valid for reads of `len` bytes until the operation is complete or
/// dropped.
pub unsafe fn write_raw<'a>(fd: RawFd, ptr: *const u8, len: usize, offset: u64) -> Op<'a> {
    let len = len.min(MAX_TRANSFER);
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::Write::new(
                file, ptr, len as u32
            )
            .offset(offset)
            .build())
        },
        // SAFETY: by this function's contract.
        || unsafe { libc::pwrite64(fd, ptr.cast(), len, offset as i64) },
    )
}

/// Reads into the ring's fixed buffer `index`, from byte `start` of it.
/// Needs a ring.
pub fn read_fixed<'a>(fd: RawFd, index: u16, start: u64, len: u32, offset: u64) -> Op<'a> {
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::ReadFixed::new(
                file,
                start as *mut u8,
                len,
                index
            )
            .offset(offset)
            .build())
        },
        needs_ring,
    )
}

/// Writes from the ring's fixed buffer `index`, from byte `start` of it.
/// Needs a ring.
pub fn write_fixed<'a>(fd: RawFd, index: u16, start: u64, len: u32, offset: u64) -> Op<'a> {
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::WriteFixed::new(
                file,
                start as *const u8,
                len,
                index
            )
            .offset(offset)
            .build())
        },
        needs_ring,
    )
}

fn needs_ring() -> isize {
    // SAFETY: errno is thread-local and always valid.
    unsafe { *libc::__errno_location() = libc::ENOSYS };
    -1
}

/// fsync, or fdatasync with `data_only` (which includes the file size).
pub fn fsync<'a>(fd: RawFd, data_only: bool) -> Op<'a> {
    let flags = if data_only {
        types::FsyncFlags::DATASYNC
    } else {
        types::FsyncFlags::empty()
    };
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::Fsync::new(file)
                .flags(flags)
                .build())
        },
        || {
            // SAFETY: no pointers.
            let result = unsafe {
                if data_only {
                    libc::fdatasync(fd)
                } else {
                    libc::fsync(fd)
                }
            };
            result as isize
        },
    )
}

/// fallocate with the mode bits of `linux/falloc.h`.
pub fn fallocate<'a>(fd: RawFd, mode: i32, offset: u64, len: u64) -> Op<'a> {
    submit(
        |reactor| {
            with_file!(reactor, fd, |file| opcode::Fallocate::new(file, len)
                .offset(offset)
                .mode(mode)
                .build())
        },
        // SAFETY: no pointers.
        || unsafe { libc::fallocate64(fd, mode, offset as i64, len as i64) as isize },
    )
}

/// Resolves after `duration`. On a thread without ring it blocks the thread.
pub async fn sleep(duration: Duration) {
    let spec = Box::new(
        types::Timespec::new()
            .sec(duration.as_secs())
            .nsec(duration.subsec_nanos()),
    );
    let op = submit(
        |_| opcode::Timeout::new(&raw const *spec).build(),
        || {
            std::thread::sleep(duration);
            0
        },
    );
    // ETIME is how a timeout says that it is over.
    let _ = op.await;
    drop(spec);
}

/// A driver command (`IORING_OP_URING_CMD`) with its 16 bytes of command and
/// the entry's `addr` field, which ublk gives a meaning of its own. Needs a
/// ring.
///
/// # Safety
/// Whatever memory the command or `addr` makes the driver access is valid
/// until the operation is complete or dropped.
pub unsafe fn driver_command<'a>(fd: RawFd, command: u32, payload: [u8; 16], addr: u64) -> Op<'a> {
    submit(
        |reactor| {
            let mut entry = with_file!(reactor, fd, |file| opcode::UringCmd16::new(file, command)
                .cmd(payload)
                .build());
            // Byte 16 of `struct io_uring_sqe` is `addr` (linux/io_uring.h);
            // the crate offers no setter for this opcode.
            const _: () = assert!(size_of::<squeue::Entry>() == 64);
            // SAFETY: an Entry is the 64-byte repr(C) io_uring_sqe, plain
            // data, and bytes 16..24 are inside it.
            unsafe {
                (&raw mut entry)
                    .cast::<u8>()
                    .add(16)
                    .cast::<u64>()
                    .write_unaligned(addr);
            }
            entry
        },
        needs_ring,
    )
}
