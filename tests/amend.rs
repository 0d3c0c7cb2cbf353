//! `amend`: features change, content and snapshots do not; QEMU accepts and
//! refuses the same; a power cut leaves the image as it was or amended.

mod common;

use std::path::Path;

use common::check::Checked;
use common::lab;
use common::{half_random, qemu_create, qemu_img, qemu_io};
use qcow2_ublk::ErrorKind;
use qcow2_ublk::qcow2::amend::Amendment;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk, crash_images};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn amend(options: &str, path: &Path) -> (Option<i32>, String) {
    common::run(PROGRAM, &["amend", "-o", options, text(path)])
}

/// What `qemu-img info` says of the format, and the size.
fn features(path: &Path) -> (Value, Value) {
    let info: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", text(path)])).unwrap();
    (
        info["format-specific"].clone(),
        info["virtual-size"].clone(),
    )
}

/// The active disk and the snapshots, as QEMU sees them.
fn contents(path: &Path, snapshots: &[&str]) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let mut contents = Vec::new();
    qemu_img(&["convert", "-O", "raw", text(path), text(&raw)]);
    contents.push(std::fs::read(&raw).unwrap());
    for name in snapshots {
        qemu_img(&["convert", "-l", name, "-O", "raw", text(path), text(&raw)]);
        contents.push(std::fs::read(&raw).unwrap());
    }
    contents
}

/// An image with all kinds of clusters, and the snapshots "one" and "two".
fn busy(path: &Path, options: &str) {
    let mut image = lab::converted(&half_random(500 << 10, 3), &["-c", "-o", options]);
    let old = options.contains("0.10");
    lab::with_file(&mut image, |path| {
        qemu_io(path, &["write -P 1 10k 100k"]);
        qemu_img(&["snapshot", "-c", "one", text(path)]);
        qemu_io(path, &["write -P 2 50k 100k", "discard 256k 64k"]);
        if !old {
            qemu_io(path, &["write -z 0 64k", "write -zu 128k 64k"]);
        }
        qemu_img(&["snapshot", "-c", "two", text(path)]);
        qemu_io(path, &["write -P 3 300k 50k"]);
        if !old {
            qemu_io(path, &["write -z 64k 64k"]);
        }
    });
    image.save(path).unwrap();
}

#[test]
fn as_qemu_amends() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    busy(&ours, "cluster_size=64k");
    std::fs::copy(&ours, &theirs).unwrap();
    let before = contents(&ours, &["one", "two"]);
    for options in [
        "compat=0.10",
        "lazy_refcounts=on",
        "compat=v2",
        "refcount_bits=32",
        "compat=0.10,lazy_refcounts=on",
        "compat=1.1,lazy_refcounts=on",
        "lazy_refcounts=off",
        "refcount_bits=32",
        "compat=0.10",
        "compat=0.10,refcount_bits=16",
        "compat=v3,refcount_bits=64,lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=8",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=many",
        "lazy_refcounts=maybe",
        "cluster_size=4096",
        "preallocation=off",
        "data_file=x",
        "data_file_raw=on",
        "backing_file=b.qcow2",
        "backing_fmt=qcow2",
        "extended_l2=on",
        "compression_type=zstd",
        "encrypt.key-secret=s",
        "foo=bar",
        "compat=1.0",
    ] {
        let (code, message) = amend(options, &ours);
        let args = ["amend", "-o", options, text(&theirs)];
        let (expected, their_message) = common::run("qemu-img", &args);
        assert_eq!(code, expected, "{options}: {message} {their_message}");
        if code != Some(0) {
            assert!(message.lines().count() <= 2, "{message}");
        }
        assert_eq!(features(&ours), features(&theirs), "{options}");
        lab::qemu_check(&ours, false);
        assert!(contents(&ours, &["one", "two"]) == before, "{options}");
    }
}

#[test]
fn every_width_of_refcounts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for cluster in ["512", "4k", "64k"] {
        busy(&path, &format!("cluster_size={cluster}"));
        let before = contents(&path, &["one", "two"]);
        for bits in ["64", "32", "8", "16", "64", "8"] {
            let (code, message) = amend(&format!("refcount_bits={bits}"), &path);
            assert_eq!(code, Some(0), "{message}");
            lab::qemu_check(&path, false);
            assert_eq!(features(&path).0["data"]["refcount-bits"].to_string(), bits);
            assert!(contents(&path, &["one", "two"]) == before);
        }
        // Three tables refer to the same clusters.
        let file = std::fs::read(&path).unwrap();
        let (code, message) = amend("refcount_bits=1", &path);
        assert_eq!(code, Some(1));
        assert!(message.contains("does not fit in 1 bits"), "{message}");
        assert!(std::fs::read(&path).unwrap() == file, "nothing is changed");
        // And life goes on.
        let writes = ["write -P 9 0 500k", "discard 0 100k"];
        qemu_io(&path, &writes);
        for command in writes {
            let args = ["io", "-c", command, text(&path)];
            assert_eq!(common::run(PROGRAM, &args).0, Some(0));
        }
        lab::qemu_check(&path, false);
    }
    // A disk of its own needs one bit.
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_io(&path, &["write -P 1 0 1M"]);
    for bits in ["1", "2", "4", "1"] {
        let (code, message) = amend(&format!("refcount_bits={bits}"), &path);
        assert_eq!(code, Some(0), "{message}");
        lab::qemu_check(&path, false);
    }
}

#[test]
fn down_to_version_2_and_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let base = dir.path().join("base");
    std::fs::write(&base, half_random(400 << 10, 5)).unwrap();
    for backed in [false, true] {
        busy(&path, "cluster_size=4k");
        if backed {
            qemu_img(&["rebase", "-u", "-F", "raw", "-b", text(&base), text(&path)]);
        }
        let before = contents(&path, &["one", "two"]);
        for (compat, is) in [("0.10", "0.10"), ("v3", "1.1"), ("v2", "0.10")] {
            let (code, message) = amend(&format!("compat={compat}"), &path);
            assert_eq!(code, Some(0), "{message}");
            assert_eq!(features(&path).0["data"]["compat"], is);
            lab::qemu_check(&path, false);
            assert!(contents(&path, &["one", "two"]) == before, "{compat}");
            qemu_io(&path, &["write -P 1 0 100"]);
            qemu_img(&["snapshot", "-c", "x", text(&path)]);
            qemu_img(&["snapshot", "-a", "two", text(&path)]);
            qemu_img(&["snapshot", "-d", "x", text(&path)]);
            lab::qemu_check(&path, false);
            let now = contents(&path, &["one", "two"]);
            assert!(now[1..] == before[1..] && now[0] == before[2]);
            busy(&path, "cluster_size=4k");
            if backed {
                qemu_img(&["rebase", "-u", "-F", "raw", "-b", text(&base), text(&path)]);
            }
            if is == "1.1" {
                assert_eq!(amend("compat=0.10", &path).0, Some(0));
                assert_eq!(amend("compat=1.1", &path).0, Some(0));
                assert!(contents(&path, &["one", "two"]) == before);
            }
        }
    }
}

#[test]
fn what_version_2_cannot_say_stands_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let refused = |why: &str| {
        let file = std::fs::read(&path).unwrap();
        let (code, message) = amend("compat=0.10", &path);
        assert_eq!(code, Some(1), "{message}");
        assert!(message.contains(why), "{message}");
        assert!(std::fs::read(&path).unwrap() == file);
    };
    for (options, why) in [
        ("extended_l2=on", "incompatible features"),
        ("compression_type=zstd", "incompatible features"),
        ("refcount_bits=8", "requires refcount_bits=16"),
    ] {
        qemu_create(text(&path), options, "4M");
        refused(why);
    }
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_img(&["bitmap", "--add", text(&path), "b"]);
    refused("bitmaps");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_img(&["snapshot", "-c", "x", text(&path)]);
    qemu_img(&["resize", "-q", text(&path), "8M"]);
    refused("snapshots");
}

/// Snapshots of old do not tell their disk's size, which version 3 requires.
#[test]
fn old_snapshots_learn_their_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(text(&path), "compat=0.10", "4M");
    qemu_io(&path, &["write -P 1 0 64k"]);
    qemu_img(&["snapshot", "-c", "x", text(&path)]);
    let mut file = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(file[64..72].try_into().unwrap()) as usize;
    assert_eq!(file[table + 36..][..4], [0, 0, 0, 24]);
    // Without extra data, ID and name follow at once.
    file[table + 36..][..4].fill(0);
    let (id_and_name, len) = (table + 64, 2);
    let moved = file[id_and_name..][..len].to_vec();
    file[table + 40..][..len].copy_from_slice(&moved);
    std::fs::write(&path, &file).unwrap();
    lab::qemu_check(&path, false);
    assert_eq!(amend("compat=1.1", &path).0, Some(0));
    lab::qemu_check(&path, false);
    let snapshots = qcow2_ublk::report::snapshots(&path, false).unwrap();
    assert_eq!(snapshots[0].disk_size, Some(4 << 20));
    assert_eq!(snapshots[0].name, b"x");
    qemu_img(&["resize", "-q", text(&path), "8M"]);
    qemu_img(&["snapshot", "-a", "x", text(&path)]);
    assert_eq!(features(&path).1, 4 << 20);
}

/// Version, width, and what is shown.
fn shown(image: &sim::Image) -> (u8, u32, Vec<Vec<u8>>) {
    let checked = Checked::open(image).expect("it opens");
    let found = checked.check();
    assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
    assert_eq!(found.leaks, 0);
    let mut contents = vec![checked.active_content(&[])];
    for index in 0..checked.snapshots().len() {
        contents.push(checked.snapshot_content(index, &[]));
    }
    let header = &checked.header;
    (header.version, header.refcount_order, contents)
}

#[test]
fn a_power_cut_leaves_the_old_image_or_the_amended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let wide = |bits| Amendment {
        refcount_bits: Some(bits),
        ..Amendment::default()
    };
    let version = |version| Amendment {
        version: Some(version),
        ..Amendment::default()
    };
    for (seed, (options, amendment)) in (1..).zip([
        ("cluster_size=4k", wide(64)),
        ("cluster_size=512,refcount_bits=32", wide(8)),
        ("cluster_size=4k", version(2)),
        ("cluster_size=4k,compat=0.10", version(3)),
    ]) {
        busy(&path, options);
        let image = sim::Image::load(&path).unwrap();
        let before = shown(&image);
        let disk = SimDisk::with_image(image);
        disk.shuffle(Some(seed));
        let storage = Storage::simulated(&disk, 1);
        lab::block_on(amendment.run(&storage)).unwrap();
        let after = shown(&disk.image());
        assert_ne!((before.0, before.1), (after.0, after.1));
        assert!(before.2 == after.2, "the content stays");
        let mut seen = [0, 0];
        for crash in crash_images(&disk.history(), seed, 3) {
            let now = shown(&crash.images[0]);
            assert!(now == before || now == after, "{options}: {crash}");
            seen[usize::from(now == after)] += 1;
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    }
}

#[test]
fn a_corrupt_image_is_left_alone() {
    let mut image = lab::created("", 4 << 20);
    // The corrupt mark.
    image.write(79, &[2]);
    let disk = SimDisk::with_image(image.clone());
    let storage = Storage::simulated(&disk, 1);
    let amendment = Amendment {
        version: Some(2),
        ..Amendment::default()
    };
    let error = lab::block_on(amendment.run(&storage)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(disk.image().bytes(0, 65536) == image.bytes(0, 65536));
}
