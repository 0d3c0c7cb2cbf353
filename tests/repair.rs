//! `check --repair`: what it leaves, `qemu-img check` finds clean; the disk
//! and its snapshots show what they showed.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::shapes::{Random, damage, images, metadata};
use common::{Reader, qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::check::{Repair, Repaired};
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use qcow2_ublk::{Disk, chain, report};
use serde_json::Value;
use tempfile::TempDir;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// A name, and bytes to be stored at places of the file.
type Damage<'a> = (&'a str, &'a [(u64, &'a [u8])]);

/// An image of 64 MiB in clusters of 64 KiB, with what is where.
struct Subject {
    dir: TempDir,
    path: PathBuf,
    good: Vec<u8>,
    l1: u64,
    l2: u64,
    reftable: u64,
    block: u64,
}

impl Subject {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let name = path.to_str().unwrap();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([name, "64M"]);
        qemu_img(&args);
        qemu_io(
            &path,
            &[
                "write -P 1 0 64k",
                "write -P 2 64k 64k",
                "write -P 3 1M 128k",
            ],
        );
        let reader = Reader::open(&path);
        let l1 = reader.header.l1_table_offset.0;
        let reftable = reader.header.refcount_table_offset.0;
        Self {
            good: fs::read(&path).unwrap(),
            l2: reader.be64(reader.header.l1_table_offset) & OFFSET,
            block: reader.be64(reader.header.refcount_table_offset),
            l1,
            reftable,
            path,
            dir,
        }
    }

    /// The entry of guest cluster `n`.
    fn entry(&self, n: u64) -> u64 {
        let at = self.l2 as usize + n as usize * 8;
        u64::from_be_bytes(self.good[at..at + 8].try_into().unwrap())
    }

    /// Where the refcount of a host cluster is (16 bits).
    fn refcount_at(&self, host: u64) -> u64 {
        self.block + (host >> 16) * 2
    }

    /// The image with these bytes changed, in place and in a copy for QEMU.
    fn damaged(&self, changes: &[(u64, &[u8])]) -> PathBuf {
        let mut bad = self.good.clone();
        for (at, bytes) in changes {
            bad[*at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        fs::write(&self.path, &bad).unwrap();
        let copy = self.dir.path().join("copy.qcow2");
        fs::write(&copy, &bad).unwrap();
        copy
    }

    fn assert_reads(&self, patterns: &[(u64, u64, u8)]) {
        let commands: Vec<String> = patterns
            .iter()
            .map(|(at, len, byte)| format!("read -P {byte} {at} {len}"))
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let said = qemu_io(&self.path, &commands);
        assert!(!said.contains("Pattern verification failed"), "{said}");
    }

    /// All that [`Self::new`] has written is there.
    fn assert_whole(&self) {
        self.assert_reads(&[
            (0, 65536, 1),
            (65536, 65536, 2),
            (1 << 20, 131_072, 3),
            (2 << 20, 65536, 0),
        ]);
    }
}

/// Exit code and JSON of `check -r WHAT`; of the report, what the two programs
/// must agree on.
fn repair_with(program: &str, what: &str, image: &Path) -> (Option<i32>, Value) {
    let output = Command::new(program)
        .args(["check", "-f", "qcow2", "--output=json", "-r", what])
        .arg(image)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    if let Some(object) = report.as_object_mut() {
        object.remove("filename");
        // Where new refcounts are put is our own affair.
        object.remove("image-end-offset");
    }
    (output.status.code(), report)
}

fn assert_clean(image: &Path, what: &str) {
    let (code, text) = run("qemu-img", &["check".as_ref(), image.as_os_str()]);
    assert_eq!(code, Some(0), "{what}: {text}");
    let found = report::check(image, false, |_| {}).unwrap();
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}");
}

#[test]
fn leaks_are_given_back_as_qemu_does() {
    let subject = Subject::new("");
    for what in ["leaks", "all"] {
        let third = subject.entry(16) & OFFSET;
        let copy = subject.damaged(&[
            // A mapping gone, and a cluster counted twice.
            (subject.l2 + 8, &[0; 8]),
            (subject.refcount_at(third), &[0, 2]),
            (subject.l2 + 16 * 8, &third.to_be_bytes()),
        ]);
        let ours = repair_with(OURS, what, &subject.path);
        assert_eq!(ours, repair_with("qemu-img", what, &copy), "{what}");
        assert_eq!(ours.0, Some(0));
        assert_eq!(ours.1["leaks-fixed"], 2);
        assert_clean(&subject.path, what);
        subject.assert_reads(&[(0, 65536, 1), (65536, 65536, 0), (1 << 20, 131_072, 3)]);
    }
}

/// Only lost space is given back: the rest of the image stays as it is.
#[test]
fn leaks_mode_leaves_corruptions_alone() {
    let subject = Subject::new("");
    let first = subject.entry(0) & OFFSET;
    subject.damaged(&[
        (subject.refcount_at(first), &[0, 0]),
        (subject.l2 + 8, &[0; 8]),
    ]);
    let done = report::repair(&subject.path, Repair::Leaks, |_| {}).unwrap();
    assert_eq!((done.leaks_fixed, done.corruptions_fixed), (1, 0));
    assert!(done.report.corruptions > 0 && done.report.leaks == 0);
    let (code, _) = repair_with(OURS, "leaks", &subject.path);
    assert_eq!(code, Some(2));
}

#[test]
fn wrong_refcounts_and_flags_as_qemu_does() {
    let subject = Subject::new("");
    let (first, second) = (subject.entry(0) & OFFSET, subject.entry(1) & OFFSET);
    let wrong: &[Damage<'_>] = &[
        ("refcount 0", &[(subject.refcount_at(first), &[0, 0])]),
        (
            "COPIED missing",
            &[
                (subject.l2, &first.to_be_bytes()),
                (subject.l1, &subject.l2.to_be_bytes()),
            ],
        ),
        (
            "many at once",
            &[
                (subject.refcount_at(first), &[0, 7]),
                (subject.l2 + 8, &second.to_be_bytes()),
                (subject.refcount_at(subject.l2), &[0, 0]),
            ],
        ),
        ("refcount of the header", &[(subject.block, &[0, 0])]),
    ];
    for (what, changes) in wrong {
        let copy = subject.damaged(changes);
        let before = run("qemu-img", &["check", subject.path.to_str().unwrap()]).0;
        assert_eq!(before, Some(2), "{what}: not damaged");
        let ours = repair_with(OURS, "all", &subject.path);
        let qemus = repair_with("qemu-img", "all", &copy);
        assert_eq!(ours.0, Some(0), "{what}: {ours:?}");
        assert_eq!(ours.0, qemus.0, "{what}");
        assert!(ours.1["corruptions-fixed"].as_u64() > Some(0), "{what}");
        assert_clean(&subject.path, what);
        subject.assert_whole();
    }
}

/// Two guest clusters in one host cluster: both keep what they show, and a
/// write to one does not show in the other.
#[test]
fn a_cluster_with_two_owners_is_counted_twice_and_copied_on_write() {
    let subject = Subject::new("");
    let first = subject.entry(0);
    subject.damaged(&[(subject.l2 + 8, &first.to_be_bytes())]);
    let done = report::repair(&subject.path, Repair::All, |_| {}).unwrap();
    assert!(done.corruptions_fixed >= 3, "{done:?}");
    assert_clean(&subject.path, "cross-link");
    subject.assert_reads(&[(0, 65536, 1), (65536, 65536, 1), (1 << 20, 131_072, 3)]);
    assert_eq!(
        Reader::open(&subject.path).refcount((first & OFFSET) >> 16),
        2
    );
    let disk = open_rw(&subject.path);
    disk.write_at(&[9; 512], 4096).unwrap();
    disk.close().unwrap();
    subject.assert_reads(&[(4096, 512, 9), (0, 4096, 1), (65536, 65536, 1)]);
    // The other's flag says no more that it is not alone: QEMU too leaves that.
    let left = report::check(&subject.path, false, |_| {}).unwrap();
    assert_eq!((left.corruptions, left.leaks), (1, 0));
    report::repair(&subject.path, Repair::All, |_| {}).unwrap();
    assert_clean(&subject.path, "after the write");
    subject.assert_reads(&[(4096, 512, 9), (0, 4096, 1), (65536, 65536, 1)]);
}

fn open_rw(path: &Path) -> Disk {
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    Disk::open(path, &options).unwrap()
}

/// Refcounts that are gone, or where no refcounts can be.
#[test]
fn refcounts_are_built_anew() {
    for options in ["", "compat=0.10", "refcount_bits=1", "refcount_bits=64"] {
        let subject = Subject::new(options);
        let (table, block) = (subject.reftable, subject.block);
        let mut cases: Vec<(&str, u64, Vec<u8>)> = vec![
            ("no block", table, vec![0; 8]),
            ("no counts", block, vec![0; 65536]),
            ("no table", 48, (1u64 << 30).to_be_bytes().to_vec()),
            ("reserved bits", table, (block | 1).to_be_bytes().to_vec()),
            ("misaligned", table, (block | 0x200).to_be_bytes().to_vec()),
            ("far away", table, (1u64 << 50).to_be_bytes().to_vec()),
            ("absurd", table, (1u64 << 63).to_be_bytes().to_vec()),
            ("twice", table + 8, block.to_be_bytes().to_vec()),
            ("in the L1 table", table, subject.l1.to_be_bytes().to_vec()),
            (
                "table over the L1 table",
                48,
                subject.l1.to_be_bytes().to_vec(),
            ),
            (
                "table over data",
                48,
                (subject.entry(0) & OFFSET).to_be_bytes().to_vec(),
            ),
        ];
        if options == "refcount_bits=1" {
            // A table that is also another one cannot be counted in one bit.
            cases.retain(|(what, ..)| !what.contains("over") && !what.contains("in the"));
        }
        for (what, at, bytes) in cases {
            let what = format!("{options} {what}");
            subject.damaged(&[(at, &bytes)]);
            let done = report::repair(&subject.path, Repair::All, |_| {}).unwrap();
            assert!(done.corruptions_fixed > 0, "{what}: {done:?}");
            assert_clean(&subject.path, &what);
            subject.assert_whole();
            // And it works.
            let disk = open_rw(&subject.path);
            disk.write_at(&vec![7; 1 << 20], 4 << 20).unwrap();
            disk.close().unwrap();
            subject.assert_reads(&[(4 << 20, 1 << 20, 7)]);
            assert_clean(&subject.path, &format!("{what}, used"));
        }
    }
}

/// What cannot be in the file reads as before, as zeros.
#[test]
fn entries_that_refer_to_nothing_become_zeros() {
    for options in ["", "compat=0.10"] {
        let subject = Subject::new(options);
        let wrong: &[(&str, u64)] = &[
            ("far away", COPIED | 1 << 50),
            ("behind the end", COPIED | 1 << 30),
            ("misaligned", subject.entry(1) | 0x200),
            ("compressed far away", 1 << 62 | 1 << 50),
            ("compressed in the header", 1 << 62 | 600),
        ];
        for (what, entry) in wrong {
            subject.damaged(&[(subject.l2 + 8, &entry.to_be_bytes())]);
            let done = report::repair(&subject.path, Repair::All, |_| {}).unwrap();
            assert!(done.corruptions_fixed > 0, "{options} {what}");
            assert_clean(&subject.path, what);
            subject.assert_reads(&[(0, 65536, 1), (65536, 65536, 0), (1 << 20, 131_072, 3)]);
        }
        // Reserved bits are no reason to give data up.
        let entry = subject.entry(1) | 1 << 60;
        let l1 = COPIED | 1 << 58 | subject.l2;
        subject.damaged(&[
            (subject.l2 + 8, &entry.to_be_bytes()),
            (subject.l1, &l1.to_be_bytes()),
        ]);
        report::repair(&subject.path, Repair::All, |_| {}).unwrap();
        assert_clean(&subject.path, "reserved bits");
        subject.assert_whole();
        // L1 entries that lead nowhere.
        for l1 in [
            COPIED | 1 << 50,
            COPIED | subject.l2 | 0x200,
            1 << 60,
            COPIED,
        ] {
            subject.damaged(&[(subject.l1, &l1.to_be_bytes())]);
            report::repair(&subject.path, Repair::All, |_| {}).unwrap();
            assert_clean(&subject.path, &format!("L1 {l1:#x}"));
            subject.assert_reads(&[(0, 1 << 20, 0)]);
        }
    }
}

#[test]
fn a_truncated_image() {
    let subject = Subject::new("");
    let len = subject.good.len();
    for keep in [len - 1, len - 65536, len - 131_072, len - 196_608] {
        fs::write(&subject.path, &subject.good[..keep]).unwrap();
        let before = read_all(&subject.path, 64 << 20, 65536);
        report::repair(&subject.path, Repair::All, |_| {}).unwrap();
        assert_clean(&subject.path, &format!("cut at {keep}"));
        let after = read_all(&subject.path, 64 << 20, 65536);
        assert!(before == after, "cut at {keep}: the content has changed");
    }
}

/// Each piece of the disk, where it can be read at all.
fn read_all(path: &Path, size: u64, piece: u64) -> Vec<Option<Vec<u8>>> {
    let Ok(disk) = Disk::open(path, &chain::Options::default()) else {
        return Vec::new();
    };
    (0..size.div_ceil(piece))
        .map(|n| {
            let at = n * piece;
            let mut bytes = vec![0; piece.min(size - at) as usize];
            disk.read_at(&mut bytes, at).ok().map(|()| bytes)
        })
        .collect()
}

/// Marks of an image that was not closed, or found corrupt, go when nothing is
/// wrong any more, and unknown autoclear bits go with the first write.
#[test]
fn a_repaired_image_is_marked_clean() {
    let subject = Subject::new("lazy_refcounts=on");
    let first = subject.entry(0) & OFFSET;
    subject.damaged(&[
        (79, &[3]),
        (88, &[0x80]),
        (subject.refcount_at(first), &[0, 0]),
    ]);
    let (code, _) = repair_with(OURS, "all", &subject.path);
    assert_eq!(code, Some(0));
    let file = fs::read(&subject.path).unwrap();
    assert_eq!((file[79], file[88]), (0, 0));
    assert_clean(&subject.path, "marked");
    subject.assert_whole();
    // A sound image that says it is not: the marks are all there is to repair.
    subject.damaged(&[(79, &[3])]);
    assert_eq!(repair_with(OURS, "leaks", &subject.path).0, Some(0));
    assert_eq!(fs::read(&subject.path).unwrap(), subject.good);
    // Nothing to repair: nothing is written.
    let old = fs::metadata(&subject.path).unwrap().modified().unwrap();
    assert_eq!(repair_with(OURS, "all", &subject.path).0, Some(0));
    let now = fs::metadata(&subject.path).unwrap().modified().unwrap();
    assert_eq!(old, now);
}

/// Images of every shape, damaged at random: afterwards either all is well by
/// QEMU's word too, or we have said that it is not; a second repair finds
/// nothing to do; and what could be read still can, and is the same.
#[test]
fn random_damage_is_repaired_or_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x0bad_cafe_1234_5677);
    let (mut repaired, mut total) = (0, 0);
    for (name, image) in images(dir.path()) {
        let good = fs::read(&image).unwrap();
        let reader = Reader::open(&image);
        for round in 0..6 {
            let (bad, what) = damage(&good, &reader, &mut random);
            let what = format!("{name}, round {round}:{what}");
            let path = dir.path().join("damaged.qcow2");
            fs::write(&path, &bad).unwrap();
            if name == "external" {
                let raw = dir.path().join("external.qcow2.raw");
                fs::copy(raw, dir.path().join("damaged.qcow2.raw")).unwrap();
            }
            let spared = aimed_at_metadata(&path);
            let piece = reader.header.cluster_size();
            let before = read_all(&path, reader.header.virtual_size(), piece);
            let done = report::repair(&path, Repair::All, |_| {})
                .unwrap_or_else(|e| panic!("{what}: {e:?}"));
            total += 1;
            let sound = done.report.corruptions == 0 && done.report.check_errors == 0;
            let code = run("qemu-img", &["check", path.to_str().unwrap()]).0;
            if sound {
                assert_eq!(code, Some(0), "{what}: {done:?}");
                assert_eq!(done.report.leaks, 0, "{what}");
                repaired += 1;
            }
            let again = report::repair(&path, Repair::All, |_| {}).unwrap();
            let nothing = Repaired {
                corruptions_fixed: 0,
                leaks_fixed: 0,
                report: done.report,
            };
            assert_eq!(again, nothing, "{what}: a second repair");
            let after = read_all(&path, reader.header.virtual_size(), piece);
            for (n, (old, new)) in before.iter().zip(&after).enumerate() {
                if let Some(old) = old
                    && !spared.contains(&(n as u64))
                {
                    let same = new.as_ref() == Some(old);
                    assert!(same, "{what}: guest cluster {n} differs, {done:?}");
                }
            }
        }
    }
    assert!(
        repaired * 10 >= total * 9,
        "only {repaired} of {total} images were repaired"
    );
}

/// Guest clusters that show metadata, which a repair is about to change.
fn aimed_at_metadata(path: &Path) -> Vec<u64> {
    let reader = Reader::open(path);
    let geometry = reader.geometry();
    let size = geometry.cluster_size();
    let tables: Vec<u64> = metadata(&reader)
        .iter()
        .map(|place| place.0 / size)
        .collect();
    (0..reader.header.virtual_size().div_ceil(size))
        .filter(|n| {
            let guest = GuestOffset(n * size);
            let l1 = reader.header.l1_table_offset + geometry.l1_index(guest) * 8;
            let table = reader.be64(l1) & OFFSET;
            let entry = geometry.l2_index(guest) << geometry.l2_entry_bits();
            let raw = reader.be64(qcow2_ublk::qcow2::spec::HostOffset(table + entry));
            match L2Entry::decode(raw, &geometry) {
                Ok(L2Entry::Data { host, .. }) => tables.contains(&(host.0 / size)),
                Ok(L2Entry::Compressed(range)) => range
                    .clusters_touched(&geometry)
                    .any(|cluster| tables.contains(&cluster)),
                _ => table != 0 && tables.iter().filter(|&&t| t == table / size).count() > 2,
            }
        })
        .collect()
}
