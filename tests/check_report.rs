//! `check` finds what `qemu-img check` finds, in the same numbers: in images
//! of every shape that QEMU makes, and in the same images after damage.

mod common;

use std::fs;
use std::path::Path;

use qcow2_ublk::qcow2::check::{CheckReport, Finding};
use qcow2_ublk::qcow2::spec::{L1Entry, L2Entry};
use qcow2_ublk::report;
use serde_json::Value;

use common::shapes::{Random, damage, images};
use common::{Reader, qemu_img, qemu_io};

/// The numbers of a report, and the exit code that goes with them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Numbers {
    exit: i32,
    /// `None` when the check could not be made.
    report: Option<CheckReport>,
}

fn ours(image: &Path) -> (Numbers, Vec<Finding>) {
    let mut findings = Vec::new();
    let report = report::check(image, false, |finding| findings.push(finding.clone()));
    let exit = match &report {
        Err(_) => 1,
        Ok(report) if report.check_errors > 0 => 1,
        Ok(report) if report.corruptions > 0 => 2,
        Ok(report) if report.leaks > 0 => 3,
        Ok(_) => 0,
    };
    let report = report.ok();
    (Numbers { exit, report }, findings)
}

fn qemus(image: &Path) -> (Numbers, String) {
    let args = ["check", "-f", "qcow2", "--output=json"].map(AsRef::as_ref);
    let output = std::process::Command::new("qemu-img")
        .args(args.iter().copied().chain([image.as_os_str()]))
        .output()
        .expect("qemu-img, which this test needs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout)
        .ok()
        .map(|value: Value| {
            let number = |key: &str| value[key].as_u64().unwrap_or(0);
            CheckReport {
                corruptions: number("corruptions"),
                leaks: number("leaks"),
                check_errors: number("check-errors"),
                image_end_offset: number("image-end-offset"),
                total_clusters: number("total-clusters"),
                allocated_clusters: number("allocated-clusters"),
                fragmented_clusters: number("fragmented-clusters"),
                compressed_clusters: number("compressed-clusters"),
            }
        });
    let exit = output.status.code().expect("an exit code");
    (Numbers { exit, report }, said)
}

/// Both programs agree about the image.
fn assert_same(image: &Path, what: &str) {
    let (ours, findings) = ours(image);
    let (qemus, said) = qemus(image);
    if said.contains("Could not open") && ours.exit != 0 {
        // Damage that QEMU will not open an image with, to check it or for
        // anything else: a bitmap directory that it does not understand, or
        // an external data file in another state. We go on.
        return;
    }
    assert_eq!(
        ours,
        qemus,
        "{what}: ours found\n{}\nqemu-img said\n{said}",
        findings
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect::<String>()
    );
}

#[test]
fn sound_images_of_every_shape() {
    let dir = tempfile::tempdir().unwrap();
    for (name, image) in images(dir.path()) {
        assert_same(&image, &name);
        let (found, _) = ours(&image);
        assert_eq!(found.exit, 0, "{name}");
    }
}

/// The image with metadata damaged at random: bits turned, words replaced,
/// the file cut off. The header stays, so that both programs look further.
#[test]
fn random_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x5eed_1234_5678_9abc);
    for (name, image) in images(dir.path()) {
        let good = fs::read(&image).unwrap();
        let reader = Reader::open(&image);
        for round in 0..rounds() {
            let (bad, what) = damage(&good, &reader, &mut random);
            let what = format!("{name}, round {round}:{what}");
            let damaged = dir.path().join("damaged.qcow2");
            fs::write(&damaged, &bad).unwrap();
            if name == "external" {
                fs::copy(
                    dir.path().join("external.qcow2.raw"),
                    dir.path().join("damaged.qcow2.raw"),
                )
                .unwrap();
            }
            assert_same(&damaged, &what);
        }
    }
}

/// How often each image is damaged.
fn rounds() -> u64 {
    std::env::var("CHECK_ROUNDS").map_or(12, |n| n.parse().unwrap())
}

/// One damage each, by hand.
#[test]
fn named_damage() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let path = image.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", path, "64M"]);
    qemu_io(&image, &["write 0 256k", "write -z 0 64k", "write 1M 64k"]);
    let good = fs::read(&image).unwrap();
    let reader = Reader::open(&image);
    let geometry = reader.geometry();
    let l1 = reader.header.l1_table_offset;
    let Ok(L1Entry::Table { offset: l2, .. }) = L1Entry::decode(reader.be64(l1), &geometry) else {
        panic!("no L2 table");
    };
    let Ok(L2Entry::Data { host, .. }) = L2Entry::decode(reader.be64(l2 + 8), &geometry) else {
        panic!("no data cluster");
    };
    let block = reader.be64(reader.header.refcount_table_offset);
    let refcount = |cluster: u64| block + cluster * 2;
    let copied = 1u64 << 63;
    let of = |cluster: u64| cluster << 16;
    let last = good.len() as u64 >> 16;
    let cases: &[(&str, u64, &[u8], i32)] = &[
        ("refcount too high", refcount(last - 1), &[0, 2], 2),
        ("leak", l2.0 + 16, &[0; 8], 3),
        ("leak where nothing is", refcount(last), &[0, 1], 0),
        ("refcount too low", refcount(host.0 >> 16), &[0, 0], 2),
        ("refcount wide", refcount(host.0 >> 16), &[255, 255], 2),
        ("COPIED missing", l2.0 + 8, &host.0.to_be_bytes(), 2),
        ("L1 COPIED missing", l1.0, &l2.0.to_be_bytes(), 2),
        (
            "data misaligned",
            l2.0 + 8,
            &(copied | host.0 | 0x200).to_be_bytes(),
            2,
        ),
        (
            "data far away",
            l2.0 + 8,
            &(copied | 1 << 50).to_be_bytes(),
            2,
        ),
        (
            "data just behind the end",
            l2.0 + 8,
            &(copied | of(last + 1)).to_be_bytes(),
            2,
        ),
        (
            "data in the header",
            l2.0 + 8,
            &(copied | 0x200).to_be_bytes(),
            2,
        ),
        (
            "data in the refcount table",
            l2.0 + 8,
            &(copied | of(1)).to_be_bytes(),
            2,
        ),
        (
            "data in its own L2 table",
            l2.0 + 8,
            &(copied | l2.0).to_be_bytes(),
            2,
        ),
        (
            "reserved bits, L2",
            l2.0 + 8,
            &(copied | 1 << 60 | host.0).to_be_bytes(),
            2,
        ),
        (
            "reserved bits, L1",
            l1.0,
            &(copied | 1 << 60 | l2.0).to_be_bytes(),
            2,
        ),
        (
            "only reserved bits, L1",
            l1.0,
            &(1u64 << 60).to_be_bytes(),
            2,
        ),
        ("COPIED of nothing, L1", l1.0, &copied.to_be_bytes(), 2),
        ("COPIED of nothing, L2", l2.0 + 8, &copied.to_be_bytes(), 3),
        (
            "compressed and COPIED",
            l2.0 + 8,
            &(0b11u64 << 62 | host.0).to_be_bytes(),
            2,
        ),
        (
            "L1 misaligned",
            l1.0,
            &(copied | l2.0 | 0x200).to_be_bytes(),
            2,
        ),
        ("L1 far away", l1.0, &(copied | 1 << 50).to_be_bytes(), 2),
        ("no L2 table", l1.0, &[0; 8], 3),
        (
            "no refcounts",
            reader.header.refcount_table_offset.0,
            &[0; 8],
            2,
        ),
        (
            "reftable reserved bits",
            reader.header.refcount_table_offset.0,
            &(block | 1).to_be_bytes(),
            2,
        ),
        (
            "reftable misaligned",
            reader.header.refcount_table_offset.0,
            &(block | 0x200).to_be_bytes(),
            1,
        ),
        (
            "reftable far away",
            reader.header.refcount_table_offset.0,
            &(1u64 << 50).to_be_bytes(),
            2,
        ),
        (
            "reftable absurd",
            reader.header.refcount_table_offset.0,
            &(1u64 << 63).to_be_bytes(),
            1,
        ),
        (
            "block twice",
            reader.header.refcount_table_offset.0 + 8,
            &block.to_be_bytes(),
            2,
        ),
        ("L1 table of another length", 36, &2u32.to_be_bytes(), 0),
        ("disk size odd", 24, &(64u64 << 20 | 3).to_be_bytes(), 0),
        ("no autoclear bits", 88, &[0xff; 8], 1),
    ];
    for &(what, at, bytes, exit) in cases {
        let mut bad = good.clone();
        bad[at as usize..][..bytes.len()].copy_from_slice(bytes);
        let damaged = dir.path().join("damaged.qcow2");
        fs::write(&damaged, bad).unwrap();
        assert_same(&damaged, what);
        assert_eq!(ours(&damaged).0.exit, exit, "{what}");
    }
    let damaged = dir.path().join("damaged.qcow2");
    // Where the L1 table began: QEMU is content with an empty disk, while we do
    // not open such an image.
    fs::write(&damaged, &good[..0x30000]).unwrap();
    assert_eq!((ours(&damaged).0.exit, qemus(&damaged).0.exit), (2, 0));
    for keep in [last * 0x10000 - 1, last * 0x8000, 0x20000] {
        fs::write(&damaged, &good[..keep as usize]).unwrap();
        assert_same(&damaged, &format!("cut off at {keep:#x}"));
    }
}
