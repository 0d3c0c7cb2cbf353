//! Persistent dirty bitmaps (qcow2 specification, "Bitmaps").

use bitflags::bitflags;

use super::addr::HostOffset;
use super::bytes::{be16, be32, be64, pad8};
use super::entry::BadEntry;
use super::geometry::Geometry;
use crate::error::{Error, ErrorKind, Result};

/// Most bitmaps of an image.
pub const MAX_BITMAPS: u32 = 65535;
/// Longest bitmap directory in bytes: every entry at its longest.
pub const MAX_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * MAX_ENTRY_BYTES as u64;
/// Longest name of a bitmap, in bytes.
pub const MAX_NAME: usize = 1023;
/// Granularities that QEMU knows, as log2 of bytes: 512 bytes to 2 GiB.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Most entries of a bitmap's table.
pub const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Longest bitmap, in bytes.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;

/// Longest directory entry that QEMU accepts, in bytes.
const MAX_ENTRY_BYTES: usize = 1024;
/// Bytes of a directory entry before extra data and name.
const ENTRY_HEAD: usize = 24;
/// The one type of bitmap there is.
const DIRTY_TRACKING: u8 = 1;

/// The bitmaps header extension: where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, 1 to 65535.
    pub nb_bitmaps: u32,
    /// Length of the directory in bytes.
    pub directory_size: u64,
    /// The directory, cluster-aligned.
    pub directory_offset: HostOffset,
}

impl BitmapsExtension {
    /// Length of the extension's data in bytes.
    pub const LEN: usize = 24;

    /// Reads the extension's data; `here` is where it is, for errors.
    pub(super) fn parse(data: &[u8], here: u64, cluster_bits: u32) -> Result<Self> {
        let (Some(nb_bitmaps), Some(reserved), Some(directory_size), Some(offset)) =
            (be32(data, 0), be32(data, 4), be64(data, 8), be64(data, 16))
        else {
            return Err(invalid("the bitmaps header extension is cut short", here));
        };
        let directory_offset = HostOffset(offset);
        let problem = if nb_bitmaps == 0 || nb_bitmaps > MAX_BITMAPS {
            format!("the number of bitmaps, {nb_bitmaps}, is not between 1 and {MAX_BITMAPS}")
        } else if reserved != 0 {
            "the reserved field of the bitmaps header extension is not zero".to_owned()
        } else if !directory_offset.is_aligned(cluster_bits) || offset == 0 || offset >> 56 != 0 {
            format!("the bitmap directory's offset {directory_offset} is not that of a cluster")
        } else if directory_size > MAX_DIRECTORY_BYTES
            || directory_size < u64::from(nb_bitmaps) * ENTRY_HEAD as u64
        {
            format!("{nb_bitmaps} bitmaps cannot have a directory of {directory_size} bytes")
        } else {
            return Ok(Self {
                nb_bitmaps,
                directory_size,
                directory_offset,
            });
        };
        Err(invalid(problem, here))
    }

    /// The extension's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        out.extend_from_slice(&self.nb_bitmaps.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.directory_size.to_be_bytes());
        out.extend_from_slice(&self.directory_offset.0.to_be_bytes());
        out
    }
}

bitflags! {
    /// Flags of a bitmap. There are no others.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct BitmapFlags: u32 {
        /// Somebody had the bitmap in memory and did not store it: it cannot
        /// be trusted and is good only for removal.
        const IN_USE = 1 << 0;
        /// Every change of the disk must be recorded.
        const AUTO = 1 << 1;
        /// The bitmap may be used by those who do not know its extra data.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The bitmap's table, cluster-aligned.
    pub table_offset: HostOffset,
    /// Entries of the table: one for each cluster of the bitmap.
    pub table_size: u32,
    /// Flags.
    pub flags: BitmapFlags,
    /// log2 of the bytes of the disk that one bit stands for.
    pub granularity_bits: u8,
    /// Data of unknown meaning, to be kept.
    pub extra: Vec<u8>,
    /// The name, unique in the image; 1 to 1023 bytes.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// Where the flags are in an entry, in bytes; 32 bits.
    pub const FLAGS_AT: u64 = 12;

    /// Bytes of the entry in a directory.
    pub fn encoded_len(&self) -> usize {
        pad8(ENTRY_HEAD + self.extra.len() + self.name.len())
    }

    /// Reads the whole directory, `nb_bitmaps` entries that fill `directory`
    /// to the byte; it lies at `at` in the file.
    ///
    /// # Errors
    ///
    /// `Corrupt` with the offset of the entry that breaks a rule.
    pub fn parse_directory(
        directory: &[u8],
        extension: &BitmapsExtension,
        geometry: &Geometry,
    ) -> Result<Vec<Self>> {
        let base = extension.directory_offset.0;
        let mut bitmaps: Vec<Self> = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut at = 0;
        for _ in 0..extension.nb_bitmaps {
            let here = base.saturating_add(at as u64);
            let (bitmap, len) =
                Self::parse(directory.get(at..).unwrap_or_default(), here, geometry)?;
            if !names.insert(bitmap.name.clone()) {
                return Err(Error::corrupt("two bitmaps have the same name", here));
            }
            bitmaps.push(bitmap);
            at += len;
        }
        if at != directory.len() {
            return Err(Error::corrupt(
                format!(
                    "the bitmap directory has {} bytes but its entries {at}",
                    directory.len()
                ),
                base,
            ));
        }
        Ok(bitmaps)
    }

    /// Reads the entry at the beginning of `bytes`, which lies at `here` in
    /// the file, and tells its length.
    fn parse(bytes: &[u8], here: u64, geometry: &Geometry) -> Result<(Self, usize)> {
        let corrupt = |message: String| Error::corrupt(message, here);
        let short = || corrupt("the bitmap directory ends inside an entry".to_owned());
        let table_offset = HostOffset(be64(bytes, 0).ok_or_else(short)?);
        let table_size = be32(bytes, 8).ok_or_else(short)?;
        let flags = be32(bytes, 12).ok_or_else(short)?;
        let [kind, granularity_bits] =
            [16, 17].map(|at| bytes.get(at).copied().unwrap_or_default());
        let name_len = usize::from(be16(bytes, 18).ok_or_else(short)?);
        let extra_len = be32(bytes, 20).ok_or_else(short)? as usize;
        let name_at = ENTRY_HEAD.checked_add(extra_len).ok_or_else(short)?;
        let name_end = name_at.checked_add(name_len).ok_or_else(short)?;
        let extra = bytes.get(ENTRY_HEAD..name_at).ok_or_else(short)?;
        let name = bytes.get(name_at..name_end).ok_or_else(short)?;
        let len = pad8(name_end);
        if bytes.len() < len {
            return Err(short());
        }

        let flags = BitmapFlags::from_bits(flags)
            .ok_or_else(|| corrupt(format!("a bitmap has unknown flags {flags:#x}")))?;
        if kind != DIRTY_TRACKING {
            return Err(corrupt(format!("a bitmap has the unknown type {kind}")));
        }
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(corrupt(format!(
                "a bitmap has a name of {} bytes",
                name.len()
            )));
        }
        if !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(corrupt(format!(
                "a bitmap has a granularity of 2^{granularity_bits} bytes"
            )));
        }
        if !table_offset.is_aligned(geometry.cluster_bits)
            || table_offset.0 == 0
            || table_offset.0 >> 56 != 0
        {
            return Err(corrupt(format!(
                "a bitmap's table offset {table_offset} is not that of a cluster"
            )));
        }
        if table_size == 0
            || table_size > MAX_TABLE_ENTRIES
            || u64::from(table_size) << geometry.cluster_bits
                > MAX_BITMAP_BYTES.next_multiple_of(geometry.cluster_size())
        {
            return Err(corrupt(format!(
                "a bitmap has a table of {table_size} entries"
            )));
        }
        let bitmap = Self {
            table_offset,
            table_size,
            flags,
            granularity_bits,
            extra: extra.to_vec(),
            name: name.to_vec(),
        };
        Ok((bitmap, len))
    }

    /// Appends the entry to a directory under construction.
    ///
    /// # Errors
    ///
    /// `Usage` if the name is too long or empty.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let too_long = || Error::new(ErrorKind::Usage, "Bitmap name must have 1 to 1023 bytes");
        let extra_len = u32::try_from(self.extra.len()).map_err(|_| too_long())?;
        let name_len = u16::try_from(self.name.len()).map_err(|_| too_long())?;
        if self.name.is_empty() || self.name.len() > MAX_NAME {
            return Err(too_long());
        }
        let start = out.len();
        out.extend_from_slice(&self.table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, self.granularity_bits]);
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(start + pad8(out.len() - start), 0);
        Ok(())
    }

    /// Whether the bitmap has extra data that makes it unusable here. It is
    /// to be left alone.
    pub fn has_foreign_data(&self) -> bool {
        !self.extra.is_empty() && !self.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE)
    }

    /// Table entries that a bitmap of this granularity needs for a disk of
    /// `size` bytes; a table of another length does not fit the disk.
    pub fn table_entries_for(granularity_bits: u8, size: u64, geometry: &Geometry) -> u64 {
        let bits = size.div_ceil(1 << granularity_bits);
        geometry.clusters_for(bits.div_ceil(8))
    }
}

/// An entry of a bitmap's table: one cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are 0.
    Zeros,
    /// All bits are 1.
    Ones,
    /// The bits are in this cluster; the first is the least significant of
    /// the first byte.
    Cluster(HostOffset),
}

impl BitmapTableEntry {
    /// Takes an entry apart; `raw` is the big-endian number as a native one.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        let offset = HostOffset(raw & 0x00ff_ffff_ffff_fe00);
        let flags = raw & !offset.0;
        match (offset.0, flags) {
            (0, 0) => Ok(Self::Zeros),
            (0, 1) => Ok(Self::Ones),
            (0, _) => Err(BadEntry::ReservedBits(flags & !1)),
            (_, 0) if offset.is_aligned(geometry.cluster_bits) => Ok(Self::Cluster(offset)),
            (_, 0) => Err(BadEntry::Misaligned(offset)),
            _ => Err(BadEntry::ReservedBits(flags)),
        }
    }

    /// The number to be stored, big-endian, on disk.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::Cluster(offset) => offset.0,
        }
    }
}

fn invalid(message: impl Into<String>, at: u64) -> Error {
    Error::new(ErrorKind::InvalidFormat, message).at(at)
}

#[cfg(test)]
#[path = "bitmap_tests.rs"]
mod tests;
