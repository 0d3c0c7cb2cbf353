//! A fault at each operation of random requests, over every kind of image.
#![allow(unreachable_pub, reason = "a part of a test program")]

use std::sync::Arc;
use std::time::Duration;

use qcow2_ublk::crypto::{Effort, Secret, luks1};
use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::storage::sim;

use crate::common::lab::{self, How};
use crate::common::{half_random, qemu_img, qemu_io};
use crate::seeds;
use crate::trial::every_operation;
use crate::work::{Files, Step, Work};

pub const K: u64 = 1 << 10;

pub fn plain(name: &'static str, image: sim::Image) -> Work {
    Work::new(name, image, Files::default(), How::default())
}

fn each(work: impl Fn(u64) -> Work) {
    for seed in 1..=seeds() {
        lab::watched(600, || every_operation(&work(seed)));
    }
}

/// Over a raw file, an image of compressed clusters, and one that hides some
/// of both.
pub fn layers(with_images: bool) -> Files {
    let text = half_random(100 << 10, 6);
    if !with_images {
        return Files {
            raw: Some(sim::Image::from_bytes(&text)),
            ..Files::default()
        };
    }
    let mut middle = lab::created("cluster_size=8k", 160 * K);
    lab::with_file(&mut middle, |path| {
        qemu_io(path, &["write -P 0x61 3k 20k", "write -z 64k 8k"]);
    });
    let base = lab::converted(&text, &["-c", "-o", "cluster_size=4k"]);
    Files {
        layers: vec![middle, base],
        ..Files::default()
    }
}

/// An image with an external data file that has something already.
pub fn with_data_file(raw: bool, extended_l2: bool) -> (sim::Image, Files) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let options = CreateOptions {
        cluster_size: if extended_l2 { 16384 } else { 4096 },
        extended_l2,
        data_file: Some("data".into()),
        data_file_raw: raw,
        ..CreateOptions::new(128 * K)
    };
    lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
    let writable = qcow2_ublk::chain::Options {
        writable: true,
        ..Default::default()
    };
    let made = qcow2_ublk::Disk::open(&path, &writable).unwrap();
    made.write_at(&[0x41; 30 << 10], 20 << 10).unwrap();
    made.close().unwrap();
    let data = sim::Image::load(&dir.path().join("data")).unwrap();
    let files = Files {
        data: Some(data),
        ..Files::default()
    };
    (sim::Image::load(&path).unwrap(), files)
}

pub fn with_bitmaps(options: &str) -> sim::Image {
    let mut image = lab::created(options, 128 * K);
    lab::with_file(&mut image, |path| {
        let path = path.to_str().unwrap();
        qemu_img(&["bitmap", "--add", "-g", "512", path, "a"]);
        qemu_img(&["bitmap", "--add", "-g", "4k", path, "c"]);
    });
    image
}

pub fn encrypted() -> Work {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let format = luks1::Format {
        effort: Effort(Duration::from_millis(1)),
        ..luks1::Format::default()
    };
    let options = CreateOptions {
        cluster_size: 4096,
        luks: Some(format.make(b"open sesame").unwrap().into()),
        ..CreateOptions::new(128 * K)
    };
    lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
    let how = How {
        keys: Some(Arc::new(Secret::new(b"open sesame".to_vec()))),
        ..How::default()
    };
    let image = sim::Image::load(&path).unwrap();
    let mut work = Work::new("LUKS", image, layers(false), how);
    work.is_slow = true;
    work
}

pub fn with_snapshot(options: &str) -> sim::Image {
    let mut image = lab::converted(&half_random(64 << 10, 3), &["-o", options]);
    lab::with_file(&mut image, |path| {
        qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    });
    image
}

const RESIZES: [Step; 3] = [
    Step::Grow(200 * K + 512),
    Step::Shrink(150 * K),
    Step::Reopen,
];

#[test]
fn plain_images() {
    each(|seed| {
        plain(
            "512-byte clusters",
            lab::created("cluster_size=512,refcount_bits=64", 96 * K),
        )
        .steps(seed, 9, &RESIZES)
    });
    each(|seed| {
        plain("64K clusters", lab::created("cluster_size=65536", 512 * K)).steps(
            seed,
            10,
            &[Step::Reopen],
        )
    });
    each(|seed| {
        let mut work = plain("direct I/O", lab::created("cluster_size=4096", 128 * K));
        work.how.alignment = 512;
        work.steps(seed, 10, &RESIZES)
    });
}

#[test]
fn layers_below() {
    each(|seed| {
        let image = lab::created("compat=0.10,cluster_size=4096", 128 * K);
        Work::new(
            "version 2 over a raw file",
            image,
            layers(false),
            How::default(),
        )
        .steps(seed, 10, &[Step::Grow(160 * K)])
    });
    each(|seed| {
        let image = lab::created("cluster_size=4096", 128 * K);
        Work::new("over two images", image, layers(true), How::default()).steps(seed, 10, &RESIZES)
    });
}

#[test]
fn compressed_clusters() {
    each(|seed| {
        let image = lab::converted(
            &half_random(128 << 10, 4),
            &["-c", "-o", "cluster_size=4096"],
        );
        plain("compressed", image).steps(seed, 10, &[Step::Reopen])
    });
    each(|seed| {
        let options = "cluster_size=4096,compression_type=zstd";
        let image = lab::converted(&half_random(128 << 10, 4), &["-c", "-o", options]);
        plain("compressed writes", image)
            .steps(seed + 10, 12, &[Step::Reopen])
            .compressing()
    });
}

#[test]
fn subclusters() {
    each(|seed| {
        let image = lab::created("extended_l2=on,cluster_size=16384", 256 * K);
        Work::new("subclusters", image, layers(false), How::default()).steps(
            seed,
            10,
            &[Step::Grow(300 * K), Step::Reopen],
        )
    });
}

#[test]
fn external_data_files() {
    for (raw, extended_l2) in [(false, false), (true, false), (false, true)] {
        each(|seed| {
            let (image, files) = with_data_file(raw, extended_l2);
            Work::new("external data file", image, files, How::default()).steps(
                seed,
                10,
                &[Step::Grow(160 * K), Step::Reopen],
            )
        });
    }
}

#[test]
fn encrypted_images() {
    each(|seed| encrypted().steps(seed, 8, &[Step::Reopen]));
}

#[test]
fn live_bitmaps() {
    let steps = [
        Step::AddBitmap("b"),
        Step::ClearBitmap("a"),
        Step::Reopen,
        Step::RemoveBitmap("c"),
        Step::Grow(160 * K),
    ];
    each(|seed| plain("bitmaps", with_bitmaps("cluster_size=4096")).steps(seed, 10, &steps));
    each(|seed| {
        let mut work = plain(
            "bitmaps, every write durable",
            with_bitmaps("cluster_size=4096"),
        );
        work.how.barrier = Barrier::Full;
        work.steps(seed, 5, &[Step::Reopen])
    });
    each(|seed| {
        let image = with_bitmaps("cluster_size=4096,lazy_refcounts=on");
        plain("bitmaps, lazy refcounts", image).steps(seed, 8, &[Step::Reopen])
    });
}

#[test]
fn barriers_and_lazy_refcounts() {
    for barrier in [Barrier::None, Barrier::Metadata, Barrier::Full] {
        each(|seed| {
            let mut work = plain("barriers", lab::created("cluster_size=4096", 128 * K));
            work.how.barrier = barrier;
            work.steps(seed, 6, &[Step::Grow(160 * K)])
        });
    }
    each(|seed| {
        let image = lab::created("cluster_size=512,lazy_refcounts=on", 96 * K);
        plain("lazy refcounts", image).steps(seed, 9, &RESIZES)
    });
}

#[test]
fn snapshots() {
    let steps = [
        Step::Snapshot("two"),
        Step::Apply("one"),
        Step::Snapshot("three"),
        Step::Delete("one"),
        Step::Apply("two"),
    ];
    each(|seed| plain("snapshots", with_snapshot("cluster_size=4096")).steps(seed, 5, &steps));
    each(|seed| {
        let mut image = with_bitmaps("cluster_size=4096,lazy_refcounts=on");
        lab::with_file(&mut image, |path| {
            qemu_io(path, &["write -P 0x31 0 90k"]);
            qemu_img(&["bitmap", "--clear", path.to_str().unwrap(), "a"]);
            qemu_img(&["bitmap", "--clear", path.to_str().unwrap(), "c"]);
        });
        let steps = [Step::Snapshot("two"), Step::Delete("two")];
        plain("a snapshot, bitmaps and lazy refcounts", image).steps(seed, 5, &steps)
    });
}
