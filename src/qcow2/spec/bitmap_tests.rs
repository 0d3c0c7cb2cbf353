//! Bitmap directories and tables: round trips and every breach.

use proptest::prelude::*;

use super::*;
use crate::qcow2::spec::entry::BadEntry;

const GEOMETRY: Geometry = Geometry {
    cluster_bits: 16,
    refcount_order: 4,
    version: 3,
    extended_l2: false,
    external_data: false,
};

fn bitmap(name: &str) -> Bitmap {
    Bitmap {
        table_offset: HostOffset(0x5_0000),
        table_size: 1,
        flags: BitmapFlags::AUTO,
        granularity_bits: 16,
        extra: Vec::new(),
        name: name.into(),
    }
}

fn directory(bitmaps: &[Bitmap]) -> (Vec<u8>, BitmapsExtension) {
    let mut bytes = Vec::new();
    for bitmap in bitmaps {
        bitmap.encode(&mut bytes).unwrap();
    }
    let extension = BitmapsExtension {
        nb_bitmaps: bitmaps.len() as u32,
        directory_size: bytes.len() as u64,
        directory_offset: HostOffset(0x4_0000),
    };
    (bytes, extension)
}

#[test]
fn directory_round_trip() {
    let with_extra = Bitmap {
        extra: vec![1, 2, 3],
        flags: BitmapFlags::EXTRA_DATA_COMPATIBLE,
        ..bitmap("b")
    };
    let bitmaps = [bitmap("a"), with_extra, bitmap("a name of nine")];
    let (bytes, extension) = directory(&bitmaps);
    assert_eq!(bytes.len() % 8, 0);
    let parsed = Bitmap::parse_directory(&bytes, &extension, &GEOMETRY).unwrap();
    assert_eq!(parsed, bitmaps);
    assert!(!parsed[1].has_foreign_data());
}

#[test]
fn every_breach_is_named() {
    let (good, extension) = directory(&[bitmap("a")]);
    let cases: [(usize, &[u8], &str); 10] = [
        (0, &[0; 8], "table offset"),
        (6, &[2], "table offset"),
        (8, &[0; 4], "table of 0 entries"),
        (8, &[0xff; 4], "table of"),
        (15, &[8], "unknown flags 0x8"),
        (16, &[2], "unknown type 2"),
        (17, &[8], "granularity"),
        (17, &[255], "granularity"),
        (18, &[0, 0], "name of 0 bytes"),
        (20, &[0xff; 4], "ends inside"),
    ];
    for (at, patch, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let error = Bitmap::parse_directory(&bytes, &extension, &GEOMETRY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = |bytes: &[u8], nb_bitmaps| {
        let extension = BitmapsExtension {
            nb_bitmaps,
            ..extension
        };
        Bitmap::parse_directory(bytes, &extension, &GEOMETRY)
            .unwrap_err()
            .to_string()
    };
    let twice = [good.clone(), good.clone()].concat();
    assert!(error(&twice, 2).contains("same name"));
    assert!(error(&twice, 1).contains("but its entries"));
    assert!(error(&good, 2).contains("ends inside"));
}

#[test]
fn extension_rules() {
    let parse = |nb: u32, reserved: u32, size: u64, offset: u64| {
        let mut data = Vec::new();
        data.extend_from_slice(&nb.to_be_bytes());
        data.extend_from_slice(&reserved.to_be_bytes());
        data.extend_from_slice(&size.to_be_bytes());
        data.extend_from_slice(&offset.to_be_bytes());
        BitmapsExtension::parse(&data, 0, 16)
    };
    assert!(parse(1, 0, 32, 0x4_0000).is_ok());
    for (nb, reserved, size, offset) in [
        (0, 0, 32, 0x4_0000),
        (65536, 0, 2 << 20, 0x4_0000),
        (1, 1, 32, 0x4_0000),
        (1, 0, 32, 0x4_0200),
        (1, 0, 32, 0),
        (1, 0, 16, 0x4_0000),
        (1, 0, u64::MAX, 0x4_0000),
        (1, 0, 32, 1 << 60),
    ] {
        let error = parse(nb, reserved, size, offset).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    }
}

#[test]
fn table_entries() {
    let decode = |raw| BitmapTableEntry::decode(raw, &GEOMETRY);
    assert_eq!(decode(0), Ok(BitmapTableEntry::Zeros));
    assert_eq!(decode(1), Ok(BitmapTableEntry::Ones));
    assert_eq!(
        decode(0x5_0000),
        Ok(BitmapTableEntry::Cluster(HostOffset(0x5_0000)))
    );
    assert_eq!(decode(0x5_0001), Err(BadEntry::ReservedBits(1)));
    assert_eq!(decode(3), Err(BadEntry::ReservedBits(2)));
    assert_eq!(decode(1 << 63), Err(BadEntry::ReservedBits(1 << 63)));
    assert_eq!(
        decode(0x5_0200),
        Err(BadEntry::Misaligned(HostOffset(0x5_0200)))
    );
}

#[test]
fn table_length_for_a_disk() {
    let entries = |size| Bitmap::table_entries_for(16, size, &GEOMETRY);
    assert_eq!(entries(0), 0);
    assert_eq!(entries(1), 1);
    assert_eq!(entries(1 << 35), 1);
    assert_eq!(entries((1 << 35) + 1), 2);
}

proptest! {
    #[test]
    fn random_directories_never_panic(bytes: Vec<u8>, nb_bitmaps in 0u32..4) {
        let extension = BitmapsExtension {
            nb_bitmaps, directory_size: bytes.len() as u64, directory_offset: HostOffset(u64::MAX),
        };
        let _ = Bitmap::parse_directory(&bytes, &extension, &GEOMETRY);
        let _ = BitmapsExtension::parse(&bytes, 0, 16);
    }

    #[test]
    fn damaged_directories_never_panic(at in 0usize..32, byte: u8) {
        let (mut bytes, extension) = directory(&[bitmap("name")]);
        bytes[at] = byte;
        let _ = Bitmap::parse_directory(&bytes, &extension, &GEOMETRY);
    }

    #[test]
    fn table_entries_round_trip(raw: u64) {
        for raw in [raw, raw & 0x00ff_ffff_ffff_0000] {
            if let Ok(entry) = BitmapTableEntry::decode(raw, &GEOMETRY) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
