//! Entries of L2 tables, of 8 bytes and (extended) of 16.

use std::ops::RangeInclusive;

use super::addr::HostOffset;
use super::entry::{BadEntry, COMPRESSED, COPIED, CompressedRange, OFFSET, cluster_at, plain};
use super::geometry::Geometry;
use super::subcluster::{Subcluster, Subclusters};

/// Bit 0 of a standard descriptor: reads as zeros.
pub(crate) const ZERO: u64 = 1;

/// An entry as it is stored, in native numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawL2Entry {
    /// The first 8 bytes: where the cluster is.
    pub descriptor: u64,
    /// The other 8 bytes of an extended entry, else 0.
    pub bitmap: u64,
}

impl From<u64> for RawL2Entry {
    /// An entry of 8 bytes.
    fn from(descriptor: u64) -> Self {
        Self {
            descriptor,
            bitmap: 0,
        }
    }
}

impl RawL2Entry {
    /// Reads an entry of [`Geometry::l2_entry_bytes`] bytes.
    #[inline]
    pub fn read(bytes: &[u8], geometry: &Geometry) -> Self {
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Self {
            descriptor: word(0),
            bitmap: if geometry.extended_l2 { word(8) } else { 0 },
        }
    }

    /// The entries of a table, or of a part of one.
    pub fn all(bytes: &[u8], geometry: &Geometry) -> impl Iterator<Item = Self> {
        let geometry = *geometry;
        bytes
            .chunks_exact(geometry.l2_entry_bytes() as usize)
            .map(move |bytes| Self::read(bytes, &geometry))
    }

    /// Writes it to the first [`Geometry::l2_entry_bytes`] of `bytes`.
    pub fn write(self, bytes: &mut [u8], geometry: &Geometry) {
        bytes[..8].copy_from_slice(&self.descriptor.to_be_bytes());
        if geometry.extended_l2 {
            bytes[8..16].copy_from_slice(&self.bitmap.to_be_bytes());
        }
    }
}

/// An entry of an L2 table.
///
/// What a whole cluster is has one value, be the entry extended or not:
/// [`Self::Mixed`] is for clusters whose subclusters differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: the backing file shows through, or zeros.
    Unallocated,
    /// Reads as zeros, whatever the backing file holds.
    Zero,
    /// Reads as zeros but owns a host cluster, whose content is not to be
    /// seen.
    ZeroAllocated {
        /// The cluster.
        host: HostOffset,
        /// Its refcount is exactly 1. Meaningful under the active table only.
        copied: bool,
    },
    /// An ordinary cluster.
    Data {
        /// The cluster.
        host: HostOffset,
        /// Its refcount is exactly 1. Meaningful under the active table only.
        copied: bool,
    },
    /// A cluster whose subclusters differ, or one that owns a host cluster
    /// and shows nothing of it. In extended tables only.
    Mixed {
        /// The cluster, without which no subcluster has data.
        host: Option<HostOffset>,
        /// Its refcount is exactly 1. Meaningful under the active table only.
        copied: bool,
        /// What is in it.
        subclusters: Subclusters,
    },
    /// A compressed cluster.
    Compressed(CompressedRange),
}

impl L2Entry {
    /// Takes an entry apart.
    #[inline]
    pub fn decode(raw: impl Into<RawL2Entry>, geometry: &Geometry) -> Result<Self, BadEntry> {
        let raw: RawL2Entry = raw.into();
        if geometry.extended_l2 {
            return Self::decode_extended(raw, geometry);
        }
        let raw = without_idle_copied(raw.descriptor, geometry);
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        if raw & COMPRESSED != 0 {
            return compressed(raw, geometry).map(Self::Compressed);
        }
        let reserved = raw & !(COPIED | OFFSET | ZERO);
        if reserved != 0 {
            return Err(BadEntry::ReservedBits(reserved));
        }
        let zero = raw & ZERO != 0;
        if zero && geometry.version < 3 {
            return Err(BadEntry::ZeroFlagInV2);
        }
        if zero && raw == ZERO {
            return Ok(Self::Zero);
        }
        let (host, copied) = host_of(raw, geometry)?;
        Ok(if zero {
            Self::ZeroAllocated { host, copied }
        } else {
            Self::Data { host, copied }
        })
    }

    /// In an extended table zeros are told by the bitmap. Bit 0 is to be 0 there,
    /// and says nothing where it is not, as for QEMU.
    fn decode_extended(raw: RawL2Entry, geometry: &Geometry) -> Result<Self, BadEntry> {
        let bitmap = raw.bitmap;
        let descriptor = without_idle_copied(raw.descriptor, geometry);
        if descriptor & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err(BadEntry::CompressedSubclusters);
            }
            return compressed(descriptor, geometry).map(Self::Compressed);
        }
        let descriptor = descriptor & !ZERO;
        let reserved = descriptor & !(COPIED | OFFSET);
        if reserved != 0 {
            return Err(BadEntry::ReservedBits(reserved));
        }
        let subclusters = Subclusters::decode(bitmap)?;
        if descriptor != 0 {
            let (host, copied) = host_of(descriptor, geometry)?;
            return Ok(Self::with_host(host, copied, subclusters));
        }
        if subclusters.allocated() != 0 {
            return Err(BadEntry::SubclusterNowhere);
        }
        Ok(Self::without_host(subclusters))
    }

    /// An entry of an extended table for a cluster at `host`.
    pub fn with_host(host: HostOffset, copied: bool, subclusters: Subclusters) -> Self {
        match subclusters {
            Subclusters::DATA => Self::Data { host, copied },
            Subclusters::ZERO => Self::ZeroAllocated { host, copied },
            subclusters => Self::Mixed {
                host: Some(host),
                copied,
                subclusters,
            },
        }
    }

    /// An entry of an extended table for a cluster without data.
    pub fn without_host(subclusters: Subclusters) -> Self {
        debug_assert_eq!(subclusters.allocated(), 0, "data without a place");
        match subclusters {
            Subclusters::UNALLOCATED => Self::Unallocated,
            Subclusters::ZERO => Self::Zero,
            subclusters => Self::Mixed {
                host: None,
                copied: false,
                subclusters,
            },
        }
    }

    /// The numbers to be stored, big-endian, on disk.
    #[inline]
    pub fn encode(self, geometry: &Geometry) -> RawL2Entry {
        if geometry.extended_l2 {
            return self.encode_extended(geometry);
        }
        debug_assert!(
            geometry.version >= 3 || !matches!(self, Self::Zero | Self::ZeroAllocated { .. }),
            "there is no zero flag in this image"
        );
        RawL2Entry::from(match self {
            Self::Unallocated => 0,
            Self::Zero => ZERO,
            Self::ZeroAllocated { host, copied } => ZERO | plain(host, copied, geometry),
            Self::Data { host, copied } => plain(host, copied, geometry),
            Self::Compressed(range) => range.encode(geometry),
            Self::Mixed { .. } => unreachable!("subclusters in an image that has none"),
        })
    }

    fn encode_extended(self, geometry: &Geometry) -> RawL2Entry {
        let descriptor = match self {
            Self::Compressed(range) => return range.encode(geometry).into(),
            _ => self
                .host()
                .map_or(0, |(host, copied)| plain(host, copied, geometry)),
        };
        RawL2Entry {
            descriptor,
            bitmap: self.subclusters().encode(),
        }
    }

    /// The host cluster that an entry other than a compressed one refers to,
    /// and its COPIED flag.
    #[inline]
    pub fn host(self) -> Option<(HostOffset, bool)> {
        match self {
            Self::Data { host, copied } | Self::ZeroAllocated { host, copied } => {
                Some((host, copied))
            }
            Self::Mixed { host, copied, .. } => host.map(|host| (host, copied)),
            Self::Unallocated | Self::Zero | Self::Compressed(_) => None,
        }
    }

    /// The same with this COPIED flag, if it has one.
    #[must_use]
    pub fn with_copied(mut self, flag: bool) -> Self {
        match &mut self {
            Self::Data { copied, .. } | Self::ZeroAllocated { copied, .. } => *copied = flag,
            Self::Mixed { host, copied, .. } => *copied = flag && host.is_some(),
            Self::Unallocated | Self::Zero | Self::Compressed(_) => {}
        }
        self
    }

    /// The numbers of the host clusters of the image file that it refers to,
    /// each of which it adds 1 to the refcount of.
    pub fn references(self, geometry: &Geometry) -> Option<RangeInclusive<u64>> {
        match self {
            Self::Compressed(range) => Some(range.clusters_touched(geometry)),
            // Clusters of a data file have no refcounts.
            _ if geometry.external_data => None,
            _ => self.host().map(|(host, _)| {
                let cluster = host.cluster(geometry.cluster_bits);
                cluster..=cluster
            }),
        }
    }

    /// What the parts of the cluster are; in a compressed one, all are data.
    #[inline]
    pub fn subclusters(self) -> Subclusters {
        match self {
            Self::Unallocated => Subclusters::UNALLOCATED,
            Self::Zero | Self::ZeroAllocated { .. } => Subclusters::ZERO,
            Self::Data { .. } | Self::Compressed(_) => Subclusters::DATA,
            Self::Mixed { subclusters, .. } => subclusters,
        }
    }

    /// What subcluster `index` is, and how many from there on are the same.
    #[inline]
    pub fn run(self, index: u32) -> (Subcluster, u32) {
        let subclusters = self.subclusters();
        (subclusters.get(index), subclusters.run(index))
    }
}

/// Without an offset the COPIED flag says nothing, as for QEMU; except for the
/// first cluster of an external data file.
#[inline]
fn without_idle_copied(raw: u64, geometry: &Geometry) -> u64 {
    if raw & (OFFSET | COMPRESSED) == 0 && !geometry.external_data {
        raw & !COPIED
    } else {
        raw
    }
}

/// Where a cluster is and whether it is marked COPIED; never in the header,
/// but offset 0 of an external data file is as good as any.
#[inline]
fn host_of(raw: u64, geometry: &Geometry) -> Result<(HostOffset, bool), BadEntry> {
    let copied = raw & COPIED != 0;
    if geometry.external_data && copied && raw & OFFSET == 0 {
        return Ok((HostOffset(0), copied));
    }
    Ok((cluster_at(raw, geometry)?, copied))
}

#[inline]
fn compressed(raw: u64, geometry: &Geometry) -> Result<CompressedRange, BadEntry> {
    if geometry.external_data {
        return Err(BadEntry::CompressedExternal);
    }
    CompressedRange::decode(raw, geometry)
}
