//! What a ring may do: the operations of [`super::ops`] and no others.
//!
//! io_uring passes by seccomp: a program that is not allowed to call `openat`
//! can still submit it. A ring that is made disabled, restricted and then
//! enabled cannot, whoever submits to it, and the restrictions are for good
//! (Linux 5.10). A refused entry completes with EACCES.

use std::io;

use io_uring::{IoUring, opcode, register::Restriction, squeue};

/// Reading and writing in all their forms, making durable, space, time,
/// driver commands, and waiting for wake-ups.
const OPERATIONS: [u8; 10] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::Timeout::CODE,
    opcode::UringCmd16::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// `enum io_uring_register_op` of linux/io_uring.h: changing the table of
/// files, and making that of a ublk device's buffers.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_BUFFERS2: u8 = 15;

/// Restricts a ring made with `IORING_SETUP_R_DISABLED`, and enables it.
pub(super) fn enable(ring: &IoUring) -> io::Result<()> {
    let mut allowed: Vec<Restriction> = OPERATIONS.map(Restriction::sqe_op).into();
    allowed.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    allowed.push(Restriction::register_op(REGISTER_BUFFERS2));
    allowed.push(Restriction::sqe_flags_allowed(
        squeue::Flags::FIXED_FILE.bits(),
    ));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What opening a file by the ring says.
    fn open_by(ring: &mut IoUring) -> i32 {
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        // SAFETY: a static path.
        unsafe { ring.submission().push(&open).unwrap() };
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_restricted_ring_opens_nothing() {
        let mut free = IoUring::new(4).unwrap();
        let fd = open_by(&mut free);
        assert!(fd >= 0, "{fd}");
        // SAFETY: the ring has just made it, for us.
        unsafe { libc::close(fd) };

        let mut ring = IoUring::builder().setup_r_disabled().build(4).unwrap();
        enable(&ring).unwrap();
        assert_eq!(open_by(&mut ring), -libc::EACCES);
        // Nor does it become another: files and restrictions are as they are.
        let mut more = [Restriction::sqe_op(opcode::OpenAt::CODE)];
        assert!(ring.submitter().register_restrictions(&mut more).is_err());
        assert!(ring.submitter().register_personality().is_err());
    }
}
