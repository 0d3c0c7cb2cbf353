//! Every limit of the header and of the tables it names: the last value that
//! is accepted, and the first that is not, by name and offset.

use qcow2_ublk::{ErrorKind, report};

use super::craft::*;
use super::{open, whole};

/// What becomes of an image.
enum Fate {
    Opens,
    /// The error has this text, and names this offset.
    Refused(&'static str, u64),
}
use Fate::{Opens, Refused};

/// Ends a chain of changes.
fn done(_: &mut Craft) {}

type Case = (&'static str, fn(&mut Craft), Fate);

fn try_all(bits: u32, cases: &[Case]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for (what, change, fate) in cases {
        let mut craft = Craft::new(bits);
        change(&mut craft);
        craft.save(&path);
        let opened = open(&path, false);
        match (fate, opened) {
            (Opens, Ok(disk)) => {
                let mut byte = [0];
                if disk.size() > 0 {
                    // Where other tables took the place of these, no more.
                    let read = disk.read_at(&mut byte, 0);
                    let corrupt = |error: &qcow2_ublk::Error| error.kind() == ErrorKind::Corrupt;
                    assert!(read.as_ref().err().is_none_or(corrupt), "{what}: {read:?}");
                }
                report::info(&path, &super::options(false)).unwrap();
            }
            (Opens, Err(error)) => panic!("{what}: {}", whole(&error)),
            (Refused(text, _), Ok(_)) => panic!("{what}: opened, not refused as {text:?}"),
            (Refused(text, at), Err(error)) => {
                let said = error.to_string();
                assert!(said.contains(text), "{what}: {said}");
                assert!(said.contains("image.qcow2"), "{what}: {said}");
                let offset = format!("(at offset {at:#x})");
                assert!(said.contains(&offset), "{what}: {said}, not {offset}");
                assert!(
                    matches!(
                        error.kind(),
                        ErrorKind::InvalidFormat | ErrorKind::Unsupported | ErrorKind::Corrupt
                    ),
                    "{what}: {:?}",
                    error.kind()
                );
                // Nor for writing.
                assert!(open(&path, true).is_err(), "{what}");
            }
        }
    }
}

#[test]
fn fields_of_the_header() {
    let cases: &[Case] = &[
        ("sound", |_| {}, Opens),
        ("magic", |c| done(c.put(3, &[0xfa])), Refused("magic", 0)),
        (
            "version 1",
            |c| done(c.put32(4, 1)),
            Refused("version 1", 4),
        ),
        (
            "version 4",
            |c| done(c.put32(4, 4)),
            Refused("version 4", 4),
        ),
        (
            "version 2",
            |c| done(c.put32(4, 2).put(72, &[0; 40])),
            Opens,
        ),
        (
            "version",
            |c| done(c.put32(4, u32::MAX)),
            Refused("version 4294967295", 4),
        ),
        (
            "clusters of 256 bytes",
            |c| done(c.put32(CLUSTER_BITS, 8)),
            Refused("2^8", CLUSTER_BITS),
        ),
        (
            "clusters of 4 MiB",
            |c| done(c.put32(CLUSTER_BITS, 22)),
            Refused("2^22", CLUSTER_BITS),
        ),
        (
            "a shift too far",
            |c| done(c.put32(CLUSTER_BITS, 64)),
            Refused("2^64", CLUSTER_BITS),
        ),
        (
            "cluster bits",
            |c| done(c.put32(CLUSTER_BITS, u32::MAX)),
            Refused("not between 512", CLUSTER_BITS),
        ),
        (
            "unknown encryption",
            |c| done(c.put32(CRYPT_METHOD, 3)),
            Refused("encryption method 3", CRYPT_METHOD),
        ),
        (
            "L1 table of 32 MiB",
            |c| {
                done(
                    c.put64(L1_OFFSET, c.at(5))
                        .put32(L1_SIZE, 4 << 20)
                        .put64(SIZE, 0),
                );
            },
            Opens,
        ),
        (
            "and one entry more",
            |c| done(c.put64(L1_OFFSET, c.at(5)).put32(L1_SIZE, (4 << 20) + 1)),
            Refused("Active L1 table too large", L1_SIZE),
        ),
        (
            "L1 entries",
            |c| done(c.put32(L1_SIZE, u32::MAX)),
            Refused("Active L1 table too large", L1_SIZE),
        ),
        (
            "as large as the L1 table maps",
            |c| done(c.put64(SIZE, 512 << 20)),
            Opens,
        ),
        (
            "a byte larger",
            |c| done(c.put64(SIZE, (512 << 20) + 1)),
            Refused(
                "too small: 1 entries, but the virtual size needs 2",
                L1_SIZE,
            ),
        ),
        (
            "2^63 - 1",
            |c| done(c.put64(SIZE, (1 << 63) - 1)),
            Refused("L1 table is too small", L1_SIZE),
        ),
        (
            "2^63",
            |c| done(c.put64(SIZE, 1 << 63)),
            Refused("impossible", SIZE),
        ),
        (
            "2^64 - 1",
            |c| done(c.put64(SIZE, u64::MAX)),
            Refused("impossible", SIZE),
        ),
        (
            "size 0",
            |c| done(c.put64(SIZE, 0).put32(L1_SIZE, 0).put64(L1_OFFSET, 0)),
            Opens,
        ),
        (
            "a refcount table of 8 MiB",
            |c| {
                done(
                    c.put64(REFTABLE_OFFSET, c.at(5))
                        .put32(REFTABLE_CLUSTERS, 128),
                );
            },
            Opens,
        ),
        (
            "and a cluster more",
            |c| done(c.put32(REFTABLE_CLUSTERS, 129)),
            Refused("Reference count table too large", REFTABLE_CLUSTERS),
        ),
        (
            "refcount clusters",
            |c| done(c.put32(REFTABLE_CLUSTERS, u32::MAX)),
            Refused("Reference count table too large", REFTABLE_CLUSTERS),
        ),
        (
            "no refcount table",
            |c| done(c.put32(REFTABLE_CLUSTERS, 0)),
            Refused(
                "does not contain a reference count table",
                REFTABLE_CLUSTERS,
            ),
        ),
        (
            "refcounts of 64 bits",
            |c| done(c.put32(REFCOUNT_ORDER, 6)),
            Opens,
        ),
        (
            "refcounts of 128 bits",
            |c| done(c.put32(REFCOUNT_ORDER, 7)),
            Refused("wider than 64", REFCOUNT_ORDER),
        ),
        (
            "refcount order",
            |c| done(c.put32(REFCOUNT_ORDER, u32::MAX)),
            Refused("wider than 64", REFCOUNT_ORDER),
        ),
        (
            "65536 snapshots",
            |c| done(c.put32(SNAPSHOTS, 65536).put64(SNAPSHOTS_OFFSET, 5 << 16)),
            Opens,
        ),
        (
            "65537 snapshots",
            |c| done(c.put32(SNAPSHOTS, 65537).put64(SNAPSHOTS_OFFSET, 5 << 16)),
            Refused("65537 snapshots are more than 65536", SNAPSHOTS),
        ),
        (
            "header of 104 bytes",
            |c| done(c.put32(HEADER_LENGTH, 104)),
            Opens,
        ),
        (
            "header as long as a cluster",
            |c| done(c.put32(HEADER_LENGTH, 65536)),
            Opens,
        ),
        (
            "and longer",
            |c| done(c.put32(HEADER_LENGTH, 65544)),
            Refused("longer than a cluster", HEADER_LENGTH),
        ),
        (
            "header of 103 bytes",
            |c| done(c.put32(HEADER_LENGTH, 103)),
            Refused("too short", HEADER_LENGTH),
        ),
        (
            "header of no bytes",
            |c| done(c.put32(HEADER_LENGTH, 0)),
            Refused("too short", HEADER_LENGTH),
        ),
        (
            "header of 105 bytes",
            |c| done(c.put32(HEADER_LENGTH, 105)),
            Refused("not a multiple of 8", HEADER_LENGTH),
        ),
        (
            "header length",
            |c| done(c.put32(HEADER_LENGTH, u32::MAX)),
            Refused("longer than a cluster", HEADER_LENGTH),
        ),
        (
            "compression type without its bit",
            |c| done(c.put(104, &[1])),
            Refused("compression type", 104),
        ),
        (
            "bit without a compression type",
            |c| done(c.put64(INCOMPATIBLE, 8)),
            Refused("compression type", 104),
        ),
        (
            "unknown compression type",
            |c| done(c.put64(INCOMPATIBLE, 8).put(104, &[2])),
            Refused("compression type 2", 104),
        ),
        (
            "bitmaps without their extension",
            |c| done(c.put64(AUTOCLEAR, 1)),
            Refused("no bitmaps extension", AUTOCLEAR),
        ),
        (
            "raw data file without a data file",
            |c| done(c.put64(AUTOCLEAR, 2)),
            Refused("no external data file", AUTOCLEAR),
        ),
        (
            "unknown bits that may be ignored",
            |c| done(c.put64(80, !0 ^ 1).put64(AUTOCLEAR, !3)),
            Opens,
        ),
    ];
    try_all(16, cases);
    try_all(
        9,
        &[
            (
                "extended L2 entries in small clusters",
                |c| done(c.put64(INCOMPATIBLE, 16)),
                Refused("16 KiB", CLUSTER_BITS),
            ),
            (
                "the largest disk of small clusters",
                |c| {
                    c.put64(L1_OFFSET, c.at(5)).put32(L1_SIZE, 4 << 20);
                    c.put64(SIZE, 128 << 30);
                },
                Opens,
            ),
            (
                "and a sector more",
                |c| {
                    c.put64(L1_OFFSET, c.at(5)).put32(L1_SIZE, 4 << 20);
                    c.put64(SIZE, (128 << 30) + 512);
                },
                Refused("L1 table is too small", L1_SIZE),
            ),
        ],
    );
}

/// Where tables can be: aligned, in the file, not in the header, not in each
/// other.
#[test]
fn places_of_tables() {
    let cases: &[Case] = &[
        (
            "L1 table in a sector",
            |c| done(c.put64(L1_OFFSET, c.at(3) + 512)),
            Refused("not a multiple of the cluster size", L1_OFFSET),
        ),
        (
            "refcount table at a byte",
            |c| done(c.put64(REFTABLE_OFFSET, c.at(1) + 1)),
            Refused("not a multiple of the cluster size", REFTABLE_OFFSET),
        ),
        (
            "snapshot table in a sector",
            |c| {
                done(
                    c.put32(SNAPSHOTS, 1)
                        .put64(SNAPSHOTS_OFFSET, (5 << 16) + 512),
                );
            },
            Refused("not a multiple of the cluster size", SNAPSHOTS_OFFSET),
        ),
        (
            "L1 table in the header",
            |c| done(c.put64(L1_OFFSET, 0)),
            Refused("lies in the header cluster", L1_OFFSET),
        ),
        (
            "refcount table in the header",
            |c| done(c.put64(REFTABLE_OFFSET, 0)),
            Refused("lies in the header cluster", REFTABLE_OFFSET),
        ),
        (
            "snapshot table in the header",
            |c| done(c.put32(SNAPSHOTS, 1)),
            Refused("lies in the header cluster", SNAPSHOTS_OFFSET),
        ),
        (
            "L1 table at the end",
            |c| done(c.put64(L1_OFFSET, c.at(6))),
            Refused("behind the end of the file", L1_OFFSET),
        ),
        (
            "refcount table at the end",
            |c| done(c.put64(REFTABLE_OFFSET, c.at(6))),
            Refused("behind the end of the file", REFTABLE_OFFSET),
        ),
        (
            "snapshot table at the end",
            |c| done(c.put32(SNAPSHOTS, 1).put64(SNAPSHOTS_OFFSET, 6 << 16)),
            Refused("behind the end of the file", SNAPSHOTS_OFFSET),
        ),
        (
            "L1 table at 2^56",
            |c| done(c.put64(L1_OFFSET, 1 << 56)),
            Refused("beyond 2^56", L1_OFFSET),
        ),
        (
            "refcount table at the largest offset",
            |c| done(c.put64(REFTABLE_OFFSET, !0 << 16)),
            Refused("beyond 2^56", REFTABLE_OFFSET),
        ),
        (
            "snapshot table at the largest offset",
            |c| done(c.put32(SNAPSHOTS, 1).put64(SNAPSHOTS_OFFSET, !0 << 16)),
            Refused("beyond 2^56", SNAPSHOTS_OFFSET),
        ),
        (
            "L1 and refcount table in one place",
            |c| done(c.put64(L1_OFFSET, c.at(1))),
            Refused("overlap", REFTABLE_OFFSET),
        ),
        (
            "snapshot and L1 table in one place",
            |c| done(c.put32(SNAPSHOTS, 1).put64(SNAPSHOTS_OFFSET, 3 << 16)),
            Refused("overlap", SNAPSHOTS_OFFSET),
        ),
        (
            "snapshot and refcount table in one place",
            |c| done(c.put32(SNAPSHOTS, 1).put64(SNAPSHOTS_OFFSET, 1 << 16)),
            Refused("overlap", SNAPSHOTS_OFFSET),
        ),
        (
            "an L1 table that reaches into the refcount table",
            |c| {
                c.put64(REFTABLE_OFFSET, c.at(5)).put64(L1_OFFSET, 4 << 16);
                c.put32(L1_SIZE, 8193);
            },
            Refused("overlap", REFTABLE_OFFSET),
        ),
    ];
    try_all(16, cases);
}

/// Names and extensions in the header cluster.
#[test]
fn names_and_extensions() {
    let cases: &[Case] = &[
        (
            "name at the largest offset",
            |c| done(c.put64(BACKING_OFFSET, u64::MAX).put32(BACKING_SIZE, 1)),
            Refused("not in the header cluster", BACKING_OFFSET),
        ),
        (
            "name behind the header cluster",
            |c| done(c.put64(BACKING_OFFSET, c.at(1) + 1).put32(BACKING_SIZE, 1)),
            Refused("not in the header cluster", BACKING_OFFSET),
        ),
        (
            "name in the fixed fields",
            |c| done(c.put64(BACKING_OFFSET, 8).put32(BACKING_SIZE, 8)),
            Refused("not in the header cluster", BACKING_OFFSET),
        ),
        (
            "name that leaves the header cluster",
            |c| done(c.put64(BACKING_OFFSET, c.at(1) - 4).put32(BACKING_SIZE, 5)),
            Refused("leaves the header cluster", BACKING_SIZE),
        ),
        (
            "name of 1024 bytes",
            |c| done(c.backing(&[b'a'; 1024], "raw")),
            Refused("longer than 1023", BACKING_SIZE),
        ),
        (
            "name without end",
            |c| done(c.backing(b"a", "raw").put32(BACKING_SIZE, u32::MAX)),
            Refused("longer than 1023", BACKING_SIZE),
        ),
        (
            "name with a NUL",
            |c| done(c.backing(b"a\0b", "raw")),
            Refused("NUL", 136),
        ),
        (
            "format of 16 bytes",
            |c| done(c.backing(b"a", "raw-and-so-forth")),
            Refused("16 bytes", 112),
        ),
        (
            "format with a NUL",
            |c| done(c.backing(b"a", "raw\0")),
            Refused("not text", 112),
        ),
        (
            "extension longer than the cluster",
            |c| done(c.put32(112, 77).put32(116, 65536 - 112 - 8 + 1)),
            Refused("does not fit", 112),
        ),
        (
            "extension that fills the cluster",
            |c| done(c.put32(112, 77).put32(116, 65536 - 112 - 8)),
            Opens,
        ),
        (
            "extension without end",
            |c| done(c.put32(112, 77).put32(116, u32::MAX)),
            Refused("does not fit", 112),
        ),
        (
            "second extension without end",
            |c| done(c.put32(112, 77).put32(120, 78).put32(124, u32::MAX - 7)),
            Refused("does not fit", 120),
        ),
        (
            "two formats",
            |c| {
                done(
                    c.extension(BACKING_FORMAT, b"raw")
                        .extension(BACKING_FORMAT, b"raw"),
                );
            },
            Refused("twice", 128),
        ),
        (
            "an empty data file name",
            |c| done(c.extension(DATA_FILE, b"").put64(INCOMPATIBLE, 4)),
            Refused("external data file's name", 112),
        ),
        (
            "a data file name of 4096 bytes",
            |c| done(c.extension(DATA_FILE, &[b'a'; 4096]).put64(INCOMPATIBLE, 4)),
            Refused("external data file's name", 112),
        ),
        (
            "a data file name with a NUL",
            |c| done(c.extension(DATA_FILE, b"a\0b").put64(INCOMPATIBLE, 4)),
            Refused("external data file's name", 112),
        ),
        (
            "no bitmaps",
            |c| done(c.bitmaps(0, 0, 5 << 16)),
            Refused("number of bitmaps", 112),
        ),
        (
            "65536 bitmaps",
            |c| done(c.bitmaps(65536, 65536 * 32, 5 << 16)),
            Refused("number of bitmaps", 112),
        ),
        (
            "bitmaps in too small a directory",
            |c| done(c.bitmaps(2, 47, 5 << 16)),
            Refused("cannot have a directory of 47", 112),
        ),
        (
            "a directory too large",
            |c| done(c.bitmaps(1, 65535 * 1024 + 1, 5 << 16)),
            Refused("cannot have a directory", 112),
        ),
        (
            "a directory beyond everything",
            |c| done(c.bitmaps(1, u64::MAX, 5 << 16)),
            Refused("cannot have a directory", 112),
        ),
        (
            "a directory in the header",
            |c| done(c.bitmaps(1, 32, 0)),
            Refused("directory's offset", 112),
        ),
        (
            "a directory at the largest offset",
            |c| done(c.bitmaps(1, 32, !0 << 16)),
            Refused("directory's offset", 112),
        ),
        (
            "a directory in a sector",
            |c| done(c.bitmaps(1, 32, (5 << 16) + 512)),
            Refused("directory's offset", 112),
        ),
        (
            "an encryption header without encryption",
            |c| done(c.extension(CRYPTO, &[0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0])),
            Refused("not encrypted with LUKS", CRYPT_METHOD),
        ),
        (
            "encryption without an encryption header",
            |c| done(c.put32(CRYPT_METHOD, 2)),
            Refused("extension is missing", CRYPT_METHOD),
        ),
        (
            "an encryption header of another length",
            |c| done(c.extension(CRYPTO, &[0; 15]).put32(CRYPT_METHOD, 2)),
            Refused("15 bytes, not 16", 112),
        ),
        (
            "an encryption header in the header",
            |c| done(c.extension(CRYPTO, &[0; 16]).put32(CRYPT_METHOD, 2)),
            Refused("not that of a cluster", 112),
        ),
        (
            "an encryption header beyond everything",
            |c| {
                let mut data = [0xff; 16];
                data[6..8].fill(0);
                c.extension(CRYPTO, &data).put32(CRYPT_METHOD, 2);
            },
            Refused("impossible", 112),
        ),
        (
            "an unknown feature without a name",
            |c| done(c.put64(INCOMPATIBLE, 1 << 63)),
            Refused("unknown incompatible feature, bit 63", INCOMPATIBLE),
        ),
        (
            "an unknown feature with a name of its own",
            |c| {
                let mut entry = [b' '; 48];
                entry[..6].copy_from_slice(b"\0\x05\x1b[2J");
                c.extension(FEATURE_NAMES, &entry)
                    .put64(INCOMPATIBLE, 1 << 5);
            },
            Refused("\\u{1b}[2J", INCOMPATIBLE),
        ),
        (
            "names of the features we know",
            |c| {
                let names = [[0; 48], [0xff; 48], [1; 48]].concat();
                c.extension(FEATURE_NAMES, &names[..143]);
            },
            Opens,
        ),
    ];
    try_all(16, cases);
}
