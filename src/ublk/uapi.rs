//! The driver's binary interface (linux/ublk_cmd.h): what libublk's generated
//! bindings have is taken from there, what they lack is defined here with the
//! header's values.

use bitflags::bitflags;
use libublk::sys;

pub(super) use sys::{
    UBLK_ATTR_FUA, UBLK_ATTR_READ_ONLY, UBLK_ATTR_VOLATILE_CACHE, UBLK_AUTO_BUF_REG_FALLBACK,
    UBLK_IO_F_FUA, UBLK_IO_F_NEED_REG_BUF, UBLK_IO_F_NOUNMAP, UBLK_IO_OP_DISCARD, UBLK_IO_OP_FLUSH,
    UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_WRITE_ZEROES, UBLK_MAX_NR_QUEUES,
    UBLK_MAX_QUEUE_DEPTH, UBLK_PARAM_TYPE_BASIC, UBLK_PARAM_TYPE_DISCARD,
    UBLK_PARAM_TYPE_DMA_ALIGN, UBLK_QID_OFF, UBLK_TAG_OFF, UBLK_U_IO_COMMIT_AND_FETCH_REQ,
    UBLK_U_IO_FETCH_REQ, UBLKSRV_CMD_BUF_OFFSET, UBLKSRV_IO_BUF_OFFSET, ublk_param_basic,
    ublk_param_devt, ublk_param_discard, ublk_param_dma_align, ublk_param_segment,
    ublk_param_zoned, ublksrv_ctrl_cmd, ublksrv_ctrl_dev_info, ublksrv_io_desc,
};

bitflags! {
    /// Features of the driver, or of one device (the `UBLK_F_*` bits).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Features: u64 {
        /// A request's pages can be registered with a ring as a fixed buffer.
        const SUPPORT_ZERO_COPY = sys::UBLK_F_SUPPORT_ZERO_COPY as u64;
        /// Commands complete in task work.
        const URING_CMD_COMP_IN_TASK = sys::UBLK_F_URING_CMD_COMP_IN_TASK as u64;
        /// A write asks for its buffer before its data is copied.
        const NEED_GET_DATA = sys::UBLK_F_NEED_GET_DATA as u64;
        /// The device survives its server.
        const USER_RECOVERY = sys::UBLK_F_USER_RECOVERY as u64;
        /// Requests in flight are issued again to the next server.
        const USER_RECOVERY_REISSUE = sys::UBLK_F_USER_RECOVERY_REISSUE as u64;
        /// Owned by an unprivileged user.
        const UNPRIVILEGED_DEV = sys::UBLK_F_UNPRIVILEGED_DEV as u64;
        /// Commands have ioctl numbers.
        const CMD_IOCTL_ENCODE = sys::UBLK_F_CMD_IOCTL_ENCODE as u64;
        /// Data moves by pread and pwrite on the character device.
        const USER_COPY = sys::UBLK_F_USER_COPY as u64;
        /// Zoned devices.
        const ZONED = sys::UBLK_F_ZONED as u64;
        /// I/O fails while there is no server.
        const USER_RECOVERY_FAIL_IO = sys::UBLK_F_USER_RECOVERY_FAIL_IO as u64;
        /// The size can change while the device is in use.
        const UPDATE_SIZE = sys::UBLK_F_UPDATE_SIZE as u64;
        /// A request's pages are registered with the ring before delivery.
        const AUTO_BUF_REG = sys::UBLK_F_AUTO_BUF_REG as u64;
        /// The device can be handed from one server to the next.
        const QUIESCE = sys::UBLK_F_QUIESCE as u64;
        /// Each tag may have its own thread.
        const PER_IO_DAEMON = sys::UBLK_F_PER_IO_DAEMON as u64;
        /// Buffers may be registered by any thread.
        const BUF_REG_OFF_DAEMON = sys::UBLK_F_BUF_REG_OFF_DAEMON as u64;
        /// Requests are fetched and committed in batches.
        const BATCH_IO = sys::UBLK_F_BATCH_IO as u64;
        /// Integrity metadata.
        const INTEGRITY = sys::UBLK_F_INTEGRITY as u64;
        /// `TRY_STOP_DEV` stops a device only if nobody has it open.
        const SAFE_STOP_DEV = sys::UBLK_F_SAFE_STOP_DEV as u64;
        /// The kernel does not look for partitions at start.
        const NO_AUTO_PART_SCAN = sys::UBLK_F_NO_AUTO_PART_SCAN as u64;
        /// Requests from registered shared memory need no copy.
        const SHMEM_ZC = sys::UBLK_F_SHMEM_ZC as u64;
        /// The size of a request descriptor can be chosen. Since Linux 7.3;
        /// not in libublk 0.4.8.
        const IO_DESC_SIZE = 1 << 20;

        // A newer kernel's bits are kept.
        const _ = !0;
    }
}

impl Features {
    /// The Linux version a single feature came with.
    pub fn since(self) -> &'static str {
        match self {
            Self::SUPPORT_ZERO_COPY => "6.15",
            Self::URING_CMD_COMP_IN_TASK | Self::NEED_GET_DATA => "6.0",
            Self::USER_RECOVERY | Self::USER_RECOVERY_REISSUE => "6.1",
            Self::UNPRIVILEGED_DEV => "6.3",
            Self::CMD_IOCTL_ENCODE => "6.4",
            Self::USER_COPY => "6.5",
            Self::ZONED => "6.6",
            Self::USER_RECOVERY_FAIL_IO => "6.13",
            Self::UPDATE_SIZE | Self::AUTO_BUF_REG | Self::QUIESCE | Self::PER_IO_DAEMON => "6.16",
            Self::BUF_REG_OFF_DAEMON => "6.17",
            Self::BATCH_IO | Self::INTEGRITY | Self::SAFE_STOP_DEV | Self::NO_AUTO_PART_SCAN => {
                "7.0"
            }
            Self::SHMEM_ZC => "7.1",
            Self::IO_DESC_SIZE => "7.3",
            _ => "a later version",
        }
    }

    /// The names of the bits that are set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.iter_names().map(|(name, _)| name)
    }
}

/// `struct ublk_params`. libublk's has no `dma` and `segment` members (Linux
/// 6.15); an older driver reads as many bytes as it knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Params {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) basic: ublk_param_basic,
    pub(super) discard: ublk_param_discard,
    pub(super) devt: ublk_param_devt,
    pub(super) zoned: ublk_param_zoned,
    pub(super) dma: ublk_param_dma_align,
    /// What C leaves before `segment`.
    pub(super) gap: u32,
    pub(super) segment: ublk_param_segment,
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Params, basic) == 8);
    assert!(offset_of!(Params, discard) == 40);
    assert!(offset_of!(Params, devt) == 60);
    assert!(offset_of!(Params, zoned) == 76);
    assert!(offset_of!(Params, dma) == 108);
    assert!(offset_of!(Params, segment) == 120);
    assert!(size_of::<Params>() == 136);
    assert!(size_of::<ublksrv_ctrl_cmd>() == 32);
    assert!(size_of::<ublksrv_ctrl_dev_info>() == 64);
    assert!(size_of::<ublksrv_io_desc>() == 24);
};

/// A structure the driver reads and writes as bytes.
///
/// # Safety
/// The type is `repr(C)` without implicit padding, and every bit pattern is a
/// value of it.
pub(super) unsafe trait Plain: Copy {
    /// The structure's bytes.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: by the trait's contract all bytes are initialised and may be
        // changed to anything; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut((&raw mut *self).cast(), size_of::<Self>()) }
    }
}

// SAFETY: integers only, with every gap of the C layout a member (the asserts
// above).
unsafe impl Plain for Params {}
// SAFETY: as above.
unsafe impl Plain for ublksrv_ctrl_cmd {}
// SAFETY: as above.
unsafe impl Plain for ublksrv_ctrl_dev_info {}
