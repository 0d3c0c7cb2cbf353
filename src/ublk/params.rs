//! What the device promises its users: limits and options as the driver's
//! parameters.

use super::uapi::{
    Params, UBLK_ATTR_FUA, UBLK_ATTR_READ_ONLY, UBLK_ATTR_VOLATILE_CACHE, UBLK_PARAM_TYPE_BASIC,
    UBLK_PARAM_TYPE_DISCARD, UBLK_PARAM_TYPE_DMA_ALIGN, ublk_param_basic, ublk_param_discard,
    ublk_param_dma_align,
};
use crate::block::Limits;
use crate::error::{Error, ErrorKind, Result};

/// The kernel counts in these, whatever the logical block size.
pub(super) const SECTOR: u64 = 512;
const SECTOR_SHIFT: u8 = 9;
/// The largest logical block the driver takes: a page.
const LARGEST_BLOCK: u32 = 4096;
/// The largest discard or zeroing in one request. A power of two, so that
/// pieces of a larger one begin at cluster boundaries; well below the 4 GiB
/// that fit, so that one request does not keep a queue for long.
const LARGEST_DISCARD: u32 = 1 << 30;
/// Requests whose memory is not aligned like this are refused by the kernel
/// (512 bytes is what every other disk wants, too), so that fixed buffers can
/// go straight to a file opened with `O_DIRECT`.
const DMA_MASK: u32 = 511;

/// The parameters for a handler with these limits. `max_request` is the
/// longest read or write, in bytes.
pub(super) fn params(
    limits: &Limits,
    logical_block: u32,
    read_only: bool,
    max_request: u32,
) -> Result<Params> {
    if !logical_block.is_power_of_two() || !(512..=LARGEST_BLOCK).contains(&logical_block) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a logical block of {logical_block} bytes: it is 512, 1024, 2048 or 4096"),
        ));
    }
    let read_only = read_only || limits.read_only;
    let physical = power_of_two(limits.physical_block, logical_block);
    let optimal = power_of_two(limits.optimal_io, physical);
    let mut params = Params {
        len: size_of::<Params>() as u32,
        types: UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DMA_ALIGN,
        basic: ublk_param_basic {
            // Without a volatile cache the kernel would send neither FLUSH nor
            // FUA.
            attrs: if read_only {
                UBLK_ATTR_READ_ONLY
            } else {
                UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA
            },
            logical_bs_shift: shift(logical_block),
            physical_bs_shift: shift(physical),
            io_min_shift: shift(physical),
            io_opt_shift: shift(optimal),
            max_sectors: max_request >> SECTOR_SHIFT,
            dev_sectors: sectors(limits.size, logical_block)?,
            ..ublk_param_basic::default()
        },
        dma: ublk_param_dma_align {
            alignment: DMA_MASK,
            ..ublk_param_dma_align::default()
        },
        ..Params::default()
    };
    if !read_only {
        params.types |= UBLK_PARAM_TYPE_DISCARD;
        params.discard = ublk_param_discard {
            discard_granularity: power_of_two(limits.discard_granularity, logical_block),
            max_discard_sectors: if limits.discard {
                LARGEST_DISCARD >> SECTOR_SHIFT
            } else {
                0
            },
            max_write_zeroes_sectors: LARGEST_DISCARD >> SECTOR_SHIFT,
            // The driver takes no more.
            max_discard_segments: 1,
            ..ublk_param_discard::default()
        };
    }
    Ok(params)
}

/// The disk's size in sectors. A last piece of less than a sector cannot be
/// shown; anything else is shown whole or refused.
pub(super) fn sectors(size: u64, logical_block: u32) -> Result<u64> {
    let sectors = size / SECTOR;
    if sectors == 0 {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a disk of {size} bytes has no sector"),
        ));
    }
    let per_block = u64::from(logical_block) / SECTOR;
    if !sectors.is_multiple_of(per_block) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a disk of {size} bytes is not a whole number of blocks of {logical_block}"),
        )
        .cure("use a logical block size of 512"));
    }
    if !size.is_multiple_of(SECTOR) {
        tracing::warn!(
            "the last {} bytes of the disk are less than a sector and cannot be reached",
            size % SECTOR
        );
    }
    Ok(sectors)
}

fn shift(size: u32) -> u8 {
    size.trailing_zeros() as u8
}

/// `wanted` as the power of two below it, but not less than `least`.
fn power_of_two(wanted: u32, least: u32) -> u32 {
    match wanted.checked_ilog2() {
        Some(log) => (1 << log).max(least),
        None => least,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            size: 1 << 30,
            read_only: false,
            discard_granularity: 65_536,
            optimal_io: 65_536,
            physical_block: 4096,
            discard: true,
        }
    }

    #[test]
    fn a_writable_disk() {
        let params = params(&limits(), 512, false, 1 << 20).unwrap();
        assert_eq!(params.len, 136);
        assert_eq!(
            params.types,
            UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD | UBLK_PARAM_TYPE_DMA_ALIGN
        );
        let basic = params.basic;
        assert_eq!(basic.attrs, UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA);
        assert_eq!((basic.logical_bs_shift, basic.physical_bs_shift), (9, 12));
        assert_eq!((basic.io_min_shift, basic.io_opt_shift), (12, 16));
        assert_eq!((basic.max_sectors, basic.chunk_sectors), (2048, 0));
        assert_eq!(basic.dev_sectors, 2 << 20);
        assert_eq!(params.discard.discard_granularity, 65_536);
        assert_eq!(params.discard.max_discard_segments, 1);
        assert_eq!(params.discard.max_discard_sectors, 1 << 21);
        assert_eq!(params.dma.alignment, 511);
    }

    #[test]
    fn a_read_only_disk_wants_neither_flushes_nor_discards() {
        for (option, limit) in [(true, false), (false, true)] {
            let limits = Limits {
                read_only: limit,
                ..limits()
            };
            let params = params(&limits, 512, option, 1 << 20).unwrap();
            assert_eq!(params.basic.attrs, UBLK_ATTR_READ_ONLY);
            assert_eq!(params.types & UBLK_PARAM_TYPE_DISCARD, 0);
        }
    }

    #[test]
    fn without_discard_zeroing_remains() {
        let limits = Limits {
            discard: false,
            ..limits()
        };
        let params = params(&limits, 512, false, 1 << 20).unwrap();
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert!(params.discard.max_write_zeroes_sectors > 0);
        // The driver refuses 0, discards or not.
        assert!(params.discard.discard_granularity > 0);
    }

    #[test]
    fn odd_limits_become_powers_of_two_in_order() {
        let limits = Limits {
            optimal_io: 0,
            physical_block: 100,
            discard_granularity: 3000,
            ..limits()
        };
        let params = params(&limits, 1024, false, 1 << 20).unwrap();
        let basic = params.basic;
        assert_eq!((basic.physical_bs_shift, basic.io_opt_shift), (10, 10));
        assert_eq!(params.discard.discard_granularity, 2048);
    }

    #[test]
    fn every_sector_is_shown_or_the_block_size_refused() {
        assert_eq!(sectors(1_000_448, 512).unwrap(), 1954);
        assert_eq!(sectors(1_000_449, 512).unwrap(), 1954);
        assert_eq!(sectors(4096, 4096).unwrap(), 8);
        let error = sectors(1_000_448, 4096).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.cure_text().unwrap().contains("512"));
        assert!(sectors(511, 512).is_err());
        for block in [0, 256, 513, 8192] {
            assert!(params(&limits(), block, false, 1 << 20).is_err(), "{block}");
        }
    }
}
