//! `check --repair` of the snapshot table and of bitmaps: as qemu-img where it
//! repairs, and never a bitmap that says too little.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Reader, qemu_create, qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::spec::HostOffset;
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapFlags};
use qcow2_ublk::qcow2::spec::snapshot::Snapshot;
use qcow2_ublk::{Disk, chain, report};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn assert_clean(image: &Path, what: &str) {
    let (code, said) = run("qemu-img", &["check", text(image)]);
    assert_eq!(code, Some(0), "{what}: {said}");
    let found = report::check(image, false, |_| {}).unwrap();
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}");
}

fn repaired(program: &str, what: &str, image: &Path) -> (Option<i32>, String) {
    run(program, &["check", "-r", what, text(image)])
}

/// The snapshot table, without where L1 tables are.
fn snapshots(image: &Path) -> Vec<Snapshot> {
    let reader = Reader::open(image);
    let mut at = reader.header.snapshots_offset;
    let mut found = Vec::new();
    for _ in 0..reader.header.nb_snapshots {
        let bytes = reader.bytes(at, 4096);
        let (snapshot, len) = Snapshot::parse(&bytes, at, &reader.geometry()).unwrap();
        found.push(Snapshot {
            l1_table_offset: HostOffset(0),
            ..snapshot
        });
        at += len as u64;
    }
    found
}

/// Cuts the extra data of the first snapshot's entry to `len` bytes.
fn shorten_extra(image: &Path, len: usize) {
    let reader = Reader::open(image);
    let start = reader.header.snapshots_offset;
    let mut at = start;
    let mut table = Vec::new();
    for index in 0..reader.header.nb_snapshots {
        let bytes = reader.bytes(at, 4096);
        let (mut snapshot, entry) = Snapshot::parse(&bytes, at, &reader.geometry()).unwrap();
        if index == 0 {
            snapshot.has_vm_state_64 = len >= 8;
            snapshot.disk_size = None;
            snapshot.icount = None;
            snapshot.unknown_extra = vec![0x5a; len % 8];
        }
        snapshot.encode(&mut table).unwrap();
        at += entry as u64;
    }
    let mut file = reader.file;
    file[start.0 as usize..][..table.len()].copy_from_slice(&table);
    fs::write(image, file).unwrap();
}

/// Entries without the disk's size get the image's, as with qemu-img; what
/// else is wrong is put right before.
#[test]
fn snapshots_get_the_size_that_version_3_requires() {
    let dir = tempfile::tempdir().unwrap();
    let [image, theirs, flat] = ["a", "theirs", "flat"].map(|name| dir.path().join(name));
    let name = text(&image);
    for options in ["cluster_size=64k", "cluster_size=512", "refcount_bits=64"] {
        qemu_create(name, options, "4M");
        qemu_io(&image, &["write -P 1 0 128k"]);
        qemu_img(&["snapshot", "-c", "one", name]);
        qemu_io(&image, &["write -P 2 64k 128k"]);
        qemu_img(&["resize", "-q", name, "8M"]);
        qemu_img(&["snapshot", "-c", "two", name]);
        let good = fs::read(&image).unwrap();
        for len in [0, 8, 12] {
            for also_low in [false, true] {
                let what = format!("{options}, {len} bytes, {also_low}");
                fs::write(&image, &good).unwrap();
                shorten_extra(&image, len);
                if also_low {
                    // The active L1 table is counted as free.
                    let reader = Reader::open(&image);
                    let geometry = reader.geometry();
                    let l1 = reader.header.l1_table_offset;
                    let l1 = l1.cluster(geometry.cluster_bits);
                    let per_block = geometry.refcounts_per_block();
                    let block = reader.header.refcount_table_offset + l1 / per_block * 8;
                    let width = geometry.refcount_bits() as usize / 8;
                    let at = reader.be64(block) as usize + (l1 % per_block) as usize * width;
                    let mut file = reader.file;
                    file[at..at + width].fill(0);
                    fs::write(&image, file).unwrap();
                }
                fs::copy(&image, &theirs).unwrap();
                let bad = fs::read(&image).unwrap();
                let (code, said) = repaired(OURS, "leaks", &image);
                assert_eq!(code, Some(2), "{what}: {said}");
                assert!(fs::read(&image).unwrap() == bad, "{what}: leaks alone");
                let (code, said) = repaired(OURS, "all", &image);
                assert_eq!(code, Some(0), "{what}: {said}");
                assert_clean(&image, &what);
                let (code, said) = repaired("qemu-img", "all", &theirs);
                assert_eq!(code, Some(0), "{what}: {said}");
                assert_eq!(snapshots(&image), snapshots(&theirs), "{what}");
                assert_eq!(snapshots(&image)[0].disk_size, Some(8 << 20), "{what}");
                for snapshot in ["one", "two"] {
                    let option = format!("snapshot.name={snapshot}");
                    let convert = ["convert", "-l", &option, "-O", "raw"];
                    qemu_img(&[&convert[..], &[name, text(&flat)]].concat());
                    let shown = fs::read(&flat).unwrap();
                    assert_eq!((shown.len(), shown[0]), (8 << 20, 1), "{what}");
                    let second = if snapshot == "one" { 1 } else { 2 };
                    assert_eq!((shown[65536], shown[131_072]), (second, 2 * (second - 1)));
                }
            }
        }
    }
}

/// Makes the extra data of the first snapshot's entry `len` bytes longer.
fn lengthen_extra(image: &Path, len: usize) {
    let reader = Reader::open(image);
    let start = reader.header.snapshots_offset.0 as usize;
    let mut file = reader.file;
    let field = start + 36..start + 40;
    let extra = u32::from_be_bytes(file[field.clone()].try_into().unwrap());
    file[field].copy_from_slice(&(extra + len as u32).to_be_bytes());
    let behind = start + 40 + extra as usize;
    // The table has its cluster alone.
    file.resize(file.len().max(start + 65536), 0);
    file.copy_within(behind..start + 65536 - len, behind + len);
    file[behind..behind + len].fill(0x5a);
    fs::write(image, file).unwrap();
}

/// Extra data that is too long for everybody is cut off, as by qemu-img; no
/// snapshot is lost.
#[test]
fn snapshots_lose_the_extra_data_that_nobody_handles() {
    let dir = tempfile::tempdir().unwrap();
    let [image, theirs, flat] = ["a", "theirs", "flat"].map(|name| dir.path().join(name));
    let name = text(&image);
    for (options, len) in [
        ("cluster_size=64k", 1001_usize),
        ("compat=0.10", 5000),
        ("refcount_bits=1,cluster_size=64k", 40_000),
    ] {
        qemu_create(name, options, "4M");
        // With refcounts of one bit a snapshot shares nothing.
        qemu_img(&["snapshot", "-c", "one", name]);
        qemu_io(&image, &["write -P 2 0 64k"]);
        if !options.contains("refcount_bits") {
            qemu_img(&["snapshot", "-c", "two", name]);
        }
        lengthen_extra(&image, len.next_multiple_of(8));
        fs::copy(&image, &theirs).unwrap();
        let bad = fs::read(&image).unwrap();
        let (code, said) = run(OURS, &["check", name]);
        assert_eq!(
            code,
            run("qemu-img", &["check", name]).0,
            "{options}: {said}"
        );
        assert!(
            said.contains("snapshot 0 has too much extra data"),
            "{said}"
        );
        let (code, said) = repaired(OURS, "leaks", &image);
        assert_eq!(code, Some(1), "{options}: {said}");
        assert!(fs::read(&image).unwrap() == bad, "{options}: leaks alone");
        let (code, said) = repaired(OURS, "all", &image);
        assert_eq!(code, Some(0), "{options}: {said}");
        assert_clean(&image, options);
        let (code, said) = repaired("qemu-img", "all", &theirs);
        assert_eq!(code, Some(0), "{options}: {said}");
        assert_eq!(snapshots(&image), snapshots(&theirs), "{options}");
        assert_eq!(snapshots(&image)[0].unknown_extra.len(), 1024 - 24);
        qemu_img(&["convert", "-l", "one", "-O", "raw", name, text(&flat)]);
        assert!(fs::read(&flat).unwrap().iter().all(|&byte| byte == 0));
    }
}

/// Version 2 has no such rule.
#[test]
fn snapshots_of_version_2_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a");
    let name = text(&image);
    qemu_create(name, "compat=0.10", "4M");
    qemu_img(&["snapshot", "-c", "one", name]);
    shorten_extra(&image, 0);
    let before = fs::read(&image).unwrap();
    assert_eq!(repaired(OURS, "all", &image).0, Some(0));
    assert!(fs::read(&image).unwrap() == before);
}

/// What looks unused may be a snapshot's, when nobody knows where its L1 table
/// is: QEMU gives its clusters away.
#[test]
fn a_snapshot_whose_l1_table_is_nowhere_keeps_its_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a");
    let name = text(&image);
    qemu_create(name, "cluster_size=4k", "4M");
    qemu_io(&image, &["write -P 7 0 64k"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    qemu_io(&image, &["write -P 8 0 64k"]);
    let reader = Reader::open(&image);
    let at = reader.header.snapshots_offset.0 as usize;
    let good = fs::read(&image).unwrap();
    let mut damaged = good.clone();
    damaged[at..at + 8].fill(0);
    for what in ["leaks", "all"] {
        fs::write(&image, &damaged).unwrap();
        let (code, said) = repaired(OURS, what, &image);
        assert_eq!(code, Some(2), "{said}");
        assert!(fs::read(&image).unwrap() == damaged, "{what}: {said}");
    }
    fs::write(&image, &good).unwrap();
    assert_clean(&image, "put back by hand");
}

const SIZE: u64 = 64 << 20;

/// An image with three bitmaps that have bits, and places in it.
struct Bitmaps {
    _dir: tempfile::TempDir,
    path: PathBuf,
    good: Vec<u8>,
    directory: u64,
    /// Of each bitmap: its table and its one cluster.
    places: Vec<(u64, u64)>,
    /// A cluster of guest data.
    data: u64,
}

impl Bitmaps {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let name = text(&path);
        qemu_img(&["create", "-q", "-f", "qcow2", name, "64M"]);
        for (bitmap, write) in [
            ("a", "write -P 7 0 64k"),
            ("b", "write 3M 64k"),
            ("c", "write 9M 64k"),
        ] {
            qemu_img(&["bitmap", "--add", name, bitmap]);
            qemu_io(&path, &[write]);
        }
        let reader = Reader::open(&path);
        let directory = reader.header.bitmaps().unwrap().directory_offset.0;
        assert_eq!(
            reader.bytes(HostOffset(directory + 24), 1),
            b"a",
            "a is first"
        );
        let places = directory_of(&reader)
            .iter()
            .map(|bitmap| {
                let table = bitmap.table_offset;
                (table.0, reader.be64(table) & OFFSET)
            })
            .collect();
        let l2 = HostOffset(reader.be64(reader.header.l1_table_offset) & OFFSET);
        Self {
            directory,
            places,
            data: reader.be64(l2) & OFFSET,
            good: reader.file,
            path,
            _dir: dir,
        }
    }

    /// Puts these numbers at these places, and repairs.
    fn damaged(&self, what: &str, changes: &[(u64, u64)]) {
        let mut bad = self.good.clone();
        for (at, word) in changes {
            bad[*at as usize..][..8].copy_from_slice(&word.to_be_bytes());
        }
        fs::write(&self.path, &bad).unwrap();
        let (code, said) = run(OURS, &["check", text(&self.path)]);
        assert_eq!(code, Some(2), "{what}: {said}");
        let (code, said) = repaired(OURS, "all", &self.path);
        assert_eq!(code, Some(0), "{what}: {said}");
        assert_clean(&self.path, what);
        let disk = Disk::open(&self.path, &chain::Options::default()).unwrap();
        let mut shown = vec![0; 65536];
        disk.read_at(&mut shown, 0).unwrap();
        assert!(shown.iter().all(|&byte| byte == 7), "{what}");
    }

    /// What the bitmaps say is dirty; None for those that nobody may use.
    fn say(&self) -> Vec<Option<Vec<(u64, u64)>>> {
        let reader = Reader::open(&self.path);
        if !reader.header.bitmaps_consistent() {
            return vec![None; 3];
        }
        let disk = Disk::open(&self.path, &chain::Options::default()).unwrap();
        directory_of(&reader)
            .iter()
            .map(|bitmap| {
                if bitmap.flags.contains(BitmapFlags::IN_USE) {
                    return None;
                }
                let name = std::str::from_utf8(&bitmap.name).unwrap();
                let content = disk.bitmap(name).unwrap();
                let mut ranges = Vec::new();
                content
                    .ranges(|start, len| {
                        ranges.push((start, len));
                        Ok(())
                    })
                    .unwrap();
                Some(ranges)
            })
            .collect()
    }
}

/// The bitmaps, by name.
fn directory_of(reader: &Reader) -> Vec<Bitmap> {
    let extension = reader.header.bitmaps().unwrap();
    let bytes = reader.bytes(extension.directory_offset, extension.directory_size);
    let mut bitmaps = Bitmap::parse_directory(&bytes, extension, &reader.geometry()).unwrap();
    bitmaps.sort_by(|a, b| a.name.cmp(&b.name));
    bitmaps
}

/// Bitmaps of which a part is somebody else's say that all is dirty; the
/// others say what they said, and QEMU goes on with all of them.
#[test]
fn doubtful_bitmaps_say_that_everything_has_changed() {
    let image = Bitmaps::new();
    let [a, b, _] = image.places[..] else {
        panic!("three bitmaps")
    };
    let all = Some(vec![(0, SIZE)]);
    let said = image.say();
    assert_eq!(said[2], Some(vec![(9 << 20, 65536)]));
    let cases = [
        ("another's cluster", vec![(a.0, b.1)], 2),
        ("the guest's cluster", vec![(a.0, image.data)], 1),
        ("the refcount table", vec![(a.0, 65536)], 1),
        ("another's table", vec![(a.0, b.0)], 1),
        ("reserved bits", vec![(a.0, a.1 | 2)], 1),
        ("reserved bits and nowhere", vec![(a.0, 1 << 60)], 1),
        ("far away", vec![(a.0, 1 << 40)], 1),
    ];
    for (what, changes, doubtful) in cases {
        image.damaged(what, &changes);
        let now = image.say();
        assert_eq!(now[0], all, "{what}");
        // One whose table could be written over by another is not believed.
        match what {
            "another's table" => assert_eq!(now[1], None, "{what}"),
            _ if doubtful == 2 => assert_eq!(now[1], all, "{what}"),
            _ => assert_eq!(now[1], said[1], "{what}"),
        }
        assert_eq!(now[2], said[2], "{what}");
        // QEMU records in them, and puts them together.
        let name = text(&image.path);
        qemu_io(&image.path, &["write 20M 64k"]);
        assert_eq!(
            image.say()[2],
            Some(vec![(9 << 20, 65536), (20 << 20, 65536)])
        );
        qemu_img(&["bitmap", "--add", "--disable", name, "sum"]);
        qemu_img(&["bitmap", "--merge", "a", "--merge", "c", name, "sum"]);
        assert_eq!(image.say()[3], all, "{what}");
        assert_clean(&image.path, what);
    }
}

/// Where the table itself is somebody else's, or the directory cannot be read,
/// nobody believes what it says any more.
#[test]
fn bitmaps_without_a_table_of_their_own_are_not_believed() {
    let image = Bitmaps::new();
    let said = image.say();
    let [a, b, _] = image.places[..] else {
        panic!("three bitmaps")
    };
    let at = image.directory;
    // The guest's data leaves; the bitmap stays marked.
    image.damaged("a table in the guest's data", &[(at, image.data)]);
    let now = image.say();
    assert_eq!(now, [None, said[1].clone(), said[2].clone()]);
    let name = text(&image.path);
    qemu_img(&["bitmap", "--remove", name, "a"]);
    assert_clean(&image.path, "removed");
    for (what, changes) in [
        ("two bitmaps with one table", vec![(at, b.0)]),
        ("a table behind the end", vec![(at, 1 << 30)]),
        ("no directory", vec![(at, 3)]),
        ("a cluster in the directory", vec![(a.0, at)]),
    ] {
        image.damaged(what, &changes);
        assert_eq!(image.say(), vec![None; 3], "{what}");
    }
}
