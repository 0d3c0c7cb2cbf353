//! The power fails in the middle of a repair: the image is no worse than
//! before, shows what it showed, and a second repair completes the first.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::check::Checked;
use common::lab;
use common::{half_random, qemu_img, qemu_io};
use qcow2_ublk::qcow2::check::{self, CheckReport, Finding, Problem, Repair};
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapFlags};
use qcow2_ublk::qcow2::spec::snapshot::Snapshot;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk, crash_images};

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What endangers data.
#[derive(Debug, Default)]
struct Dangers {
    /// Clusters used more often than they are counted.
    low: BTreeSet<u64>,
    /// Clusters that some entry wrongly says are its alone.
    copied: BTreeSet<u64>,
}

fn look(image: &sim::Image) -> (CheckReport, Dangers) {
    let storage = Storage::simulated(&SimDisk::with_image(image.clone()), 1);
    let mut findings: Vec<Finding> = Vec::new();
    let report = lab::block_on(check::check(&storage, &mut |f| findings.push(f.clone()))).unwrap();
    let mut dangers = Dangers::default();
    let mut counts = BTreeMap::new();
    for finding in &findings {
        if let Problem::Refcount {
            cluster,
            stored,
            counted,
        } = finding.problem
        {
            counts.insert(cluster, counted);
            if stored < counted {
                dangers.low.insert(cluster);
            }
        }
    }
    let bits = Checked::open(image).map_or(0, |checked| checked.header.cluster_bits);
    for finding in &findings {
        let Problem::Copied { entry, .. } = finding.problem else {
            continue;
        };
        let cluster = (entry & OFFSET) >> bits;
        if entry & COPIED != 0 && counts.get(&cluster) != Some(&1) {
            dangers.copied.insert(cluster);
        }
    }
    (report, dangers)
}

struct Content {
    active: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
}

/// What the disk and its snapshots show: of an image whose entries obey the
/// rules.
fn content(image: &sim::Image) -> Content {
    let checked = Checked::open(image).unwrap();
    Content {
        active: checked.active_content(&[]),
        snapshots: (0..checked.snapshots().len())
            .map(|index| checked.snapshot_content(index, &[]))
            .collect(),
    }
}

/// `spared` are guest clusters, their numbers and length, that show metadata:
/// what they show changes with it.
fn assert_same_but(
    image: &sim::Image,
    expected: &Content,
    (spared, cluster): (&[u64], u64),
    what: &str,
) {
    let mut now = content(image);
    for &n in spared {
        let range = (n * cluster) as usize..((n + 1) * cluster) as usize;
        now.active[range.clone()].copy_from_slice(&expected.active[range]);
    }
    assert!(
        now.active == expected.active,
        "{what}: the disk has changed"
    );
    assert!(
        now.snapshots == expected.snapshots,
        "{what}: a snapshot has changed"
    );
}

fn assert_same(image: &sim::Image, expected: &Content, what: &str) {
    assert_same_but(image, expected, (&[], 0), what);
}

fn repaired(disk: &SimDisk, what: Repair) -> CheckReport {
    let storage = Storage::simulated(disk, 1);
    lab::block_on(check::repair(&storage, what, &mut |_| {}))
        .unwrap()
        .report
}

/// Repairs `image` and cuts the power everywhere.
fn trial(name: &str, image: &sim::Image, what: Repair) {
    trial_but(name, image, what, &[]);
}

fn trial_but(name: &str, image: &sim::Image, what: Repair, spared: &[u64]) {
    let spared = (spared, Checked::open(image).unwrap().header.cluster_size());
    let shown = content(image);
    let (_, before) = look(image);
    let disk = SimDisk::with_image(image.clone());
    let report = repaired(&disk, what);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}");
    assert_same(&disk.image(), &shown, name);
    let history = disk.history();
    let mut states = 0;
    for crash in crash_images(&history, 11, 2) {
        states += 1;
        let at = format!("{name}, {crash}");
        let left = &crash.images[0];
        assert_same_but(left, &shown, spared, &at);
        let (_, dangers) = look(left);
        assert!(dangers.low.is_subset(&before.low), "{at}: {dangers:?}");
        // A flag that agreed with a refcount of too little was no better.
        let known = &before.copied | &before.low;
        assert!(dangers.copied.is_subset(&known), "{at}: {dangers:?}");
        let again = SimDisk::with_image(left.clone());
        let report = repaired(&again, what);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{at}");
        assert_same_but(&again.image(), &shown, spared, &at);
    }
    assert!(states > 4, "{name}: too few states to mean anything");
}

/// An image with snapshots, compressed clusters and zeros.
fn subject(options: &str) -> sim::Image {
    let mut bytes = half_random(300 << 10, 5);
    bytes.resize(1 << 20, 0);
    let mut image = lab::converted(&bytes, &["-c", "-o", options]);
    lab::with_file(&mut image, |path| {
        qemu_io(path, &["write -P 1 400k 60k", "write -z 500k 8k"]);
        qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
        qemu_io(path, &["write -P 2 410k 30k", "write -P 3 700k 40k"]);
    });
    image
}

/// Places of an image's parts.
struct Places {
    l1: u64,
    l2: u64,
    reftable: u64,
    block: u64,
    cluster: u64,
}

impl Places {
    fn of(image: &sim::Image) -> Self {
        let header = Checked::open(image).unwrap().header.clone();
        let (l1, reftable) = (header.l1_table_offset.0, header.refcount_table_offset.0);
        Self {
            l1,
            l2: be64(image, l1) & OFFSET,
            reftable,
            block: be64(image, reftable),
            cluster: header.cluster_size(),
        }
    }

    /// The places of L2 entries of the first table that are plain data.
    fn data_entries(&self, image: &sim::Image) -> Vec<u64> {
        (0..self.cluster / 8)
            .map(|index| self.l2 + index * 8)
            .filter(|&at| {
                let entry = be64(image, at);
                entry & 1 << 62 == 0 && entry & OFFSET != 0 && entry & COPIED != 0
            })
            .collect()
    }
}

fn be64(image: &sim::Image, at: u64) -> u64 {
    u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap())
}

fn put(image: &mut sim::Image, at: u64, entry: u64) {
    image.write(at, &entry.to_be_bytes());
}

const SHAPES: [&str; 2] = ["cluster_size=4k", "cluster_size=16k,compat=0.10"];

#[test]
fn leaks_and_low_refcounts() {
    for options in SHAPES {
        let good = subject(options);
        let places = Places::of(&good);
        // Refcounts of some clusters in a row: gone, too low, too high.
        let mut image = good.clone();
        image.write(places.block, &[0; 24]);
        image.write(places.block + 24, &[0, 9, 0, 1, 0, 3, 0, 1]);
        trial(options, &image, Repair::All);
        let mut image = good.clone();
        let entries = places.data_entries(&good);
        put(&mut image, entries[0], 0);
        let end = good.len() / places.cluster;
        image.set_len((end + 3) * places.cluster);
        image.write(places.block + end * 2, &[0, 1, 0, 1, 0, 1]);
        trial(options, &image, Repair::Leaks);
        trial(options, &image, Repair::All);
    }
}

#[test]
fn flags_and_cross_links() {
    for options in SHAPES {
        let good = subject(options);
        let places = Places::of(&good);
        let entries = places.data_entries(&good);
        let mut image = good.clone();
        let first = be64(&good, entries[0]);
        put(&mut image, entries[1], first);
        put(&mut image, entries[2], be64(&good, entries[2]) & !COPIED);
        put(&mut image, places.l1, be64(&good, places.l1) & !COPIED);
        trial(options, &image, Repair::All);
        // The tables that guests must not see, and their counts are right.
        let mut image = good.clone();
        put(&mut image, entries[0], COPIED | places.l1);
        put(&mut image, entries[1], COPIED | places.l2);
        let guest = [entries[0], entries[1]].map(|at| (at - places.l2) / 8);
        trial_but(options, &image, Repair::All, &guest);
    }
}

#[test]
fn refcounts_built_anew() {
    for options in SHAPES {
        let good = subject(options);
        let places = Places::of(&good);
        for entry in [0, places.block | 0x100, places.l1, 1 << 40] {
            let mut image = good.clone();
            put(&mut image, places.reftable, entry);
            trial(
                &format!("{options}, block at {entry:#x}"),
                &image,
                Repair::All,
            );
        }
        let mut image = good.clone();
        let field = [(1u64 << 40).to_be_bytes().as_slice(), &[0, 0, 0, 1]].concat();
        image.write(48, &field);
        // Such an image is not opened by anybody: what it shows is told by the
        // sound one.
        let shown = content(&good);
        let disk = SimDisk::with_image(image);
        repaired(&disk, Repair::All);
        for crash in crash_images(&disk.history(), 5, 3) {
            let again = SimDisk::with_image(crash.images[0].clone());
            let report = repaired(&again, Repair::All);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{crash}");
            assert_same(&again.image(), &shown, options);
        }
    }
}

/// Writes fail one after the other; once the disk is well again, the repair is
/// as good as a first one.
#[test]
fn errors_in_the_middle() {
    let good = subject(SHAPES[0]);
    let places = Places::of(&good);
    let entries = places.data_entries(&good);
    let mut image = good.clone();
    put(&mut image, entries[0], COPIED | places.l1);
    put(&mut image, entries[1], be64(&good, entries[2]));
    image.write(places.block, &[0; 24]);
    let shown = content(&image);
    let mut failed = 0;
    for n in 0.. {
        let disk = SimDisk::with_image(image.clone());
        let storage = Storage::simulated(&disk, 1);
        disk.fail_nth(n, libc::EIO);
        let result = lab::block_on(check::repair(&storage, Repair::All, &mut |_| {}));
        disk.clear_faults();
        drop(storage);
        assert_same(&disk.image(), &shown, &format!("operation {n} failed"));
        let report = repaired(&disk, Repair::All);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "operation {n}");
        assert_same(&disk.image(), &shown, &format!("after operation {n}"));
        failed += u32::from(result.is_err());
        if disk.operations() < n {
            break;
        }
    }
    assert!(failed > 10, "only {failed} operations failed");
}

/// The table is the old one or the new one, and its refcounts with it.
#[test]
fn snapshots_without_disk_size() {
    for options in ["cluster_size=4k", "cluster_size=512"] {
        let mut image = subject(options);
        let header = Checked::open(&image).unwrap().header.clone();
        let start = header.snapshots_offset;
        let bytes = image.bytes(start.0, 4096);
        let (mut snapshot, _) = Snapshot::parse(&bytes, start, &header.geometry()).unwrap();
        snapshot.has_vm_state_64 = false;
        snapshot.disk_size = None;
        snapshot.icount = None;
        let mut table = Vec::new();
        snapshot.encode(&mut table).unwrap();
        image.write(start.0, &table);
        assert_eq!(look(&image).0.corruptions, 1);
        trial(options, &image, Repair::All);
    }
}

/// What a bitmap says at any moment: what it said, or that all is dirty; or it
/// has a mark that keeps everybody from believing it.
#[test]
fn bitmaps_that_share_a_cluster() {
    let mut good = subject("cluster_size=512");
    lab::with_file(&mut good, |path| {
        for (bitmap, write) in [("a", "write 0 8k"), ("b", "write 800k 8k")] {
            let name = path.to_str().unwrap();
            qemu_img(&["bitmap", "--add", "-g", "512", name, bitmap]);
            qemu_io(path, &[write]);
        }
    });
    let tables = |image: &sim::Image| {
        let header = Checked::open(image).unwrap().header.clone();
        assert!(header.bitmaps_consistent());
        let extension = *header.bitmaps().unwrap();
        let (at, len) = (extension.directory_offset.0, extension.directory_size);
        let bytes = image.bytes(at, len);
        Bitmap::parse_directory(&bytes, &extension, &header.geometry()).unwrap()
    };
    let entries = |image: &sim::Image, bitmap: &Bitmap| -> Vec<u64> {
        let at = |index: u64| be64(image, bitmap.table_offset.0 + index * 8);
        (0..u64::from(bitmap.table_size)).map(at).collect()
    };
    let list = tables(&good);
    let [a, b] = &list[..] else {
        panic!("two bitmaps")
    };
    let shared = *entries(&good, b).iter().find(|&&entry| entry > 1).unwrap();
    let mut image = good.clone();
    put(&mut image, a.table_offset.0, shared);
    let before = [a, b].map(|bitmap| entries(&image, bitmap));
    trial("bitmaps", &image, Repair::All);
    let disk = SimDisk::with_image(image.clone());
    repaired(&disk, Repair::All);
    let (mut marked, mut ones) = (0, 0);
    for crash in crash_images(&disk.history(), 5, 4) {
        for left in &crash.images {
            for (bitmap, before) in tables(left).iter().zip(&before) {
                if bitmap.flags.contains(BitmapFlags::IN_USE) {
                    marked += 1;
                    continue;
                }
                let now = entries(left, bitmap);
                let all = now.iter().all(|&entry| entry == 1);
                assert!(all || now == *before, "{crash}: {now:x?}");
                ones += u32::from(all);
            }
        }
    }
    assert!(marked > 4 && ones > 4, "{marked} marked, {ones} of ones");
}
