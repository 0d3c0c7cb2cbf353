//! What entries of tables are made of (qcow2 specification, "Cluster mapping"),
//! L1 entries and compressed descriptors; [`l2`](super::l2) has the rest.
//!
//! Entries are taken and given as native numbers; on disk they are big-endian.

use std::fmt;
use std::ops::RangeInclusive;

use super::addr::HostOffset;
use super::geometry::Geometry;
use crate::error::Error;

/// Bit 63: the refcount is exactly 1, so that it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62: the descriptor is one of a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55: a cluster's offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Offsets in tables have 56 bits.
const OFFSET_BITS: u32 = 56;
/// Compressed data is counted in sectors of this many bytes, whatever the
/// cluster size.
const SECTOR_BITS: u32 = 9;
const SECTOR: u64 = 1 << SECTOR_BITS;

/// Why an entry of a table cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// Bits that must be zero are set; which ones.
    ReservedBits(u64),
    /// The offset is not a multiple of the cluster size.
    Misaligned(HostOffset),
    /// The offset needs more than 56 bits.
    TooFar(HostOffset),
    /// The entry points into the header's cluster.
    InHeader,
    /// The zero flag in an image of version 2, which has none.
    ZeroFlagInV2,
    /// A compressed cluster marked as one that may be overwritten in place.
    CopiedCompressed,
    /// A compressed cluster where there is an external data file.
    CompressedExternal,
    /// A compressed cluster with subclusters.
    CompressedSubclusters,
    /// Subclusters that are both allocated and zeros; which ones.
    SubclusterBoth(u32),
    /// Allocated subclusters of a cluster that is nowhere.
    SubclusterNowhere,
}

impl BadEntry {
    /// The error for an entry of `table` ("L2 table") found at `offset` of the
    /// image file.
    #[cold]
    pub fn into_error(self, table: &str, offset: HostOffset) -> Error {
        Error::corrupt(format!("bad entry in the {table}: {self}"), offset.0)
    }
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservedBits(bits) => write!(f, "reserved bits {bits:#x} are set"),
            Self::Misaligned(offset) => {
                write!(f, "offset {offset} is not a multiple of the cluster size")
            }
            Self::TooFar(offset) => write!(f, "offset {offset} is beyond 2^56"),
            Self::InHeader => f.write_str("it points into the header"),
            Self::ZeroFlagInV2 => {
                f.write_str("the zero flag is set, which version 2 does not have")
            }
            Self::CopiedCompressed => f.write_str("a compressed cluster has the COPIED flag"),
            Self::CompressedExternal => {
                f.write_str("a compressed cluster, which an external data file cannot have")
            }
            Self::CompressedSubclusters => f.write_str("a compressed cluster has subclusters"),
            Self::SubclusterBoth(which) => {
                write!(f, "subclusters {which:#x} are both allocated and zeros")
            }
            Self::SubclusterNowhere => {
                f.write_str("subclusters are allocated but the cluster has no offset")
            }
        }
    }
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: all it would map is unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Where it is; a whole cluster.
        offset: HostOffset,
        /// Its refcount is exactly 1. Meaningful in the active table only.
        copied: bool,
    },
}

impl L1Entry {
    /// Takes an entry apart: bits 9 to 55 offset, 63 COPIED, the others zero.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        let reserved = raw & !(COPIED | OFFSET);
        if reserved != 0 {
            return Err(BadEntry::ReservedBits(reserved));
        }
        Ok(Self::Table {
            offset: cluster_at(raw, geometry)?,
            copied: raw & COPIED != 0,
        })
    }

    /// The number to be stored, big-endian, on disk.
    #[inline]
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { offset, copied } => plain(offset, copied, geometry),
        }
    }
}

/// The cluster that bits 9 to 55 name; never the first one.
#[inline]
pub(super) fn cluster_at(raw: u64, geometry: &Geometry) -> Result<HostOffset, BadEntry> {
    let offset = HostOffset(raw & OFFSET);
    if !offset.is_aligned(geometry.cluster_bits) {
        return Err(BadEntry::Misaligned(offset));
    }
    if offset.0 == 0 {
        return Err(BadEntry::InHeader);
    }
    Ok(offset)
}

#[inline]
pub(super) fn plain(offset: HostOffset, copied: bool, geometry: &Geometry) -> u64 {
    debug_assert!(offset.is_aligned(geometry.cluster_bits) && offset.0 < 1 << OFFSET_BITS);
    offset.0 | if copied { COPIED } else { 0 }
}

/// Where a compressed cluster's data is.
///
/// The data begins at a byte and ends, at the latest, with a sector: how long
/// it really is only the decompressor learns. What follows it in its last
/// sector may belong to another compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedRange {
    /// The first byte; not aligned to anything.
    pub offset: HostOffset,
    /// Bytes from there to the end of the last sector: at least 1, at most
    /// twice a cluster.
    pub max_len: u64,
}

impl CompressedRange {
    /// The range of `len` bytes at `offset`, extended to the end of its last
    /// sector. `None` when a descriptor cannot hold it: `len` is 0 or too
    /// long, or the offset too high.
    pub fn new(offset: HostOffset, len: u64, geometry: &Geometry) -> Option<Self> {
        let end = offset
            .checked_add(len)?
            .0
            .checked_next_multiple_of(SECTOR)?;
        let range = Self {
            offset,
            max_len: end - offset.0,
        };
        let fits = len > 0
            && range.additional_sectors() < 1 << (geometry.cluster_bits - 8)
            && offset.0 < 1 << shift(geometry).min(OFFSET_BITS);
        fits.then_some(range)
    }

    /// Takes a descriptor apart: from bit x = 62 - (cluster_bits - 8) on the
    /// number of sectors after the first, below it the offset.
    #[inline]
    pub(super) fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw & COPIED != 0 {
            return Err(BadEntry::CopiedCompressed);
        }
        let shift = shift(geometry);
        let offset = HostOffset(raw & ((1 << shift) - 1));
        if offset.0 >> OFFSET_BITS != 0 {
            return Err(BadEntry::TooFar(offset));
        }
        if offset.0 < geometry.cluster_size() {
            return Err(BadEntry::InHeader);
        }
        let sectors = ((raw & !COMPRESSED) >> shift) + 1;
        Ok(Self {
            offset,
            max_len: (sectors << SECTOR_BITS) - offset.offset_in(SECTOR_BITS),
        })
    }

    #[inline]
    pub(super) fn encode(self, geometry: &Geometry) -> u64 {
        COMPRESSED | self.additional_sectors() << shift(geometry) | self.offset.0
    }

    /// Sectors the range touches after the first.
    #[inline]
    fn additional_sectors(self) -> u64 {
        (self.last_byte() >> SECTOR_BITS) - (self.offset.0 >> SECTOR_BITS)
    }

    #[inline]
    fn last_byte(self) -> u64 {
        self.offset.0 + (self.max_len - 1)
    }

    /// The numbers of the host clusters that hold a part of the range; each
    /// of them is referenced once by this descriptor.
    ///
    /// The end is taken from the last byte, not from the one behind it: a
    /// range that ends with a cluster does not touch the next one.
    #[inline]
    pub fn clusters_touched(self, geometry: &Geometry) -> RangeInclusive<u64> {
        self.offset.cluster(geometry.cluster_bits)..=self.last_byte() >> geometry.cluster_bits
    }
}

/// The bit at which the sector count of a compressed descriptor begins.
#[inline]
fn shift(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
