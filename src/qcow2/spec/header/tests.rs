//! Every rule about the header and every rule's breach; round trips; noise.

use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

const FILE_LEN: u64 = 0x4_0000;

/// A header with everything that can be together.
fn full() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 1 << 30,
        crypt_method: CryptMethod::None,
        l1_size: 2,
        l1_table_offset: HostOffset(0x3_0000),
        refcount_table_offset: HostOffset(0x1_0000),
        refcount_table_clusters: 1,
        nb_snapshots: 1,
        snapshots_offset: HostOffset(0x2_0000),
        incompatible: Incompatible::COMPRESSION,
        compatible: Compatible::LAZY_REFCOUNTS | Compatible::from_bits_retain(1 << 40),
        autoclear: Autoclear::BITMAPS | Autoclear::from_bits_retain(1 << 41),
        refcount_order: 6,
        compression_type: CompressionType::Zstd,
        unknown_fields: (0..15).collect(),
        extensions: vec![
            Extension::BackingFormat("raw".into()),
            Extension::Unknown {
                kind: 0x1234_5678,
                data: b"kept".to_vec(),
            },
            Extension::FeatureNames(FeatureName::all()),
            Extension::Bitmaps(BitmapsExtension {
                nb_bitmaps: 1,
                directory_size: 32,
                directory_offset: HostOffset(0x5_0000),
            }),
        ],
        backing_file: Some("base.img".into()),
    }
}

/// The least there is.
fn v2() -> Header {
    Header {
        version: 2,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible::empty(),
        compatible: Compatible::empty(),
        autoclear: Autoclear::empty(),
        refcount_order: 4,
        compression_type: CompressionType::Deflate,
        unknown_fields: Vec::new(),
        extensions: Vec::new(),
        backing_file: None,
        ..full()
    }
}

fn parse(bytes: &[u8]) -> crate::Result<Header> {
    let prefix = Prefix::parse(&bytes[..PROBE_LEN.min(bytes.len())])?;
    assert!((512..=2 << 20).contains(&prefix.cluster_size()));
    Header::parse(bytes, FILE_LEN)
}

#[test]
fn round_trips() {
    let short_v3 = Header { version: 3, ..v2() };
    for header in [full(), v2(), short_v3] {
        let bytes = header.encode().unwrap();
        assert_eq!(parse(&bytes).unwrap(), header);
        // The same with the rest of the cluster there.
        let mut cluster = bytes.clone();
        cluster.resize(65536, 0);
        assert_eq!(parse(&cluster).unwrap(), header);
    }
    assert_eq!(v2().header_length(), 72);
    assert_eq!(full().header_length(), 120);
}

#[test]
fn single_field_updates_match_the_whole_header() {
    let header = full();
    let bytes = header.encode().unwrap();
    let at = |offset: HostOffset| &bytes[offset.0 as usize..][..12];
    assert_eq!(at(L1_AT), header.l1_update());
    assert_eq!(at(REFTABLE_AT), header.reftable_update());
    assert_eq!(at(SNAPSHOTS_AT), header.snapshots_update());
    assert_eq!(at(SIZE_AT)[..8], header.size.to_be_bytes());
    assert_eq!(
        at(INCOMPATIBLE_AT)[..8],
        header.incompatible.bits().to_be_bytes()
    );
    assert_eq!(
        at(COMPATIBLE_AT)[..8],
        header.compatible.bits().to_be_bytes()
    );
    assert_eq!(at(AUTOCLEAR_AT)[..8], header.autoclear.bits().to_be_bytes());
    assert_eq!(at(COMPRESSION_TYPE_AT)[0], 1);
}

#[test]
fn broken_fields_are_named_with_their_offset() {
    // Where, what, the kind of error, and words of it. The offset in the
    // error is that of the field.
    let invalid = ErrorKind::InvalidFormat;
    let unsupported = ErrorKind::Unsupported;
    let cases: [(usize, &[u8], ErrorKind, &str); 43] = [
        (
            0,
            b"QFI\0",
            invalid,
            "magic number is missing (at offset 0x0)",
        ),
        (
            7,
            &[1],
            unsupported,
            "version 1 is not supported: only 2 and 3 are (at offset 0x4)",
        ),
        (7, &[4], unsupported, "version 4"),
        (4, &[1], unsupported, "version 16777219"),
        (
            8,
            &[0xff; 8],
            invalid,
            "name at 0xffffffffffffffff is not in the header cluster (at offset 0x8)",
        ),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 0, 8],
            invalid,
            "name at 0x8 is not in",
        ),
        (
            8,
            &[0, 0, 0, 0, 0, 1, 0, 1],
            invalid,
            "name at 0x10001 is not in",
        ),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 0xff, 0xfe],
            invalid,
            "leaves the header cluster",
        ),
        (
            16,
            &[0, 0, 4, 0],
            invalid,
            "name of 1024 bytes is longer than 1023 (at offset 0x10)",
        ),
        (16, &[0, 0, 0, 9], invalid, "NUL"),
        (20, &[0, 0, 0, 8], invalid, "cluster size 2^8"),
        (
            20,
            &[0, 0, 0, 22],
            invalid,
            "cluster size 2^22 is not between 512 bytes and 2 MiB (at offset 0x14)",
        ),
        (20, &[0xff; 4], invalid, "cluster size 2^4294967295"),
        (24, &[0x80], invalid, "virtual size"),
        (24, &[0, 0, 0, 1], invalid, "L1 table is too small"),
        (
            32,
            &[0, 0, 0, 2],
            invalid,
            "encryption header extension is missing (at offset 0x20)",
        ),
        (32, &[0, 0, 0, 3], unsupported, "encryption method 3"),
        (
            36,
            &[0, 0, 0, 1],
            invalid,
            "L1 table is too small: 1 entries, but the virtual size needs 2 (at offset 0x24)",
        ),
        (36, &[0, 0x40, 0, 1], invalid, "Active L1 table too large"),
        (36, &[0xff; 4], invalid, "Active L1 table too large"),
        (
            46,
            &[2],
            invalid,
            "L1 table offset 0x30200 is not a multiple of the cluster size (at offset 0x28)",
        ),
        (40, &[0xff, 0, 0, 0, 0, 3, 0, 0], invalid, "beyond 2^56"),
        (40, &[0; 8], invalid, "L1 table lies in the header cluster"),
        (
            45,
            &[4],
            invalid,
            "behind the end of the file (262144 bytes)",
        ),
        (
            45,
            &[1],
            invalid,
            "the L1 table and the refcount table overlap",
        ),
        (
            45,
            &[2],
            invalid,
            "the L1 table and the snapshot table overlap",
        ),
        (54, &[1], invalid, "refcount table offset 0x10100"),
        (48, &[0; 8], invalid, "refcount table lies in the header"),
        (48, &[0xff; 8], invalid, "refcount table offset"),
        (
            56,
            &[0; 4],
            invalid,
            "does not contain a reference count table (at offset 0x38)",
        ),
        (
            56,
            &[0, 0, 0, 129],
            invalid,
            "Reference count table too large",
        ),
        (56, &[0xff; 4], invalid, "Reference count table too large"),
        (
            60,
            &[0, 1, 0, 1],
            invalid,
            "65537 snapshots are more than 65536 (at offset 0x3c)",
        ),
        (70, &[1], invalid, "snapshot table offset 0x20100 is not"),
        (64, &[0; 8], invalid, "snapshot table lies in the header"),
        (79, &[0], invalid, "compression type is not zlib but"),
        (
            104,
            &[0],
            invalid,
            "feature bit is set but the compression type is zlib (at offset 0x68)",
        ),
        (104, &[2], unsupported, "compression type 2"),
        (
            95,
            &[3],
            invalid,
            "declared raw but there is no external data file (at offset 0x58)",
        ),
        (99, &[7], invalid, "refcounts of 2^7 bits"),
        (
            103,
            &[96],
            invalid,
            "header length of 96 bytes is too short",
        ),
        (103, &[108], invalid, "108 bytes is not a multiple of 8"),
        (
            100,
            &[0, 1, 0, 8],
            invalid,
            "65544 bytes is longer than a cluster (at offset 0x64)",
        ),
    ];
    let good = full().encode().unwrap();
    for (at, patch, kind, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let error = parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(
            error.to_string().contains(expected),
            "{error}, not {expected}"
        );
    }
}

#[test]
fn broken_combinations_are_refused() {
    let refused = |change: fn(&mut Header), expected: &str| {
        let mut header = full();
        change(&mut header);
        let error = header.encode().unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error}, not {expected}"
        );
    };
    refused(|h| h.extensions.clear(), "no bitmaps extension");
    refused(
        |h| {
            h.incompatible |= Incompatible::EXTENDED_L2;
            h.cluster_bits = 13;
            h.l1_size = 1 << 15;
        },
        "clusters of 16 KiB",
    );
    refused(
        |h| {
            h.incompatible |= Incompatible::DATA_FILE;
            h.autoclear |= Autoclear::DATA_FILE_RAW;
        },
        "cannot have a backing file",
    );
    refused(
        |h| {
            h.extensions.push(Extension::CryptoHeader {
                offset: HostOffset(0x6_0000),
                len: 512,
            });
        },
        "not encrypted with LUKS",
    );
    refused(|h| h.version = 2, "do not exist in version 2");
    refused(
        |h| h.backing_file = Some("x".repeat(1024).into()),
        "at most 1023",
    );
    refused(|h| h.backing_file = Some("a\0b".into()), "NUL");
    refused(
        |h| {
            h.extensions.push(Extension::Unknown {
                kind: 5,
                data: vec![0; 65536],
            });
        },
        "more than a cluster of 65536",
    );
}

#[test]
fn extensions_are_bounded() {
    let with = |extension: &[u8]| {
        let mut bytes = v2().encode().unwrap();
        bytes.truncate(V2_LEN);
        bytes.extend_from_slice(extension);
        bytes.resize(65536, 0);
        parse(&bytes)
    };
    let refused = |extension: &[u8], expected: &str| {
        let error = with(extension).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat);
        assert!(
            error.to_string().contains(expected),
            "{error}, not {expected}"
        );
    };
    refused(
        b"abcd\xff\xff\xff\xff",
        "0x61626364 of 4294967295 bytes does not fit into the header cluster (at offset 0x48)",
    );
    refused(b"abcd\x00\x00\xff\xff", "does not fit");
    refused(
        b"\xe2\x79\x2a\xca\x00\x00\x00\x10sixteen bytes ok",
        "16 bytes",
    );
    refused(b"\xe2\x79\x2a\xca\x00\x00\x00\x02a\0", "not text");
    refused(b"\xe2\x79\x2a\xca\x00\x00\x00\x02\xff\xfe", "not text");
    let twice = b"\xe2\x79\x2a\xca\x00\x00\x00\x03raw\0\0\0\0\0".repeat(2);
    refused(&twice, "is there twice (at offset 0x58)");
    refused(
        b"\x23\x85\x28\x75\x00\x00\x00\x08\0\0\0\0\0\0\0\0",
        "has 8 bytes, not 24",
    );
    refused(
        b"\x05\x37\xbe\x77\x00\x00\x00\x08\0\0\0\0\0\0\0\0",
        "has 8 bytes, not 16",
    );
    refused(b"\x44\x41\x54\x41\x00\x00\x00\x00", "name is not one");
    // An unknown one may come twice, and may fill the cluster to its end.
    let unknown = b"abcd\x00\x00\x00\x01x\0\0\0\0\0\0\0".repeat(2);
    assert_eq!(with(&unknown).unwrap().extensions.len(), 2);
    let rest = 65536 - V2_LEN - 8;
    let mut filled = b"abcd".to_vec();
    filled.extend_from_slice(&(rest as u32).to_be_bytes());
    assert_eq!(with(&filled).unwrap().extensions.len(), 1);
    filled[7] += 1;
    refused(&filled, "does not fit");
}

#[test]
fn unknown_incompatible_features_are_named_by_the_image() {
    let mut header = full();
    let Some(Extension::FeatureNames(names)) = header.extensions.get_mut(2) else {
        panic!("no names");
    };
    names.push(FeatureName::new(INCOMPATIBLE, 17, "time\ntravel"));
    let mut bytes = header.encode().unwrap();
    bytes[72 + 5] = 1 << 1; // bit 17
    bytes[72] = 1 << 7; // bit 63
    let error = parse(&bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(
        error.to_string(),
        "Unsupported qcow2 feature(s): time\\ntravel, unknown incompatible feature, bit 63 \
         (at offset 0x48)"
    );
}

#[test]
fn too_short_files() {
    let bytes = full().encode().unwrap();
    for len in 0..V3_MIN_LEN {
        assert_eq!(
            parse(&bytes[..len]).unwrap_err().kind(),
            ErrorKind::InvalidFormat
        );
    }
}

#[test]
fn size_is_whole_sectors() {
    let header = Header {
        size: 1_000_447,
        ..full()
    };
    assert_eq!(header.virtual_size(), 1953 * 512);
    let parsed = parse(&header.encode().unwrap()).unwrap();
    assert_eq!(parsed.size, 1_000_447);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1200), version in 2u8..=3, bits in 9u8..=21) {
        let _ = Header::parse(&bytes, FILE_LEN);
        if bytes.len() > 24 {
            bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
            bytes[20..24].copy_from_slice(&[0, 0, 0, bits]);
            let _ = Header::parse(&bytes, FILE_LEN);
        }
    }

    #[test]
    fn damaged_headers_never_panic_and_encode_back(
        patches in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
    ) {
        let mut bytes = full().encode().unwrap();
        for (at, byte) in patches {
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
        }
        if let Ok(header) = Header::parse(&bytes, FILE_LEN) {
            let again = header.encode().unwrap();
            prop_assert_eq!(Header::parse(&again, FILE_LEN).unwrap(), header);
        }
    }
}
