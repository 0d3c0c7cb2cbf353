//! What is said about disks, and space taken at once.

use std::path::Path;

use super::common::lab::qemu_check;
use super::common::{Reader, qemu_create, qemu_img, qemu_io, run};
use super::{Folder, allocated, assert_same, chain, disk, len, ours, well, write_sparse};
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};

#[test]
fn preallocated_images_are_like_those_of_qemu() {
    let folder = Folder::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        for options in [
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=2M,compat=0.10",
            "extended_l2=on",
        ] {
            let (mine, theirs) = (folder.file("mine"), folder.file("theirs"));
            let all = format!("preallocation={mode},{options}");
            well(&["create", "-q", "-o", &all, &mine, "10M"]);
            qemu_create(&theirs, &all, "10M");
            qemu_check(Path::new(&mine), false);
            assert_same(("qcow2", &mine), ("qcow2", &theirs));
            let entries = |path: &str| {
                let image = Reader::open(Path::new(path));
                let cluster = image.header.cluster_size();
                (0..(10 << 20) / cluster)
                    .filter(|n| {
                        matches!(
                            image.entry(GuestOffset(n * cluster)),
                            L2Entry::Data { copied: true, .. }
                        )
                    })
                    .count()
            };
            // With subclusters QEMU reserves the clusters and allocates no part
            // of them, for the sake of a backing file.
            if !options.contains("extended_l2") {
                assert_eq!(entries(&mine), entries(&theirs), "{all}: mapped clusters");
            }
            assert_eq!(
                allocated(&mine) > 10 << 20,
                matches!(mode, "falloc" | "full"),
                "{all}"
            );
            assert!(len(&mine) <= len(&theirs) + (2 << 20), "{all}");
            qemu_io(
                Path::new(&mine),
                &["write -P 5 1M 3M", "read -P 5 1M 3M", "read -P 0 0 1M"],
            );
            qemu_check(Path::new(&mine), false);
        }
    }
    let (code, text) = ours(&[
        "create",
        "-o",
        "preallocation=some",
        &folder.file("x"),
        "1M",
    ]);
    assert!(code == Some(1) && text.contains("preallocation"), "{text}");
    std::fs::write(folder.path("base"), [0; 512]).unwrap();
    let (code, text) = ours(&[
        "create",
        "-b",
        "base",
        "-F",
        "raw",
        "-o",
        "preallocation=metadata",
        &folder.file("x"),
    ]);
    assert!(
        code == Some(1) && text.contains("Backing file and preallocation"),
        "{text}"
    );
    assert!(!folder.path("x").exists());
    // Advice for btrfs, and no obstacle elsewhere.
    well(&["create", "-q", "-o", "nocow=on", &folder.file("x"), "1M"]);
    qemu_check(&folder.path("x"), false);
}

#[test]
fn measures_are_those_of_qemu() {
    let folder = Folder::new();
    let both = |args: &[&str]| {
        let theirs = qemu_img(&[&["measure", "--output", "json"], args].concat());
        assert_eq!(
            well(&[&["measure", "-J"], args].concat()),
            theirs,
            "{args:?}"
        );
        let theirs = qemu_img(&[&["measure"], args].concat());
        assert_eq!(well(&[&["measure"], args].concat()), theirs, "{args:?}");
    };
    for size in [
        "0",
        "1",
        "512",
        "65537",
        "1M",
        "100M",
        "1G",
        "12345678901",
        "1T",
    ] {
        both(&["-O", "raw", "--size", size]);
        for options in [
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=2M",
            "refcount_bits=1",
            "refcount_bits=64",
            "compat=0.10",
            "preallocation=metadata",
            "extended_l2=on",
            "preallocation=falloc",
            "preallocation=full",
            "backing_file=base,backing_fmt=raw",
        ] {
            both(&["-O", "qcow2", "-o", options, "--size", size]);
        }
    }
    // Bitmaps, as far as both ends can have some.
    let with = folder.file("bitmaps");
    qemu_img(&["create", "-q", "-f", "qcow2", &with, "100M"]);
    for more in [&[][..], &["-g", "512"], &["-g", "2M"]] {
        let bitmap = ["bitmap", "--add"];
        let named = format!("bitmap {}", more.len() + more.concat().len());
        qemu_img(&[&bitmap, more, &[&with, &named]].concat());
        for options in ["cluster_size=64k", "cluster_size=512", "compat=0.10"] {
            both(&["-O", "qcow2", "-o", options, &with]);
        }
    }
    let old = folder.file("old");
    qemu_create(&old, "compat=0.10", "1M");
    both(&["-O", "qcow2", &old]);
    let raw = folder.file("raw");
    write_sparse(Path::new(&raw), &disk((5 << 20) + 1536, 3));
    let qcow2 = folder.file("qcow2");
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &qcow2]);
    let top = chain(&folder);
    for (file, format) in [(&raw, "raw"), (&qcow2, "qcow2"), (&top, "qcow2")] {
        both(&["-f", format, "-O", "raw", file]);
        for options in [
            "cluster_size=64k",
            "cluster_size=512",
            "cluster_size=2M",
            "backing_file=base,backing_fmt=raw",
            "preallocation=full",
        ] {
            both(&["-f", format, "-O", "qcow2", "-o", options, file]);
        }
    }
}

#[test]
fn comparisons_say_what_qemu_says() {
    let folder = Folder::new();
    let make = |name: &str, bytes: &[u8]| write_sparse(&folder.path(name), bytes);
    let mut bytes = disk(2 << 20, 40);
    bytes[..4096].fill(1);
    make("a", &bytes);
    make("same", &bytes);
    bytes.resize(3 << 20, 0);
    make("longer", &bytes);
    bytes[(2 << 20) + 70_001] = 1;
    make("longer-data", &bytes);
    bytes.truncate(2 << 20);
    bytes[1_500_001] ^= 1;
    make("other", &bytes);
    bytes[0] ^= 1;
    make("first", &bytes);
    make("zeros", &[0; 2 << 20]);
    std::fs::write(folder.path("allocated"), vec![0; 2 << 20]).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        &folder.file("a"),
        &folder.file("a.qcow2"),
    ]);
    let args = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    qemu_img(&[&args[..], &[&folder.file("a"), &folder.file("c.qcow2")]].concat());
    qemu_img(&["create", "-q", "-f", "qcow2", &folder.file("e.qcow2"), "2M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", &folder.file("z.qcow2"), "2M"]);
    qemu_io(&folder.path("z.qcow2"), &["write -z 0 64k"]);
    let mut seen = std::collections::BTreeSet::new();
    for (a, b) in [
        ("a", "same"),
        ("a", "longer"),
        ("longer", "a"),
        ("a", "longer-data"),
        ("longer-data", "a"),
        ("a", "other"),
        ("a", "first"),
        ("zeros", "allocated"),
        ("zeros", "a"),
        ("a", "a.qcow2"),
        ("c.qcow2", "a.qcow2"),
        ("z.qcow2", "e.qcow2"),
        ("e.qcow2", "zeros"),
        ("a", "nowhere"),
    ] {
        for strict in [false, true] {
            let format = |name: &str| {
                if name.ends_with("qcow2") {
                    "qcow2"
                } else {
                    "raw"
                }
            };
            let (file_a, file_b) = (folder.file(a), folder.file(b));
            let mut args = vec![
                "compare",
                "-f",
                format(a),
                "-F",
                format(b),
                &file_a,
                &file_b,
            ];
            if strict {
                args.push("-s");
            }
            let (code, text) = run("qemu-img", &args);
            let (our_code, our_text) = ours(&args);
            assert_eq!(our_code, code, "{a} {b}: {our_text}");
            if code != Some(2) {
                assert_eq!(our_text, text, "{a} {b}, strict: {strict}");
            }
            seen.insert(text.split(['0', '1', '2', '\'']).next().unwrap().to_owned());
            args.push("-q");
            let (quiet_code, text) = ours(&args);
            assert_eq!(quiet_code, code);
            assert!(code == Some(2) || text.is_empty(), "{text}");
        }
    }
    assert!(seen.len() >= 5, "all answers were had: {seen:?}");
}
