//! The bitmap in the second half of an extended L2 entry: which of a cluster's
//! 32 subclusters have data, and which read as zeros.

use std::ops::Range;

use super::entry::BadEntry;

/// Subclusters of a cluster.
pub const SUBCLUSTERS: u32 = 32;

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// The layer below shows through, or zeros.
    Unallocated,
    /// Zeros, whatever is below.
    Zero,
    /// Data, in its place of the cluster's host cluster.
    Data,
}

/// What the subclusters of one cluster are; none is both allocated and zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters {
    /// Bit n: subcluster n has data.
    allocated: u32,
    /// Bit n: subcluster n reads as zeros.
    zero: u32,
}

impl Subclusters {
    /// All are unallocated.
    pub const UNALLOCATED: Self = Self {
        allocated: 0,
        zero: 0,
    };
    /// All read as zeros.
    pub const ZERO: Self = Self {
        allocated: 0,
        zero: u32::MAX,
    };
    /// All have data.
    pub const DATA: Self = Self {
        allocated: u32::MAX,
        zero: 0,
    };

    /// Takes a bitmap apart: the low half tells who is allocated, the high
    /// half who reads as zeros.
    #[inline]
    pub fn decode(bitmap: u64) -> Result<Self, BadEntry> {
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zero != 0 {
            return Err(BadEntry::SubclusterBoth(allocated & zero));
        }
        Ok(Self { allocated, zero })
    }

    /// The number to be stored, big-endian, on disk.
    #[inline]
    pub fn encode(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// The mask of those that have data.
    #[inline]
    pub fn allocated(self) -> u32 {
        self.allocated
    }

    /// The mask of those that read as zeros.
    #[inline]
    pub fn zero(self) -> u32 {
        self.zero
    }

    /// What subcluster `index` is.
    #[inline]
    pub fn get(self, index: u32) -> Subcluster {
        if self.allocated >> index & 1 != 0 {
            Subcluster::Data
        } else if self.zero >> index & 1 != 0 {
            Subcluster::Zero
        } else {
            Subcluster::Unallocated
        }
    }

    /// How many subclusters from `index` on are what it is.
    #[inline]
    pub fn run(self, index: u32) -> u32 {
        let alike = match self.get(index) {
            Subcluster::Data => self.allocated,
            Subcluster::Zero => self.zero,
            Subcluster::Unallocated => !(self.allocated | self.zero),
        };
        (alike >> index).trailing_ones()
    }

    /// With those of `mask` having data.
    #[inline]
    #[must_use]
    pub fn with_data(self, mask: u32) -> Self {
        Self {
            allocated: self.allocated | mask,
            zero: self.zero & !mask,
        }
    }

    /// With those of `mask` reading as zeros.
    #[inline]
    #[must_use]
    pub fn with_zeros(self, mask: u32) -> Self {
        Self {
            allocated: self.allocated & !mask,
            zero: self.zero | mask,
        }
    }
}

/// The mask of the subclusters in `range`.
#[inline]
pub fn mask(range: Range<u32>) -> u32 {
    let below = |n: u32| ((1u64 << n.min(SUBCLUSTERS)) - 1) as u32;
    below(range.end) & !below(range.start)
}

/// The runs of adjacent subclusters in a mask.
pub fn runs(mut mask: u32) -> impl Iterator<Item = Range<u32>> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let start = mask.trailing_zeros();
        let end = start + (mask >> start).trailing_ones();
        mask &= !self::mask(start..end);
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_runs() {
        assert_eq!(mask(0..32), u32::MAX);
        assert_eq!(mask(3..5), 0b11000);
        assert_eq!(mask(31..32), 1 << 31);
        assert_eq!(mask(7..7), 0);
        let found: Vec<_> = runs(0x8000_0039).collect();
        assert_eq!(found, [0..1, 3..6, 31..32]);
        assert!(runs(u32::MAX).eq(std::iter::once(0..32)));
        assert!(runs(0).next().is_none());
    }

    #[test]
    fn a_subcluster_is_one_thing() {
        let bits = Subclusters::decode(0x0000_00f0_0000_000f).unwrap();
        assert_eq!(bits.get(0), Subcluster::Data);
        assert_eq!(bits.get(4), Subcluster::Zero);
        assert_eq!(bits.get(8), Subcluster::Unallocated);
        assert_eq!((bits.run(1), bits.run(4), bits.run(8)), (3, 4, 24));
        assert_eq!(bits.encode(), 0x0000_00f0_0000_000f);
        let written = bits.with_data(0x10);
        assert_eq!(written.encode(), 0x0000_00e0_0000_001f);
        assert_eq!(written.with_zeros(0x3).encode(), 0x0000_00e3_0000_001c);
        assert_eq!(
            Subclusters::decode(0x0000_0001_0000_0003),
            Err(BadEntry::SubclusterBoth(1))
        );
        assert_eq!(Subclusters::DATA.run(0), 32);
    }
}
