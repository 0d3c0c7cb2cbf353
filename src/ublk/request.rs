//! The driver's request descriptors as the crate's requests.

use super::params::SECTOR;
use super::uapi::{
    UBLK_AUTO_BUF_REG_FALLBACK, UBLK_IO_F_FUA, UBLK_IO_F_NEED_REG_BUF, UBLK_IO_F_NOUNMAP,
    UBLK_IO_OP_DISCARD, UBLK_IO_OP_FLUSH, UBLK_IO_OP_READ, UBLK_IO_OP_WRITE,
    UBLK_IO_OP_WRITE_ZEROES, UBLK_QID_OFF, UBLK_TAG_OFF, UBLKSRV_IO_BUF_OFFSET, ublksrv_io_desc,
};
use crate::block::Op;
use crate::error::Error;

/// What a descriptor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The pages are in the buffer slot that was asked for.
    pub(super) registered: bool,
}

impl Wanted {
    /// Reads a descriptor; nothing for operations that no handler has (zones,
    /// WRITE SAME), which we never offer.
    pub(super) fn decode(desc: &ublksrv_io_desc) -> Option<Self> {
        // The flags are defined as bits of the whole word.
        let fua = desc.op_flags & UBLK_IO_F_FUA != 0;
        let op = match desc.op_flags & 0xff {
            UBLK_IO_OP_READ => Op::Read,
            UBLK_IO_OP_WRITE => Op::Write { fua },
            UBLK_IO_OP_FLUSH => {
                return Some(Self {
                    op: Op::Flush,
                    offset: 0,
                    len: 0,
                    registered: false,
                });
            }
            UBLK_IO_OP_DISCARD => Op::Discard,
            UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes {
                unmap: desc.op_flags & UBLK_IO_F_NOUNMAP == 0,
                fua,
            },
            _ => return None,
        };
        Some(Self {
            op,
            offset: desc.start_sector.checked_mul(SECTOR)?,
            len: u64::from(desc.nr_sectors) * SECTOR,
            registered: desc.op_flags & UBLK_IO_F_NEED_REG_BUF == 0,
        })
    }

    /// True when data moves between the request and us.
    pub(super) fn has_data(&self) -> bool {
        matches!(self.op, Op::Read | Op::Write { .. })
    }

    /// What the driver is told at the end. Success is always the full length:
    /// what it makes of a short one differs between versions.
    pub(super) fn answer(&self, result: &Result<(), Error>) -> i32 {
        match result {
            Ok(()) if self.has_data() => self.len as i32,
            Ok(()) => 0,
            Err(error) => -error_number(error.errno()),
        }
    }
}

/// The errno for the driver. It takes nothing that is not one, and what would
/// make the issuer try again for ever becomes an I/O error.
fn error_number(errno: i32) -> i32 {
    match errno {
        libc::EAGAIN | libc::EINTR => libc::EIO,
        1..=4095 => errno,
        _ => libc::EIO,
    }
}

/// Where the character device shows the data of a request.
pub(super) fn data_position(queue: u16, tag: u16) -> u64 {
    u64::from(UBLKSRV_IO_BUF_OFFSET)
        + (u64::from(queue) << UBLK_QID_OFF)
        + (u64::from(tag) << UBLK_TAG_OFF)
}

/// `struct ublksrv_io_cmd` as the bytes of a driver command.
pub(super) fn io_command(queue: u16, tag: u16, result: i32, addr: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..].copy_from_slice(&addr.to_ne_bytes());
    bytes
}

/// `struct ublk_auto_buf_reg` as the `addr` of a driver command: the slot of
/// the ring's buffer table for the pages, and that a request whose pages could
/// not be registered is delivered all the same.
pub(super) fn buffer_slot(slot: u16) -> u64 {
    u64::from(slot) | u64::from(UBLK_AUTO_BUF_REG_FALLBACK) << 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::io;

    fn desc(op_flags: u32, nr_sectors: u32, start_sector: u64) -> ublksrv_io_desc {
        ublksrv_io_desc {
            op_flags,
            nr_sectors,
            start_sector,
            addr: 0,
        }
    }

    #[test]
    fn operations_and_flags() {
        let cases = [
            (0, Op::Read),
            (1, Op::Write { fua: false }),
            (1 | 1 << 13, Op::Write { fua: true }),
            (3, Op::Discard),
            (
                5,
                Op::WriteZeroes {
                    unmap: true,
                    fua: false,
                },
            ),
            (
                5 | 1 << 13 | 1 << 15,
                Op::WriteZeroes {
                    unmap: false,
                    fua: true,
                },
            ),
            // Fail-fast, metadata and swap hints change nothing.
            (1 | 0x1_0f00, Op::Write { fua: false }),
        ];
        for (word, op) in cases {
            let wanted = Wanted::decode(&desc(word, 8, 100)).unwrap();
            assert_eq!((wanted.op, wanted.offset, wanted.len), (op, 51_200, 4096));
        }
        // A flush has no range, whatever the descriptor's old content.
        let flush = Wanted::decode(&desc(2, 8, 100)).unwrap();
        assert_eq!((flush.op, flush.offset, flush.len), (Op::Flush, 0, 0));
        for word in [4, 10, 13, 18, 255] {
            assert_eq!(Wanted::decode(&desc(word, 8, 100)), None);
        }
        assert_eq!(Wanted::decode(&desc(0, 8, u64::MAX / 256)), None);
        assert!(Wanted::decode(&desc(0, 8, 0)).unwrap().registered);
        assert!(!Wanted::decode(&desc(1 << 17, 8, 0)).unwrap().registered);
    }

    #[test]
    fn answers_are_full_lengths_or_errnos() {
        let write = Wanted::decode(&desc(1, 8, 0)).unwrap();
        let zeroes = Wanted::decode(&desc(5, u32::MAX, 0)).unwrap();
        assert_eq!(write.answer(&Ok(())), 4096);
        assert_eq!(zeroes.answer(&Ok(())), 0);
        let host = |errno| Err(Error::io("write", io::Error::from_raw_os_error(errno)));
        assert_eq!(write.answer(&host(libc::ENOSPC)), -libc::ENOSPC);
        assert_eq!(write.answer(&host(libc::EAGAIN)), -libc::EIO);
        assert_eq!(write.answer(&host(0)), -libc::EIO);
        assert_eq!(write.answer(&host(-5)), -libc::EIO);
        let corrupt = Err(Error::new(ErrorKind::Corrupt, "x"));
        assert_eq!(write.answer(&corrupt), -libc::EIO);
    }

    #[test]
    fn positions_and_commands_are_laid_out_as_the_driver_reads_them() {
        assert_eq!(data_position(0, 0), 0x8000_0000);
        assert_eq!(data_position(3, 7), 0x8000_0000 + (3 << 41) + (7 << 25));
        let command = io_command(0x0102, 0x0304, -5, 0x1122_3344_5566_7788);
        let expected = libublk::sys::ublksrv_io_cmd {
            q_id: 0x0102,
            tag: 0x0304,
            result: -5,
            addr: 0x1122_3344_5566_7788,
        };
        assert_eq!(command[..2], expected.q_id.to_ne_bytes());
        assert_eq!(command[2..4], expected.tag.to_ne_bytes());
        assert_eq!(command[4..8], expected.result.to_ne_bytes());
        assert_eq!(command[8..], expected.addr.to_ne_bytes());
        let register = libublk::sys::ublk_auto_buf_reg {
            index: 77,
            flags: libublk::sys::UBLK_AUTO_BUF_REG_FALLBACK as u8,
            ..Default::default()
        };
        assert_eq!(
            buffer_slot(77),
            libublk::sys::ublk_auto_buf_reg_to_sqe_addr(&register)
        );
    }
}
