//! `resize` beside `qemu-img resize`.

use std::os::unix::fs::MetadataExt;

use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::{Disk, chain};

use crate::common::half_random;
use crate::place::{Place, assert_same};

/// An image as a test wants it: `-o` options and what is written.
const SHAPES: [&str; 7] = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=2M",
    "compat=0.10",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=1k,refcount_bits=64",
];

/// Absolute and relative sizes, up and down.
const SIZES: [&str; 8] = [
    "3M", "+1536k", "-2M", "1234944", "512", "2M", "+7168", "10000384",
];

#[test]
fn the_disk_is_what_qemu_img_makes_of_it() {
    for shape in SHAPES {
        let place = Place::new();
        place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, "ours", "2M"]);
        let commands = [
            "write -P 1 0 300k",
            "write -P 2 1M 1M",
            "write -z 1536k 64k",
        ];
        place.qemu_io("qcow2", "ours", &commands);
        place.copy("ours", "theirs");
        for size in SIZES {
            assert_eq!(
                place.good(&["resize", "--shrink", "ours", size]),
                "Image resized.\n"
            );
            place.qemu_img(&["resize", "-q", "--shrink", "theirs", size]);
            place.check("ours");
            let what = format!("{shape}, {size}");
            let (ours, theirs) = (
                place.content("qcow2", "ours"),
                place.content("qcow2", "theirs"),
            );
            assert_eq!(ours.len(), theirs.len(), "{what}");
            assert!(
                place.our_content("ours") == ours,
                "{what}: we and QEMU read alike"
            );
            // Bytes that came back: QEMU shows old data in the last cluster
            // of a disk that was shrunk and enlarged; we never do.
            let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b);
            assert!(differ.clone().all(|(ours, _)| *ours == 0), "{what}");
            if differ.count() > 0 {
                // Alike from here on.
                place.copy("ours", "theirs");
            }
        }
    }
}

#[test]
fn space_behind_the_new_end_goes_back_to_the_host() {
    for shape in SHAPES {
        let place = Place::new();
        place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, "a", "8M"]);
        place.qemu_io("qcow2", "a", &["write -P 7 0 8M"]);
        place.copy("a", "b");
        place.good(&["resize", "-q", "--shrink", "a", "1M"]);
        place.qemu_img(&["resize", "-q", "--shrink", "b", "1M"]);
        place.check("a");
        assert_eq!(place.content("qcow2", "a"), vec![7; 1 << 20], "{shape}");
        let (ours, theirs) = (place.len("a"), place.len("b"));
        // With small clusters, refcount blocks lie all over the file and stay.
        assert!(
            ours <= theirs || shape.contains("=512") || shape.contains("=1k"),
            "{shape}: {ours} bytes of file, {theirs} with qemu-img"
        );
        let blocks = |name| std::fs::metadata(place.path(name)).unwrap().blocks();
        assert!(blocks("a") <= blocks("b") + 64, "{shape}");
        // All of it is found again.
        place.good(&["resize", "a", "8M"]);
        place.qemu_io(
            "qcow2",
            "a",
            &["read -P 7 0 1M", "read -P 0 1M 7M", "write -P 9 0 8M"],
        );
        place.check("a");
    }
}

#[test]
fn what_lies_below_a_shorter_overlay_does_not_appear() {
    for compat in ["1.1", "0.10"] {
        for raw in [false, true] {
            for old in ["1000448", "512"] {
                let place = Place::new();
                let base = half_random(4 << 20, 7);
                std::fs::write(place.path("raw"), &base).unwrap();
                place.qemu_img(&["convert", "-c", "-O", "qcow2", "raw", "qcow2"]);
                let format = if raw { "raw" } else { "qcow2" };
                let options = format!("compat={compat},cluster_size=4k");
                let args = ["create", "-q", "-f", "qcow2", "-b", format, "-F", format];
                place.qemu_img(&[args.as_slice(), &["-o", &options, "a", old]].concat());
                let mut expected = place.content("qcow2", "a");
                for size in [3 << 20, 5 << 20] {
                    place.good(&["resize", "-q", "a", &size.to_string()]);
                    place.check("a");
                    expected.resize(size, 0);
                    assert_same(&place.content("qcow2", "a"), &expected, "QEMU");
                    assert_same(&place.our_content("a"), &expected, "ours");
                }
                // Nor after the disk was shorter for a while.
                place.good(&["resize", "-q", "--shrink", "a", "1536"]);
                place.good(&["resize", "-q", "a", "3M"]);
                expected.truncate(1536);
                expected.resize(3 << 20, 0);
                assert_same(&place.content("qcow2", "a"), &expected, "shrunk and grown");
                place.check("a");
            }
        }
    }
}

#[test]
fn snapshots_keep_their_size_and_content() {
    let place = Place::new();
    place.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "a",
        "6M",
    ]);
    place.qemu_io("qcow2", "a", &["write -P 1 0 2M", "write -P 2 5M 1M"]);
    place.qemu_img(&["snapshot", "-c", "one", "a"]);
    place.good(&["resize", "-q", "--shrink", "a", "1500k"]);
    place.check("a");
    place.qemu_io("qcow2", "a", &["read -P 1 0 1500k", "write -P 3 0 1M"]);
    place.good(&["resize", "-q", "a", "9M"]);
    place.check("a");
    place.qemu_io(
        "qcow2",
        "a",
        &[
            "read -P 3 0 1M",
            "read -P 1 1M 476k",
            "read -P 0 1500k 7716k",
        ],
    );
    place.qemu_img(&["snapshot", "-a", "one", "a"]);
    place.check("a");
    assert_eq!(place.info("a", "virtual-size"), 6 << 20);
    place.qemu_io(
        "qcow2",
        "a",
        &["read -P 1 0 2M", "read -P 0 2M 3M", "read -P 2 5M 1M"],
    );
    // Version 2 does not record the size of a snapshot's disk.
    place.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "b",
        "6M",
    ]);
    place.qemu_img(&["snapshot", "-c", "one", "b"]);
    for size in ["8M", "4M"] {
        let said = place.bad(&["resize", "--shrink", "b", size]);
        assert!(
            said.contains("Can't resize a v2 image which has snapshots"),
            "{said}"
        );
        assert_eq!(place.info("b", "virtual-size"), 6 << 20);
    }
}

#[test]
fn refusals_are_those_of_qemu_img() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "a", "10M"]);
    let before = std::fs::read(place.path("a")).unwrap();
    for args in [
        ["a", "5M"].as_slice(),
        &["a", "-1M"],
        &["--shrink", "a", "-10M"],
        &["--shrink", "a", "-11M"],
        &["--preallocation=full", "a", "10M"],
        &["--preallocation=falloc", "--shrink", "a", "7M"],
        &["--preallocation=bogus", "a", "20M"],
        &["-f", "raw", "--preallocation=metadata", "r", "4M"],
        &["a", "10486000"],
        &["-f", "raw", "r", "1000"],
        &["-f", "raw", "--shrink", "r", "-1M"],
    ] {
        std::fs::write(place.path("r"), vec![1; 1 << 20]).unwrap();
        let args = [&["resize"], args].concat();
        let theirs = place.theirs(&args);
        assert_eq!(theirs.code, Some(1), "{args:?}");
        let sentence = theirs.err.lines().next().unwrap();
        let sentence = sentence.strip_prefix("qemu-img: ").unwrap();
        let said = place.bad(&args);
        assert!(
            said.contains(sentence),
            "{args:?}: {said} is not {sentence}"
        );
        assert_eq!(std::fs::read(place.path("r")).unwrap(), vec![1; 1 << 20]);
    }
    for args in [
        ["resize", "a"].as_slice(),
        &["resize", "a", "foo"],
        &["resize", "a", "9E"],
    ] {
        assert_eq!(place.theirs(args).code, Some(1), "{args:?}");
        place.bad(args);
    }
    assert_eq!(std::fs::read(place.path("a")).unwrap(), before);
    // Somebody else has it.
    place.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "over",
    ]);
    let disk = Disk::open(&place.path("over"), &chain::Options::default()).unwrap();
    let busy = place.ours(&["resize", "a", "20M"]);
    assert_eq!(busy.code, Some(5), "{busy:?}");
    disk.close().unwrap();
    assert_eq!(std::fs::read(place.path("a")).unwrap(), before);
}

#[test]
fn new_space_is_preallocated() {
    for shape in [
        "cluster_size=4k",
        "cluster_size=64k",
        "compat=0.10",
        "cluster_size=2M",
    ] {
        for (mode, on_host) in [("metadata", false), ("falloc", true), ("full", true)] {
            let place = Place::new();
            place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, "a", "2M"]);
            place.qemu_io("qcow2", "a", &["write -P 5 0 1M"]);
            let mode = format!("--preallocation={mode}");
            place.good(&["resize", "-q", &mode, "a", "12M"]);
            place.check("a");
            place.qemu_io("qcow2", "a", &["read -P 5 0 1M", "read -P 0 1M 11M"]);
            let text = place.qemu_img(&["map", "--output=json", "a"]);
            let map: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
            let allocated: u64 = map
                .iter()
                .filter(|entry| entry["start"].as_u64() >= Some(2 << 20))
                .filter(|entry| entry["present"] == true && entry.get("offset").is_some())
                .map(|entry| entry["length"].as_u64().unwrap())
                .sum();
            let merged = map.iter().any(|e| {
                let start = e["start"].as_u64().unwrap();
                let end = start + e["length"].as_u64().unwrap();
                start < 2 << 20 && end > 2 << 20 && e["present"] == true
            });
            assert!(allocated == 10 << 20 || merged, "{shape}, {mode}: {text}");
            let bytes = std::fs::metadata(place.path("a")).unwrap().blocks() * 512;
            assert_eq!(bytes >= 11 << 20, on_host, "{shape}, {mode}: {bytes}");
        }
    }
}

#[test]
fn raw_images_are_resized_when_the_format_says_so() {
    let place = Place::new();
    std::fs::write(place.path("r"), vec![1; 1 << 20]).unwrap();
    assert_eq!(
        place.good(&["resize", "-f", "raw", "r", "+1M"]),
        "Image resized.\n"
    );
    assert_eq!(place.len("r"), 2 << 20);
    place.good(&["resize", "-q", "-f", "raw", "--shrink", "r", "1048577"]);
    assert_eq!(place.len("r"), 1_048_577);
    for (mode, size) in [("falloc", 4 << 20), ("full", 6 << 20)] {
        let size = u64::to_string(&size);
        place.good(&["resize", "-f", "raw", "--preallocation", mode, "r", &size]);
        let metadata = std::fs::metadata(place.path("r")).unwrap();
        assert_eq!(metadata.len().to_string(), size);
        assert!(
            metadata.blocks() * 512 >= metadata.len() - (1 << 20),
            "{mode}"
        );
    }
    let content = std::fs::read(place.path("r")).unwrap();
    assert_eq!(content[..1 << 20], vec![1; 1 << 20]);
    assert!(content[1 << 20..].iter().all(|&byte| byte == 0));
    // A format is never guessed: raw bytes are no qcow2 image.
    let said = place.bad(&["resize", "r", "9M"]);
    assert!(
        said.contains("not a qcow2 image") || said.contains("magic"),
        "{said}"
    );
    assert_eq!(place.len("r"), 6 << 20);
}

#[test]
fn random_sizes_and_writes() {
    for seed in 0..5 {
        let place = Place::new();
        let mut rng = Rng::new(seed);
        let cluster_size = 512 << (rng.below(4) * 2);
        let (path, mut model) = (place.path("a"), vec![0; 1 << 20]);
        let version = if rng.chance(1, 4) { 2 } else { 3 };
        let options = CreateOptions {
            cluster_size,
            version,
            ..CreateOptions::new(1 << 20)
        };
        Disk::create(&path, &options).unwrap().close().unwrap();
        for step in 0..8 {
            let options = chain::Options {
                writable: true,
                ..chain::Options::default()
            };
            let disk = Disk::open(&path, &options).unwrap();
            for _ in 0..6 {
                let at = rng.below(model.len() as u64);
                let len = (1 + rng.below(200_000)).min(model.len() as u64 - at);
                let range = at as usize..(at + len) as usize;
                if rng.chance(1, 5) {
                    model[range].fill(0);
                    disk.write_zeroes_at(at, len, rng.chance(1, 2)).unwrap();
                } else {
                    model[range.clone()].fill(rng.next_u64() as u8 | 1);
                    disk.write_at(&model[range], at).unwrap();
                }
            }
            let size = (1 + rng.below(6000)) * 512;
            disk.resize(size).unwrap();
            model.resize(size as usize, 0);
            let mut seen = vec![0xee; model.len()];
            disk.read_at(&mut seen, 0).unwrap();
            assert_same(&seen, &model, &format!("seed {seed}, step {step}"));
            disk.close().unwrap();
            place.check("a");
            assert_same(
                &place.content("qcow2", "a"),
                &model,
                &format!("seed {seed}, QEMU"),
            );
        }
    }
}
