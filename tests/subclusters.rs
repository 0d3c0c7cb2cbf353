//! Extended L2 entries, with QEMU both ways: which subclusters a request
//! changes, which host clusters it keeps, and what everybody reads.

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::lab::qemu_check;
use common::turns::Turn;
use common::{Reader, half_random, qemu_create, qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::spec::{GuestOffset, HostOffset, L2Entry};
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::{Disk, chain};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image of `size` bytes with 64 KiB clusters: subclusters of 2 KiB.
fn create(folder: &Path, options: &str, size: u64) -> PathBuf {
    let path = folder.join("a.qcow2");
    let options = format!("extended_l2=on{options}");
    let size = size.to_string();
    qemu_create(name(&path), &options, &size);
    path
}

/// Opens the image, works on it, and closes it; QEMU finds it clean.
fn work(path: &Path, work: impl FnOnce(&Disk)) {
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(path, &options).unwrap();
    work(&disk);
    disk.close().unwrap();
    qemu_check(path, false);
}

fn fill(disk: &Disk, at: u64, len: u64, byte: u8) {
    disk.write_at(&vec![byte; len as usize], at).unwrap();
}

/// The host cluster of the first cluster, its COPIED flag and its bitmap.
#[track_caller]
fn entry(path: &Path) -> (HostOffset, bool, u64) {
    let reader = Reader::open(path);
    let entry = reader.entry(GuestOffset(0));
    let (host, copied) = entry.host().expect("a host cluster");
    (host, copied, entry.subclusters().encode())
}

/// What everybody reads: we, and QEMU.
#[track_caller]
fn assert_content(path: &Path, model: &[u8], what: &str) {
    let disk = Disk::open(path, &chain::Options::default()).unwrap();
    let mut seen = vec![0xee; model.len()];
    disk.read_at(&mut seen, 0).unwrap();
    if let Some(at) = seen.iter().zip(model).position(|(a, b)| a != b) {
        panic!(
            "{what}: we read {:#x} at {at:#x}, not {:#x}",
            seen[at], model[at]
        );
    }
    drop(disk);
    let flat = path.with_extension("flat");
    std::fs::write(&flat, model).unwrap();
    let args = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
    qemu_img(&[args.as_slice(), &[name(path), name(&flat)]].concat());
}

/// Row 10: writes set the bits of what they touch and leave the cluster where
/// it is; zeros clear them again and keep the host cluster; what is next to
/// them shows the backing file until the end.
#[test]
fn row_10_only_what_is_touched_changes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), vec![0xbb; M as usize]).unwrap();
    let path = create(dir.path(), ",backing_file=base,backing_fmt=raw", M);
    let mut model = vec![0xbb; M as usize];

    work(&path, |disk| fill(disk, 3 * K, K, 1));
    model[3 << 10..4 << 10].fill(1);
    let (host, copied, bitmap) = entry(&path);
    assert!(copied);
    assert_eq!(bitmap, 0b10, "the one subcluster that was touched");
    assert_content(&path, &model, "one subcluster");

    // Into neighbours on both sides, and further away.
    work(&path, |disk| {
        fill(disk, K, 4 * K, 2);
        fill(disk, 62 * K + 100, 200, 3);
    });
    model[1 << 10..5 << 10].fill(2);
    model[(62 << 10) + 100..(62 << 10) + 300].fill(3);
    assert_eq!(
        entry(&path),
        (host, true, 0x8000_0007),
        "bits, no new cluster"
    );
    assert_content(&path, &model, "more bits");

    // Zeros: one whole subcluster by its bit, parts of two by writing.
    work(&path, |disk| {
        disk.write_zeroes_at(3 * K, 4 * K, true).unwrap();
    });
    model[3 << 10..7 << 10].fill(0);
    assert_eq!(entry(&path), (host, true, 0x0000_0004_8000_000b));
    assert_content(&path, &model, "zeros");

    // A zero subcluster written in part: the rest of it stays zeros.
    work(&path, |disk| fill(disk, 4 * K + 512, 512, 4));
    model[(4 << 10) + 512..5 << 10].fill(4);
    assert_eq!(entry(&path), (host, true, 0x0000_0000_8000_000f));
    assert_content(&path, &model, "over zeros");

    // Discards of less than a cluster change nothing, as in QEMU.
    work(&path, |disk| disk.discard_at(0, 63 * K).unwrap());
    assert_eq!(entry(&path), (host, true, 0x0000_0000_8000_000f));
    assert_content(&path, &model, "a partial discard");

    // Everything that has data is zeroed, in parts: the cluster is freed.
    work(&path, |disk| {
        disk.write_zeroes_at(0, 32 * K, true).unwrap();
        disk.write_zeroes_at(62 * K, 2 * K, true).unwrap();
    });
    model[..32 << 10].fill(0);
    model[62 << 10..64 << 10].fill(0);
    let mixed = Reader::open(&path).entry(GuestOffset(0));
    assert_eq!(mixed.host(), None, "{mixed:?}");
    assert_eq!(mixed.subclusters().encode(), 0x8000_ffff << 32);
    assert_content(&path, &model, "all zeroed");

    // And a whole cluster goes whole, whatever it was.
    work(&path, |disk| {
        fill(disk, 30 * K, 40 * K, 5);
        disk.discard_at(0, 64 * K).unwrap();
    });
    model[..64 << 10].fill(0);
    model[64 << 10..70 << 10].fill(5);
    assert_eq!(Reader::open(&path).entry(GuestOffset(0)), L2Entry::Zero);
    assert_content(&path, &model, "discarded");
}

/// Zeros that are to keep their space keep the host cluster.
#[test]
fn zeros_without_unmap_keep_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "", M);
    work(&path, |disk| fill(disk, 0, 64 * K, 1));
    let (host, ..) = entry(&path);
    work(&path, |disk| {
        disk.write_zeroes_at(0, 64 * K, false).unwrap();
    });
    assert_eq!(entry(&path), (host, true, 0xffff_ffff << 32));
    work(&path, |disk| {
        fill(disk, 8 * K, 2 * K, 2);
        disk.write_zeroes_at(8 * K, 2 * K, false).unwrap();
        fill(disk, 12 * K, K, 3);
    });
    assert_eq!(entry(&path), (host, true, 0xffff_ffbf << 32 | 0x40));
    let mut model = vec![0; M as usize];
    model[12 << 10..13 << 10].fill(3);
    assert_content(&path, &model, "kept");
}

/// A cluster shared with a snapshot is copied as far as it has data: zeros
/// and holes stay what they were.
#[test]
fn a_shared_cluster_is_copied_with_its_bitmap() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), vec![0xbb; M as usize]).unwrap();
    let path = create(dir.path(), ",backing_file=base,backing_fmt=raw", M);
    let mut model = vec![0xbb; M as usize];
    qemu_io(
        &path,
        &["write -P 1 4k 8k", "write -z 20k 6k", "write -P 2 40k 1k"],
    );
    model[4 << 10..12 << 10].fill(1);
    model[20 << 10..26 << 10].fill(0);
    model[40 << 10..41 << 10].fill(2);
    let before = entry(&path);
    qemu_img(&["snapshot", "-c", "one", name(&path)]);
    let old = model.clone();

    work(&path, |disk| fill(disk, 10 * K + 512, 4 * K, 3));
    model[(10 << 10) + 512..(14 << 10) + 512].fill(3);
    let (host, copied, bitmap) = entry(&path);
    assert!(copied && host != before.0);
    assert_eq!(bitmap, before.2 | 0b1100_0000, "two more have data");
    assert_content(&path, &model, "the active disk");

    // Zeros alone need no copy: the snapshot's cluster stays shared.
    qemu_img(&["snapshot", "-c", "two", name(&path)]);
    work(&path, |disk| {
        disk.write_zeroes_at(4 * K, 2 * K, true).unwrap();
    });
    assert_eq!(entry(&path), (host, false, (bitmap & !4) | 4 << 32));
    let second = model.clone();
    model[4 << 10..6 << 10].fill(0);
    assert_content(&path, &model, "zeroed");
    for (snapshot, content) in [("one", &old), ("two", &second)] {
        let seen = dir.path().join("seen");
        let args = ["convert", "-O", "raw", "-l", snapshot];
        qemu_img(&[args.as_slice(), &[name(&path), name(&seen)]].concat());
        assert!(std::fs::read(&seen).unwrap() == *content, "{snapshot}");
    }
}

/// A compressed cluster has no subclusters: what is written to it is copied
/// with the rest of it.
#[test]
fn a_compressed_cluster_becomes_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let mut model = half_random(M as usize, 5);
    std::fs::write(&raw, &model).unwrap();
    let path = dir.path().join("a.qcow2");
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "-o",
        "extended_l2=on",
    ];
    qemu_img(&[args.as_slice(), &[name(&raw), name(&path)]].concat());
    work(&path, |disk| {
        fill(disk, 3 * K, K, 1);
        disk.write_zeroes_at(66 * K, 2 * K, true).unwrap();
    });
    model[3 << 10..4 << 10].fill(1);
    model[66 << 10..68 << 10].fill(0);
    assert_eq!(entry(&path).2, 0xffff_ffff);
    assert_content(&path, &model, "over compressed clusters");
}

/// QEMU and we take turns at random work on one image; after each turn both
/// read the same, check it and map it alike.
#[test]
fn taking_turns_with_qemu() {
    for (seed, options, backed) in [
        (1, ",cluster_size=16k", false),
        (2, "", true),
        (3, ",cluster_size=2M", true),
        (4, ",preallocation=metadata", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let size = 4 * M;
        let mut model = vec![0; size as usize];
        let mut options = options.to_owned();
        if backed {
            // Shorter than the image, and not to the end of a cluster.
            let base = half_random(3 << 20 | 1536, seed);
            std::fs::write(dir.path().join("base"), &base).unwrap();
            model[..base.len()].copy_from_slice(&base);
            options += ",backing_file=base,backing_fmt=raw";
        }
        let path = create(dir.path(), &options, size);
        let mut rng = Rng::new(seed);
        for turn in 0..6 {
            let work_done = Turn::random(&mut rng, size);
            work_done.on_model(&mut model);
            if turn % 2 == 0 {
                work_done.by_qemu(&path);
            } else {
                work(&path, |disk| work_done.by_us(disk));
            }
            let what = format!("{options}, turn {turn}");
            assert_content(&path, &model, &what);
            for args in [["map", "--output=json"], ["check", "--output=json"]] {
                let args = [args.as_slice(), &["-f", "qcow2", name(&path)]].concat();
                let [theirs, ours] = ["qemu-img", OURS].map(|program| {
                    let (code, text) = run(program, &args);
                    assert_eq!(code, Some(0), "{what}: {program} {args:?}: {text}");
                    serde_json::from_str::<serde_json::Value>(&text).unwrap()
                });
                assert_eq!(ours, theirs, "{what}: {args:?}");
            }
        }
    }
}

/// What is wrong with a bitmap is an error for those who need it, names the
/// entry's place, and is a corruption for `check`; the rest of the disk is
/// served.
#[test]
fn bitmaps_that_cannot_be_right() {
    for (bitmap, complaint) in [
        (0x0000_0002_0000_0003_u64, "both allocated and zeros"),
        (1, "no offset"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = create(dir.path(), "", M);
        let nowhere = bitmap == 1;
        let written = if nowhere {
            "write -z 0 64k"
        } else {
            "write 0 64k"
        };
        qemu_io(&path, &[written, "write -P 7 64k 64k"]);
        let reader = Reader::open(&path);
        let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&bitmap.to_be_bytes(), l2 + 8).unwrap();
        let disk = Disk::open(&path, &chain::Options::default()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        let error = disk.read_at(&mut bytes, 0).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
        assert!(error.contains(&format!("{l2:#x}")), "{error}");
        disk.read_at(&mut bytes, 64 * K).unwrap();
        assert!(bytes.iter().all(|&b| b == 7));
        let (code, text) = run(OURS, &["check", name(&path)]);
        assert_eq!(code, Some(2), "{text}");
    }
}

/// What our `create` makes is what QEMU makes.
#[test]
fn create_with_extended_l2() {
    let dir = tempfile::tempdir().unwrap();
    for cluster in ["16k", "64k", "2M"] {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
        let (code, text) = run(OURS, &["create", "-o", &options, name(&ours), "10G"]);
        assert_eq!(code, Some(0), "{text}");
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            name(&theirs),
            "10G",
        ];
        qemu_img(&args);
        let [mut ours, theirs] = [ours, theirs].map(|path| std::fs::read(path).unwrap());
        // Ours ends with whole clusters.
        ours.truncate(theirs.len());
        assert!(ours == theirs, "{cluster}");
    }
    let path = dir.path().join("small");
    for options in [
        "extended_l2=on,cluster_size=8k",
        "extended_l2=on,compat=0.10",
    ] {
        let (code, text) = run(OURS, &["create", "-o", options, name(&path), "1M"]);
        assert_eq!(code, Some(1), "{options}: {text}");
        assert!(
            text.contains("Extended L2 entries are only supported with"),
            "{text}"
        );
        assert!(!path.exists());
    }
}
