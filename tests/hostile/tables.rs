//! Snapshot tables, bitmap directories, compressed clusters and encryption
//! headers: their limits, and what work they can make.

use std::fs;
use std::path::Path;

use qcow2_ublk::crypto::luks1;
use qcow2_ublk::qcow2::{BitmapAction, Selector};
use qcow2_ublk::{Disk, ErrorKind, chain, codec, report};

use super::craft::*;
use super::{bounded, open, options, whole};
use crate::common::half_random;

/// An image with one snapshot, whose entry is in cluster 6.
fn with_snapshot() -> Craft {
    let mut craft = Craft::new(16);
    let at = craft.at(6);
    craft.snapshot(at, craft.at(3), 1, b"1", b"one");
    craft
        .put32(SNAPSHOTS, 1)
        .put64(SNAPSHOTS_OFFSET, at)
        .count(6, 1);
    let end = craft.at(7);
    craft.file.set_len(end);
    craft
}

#[test]
fn snapshot_tables() {
    const AT: u64 = 6 << 16;
    type Case = (&'static str, fn(&mut Craft), Result<(), &'static str>);
    let cases: [Case; 13] = [
        ("sound", |_| {}, Ok(())),
        (
            "an L1 table of 32 MiB",
            |c| _ = c.put32(AT + 8, 4 << 20),
            Ok(()),
        ),
        (
            "and an entry more",
            |c| _ = c.put32(AT + 8, (4 << 20) + 1),
            Err("Snapshot L1 table too large"),
        ),
        (
            "an L1 table in a sector",
            |c| _ = c.put64(AT, (3 << 16) + 512),
            Err("is not that of a cluster"),
        ),
        (
            "an L1 table in the header",
            |c| _ = c.put64(AT, 0),
            Err("is not that of a cluster"),
        ),
        (
            "an L1 table at the largest offset",
            |c| _ = c.put64(AT, !0 << 16),
            Err("is not that of a cluster"),
        ),
        (
            "no L1 table",
            |c| _ = c.put64(AT, 0).put32(AT + 8, 0),
            Ok(()),
        ),
        (
            "extra data of 1024 bytes",
            |c| _ = c.put32(AT + 36, 1024),
            Ok(()),
        ),
        (
            "extra data of 1025 bytes",
            |c| _ = c.put32(AT + 36, 1025),
            Err("Too much extra"),
        ),
        (
            "extra data without end",
            |c| _ = c.put32(AT + 36, u32::MAX),
            Err("Too much extra"),
        ),
        (
            "the longest ID and name",
            |c| _ = c.put32(AT + 12, u32::MAX),
            Ok(()),
        ),
        (
            "more snapshots than the file has",
            |c| _ = c.put32(SNAPSHOTS, 65536),
            Err("behind the end of the file"),
        ),
        (
            "an entry that ends behind the file",
            |c| {
                c.put64(SNAPSHOTS_OFFSET, 7 << 16).put(7 << 16, &[0]);
                c.put32(SNAPSHOTS, 2);
            },
            Ok(()),
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for (what, change, fate) in cases {
        let mut craft = with_snapshot();
        change(&mut craft);
        craft.save(&path);
        // The disk itself does not depend on them.
        open(&path, false).unwrap().read_at(&mut [0], 0).unwrap();
        match (report::snapshots(&path, false), fate) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(text)) => {
                let said = whole(&error);
                assert!(said.contains(text), "{what}: {said}");
                assert!(said.contains("image.qcow2"), "{what}: {said}");
                assert!(said.contains("(at offset 0x"), "{what}: {said}");
            }
            (result, fate) => panic!("{what}: {result:?}, not {fate:?}"),
        }
    }
    // A disk that is larger than any.
    for size in [u64::MAX, 1 << 63, 1 << 60] {
        with_snapshot().put64(AT + 48, size).save(&path);
        let options = chain::Options {
            snapshot: Some(Selector::parse(b"1")),
            ..options(false)
        };
        let said = whole(&Disk::open(&path, &options).map(drop).unwrap_err());
        assert!(said.contains("larger than any"), "{said}");
        assert!(said.contains("image.qcow2"), "{said}");
    }
}

/// A snapshot whose L1 table is some other table: it is not followed into
/// freeing what others use.
#[test]
fn snapshots_with_tables_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let image = path.to_str().unwrap();
    let sound = with_snapshot();
    let content = |path: &Path| {
        let disk = open(path, false).unwrap();
        let mut bytes = vec![0; 1 << 16];
        disk.read_at(&mut bytes, 0).map(|()| bytes)
    };
    for target in [1, 2, 3, 4, 5, 6, 100] {
        for job in ["-d", "-a", "-c"] {
            let mut craft = sound.clone();
            craft.put64(6 << 16, target << 16);
            craft.save(&path);
            let name = if job == "-c" { "new" } else { "one" };
            let output = bounded(super::LIMIT, &["snapshot", job, name, image]);
            let text = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                // Then nothing of the active disk was lost by it.
                assert!(
                    job == "-c" || target == 3 || target == 100,
                    "{target} {job}"
                );
                continue;
            }
            assert!(text.contains("image.qcow2"), "{target} {job}: {text}");
            assert!(text.contains("hint:"), "{target} {job}: {text}");
            assert_eq!(
                content(&path).unwrap(),
                vec![0x5a; 1 << 16],
                "{target} {job}"
            );
        }
    }
}

/// A directory with one bitmap, in cluster 6; its table in cluster 7.
fn with_bitmap() -> Craft {
    let mut craft = Craft::new(16);
    let (directory, table) = (6 << 16, 7 << 16);
    craft.bitmaps(1, 32, directory);
    craft.put64(directory, table).put32(directory + 8, 1);
    craft
        .put32(directory + 12, 2)
        .put(directory + 16, &[1, 16, 0, 1]);
    craft.put(directory + 24, b"b").put(table + 65535, &[0]);
    craft.count(6, 1).count(7, 1);
    craft
}

#[test]
fn bitmap_directories() {
    const AT: u64 = 6 << 16;
    type Case = (&'static str, fn(&mut Craft), Result<(), &'static str>);
    let cases: [Case; 16] = [
        ("sound", |_| {}, Ok(())),
        (
            "granularity of 512 bytes",
            |c| _ = c.put(AT + 17, &[9]),
            Ok(()),
        ),
        (
            "granularity of 2 GiB",
            |c| _ = c.put(AT + 17, &[31]),
            Ok(()),
        ),
        (
            "granularity of 256 bytes",
            |c| _ = c.put(AT + 17, &[8]),
            Err("granularity of 2^8"),
        ),
        (
            "granularity of 4 GiB",
            |c| _ = c.put(AT + 17, &[32]),
            Err("granularity of 2^32"),
        ),
        (
            "granularity",
            |c| _ = c.put(AT + 17, &[255]),
            Err("granularity of 2^255"),
        ),
        (
            "no table",
            |c| _ = c.put32(AT + 8, 0),
            Err("table of 0 entries"),
        ),
        ("a bitmap of 512 MiB", |c| _ = c.put32(AT + 8, 8192), Ok(())),
        (
            "and a cluster more",
            |c| _ = c.put32(AT + 8, 8193),
            Err("table of 8193 entries"),
        ),
        (
            "entries",
            |c| _ = c.put32(AT + 8, u32::MAX),
            Err("table of 4294967295"),
        ),
        (
            "a table in the header",
            |c| _ = c.put64(AT, 0),
            Err("not that of a cluster"),
        ),
        (
            "a table in a sector",
            |c| _ = c.put64(AT, (7 << 16) + 512),
            Err("not that of a cluster"),
        ),
        (
            "an unknown flag",
            |c| _ = c.put32(AT + 12, 8),
            Err("unknown flags"),
        ),
        (
            "an unknown type",
            |c| _ = c.put(AT + 16, &[2]),
            Err("unknown type 2"),
        ),
        (
            "a name that is too long",
            |c| _ = c.put16(AT + 18, 1024),
            Err("ends inside an entry"),
        ),
        (
            "extra data without end",
            |c| _ = c.put32(AT + 20, u32::MAX),
            Err("ends inside an entry"),
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for (what, change, fate) in cases {
        let mut craft = with_bitmap();
        change(&mut craft);
        craft.save(&path);
        let disk = open(&path, false).unwrap();
        match (disk.bitmaps(), fate) {
            (Ok(found), Ok(())) => {
                assert_eq!(found.len(), 1, "{what}");
                disk.bitmap("b").unwrap();
            }
            (Err(error), Err(text)) => {
                let said = whole(&error);
                assert!(said.contains(text), "{what}: {said}");
                assert!(said.contains("image.qcow2"), "{what}: {said}");
                assert!(said.contains("(at offset 0x60000)"), "{what}: {said}");
                // A writer would have to keep it up to date.
                assert!(open(&path, true).is_err(), "{what}");
            }
            (result, fate) => panic!("{what}: {result:?}, not {fate:?}"),
        }
    }
    // Two bitmaps of one name, and two in one place.
    let twice = |craft: &mut Craft, name: &[u8], table: u64| {
        let entry = craft.file.bytes(AT, 32);
        craft
            .put(AT + 32, &entry)
            .put64(AT + 32, table)
            .put(AT + 56, name);
        // The extension is the first one in the header.
        craft.put32(120, 2).put64(128, 64);
    };
    for (name, table, text) in [(b"b", 8, "same name"), (b"c", 7, "same place")] {
        let mut craft = with_bitmap();
        twice(&mut craft, name, table << 16);
        craft.put(9 << 16, &[0]).count(8, 1).save(&path);
        let said = whole(&open(&path, true).map(drop).unwrap_err());
        assert!(said.contains(text), "{said}");
    }
    // What is damaged is removed by name only where the directory is in order.
    with_bitmap().put64(7 << 16, 4).save(&path);
    let disk = open(&path, false).unwrap();
    assert_eq!(disk.bitmap("b").unwrap_err().kind(), ErrorKind::Corrupt);
    drop(disk);
    let options = chain::Options {
        image: qcow2_ublk::qcow2::ImageOptions {
            record: false,
            ..Default::default()
        },
        ..options(true)
    };
    let disk = Disk::open(&path, &options).unwrap();
    disk.change_bitmap("b", &BitmapAction::Remove).unwrap();
    disk.close().unwrap();
    open(&path, true).unwrap().close().unwrap();
}

/// What a compressed cluster can say about itself, and what is in it.
#[test]
fn compressed_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let cluster = half_random(1 << 16, 3);
    let sevens = vec![7; 1 << 16];
    for kind in [
        codec::CompressionType::Deflate,
        codec::CompressionType::Zstd,
    ] {
        let mut packed = vec![0; 1 << 16];
        let len = codec::compress(kind, kind.default_level(), &cluster, &mut packed);
        packed.truncate(len.unwrap());
        // A bomb: far more than a cluster, in far less than a sector.
        let large = vec![7_u8; 32 << 20];
        let mut bomb = vec![0; 1 << 20];
        let len = codec::compress(kind, kind.default_level(), &large, &mut bomb).unwrap();
        bomb.truncate(len);
        // A frame that asks for a window of 2 GiB and more, without a size.
        let window: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x09, 0, 0];
        let shift = 62 - (16 - 8);
        let at = (5 << 16) + 100_u64;
        let entry = |offset: u64, sectors: u64| 1 << 62 | sectors << shift | offset;
        let whole_stream = ((at % 512 + packed.len() as u64 - 1) / 512).max(1);
        let cases: [(&str, u64, &[u8], bool); 8] = [
            ("sound", entry(at, whole_stream), &packed, true),
            ("as long as can be", entry(at, 255), &packed, true),
            ("no longer than its sector", entry(at, 0), &packed, false),
            (
                "far behind the file",
                entry((1 << shift) - 1, 255),
                &packed,
                false,
            ),
            ("in the header", entry(0, 255), &packed, false),
            ("in the L1 table", entry(3 << 16, 3), &packed, false),
            (
                "a bomb",
                entry(at, 255),
                &bomb,
                kind == codec::CompressionType::Deflate,
            ),
            ("a window", entry(at, 1), window, false),
        ];
        for (what, entry, bytes, good) in cases {
            let mut craft = Craft::new(16);
            if kind == codec::CompressionType::Zstd {
                craft.put64(INCOMPATIBLE, 8).put(104, &[1]);
            }
            craft.put(craft.at(5), &vec![0; 1 << 16]).put(at, bytes);
            craft.put(craft.at(8) - 1, &[0]);
            craft.put64(craft.at(4), entry);
            craft.save(&path);
            let disk = open(&path, false).unwrap();
            let mut read = vec![1; 1 << 16];
            let (result, most) = super::memory::peak(|| disk.read_at(&mut read, 0));
            assert!(most < 4 << 20, "{kind:?}, {what}: {most} bytes");
            match result {
                Ok(()) => {
                    let shown = if what == "a bomb" { &sevens } else { &cluster };
                    assert!(good && read == *shown, "{kind:?}, {what}");
                }
                Err(error) => {
                    assert!(!good, "{kind:?}, {what}: {error}");
                    assert_eq!(error.errno(), libc::EIO, "{kind:?}, {what}");
                    let said = error.to_string();
                    assert!(said.contains("image.qcow2"), "{said}");
                    assert!(said.contains("(at offset 0x"), "{said}");
                }
            }
            // Its neighbours are as good as ever.
            disk.read_at(&mut read, 1 << 16).unwrap();
        }
    }
}

/// The work that all key slots together can make is bounded, and the bound can
/// be raised.
#[test]
fn key_slots_cannot_keep_us_busy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let image = path.to_str().unwrap();
    let key = dir.path().join("key");
    fs::write(&key, "wrong").unwrap();
    let format = luks1::Format {
        effort: qcow2_ublk::crypto::Effort(std::time::Duration::from_millis(1)),
        ..luks1::Format::default()
    };
    let mut region = format.make(b"secret").unwrap();
    let put = |region: &mut Vec<u8>, at: usize, value: u32| {
        region[at..at + 4].copy_from_slice(&value.to_be_bytes());
    };
    // Eight slots, each of them within the limit.
    for slot in 0..8 {
        let at = 208 + slot * 48;
        put(&mut region, at, 0x00ac_71f3);
        put(&mut region, at + 4, 20_000);
    }
    put(&mut region, 164, 1000);
    let mut craft = Craft::new(16);
    let mut place = (6_u64 << 16).to_be_bytes().to_vec();
    place.extend((region.len() as u64).to_be_bytes());
    craft.extension(CRYPTO, &place).put32(CRYPT_METHOD, 2);
    craft.put(6 << 16, &region);
    craft.save(&path);
    let try_with = |limit: &str| {
        let key = key.to_str().unwrap();
        let args = ["--key-file", key, "--key-iterations", limit];
        let args = [&["io", "-r"], &args[..], &["-c", "read 0 4k", image]].concat();
        let output = bounded(super::LIMIT, &args);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    // Three slots are tried, the fourth is not.
    let text = try_with("80000");
    assert!(
        text.contains("key slot 3") && text.contains("--key-iterations"),
        "{text}"
    );
    assert!(text.contains("image.qcow2"), "{text}");
    let text = try_with("200000");
    assert!(text.contains("opens no key slot"), "{text}");
    let text = try_with("19999");
    assert!(text.contains("key slot 0"), "{text}");
}
