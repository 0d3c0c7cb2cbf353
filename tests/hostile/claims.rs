//! Small files that say they are large: tables of many megabytes, thousands of
//! snapshots, disks of exabytes. Memory and time follow what is in the file.

use std::fs;
use std::path::Path;

use qcow2_ublk::report;

use super::craft::{COPIED, CRYPTO, Craft, FEATURE_NAMES};
use super::craft::{CRYPT_METHOD, L1_OFFSET, L1_SIZE, REFCOUNT_ORDER, REFTABLE_CLUSTERS};
use super::craft::{REFTABLE_OFFSET, SIZE, SNAPSHOTS, SNAPSHOTS_OFFSET};
use super::memory::peak;
use super::{LIMIT, bounded, open, unchecked};
use crate::common::lab::watched;

const M: usize = 1 << 20;
/// Entries of the largest L1 table.
const MOST_L1: u32 = 4 << 20;

/// The largest disk that so many L1 entries map.
fn disk_of(bits: u32, entries: u64) -> u64 {
    (u128::from(entries) << (2 * bits - 3)).min((1 << 63) - 512) as u64
}

/// An L1 table as large as can be, of which the file has one cluster.
fn large_l1(bits: u32) -> Craft {
    let mut craft = Craft::new(bits);
    // Nothing follows it.
    let l1 = craft.at(6);
    craft.put64(l1, craft.at(4) | COPIED).count(6, 1);
    craft.put64(L1_OFFSET, l1).put32(L1_SIZE, MOST_L1);
    craft.put64(SIZE, disk_of(bits, MOST_L1.into()));
    craft.put(craft.at(7) - 1, &[0]);
    craft
}

fn large_reftable(bits: u32) -> Craft {
    let mut craft = Craft::new(bits);
    craft.put64(craft.at(6), craft.at(2)).count(6, 1);
    craft.put64(REFTABLE_OFFSET, craft.at(6));
    craft.put32(REFTABLE_CLUSTERS, (8 << 20) >> bits);
    craft
}

fn many_snapshots(bits: u32, count: u32, far: bool) -> Craft {
    let mut craft = Craft::new(bits);
    let table = craft.at(6);
    let mut at = table;
    for n in 0..count {
        let id = (n + 1).to_string();
        let l1 = if far {
            (1 << 40) + u64::from(n) * (64 << 20)
        } else {
            craft.at(3)
        };
        let entries = if far { MOST_L1 } else { 1 };
        at += craft.snapshot(at, l1, entries, id.as_bytes(), b"s");
    }
    for cluster in 6..=(at - 1) >> bits {
        if cluster < 1 << (bits - 1) {
            craft.count(cluster, 1);
        }
    }
    craft.put32(SNAPSHOTS, count).put64(SNAPSHOTS_OFFSET, table);
    craft
}

/// A table of 65536 snapshots, of which the file has the first.
fn cut_off_snapshots(bits: u32) -> Craft {
    let mut craft = many_snapshots(bits, 1, false);
    craft.put32(SNAPSHOTS, 65536);
    craft
}

fn bitmap(craft: &mut Craft, entries: u32, flags: u32) {
    let directory = craft.at(6);
    let table = craft.at(7);
    craft.bitmaps(1, 32, directory);
    craft.put64(directory, table).put32(directory + 8, entries);
    craft
        .put32(directory + 12, flags)
        .put(directory + 16, &[1, 9, 0, 1]);
    craft.put(directory + 24, b"b\0\0\0\0\0\0\0");
    craft.count(6, 1).count(7, 1);
    let end = craft.at(8);
    craft.file.set_len(end);
}

/// A bitmap with as many entries as a bitmap may have; each says that all of
/// its bits are ones, as far as the file goes.
fn bitmap_of_ones(bits: u32) -> Craft {
    let mut craft = Craft::new(bits);
    let entries = (512 << 20 >> bits) as u32;
    bitmap(&mut craft, entries, 2);
    let in_file = u64::from(entries).min(1 << (bits - 3));
    for n in 0..in_file {
        craft.put64(craft.at(7) + n * 8, 1);
    }
    // With 512 bytes for each bit.
    let size = (512 << 20) * 8 * 512;
    let l1 = size >> (2 * bits - 3);
    if l1 > 1 {
        craft.put64(L1_OFFSET, craft.at(8)).count(8, 1);
        craft.put64(craft.at(8), craft.at(4) | COPIED);
    }
    craft.put32(L1_SIZE, (l1 as u32).clamp(1, MOST_L1));
    craft.put64(SIZE, size.min(disk_of(bits, MOST_L1.into())));
    craft
}

/// A directory of 65535 bitmaps, of which the file has one.
fn cut_off_directory(bits: u32) -> Craft {
    let mut craft = Craft::new(bits);
    craft.bitmaps(65535, 65535 * 1024, craft.at(6));
    craft.put(craft.at(7) - 1, &[0]).count(6, 1);
    craft
}

fn luks(bits: u32, len: u64) -> Craft {
    let mut craft = Craft::new(bits);
    let mut data = craft.at(6).to_be_bytes().to_vec();
    data.extend(len.to_be_bytes());
    craft.extension(CRYPTO, &data).put32(CRYPT_METHOD, 2);
    craft.put(craft.at(6), b"LUKS\xba\xbe\0\x02").count(6, 1);
    craft.put64(craft.at(6) + 8, 4 << 20);
    craft.put(craft.at(7) - 1, &[0]);
    craft
}

/// One refcount block for every entry of the largest refcount table.
fn shared_block(bits: u32, count: u16) -> Craft {
    let mut craft = Craft::new(bits);
    let table = craft.at(6);
    let block = craft.at(2).to_be_bytes();
    craft.put(table, &block.repeat(1 << 20));
    craft.put64(REFTABLE_OFFSET, table);
    craft.put32(REFTABLE_CLUSTERS, (8 << 20) >> bits);
    for cluster in 6..1 << (bits - 1) {
        craft.count(cluster, count);
    }
    craft
}

/// A refcount for a cluster whose number is so high that its offset does not
/// fit into 64 bits.
fn used_beyond_everything() -> Craft {
    let mut craft = Craft::new(21);
    // Bits as refcounts; entry 2^19 of the table counts cluster 2^43.
    craft.put32(REFCOUNT_ORDER, 0);
    let table = craft.at(6);
    craft.put64(table, craft.at(2));
    craft.put64(table + (1 << 19) * 8, craft.at(10));
    craft.put(craft.at(10), &[1]);
    craft.put(craft.at(11) - 1, &[0]);
    craft
        .put64(REFTABLE_OFFSET, table)
        .put32(REFTABLE_CLUSTERS, 4);
    craft.put(craft.at(2), &[0xff, 0xff]);
    craft
}

/// As many header extensions as a header can have.
fn extensions() -> Craft {
    let mut craft = Craft::new(21);
    for at in (112..2 << 20).step_by(8) {
        craft.put32(at, 0x1234_5678);
    }
    craft
}

fn feature_names() -> Craft {
    let mut craft = Craft::new(21);
    craft.extension(FEATURE_NAMES, &[b'x'; 48].repeat(40_000));
    craft
}

/// A tebibyte with nothing in it but tables that say they fill it.
fn sparse_giant(bits: u32) -> Craft {
    let mut craft = many_snapshots(bits, 200, true);
    craft.put64(SIZE, disk_of(bits, MOST_L1.into()));
    craft.put32(L1_SIZE, MOST_L1).put64(L1_OFFSET, 1 << 39);
    craft.put64(REFTABLE_OFFSET, 1 << 38);
    craft.put32(REFTABLE_CLUSTERS, (8 << 20) >> bits);
    craft.put64(1 << 38, craft.at(2));
    craft.file.set_len(1 << 40);
    craft
}

/// Names, images, and whether one can be opened.
fn all() -> Vec<(String, Craft)> {
    let mut images = Vec::new();
    for bits in [9, 12, 16, 21] {
        let mut add = |what: &str, craft| images.push((format!("{what}-{bits}"), craft));
        add("sound", Craft::new(bits));
        add("L1 table", large_l1(bits));
        add("refcount table", large_reftable(bits));
        add("snapshots cut off", cut_off_snapshots(bits));
        add("snapshots far away", many_snapshots(bits, 40, true));
        add("bitmap of ones", bitmap_of_ones(bits));
        add("directory cut off", cut_off_directory(bits));
        add("LUKS", luks(bits, 1 << 62));
        add("LUKS of a gigabyte", luks(bits, 1 << 30));
        add("sparse giant", sparse_giant(bits));
    }
    let mut add = |what: &str, craft| images.push((what.to_owned(), craft));
    add("snapshots", many_snapshots(12, 20_000, false));
    add("snapshots, all far away", many_snapshots(9, 65536, true));
    add("one block, all used", shared_block(21, 1));
    add("one block, all free", shared_block(21, 0));
    add("beyond everything", used_beyond_everything());
    add("extensions", extensions());
    add("feature names", feature_names());
    images
}

/// Bytes of memory that work on an image may take: a few buffers, and some
/// times what the file takes up.
fn allowed(craft: &Craft) -> usize {
    // Buffers of a cluster, and windows on tables.
    let buffers = 8 * M + 6 * (1 << craft.bits);
    buffers + 10 * craft.file.allocated() as usize
}

/// Does something with an image; whether it could be done.
type Work = fn(&Path) -> bool;

#[test]
fn memory_follows_the_file_and_not_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut opened = 0;
    for (name, craft) in all() {
        craft.save(&path);
        let works: [(&str, Work); 6] = [
            ("open", |path| open(path, false).is_ok()),
            ("read", |path| {
                let Ok(disk) = open(path, false) else {
                    return false;
                };
                let mut bytes = vec![0; 4096];
                let last = disk.size() - 4096;
                disk.read_at(&mut bytes, 0).is_ok() && disk.read_at(&mut bytes, last).is_ok()
            }),
            ("write", |path| {
                let Ok(disk) = open(path, true) else {
                    return false;
                };
                let written = disk.write_at(&[7; 4096], 64 << 10).is_ok();
                written && disk.close().is_ok()
            }),
            ("info", |path| {
                report::info(path, &super::options(false)).is_ok()
            }),
            ("check", |path| report::check(path, false, |_| {}).is_ok()),
            ("map", |path| {
                let all = (0, None);
                report::map(path, &super::options(false), all, |_, _| Ok(())).is_ok()
            }),
        ];
        for (what, work) in works {
            let (done, most) = watched(super::HANGS, || peak(|| work(&path)));
            opened += usize::from(done);
            let allowed = allowed(&craft);
            assert!(
                most <= allowed,
                "{name}, {what} ({done}): {most} bytes of memory, {allowed} allowed"
            );
            craft.save(&path);
        }
    }
    assert!(opened > 100, "only {opened} worked at all");
}

/// The whole program, under a limit that the kernel enforces.
#[test]
fn commands_keep_within_their_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let image = path.to_str().unwrap();
    let copy = dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    let key = dir.path().join("key");
    fs::write(&key, "secret").unwrap();
    let key = key.to_str().unwrap();
    let reading: &[&[&str]] = &[
        &["info", image],
        &["info", "--output=json", image],
        &["check", image],
        &["map", "--output=json", image],
        &["measure", "-O", "qcow2", image],
        &["snapshot", "-l", image],
        &["bitmap", "list", image],
        &["key", "list", image],
        &["compare", image, image],
        &["io", "-r", "-c", "read 0 64k", "-c", "map", image],
    ];
    let writing: &[&[&str]] = &[
        &["check", "-r", "all", image],
        &["check", "-r", "leaks", image],
        &["snapshot", "-c", "new", image],
        &["snapshot", "-d", "s", image],
        &["snapshot", "-a", "1", image],
        &["bitmap", "--add", image, "new"],
        &["bitmap", "--remove", image, "b"],
        &["amend", "-o", "compat=0.10", image],
        &["amend", "-o", "refcount_bits=64", image],
        &["resize", image, "+1M"],
        &["rebase", "-u", "-b", "", image],
        &["key", "remove", "--slot", "0", "--force", image],
        &["key", "remove", "--key-file", key, image],
        &[
            "io",
            "-c",
            "write 0 64k",
            "-c",
            "discard 0 64k",
            "-c",
            "flush",
            image,
        ],
    ];
    // The limit bites.
    Craft::new(16).save(&path);
    assert!(
        !unchecked(
            LIMIT,
            &[
                "io",
                "-r",
                "-c",
                "read 0 4M",
                "-c",
                "read -P 0 0 500M",
                image
            ]
        )
        .status
        .success()
    );
    for (name, craft) in all() {
        println!("{name}");
        // The others differ in the size of clusters only.
        let sized = ["-9", "-12", "-21"].iter().any(|bits| name.ends_with(bits));
        if sized && std::env::var_os("HOSTILE_ALL").is_none() {
            continue;
        }
        craft.save(&path);
        for args in reading {
            bounded(LIMIT, args);
        }
        for args in writing {
            craft.save(&path);
            bounded(LIMIT, args);
        }
        // Not what is too large for any file system.
        if name.contains("bitmap") || name.contains("sound") {
            bounded(LIMIT, &["convert", "-O", "qcow2", image, copy]);
        }
    }
}
