//! The handful of numbers that decide how every table of an image is read.

use std::ops::Range;

use super::addr::GuestOffset;
use super::subcluster::mask;

/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB. The format allows more, QEMU does not.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster of an image with extended L2 entries: 16 KiB, so that a
/// subcluster is at least a sector.
pub const MIN_CLUSTER_BITS_EXTENDED_L2: u32 = 14;
/// Largest refcount order: 64-bit refcounts.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Largest L1 table, active or of a snapshot, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// Cluster size, refcount width and version: all that is needed to read a
/// table. A `Geometry` made from a header respects the bounds above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// 2 or 3.
    pub version: u8,
    /// L2 entries are 16 bytes long and cover 32 subclusters each.
    pub extended_l2: bool,
    /// Guest data is in another file, where every offset is as good as any:
    /// also 0.
    pub external_data: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    #[inline]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes of an L2 entry: 3, or 4 when extended.
    #[inline]
    pub fn l2_entry_bits(&self) -> u32 {
        3 + u32::from(self.extended_l2)
    }

    /// Bytes of an L2 entry: 8, or 16 when extended.
    #[inline]
    pub fn l2_entry_bytes(&self) -> u64 {
        1 << self.l2_entry_bits()
    }

    /// log2 of the bytes that are mapped apart from others: a 32nd of a
    /// cluster with extended L2 entries, else a cluster.
    #[inline]
    pub fn subcluster_bits(&self) -> u32 {
        if self.extended_l2 {
            self.cluster_bits - 5
        } else {
            self.cluster_bits
        }
    }

    /// log2 of the entries of an L2 table.
    #[inline]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Entries of an L2 table.
    #[inline]
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Bytes of an L2 table: always one cluster.
    #[inline]
    pub fn l2_table_bytes(&self) -> u64 {
        self.cluster_size()
    }

    /// log2 of the guest bytes that one L1 entry covers.
    #[inline]
    pub fn l1_entry_span_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Guest bytes that one L1 entry, that is one L2 table, covers.
    #[inline]
    pub fn l1_entry_span(&self) -> u64 {
        1 << self.l1_entry_span_bits()
    }

    /// Which L1 entry maps `guest`.
    #[inline]
    pub fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.0 >> self.l1_entry_span_bits()
    }

    /// Which entry of its L2 table maps `guest`.
    #[inline]
    pub fn l2_index(&self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// The first guest byte that entry `l2_index` under `l1_index` maps. The
    /// indices must be within the tables.
    #[inline]
    pub fn guest_offset(&self, l1_index: u64, l2_index: u64) -> GuestOffset {
        GuestOffset((l1_index << self.l1_entry_span_bits()) + (l2_index << self.cluster_bits))
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[inline]
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l1_entry_span())
    }

    /// Clusters that `len` bytes take.
    #[inline]
    pub fn clusters_for(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// The largest disk, in bytes, that an L1 table of allowed length can map.
    pub fn max_size(&self) -> u64 {
        let span = u128::from(MAX_L1_BYTES / 8) << self.l1_entry_span_bits();
        // A multiple of 512, as every virtual size.
        u64::try_from(span).map_or(1 << 63, |span| span.min(1 << 63)) - 512
    }

    /// The mask of the subclusters that the bytes of `range` touch, in the
    /// cluster that begins at byte `start`.
    pub fn subclusters_touched(&self, start: u64, range: &Range<u64>) -> u32 {
        let clip = |at: u64| at.saturating_sub(start).min(self.cluster_size());
        let (first, end) = (clip(range.start), clip(range.end));
        if first >= end {
            return 0;
        }
        let bits = self.subcluster_bits();
        mask((first >> bits) as u32..end.div_ceil(1 << bits) as u32)
    }

    /// The mask of those subclusters that `range` holds wholly.
    pub fn subclusters_inside(&self, start: u64, range: &Range<u64>) -> u32 {
        let clip = |at: u64| at.saturating_sub(start).min(self.cluster_size());
        let bits = self.subcluster_bits();
        let first = clip(range.start).div_ceil(1 << bits) as u32;
        let end = (clip(range.end) >> bits) as u32;
        if first >= end { 0 } else { mask(first..end) }
    }

    /// Width of a refcount in bits.
    #[inline]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    #[inline]
    pub fn max_refcount(&self) -> u64 {
        super::refcount::max(self.refcount_order)
    }

    /// log2 of the refcounts in a refcount block.
    #[inline]
    pub fn refcounts_per_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block, which is one cluster.
    #[inline]
    pub fn refcounts_per_block(&self) -> u64 {
        1 << self.refcounts_per_block_bits()
    }

    /// Refcount table entries in one cluster.
    #[inline]
    pub fn reftable_entries_per_cluster(&self) -> u64 {
        self.cluster_size() / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        version: 3,
        extended_l2: false,
        external_data: false,
    };

    #[test]
    fn default_geometry() {
        assert_eq!(DEFAULT.cluster_size(), 65536);
        assert_eq!(DEFAULT.l2_entries(), 8192);
        assert_eq!(DEFAULT.l1_entry_span(), 512 << 20);
        assert_eq!(DEFAULT.refcounts_per_block(), 32768);
        assert_eq!(DEFAULT.max_refcount(), 65535);
        let guest = GuestOffset((3 << 29) + (5 << 16) + 77);
        assert_eq!(DEFAULT.l1_index(guest), 3);
        assert_eq!(DEFAULT.l2_index(guest), 5);
        assert_eq!(DEFAULT.guest_offset(3, 5), GuestOffset(guest.0 - 77));
        assert_eq!(DEFAULT.l1_entries_for(0), 0);
        assert_eq!(DEFAULT.l1_entries_for(1), 1);
        assert_eq!(DEFAULT.l1_entries_for((512 << 20) + 1), 2);
    }

    #[test]
    fn subclusters_of_a_range() {
        // 64 KiB clusters: subclusters of 2 KiB.
        let g = Geometry {
            extended_l2: true,
            ..DEFAULT
        };
        assert_eq!(g.subcluster_bits(), 11);
        assert_eq!(DEFAULT.subcluster_bits(), 16);
        let both = |start, range: Range<u64>| {
            (
                g.subclusters_touched(start, &range),
                g.subclusters_inside(start, &range),
            )
        };
        assert_eq!(both(0, 0..65536), (u32::MAX, u32::MAX));
        assert_eq!(both(0, 2047..4097), (0b111, 0b010));
        assert_eq!(both(0, 100..200), (1, 0));
        assert_eq!(both(65536, 2048..65536), (0, 0));
        assert_eq!(both(65536, 0..65537), (1, 0));
        assert_eq!(both(65536, 63488..1 << 20), (u32::MAX, u32::MAX));
        assert_eq!(both(65536, 131_071..131_072), (1 << 31, 0));
    }

    #[test]
    fn extremes_do_not_overflow() {
        for cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            for refcount_order in 0..=MAX_REFCOUNT_ORDER {
                for extended_l2 in [false, true] {
                    let g = Geometry {
                        cluster_bits,
                        refcount_order,
                        version: 3,
                        extended_l2,
                        external_data: false,
                    };
                    assert!(
                        g.refcounts_per_block() * u64::from(g.refcount_bits())
                            == g.cluster_size() * 8
                    );
                    assert!(g.l1_index(GuestOffset(u64::MAX)) < 1 << 63);
                    assert!(g.l1_entries_for(u64::MAX) > 0);
                    assert_eq!(
                        g.l1_entries_for(g.max_size()),
                        (MAX_L1_BYTES / 8).min((1 << 63) >> g.l1_entry_span_bits())
                    );
                }
            }
        }
    }
}
