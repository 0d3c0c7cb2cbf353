//! Byte addresses: in the virtual disk and in the image file. Two types, so
//! that one is never taken for the other.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The largest multiple of 2^`bits` not above this.
            #[inline]
            #[must_use]
            pub fn align_down(self, bits: u32) -> Self {
                Self(self.0 >> bits << bits)
            }

            /// Whether this is a multiple of 2^`bits`.
            #[inline]
            pub fn is_aligned(self, bits: u32) -> bool {
                self.offset_in(bits) == 0
            }

            /// The distance in bytes from the multiple of 2^`bits` below.
            #[inline]
            pub fn offset_in(self, bits: u32) -> u64 {
                self.0 & ((1 << bits) - 1)
            }

            /// The address `len` bytes on, or `None` past 2^64.
            #[inline]
            pub fn checked_add(self, len: u64) -> Option<Self> {
                self.0.checked_add(len).map(Self)
            }
        }

        // Addresses that passed validation are below 2^63 and lengths are
        // table or disk sizes, so the sum of the two cannot overflow.
        impl Add<u64> for $name {
            type Output = Self;

            #[inline]
            fn add(self, len: u64) -> Self {
                Self(self.0 + len)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, len: u64) {
                self.0 += len;
            }
        }

        impl Sub for $name {
            type Output = u64;

            /// The distance in bytes; `other` must not be above.
            #[inline]
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

offset! {
    /// A byte address in the virtual disk.
    GuestOffset
}

offset! {
    /// A byte address in the image file.
    HostOffset
}

impl GuestOffset {
    /// The number of the guest cluster that holds this byte.
    #[inline]
    pub fn cluster(self, cluster_bits: u32) -> u64 {
        self.0 >> cluster_bits
    }
}

impl HostOffset {
    /// The number of the host cluster that holds this byte.
    #[inline]
    pub fn cluster(self, cluster_bits: u32) -> u64 {
        self.0 >> cluster_bits
    }

    /// The first byte of host cluster number `index`.
    #[inline]
    pub fn of_cluster(index: u64, cluster_bits: u32) -> Self {
        Self(index << cluster_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_and_distance() {
        let offset = HostOffset(0x1_2345);
        assert_eq!(offset.align_down(16), HostOffset(0x1_0000));
        assert_eq!(offset.offset_in(16), 0x2345);
        assert!(!offset.is_aligned(9) && offset.align_down(9).is_aligned(9));
        assert_eq!(offset + 0xbb - offset, 0xbb);
        assert_eq!(HostOffset(u64::MAX).checked_add(1), None);
        assert_eq!(offset.cluster(16), 1);
        assert_eq!(HostOffset::of_cluster(3, 16), HostOffset(0x3_0000));
        assert_eq!(
            format!("{offset} {offset:?}"),
            "0x12345 HostOffset(0x12345)"
        );
    }
}
