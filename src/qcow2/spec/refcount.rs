//! Reference counts: entries of the refcount table and of refcount blocks
//! (qcow2 specification, "Host cluster management").

use super::addr::HostOffset;
use super::entry::BadEntry;
use super::geometry::Geometry;

/// A refcount would have left the range its width can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefcountError {
    /// More references than [`max`] allows.
    Overflow,
    /// Fewer than none.
    Underflow,
}

/// The largest refcount of 2^`order` bits.
#[inline]
pub fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1u32 << order))
}

/// Refcount number `index` of a block.
///
/// # Panics
///
/// When `index` is not inside `block`: an error of the caller, who knows the
/// block's length, never of the image.
#[inline]
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let (byte, shift) = sub_byte(order, index);
            u64::from(block[byte] >> shift) & max(order)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes(wide(block, index))),
        5 => u64::from(u32::from_be_bytes(wide(block, index))),
        _ => u64::from_be_bytes(wide(block, index)),
    }
}

/// Makes refcount number `index` of a block `value`, which must not be above
/// [`max`].
///
/// # Panics
///
/// As [`get`].
#[inline]
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(value <= max(order), "a refcount of {value} does not fit");
    // The truncating casts lose nothing: value is at most max(order).
    match order {
        0..=2 => {
            let (byte, shift) = sub_byte(order, index);
            let mask = (max(order) as u8) << shift;
            block[byte] = (block[byte] & !mask) | ((value as u8) << shift & mask);
        }
        3 => block[index] = value as u8,
        4 => put(block, index, (value as u16).to_be_bytes()),
        5 => put(block, index, (value as u32).to_be_bytes()),
        _ => put(block, index, value.to_be_bytes()),
    }
}

/// `value + delta`, if 2^`order` bits can hold it.
#[inline]
pub fn checked_add(value: u64, delta: i64, order: u32) -> Result<u64, RefcountError> {
    if delta < 0 {
        return value
            .checked_sub(delta.unsigned_abs())
            .ok_or(RefcountError::Underflow);
    }
    value
        .checked_add(delta.unsigned_abs())
        .filter(|&sum| sum <= max(order))
        .ok_or(RefcountError::Overflow)
}

/// Adds `delta` to refcount number `index` and returns the new count; on an
/// error the block is unchanged.
///
/// # Panics
///
/// As [`get`].
#[inline]
pub fn adjust(
    block: &mut [u8],
    order: u32,
    index: usize,
    delta: i64,
) -> Result<u64, RefcountError> {
    let value = checked_add(get(block, order, index), delta, order)?;
    set(block, order, index, value);
    Ok(value)
}

/// Byte and bit at which a refcount narrower than a byte begins; the first
/// one is in the least significant bits.
#[inline]
fn sub_byte(order: u32, index: usize) -> (usize, u32) {
    let per_byte_bits = 3 - order;
    let within = index & ((1 << per_byte_bits) - 1);
    (index >> per_byte_bits, (within as u32) << order)
}

#[inline]
fn wide<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[index * N..][..N]);
    bytes
}

#[inline]
fn put<const N: usize>(block: &mut [u8], index: usize, bytes: [u8; N]) {
    block[index * N..][..N].copy_from_slice(&bytes);
}

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReftableEntry {
    /// No block: every count it would hold is 0.
    Absent,
    /// The refcount block at this offset.
    Block(HostOffset),
}

impl ReftableEntry {
    /// Takes an entry apart; `raw` is the big-endian number as a native one.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw == 0 {
            return Ok(Self::Absent);
        }
        if raw & 0x1ff != 0 {
            return Err(BadEntry::ReservedBits(raw & 0x1ff));
        }
        let offset = HostOffset(raw);
        if !offset.is_aligned(geometry.cluster_bits) {
            return Err(BadEntry::Misaligned(offset));
        }
        if raw >= 1 << 56 {
            return Err(BadEntry::TooFar(offset));
        }
        Ok(Self::Block(offset))
    }

    /// The number to be stored, big-endian, on disk.
    #[inline]
    pub fn encode(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Block(offset) => offset.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bit_order_of_the_specification() {
        // Width 1: refcount b of byte B is bit b; width 2: bits 2b and 2b+1.
        let block = [0b1000_0001, 0b0000_0010, 0, 0, 0, 0, 0, 7];
        assert_eq!(get(&block, 0, 0), 1);
        assert_eq!(get(&block, 0, 1), 0);
        assert_eq!(get(&block, 0, 7), 1);
        assert_eq!(get(&block, 0, 9), 1);
        assert_eq!(get(&block, 1, 3), 2);
        assert_eq!(get(&block, 2, 1), 8);
        assert_eq!(get(&block, 3, 7), 7);
        assert_eq!(get(&block, 4, 0), 0x8102);
        assert_eq!(get(&block, 5, 1), 7);
        assert_eq!(get(&block, 6, 0), 0x8102_0000_0000_0007);
    }

    #[test]
    fn never_wraps() {
        let mut block = [0xffu8; 8];
        for order in 0..=6 {
            assert_eq!(
                adjust(&mut block, order, 0, 1),
                Err(RefcountError::Overflow)
            );
            assert_eq!(checked_add(0, -1, order), Err(RefcountError::Underflow));
            assert_eq!(
                checked_add(max(order), i64::MAX, order),
                Err(RefcountError::Overflow)
            );
        }
        assert_eq!(block, [0xff; 8]);
        assert_eq!(max(0), 1);
        assert_eq!(max(6), u64::MAX);
        assert_eq!(checked_add(u64::MAX, i64::MIN, 6), Ok((1 << 63) - 1));
    }

    proptest! {
        #[test]
        fn a_write_changes_one_count_only(
            order in 0u32..=6, index in 0usize..512, value: u64, fill: [u8; 32],
        ) {
            let mut block: Vec<u8> = fill.iter().copied().cycle().take(4096).collect();
            let before: Vec<u64> = (0..512).map(|i| get(&block, order, i)).collect();
            let value = value & max(order);
            set(&mut block, order, index, value);
            for (i, &old) in before.iter().enumerate() {
                prop_assert_eq!(get(&block, order, i), if i == index { value } else { old });
            }
        }

        #[test]
        fn reftable_entries(raw: u64, bits in 9u32..=21) {
            let geometry = Geometry { cluster_bits: bits, refcount_order: 4, version: 3, extended_l2: false, external_data: false };
            for raw in [raw, raw >> 8 >> bits << bits] {
                if let Ok(entry) = ReftableEntry::decode(raw, &geometry) {
                    prop_assert_eq!(entry.encode(), raw);
                }
            }
        }
    }
}
