//! Every rule about table entries, and every rule's breach.

use proptest::prelude::*;

use super::super::l2::{L2Entry, RawL2Entry, ZERO};
use super::super::subcluster::Subclusters;
use super::*;

const V3: Geometry = Geometry {
    cluster_bits: 16,
    refcount_order: 4,
    version: 3,
    extended_l2: false,
    external_data: false,
};
const V2: Geometry = Geometry { version: 2, ..V3 };
const EXTENDED: Geometry = Geometry {
    extended_l2: true,
    ..V3
};
const EXTERNAL: Geometry = Geometry {
    external_data: true,
    ..V3
};

#[test]
fn l1_entries() {
    let table = |offset, copied| {
        Ok(L1Entry::Table {
            offset: HostOffset(offset),
            copied,
        })
    };
    let cases = [
        (0, Ok(L1Entry::Unallocated)),
        (0x5_0000, table(0x5_0000, false)),
        (0x8000_0000_0005_0000, table(0x5_0000, true)),
        (0x00ff_ffff_ffff_0000, table(0x00ff_ffff_ffff_0000, false)),
        (0x5_0001, Err(BadEntry::ReservedBits(1))),
        (0x5_0100, Err(BadEntry::ReservedBits(0x100))),
        (1 << 56, Err(BadEntry::ReservedBits(1 << 56))),
        (1 << 62 | 0x5_0000, Err(BadEntry::ReservedBits(1 << 62))),
        (0x5_0200, Err(BadEntry::Misaligned(HostOffset(0x5_0200)))),
        (COPIED, Err(BadEntry::InHeader)),
    ];
    for (raw, expected) in cases {
        assert_eq!(L1Entry::decode(raw, &V3), expected, "{raw:#x}");
    }
}

#[test]
fn l2_entries() {
    let host = HostOffset(0x5_0000);
    let copied = true;
    let cases = [
        (0, V3, Ok(L2Entry::Unallocated)),
        (1, V3, Ok(L2Entry::Zero)),
        (1, V2, Err(BadEntry::ZeroFlagInV2)),
        (0x5_0001, V2, Err(BadEntry::ZeroFlagInV2)),
        (1, EXTENDED, Ok(L2Entry::Unallocated)),
        (COPIED | 0x5_0000, V2, Ok(L2Entry::Data { host, copied })),
        (
            0x5_0000,
            V3,
            Ok(L2Entry::Data {
                host,
                copied: false,
            }),
        ),
        (
            COPIED | 0x5_0001,
            V3,
            Ok(L2Entry::ZeroAllocated { host, copied }),
        ),
        (0x5_0002, V3, Err(BadEntry::ReservedBits(2))),
        (1 << 61 | 0x5_0000, V3, Err(BadEntry::ReservedBits(1 << 61))),
        (1 << 56 | 0x5_0000, V3, Err(BadEntry::ReservedBits(1 << 56))),
        (
            0x5_8000,
            V3,
            Err(BadEntry::Misaligned(HostOffset(0x5_8000))),
        ),
        (
            COMPRESSED | COPIED | 0x5_0000,
            V3,
            Err(BadEntry::CopiedCompressed),
        ),
        (COMPRESSED, V3, Err(BadEntry::InHeader)),
        (COMPRESSED | 0xffff, V3, Err(BadEntry::InHeader)),
    ];
    for (raw, geometry, expected) in cases {
        assert_eq!(L2Entry::decode(raw, &geometry), expected, "{raw:#x}");
    }
}

/// QEMU does not look at it.
#[test]
fn the_lowest_bit_says_nothing_beside_a_bitmap() {
    let zeros = 0xffff_ffff << 32;
    for (descriptor, bitmap) in [(0x5_0000 | COPIED, 5), (0, zeros), (COPIED, zeros), (0, 0)] {
        let decode = |descriptor| L2Entry::decode(RawL2Entry { descriptor, bitmap }, &EXTENDED);
        assert_eq!(decode(descriptor | ZERO), decode(descriptor));
        assert!(decode(descriptor).is_ok());
    }
}

/// QEMU leaves it where a cluster was, in zero entries.
#[test]
fn copied_without_an_offset_says_nothing() {
    let decode =
        |descriptor, bitmap, geometry| L2Entry::decode(RawL2Entry { descriptor, bitmap }, geometry);
    for geometry in [&V2, &V3, &EXTENDED] {
        assert_eq!(decode(COPIED, 0, geometry), Ok(L2Entry::Unallocated));
    }
    assert_eq!(decode(COPIED | 1, 0, &V3), Ok(L2Entry::Zero));
    assert_eq!(decode(COPIED | 1, 0, &V2), Err(BadEntry::ZeroFlagInV2));
    let zeros = 0xffff_ffff << 32;
    assert_eq!(decode(COPIED, zeros, &EXTENDED), Ok(L2Entry::Zero));
    assert_eq!(
        decode(COPIED, 5 << 32, &EXTENDED),
        decode(0, 5 << 32, &EXTENDED)
    );
    assert_eq!(
        decode(COPIED, 1, &EXTENDED),
        Err(BadEntry::SubclusterNowhere)
    );
}

#[test]
fn offset_zero_is_data_only_in_an_external_file() {
    let host = HostOffset(0);
    let copied = true;
    let decode = |raw: u64| L2Entry::decode(raw, &EXTERNAL);
    assert_eq!(decode(COPIED), Ok(L2Entry::Data { host, copied }));
    assert_eq!(
        decode(COPIED | 1),
        Ok(L2Entry::ZeroAllocated { host, copied })
    );
    assert_eq!(decode(COPIED | 2), Err(BadEntry::ReservedBits(2)));
    assert_eq!(decode(0), Ok(L2Entry::Unallocated));
    assert_eq!(decode(1), Ok(L2Entry::Zero));
    assert_eq!(
        decode(COMPRESSED | 0x5_0000),
        Err(BadEntry::CompressedExternal)
    );
    let data = decode(COPIED | 0x5_0000).unwrap();
    assert_eq!(data.references(&EXTERNAL), None, "not counted in the image");
    assert_eq!(data.references(&V3), Some(5..=5));
}

/// The bitmap of an extended entry: every kind of entry and every breach.
#[test]
fn extended_entries() {
    let host = HostOffset(0x5_0000);
    let at = COPIED | 0x5_0000;
    let raw = |descriptor, bitmap| RawL2Entry { descriptor, bitmap };
    let mixed = |host, bitmap| {
        Ok(L2Entry::Mixed {
            host,
            copied: host.is_some(),
            subclusters: Subclusters::decode(bitmap).unwrap(),
        })
    };
    let (data, zeros) = (0xffff_ffff, 0xffff_ffff << 32);
    let copied = true;
    let cases = [
        (raw(0, 0), Ok(L2Entry::Unallocated)),
        (raw(0, zeros), Ok(L2Entry::Zero)),
        (raw(at, zeros), Ok(L2Entry::ZeroAllocated { host, copied })),
        (raw(at, data), Ok(L2Entry::Data { host, copied })),
        (raw(at, 0), mixed(Some(host), 0)),
        (raw(at, 0x5_0000_0002), mixed(Some(host), 0x5_0000_0002)),
        (raw(0, 0x5_0000_0000), mixed(None, 0x5_0000_0000)),
        (raw(0, 2), Err(BadEntry::SubclusterNowhere)),
        (raw(at, 0x6_0000_0003), Err(BadEntry::SubclusterBoth(2))),
        (raw(at | 2, data), Err(BadEntry::ReservedBits(2))),
        (
            raw(COMPRESSED | 0x5_0000, 1),
            Err(BadEntry::CompressedSubclusters),
        ),
        (raw(COPIED, data), Err(BadEntry::SubclusterNowhere)),
    ];
    for (raw, expected) in cases {
        let entry = L2Entry::decode(raw, &EXTENDED);
        assert_eq!(entry, expected, "{raw:x?}");
        if let Ok(entry) = entry {
            assert_eq!(entry.encode(&EXTENDED), raw);
            let mut bytes = [0xee; 17];
            raw.write(&mut bytes, &EXTENDED);
            assert_eq!(RawL2Entry::read(&bytes, &EXTENDED), raw);
            assert_eq!(bytes[16], 0xee);
            assert_eq!(entry.with_copied(true), entry);
            let shared = entry.with_copied(false);
            assert_eq!(shared.subclusters(), entry.subclusters());
            assert!(shared.host().is_none_or(|(_, copied)| !copied));
        }
    }
    assert!(matches!(
        L2Entry::decode(raw(COMPRESSED | 0x5_0000, 0), &EXTENDED),
        Ok(L2Entry::Compressed(_))
    ));
}

#[test]
fn compressed_descriptor() {
    // 64 KiB clusters: x = 54; one additional sector, offset 0x50010.
    let raw = COMPRESSED | 1 << 54 | 0x5_0010;
    let Ok(L2Entry::Compressed(range)) = L2Entry::decode(raw, &V3) else {
        panic!("not compressed");
    };
    assert_eq!(range.offset, HostOffset(0x5_0010));
    assert_eq!(range.max_len, 1024 - 16);
    assert_eq!(range.clusters_touched(&V3), 5..=5);
    assert_eq!(L2Entry::Compressed(range).encode(&V3), raw.into());

    // 512-byte clusters: x = 61, so that the offset could have 61 bits.
    let tiny = Geometry {
        cluster_bits: 9,
        ..V3
    };
    let far = L2Entry::decode(COMPRESSED | 1 << 56 | 512, &tiny);
    assert_eq!(far, Err(BadEntry::TooFar(HostOffset(1 << 56 | 512))));
    assert!(CompressedRange::new(HostOffset(1 << 56), 1, &tiny).is_none());
    // 2 MiB clusters: only 49 bits of offset.
    let huge = Geometry {
        cluster_bits: 21,
        ..V3
    };
    assert!(CompressedRange::new(HostOffset(1 << 49), 1, &huge).is_none());
    assert!(CompressedRange::new(HostOffset((1 << 49) - 1), 1, &huge).is_some());
}

/// A range that ends with a cluster used to be charged to the next cluster
/// too (or, cut one sector early, to one too few).
#[test]
fn clusters_touched_at_boundaries() {
    let touched = |offset, len| {
        CompressedRange::new(HostOffset(offset), len, &V3)
            .unwrap()
            .clusters_touched(&V3)
    };
    assert_eq!(touched(0x1_0000, 0x1_0000), 1..=1);
    assert_eq!(touched(0x1_0000, 0xfe01), 1..=1);
    assert_eq!(touched(0x1_fe00, 0x200), 1..=1);
    assert_eq!(touched(0x1_ffff, 1), 1..=1);
    assert_eq!(touched(0x1_ffff, 2), 1..=2);
    assert_eq!(touched(0x1_fff0, 0x10), 1..=1);
    assert_eq!(touched(0x1_fff0, 0x1_0010), 1..=2);
    assert_eq!(touched(0x1_fff0, 0x1_0011), 1..=3);
}

fn geometries() -> impl Strategy<Value = Geometry> {
    (9u32..=21, 2u8..=3, any::<bool>()).prop_map(|(cluster_bits, version, extended)| Geometry {
        cluster_bits,
        refcount_order: 4,
        version,
        extended_l2: extended && version == 3 && cluster_bits >= 14,
        external_data: false,
    })
}

proptest! {
    #[test]
    fn what_decodes_encodes_back(raw: u64, bitmap: u64, geometry in geometries()) {
        // Random numbers are mostly refused: also try them made plausible.
        let aligned = raw & OFFSET >> geometry.cluster_bits << geometry.cluster_bits;
        let plausible = [
            raw,
            aligned,
            aligned | COPIED,
            aligned | ZERO,
            aligned | COPIED | ZERO,
            raw & (COMPRESSED - 1) & !(0x3f << 56) | COMPRESSED,
        ];
        for raw in plausible {
            if let Ok(entry) = L1Entry::decode(raw, &geometry) {
                prop_assert_eq!(entry.encode(&geometry), raw);
            }
            let external = Geometry { external_data: true, ..geometry };
            let bitmap = if geometry.extended_l2 { bitmap & !(bitmap << 32) } else { 0 };
            for (raw, geometry) in [(RawL2Entry { descriptor: raw, bitmap }, geometry), (raw.into(), geometry), (raw.into(), external)] {
                let Ok(entry) = L2Entry::decode(raw, &geometry) else { continue };
                let compressed = matches!(entry, L2Entry::Compressed(_));
                let idle = if geometry.extended_l2 && !compressed { ZERO } else { 0 };
                if entry.host().is_some() || raw.descriptor & COPIED == 0 {
                    let descriptor = raw.descriptor & !idle;
                    prop_assert_eq!(entry.encode(&geometry), RawL2Entry { descriptor, ..raw });
                }
                if let L2Entry::Compressed(range) = entry {
                    let end = range.offset.0 + range.max_len;
                    prop_assert_eq!(end % 512, 0);
                    prop_assert!(range.max_len <= 2 * geometry.cluster_size());
                    let clusters = range.clusters_touched(&geometry);
                    prop_assert!(*clusters.end() << geometry.cluster_bits < end);
                    prop_assert!((clusters.end() + 1) << geometry.cluster_bits >= end);
                }
            }
        }
    }

    #[test]
    fn compressed_ranges_hold_what_they_were_made_for(
        geometry in geometries(), offset in 0u64..1 << 49, len in 0u64..1 << 22,
    ) {
        let offset = offset.max(geometry.cluster_size());
        match CompressedRange::new(HostOffset(offset), len, &geometry) {
            None => prop_assert!(len == 0 || len > geometry.cluster_size() || offset >= 1 << 49),
            Some(range) => {
                prop_assert!(range.max_len >= len && range.max_len < len + 512);
                let raw = L2Entry::Compressed(range).encode(&geometry);
                prop_assert_eq!(L2Entry::decode(raw, &geometry), Ok(L2Entry::Compressed(range)));
            }
        }
    }
}
