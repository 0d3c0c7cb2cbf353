//! `create` with preallocation and `resize`, as qemu-img does it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Lab, assert_same, disk};
use crate::common::Reader;

const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=1";

fn allocated(lab: &Lab, name: &str) -> u64 {
    fs::metadata(lab.path(name)).unwrap().blocks() * 512
}

/// The file with the disk's data: the data file, if there is one.
fn holder<'a>(lab: &Lab, name: &'a str) -> &'a str {
    match Reader::open(&lab.path(name)).header.data_file() {
        Some(_) => "data",
        None => name,
    }
}

/// Space is there in the file, and the disk shows zeros or what is below: as
/// with qemu-img, and where that shows noise (encrypted), zeros.
#[test]
fn preallocated_images_are_like_those_of_qemu() {
    let lab = Lab::new();
    let below = disk(1 << 20, 1);
    fs::write(lab.path("below.raw"), &below).unwrap();
    let external = format!("data_file={}", lab.file("data"));
    let over = "backing_file=below.raw,backing_fmt=raw";
    let modes = ["metadata", "falloc", "full"];
    for (nth, (name, options)) in [
        ("x", external.clone()),
        ("x", format!("{external},data_file_raw=on")),
        ("x", format!("{external},extended_l2=on")),
        ("x", format!("{external},extended_l2=on,data_file_raw=on")),
        ("x", format!("{external},extended_l2=on,{over}")),
        ("x", "extended_l2=on".to_owned()),
        ("x", format!("extended_l2=on,cluster_size=16k,{over}")),
        ("x.a", LUKS.to_owned()),
        ("x.a", format!("{LUKS},cluster_size=4k")),
        ("x.a", format!("{LUKS},extended_l2=on")),
        ("x.a", format!("{LUKS},extended_l2=on,{over}")),
        ("x.a", format!("{LUKS},{external}")),
    ]
    .into_iter()
    .enumerate()
    {
        let mode = modes[nth % modes.len()];
        let what = format!("{options},preallocation={mode}");
        let theirs = what.replace("format=luks", "format=luks,encrypt.key-secret=a");
        let theirs = theirs.replace("iter-time=1", "iter-time=10");
        lab.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &theirs, name, "3M"]);
        let place = holder(&lab, name);
        let (their_len, their_space) = (lab.read(place).len(), allocated(&lab, place));
        let map = |lab: &Lab| {
            let opts = Lab::opts(&[name]);
            lab.qemu_img(&["map", "--output=json", "--image-opts", &opts])
        };
        let their_map = map(&lab);
        lab.good(&["create", "-q", "-o", &what, "--key-file", "a", name, "3M"]);
        lab.check(name);
        let mut expected = vec![0; 3 << 20];
        if options.contains(over) {
            expected[..below.len()].copy_from_slice(&below);
        }
        assert_same(&lab.content(&[name]), &expected, &what);
        lab.good(&["convert", "--key-file", "a", name, "flat.raw"]);
        assert_same(&lab.read("flat.raw"), &expected, &what);
        let space = allocated(&lab, place);
        assert!(
            lab.read(place).len().abs_diff(their_len) <= 1 << 20,
            "{what}"
        );
        assert!(
            space <= their_space + (1 << 20) && space + (1 << 20) > their_space,
            "{what}: {space} bytes, theirs {their_space}"
        );
        // A raw data file is mapped, with subclusters too: others write to it.
        let alike = !options.contains(LUKS) || options.contains("extended_l2");
        if alike && !options.contains("extended_l2=on,data_file_raw") {
            // Offsets may differ.
            let status = |map: &str| -> Vec<serde_json::Value> {
                let mut map: Vec<serde_json::Value> = serde_json::from_str(map).unwrap();
                for entry in &mut map {
                    let entry = entry.as_object_mut().unwrap();
                    entry.remove("offset");
                    // QEMU writes to the first block of a new data file.
                    if entry["data"] == true {
                        entry.remove("zero");
                    }
                }
                map
            };
            assert_eq!(status(&map(&lab)), status(&their_map), "{what}");
        }
        // What is written gets into it, with whole clusters and parts.
        lab.good(&[
            "io",
            "--key-file",
            "a",
            name,
            "-c",
            "write -P 7 100k 30k",
            "-c",
            "write -P 8 1M 128k",
            "-c",
            "write -z 64k 3k",
        ]);
        expected[100 << 10..130 << 10].fill(7);
        expected[1 << 20..(1 << 20) + (128 << 10)].fill(8);
        expected[64 << 10..67 << 10].fill(0);
        lab.check(name);
        assert_same(
            &lab.content(&[name]),
            &expected,
            &format!("{what}, written"),
        );
        assert!(
            lab.read(place).len().abs_diff(their_len) <= 1 << 20,
            "{what}"
        );
    }
    for (options, says) in [
        (format!("{over},preallocation=full"), "if extended_l2 is on"),
        (
            format!("{LUKS},compat=0.10,preallocation=full"),
            "compat=1.1",
        ),
        (
            format!("{LUKS},{external},data_file_raw=on"),
            "data-file-raw",
        ),
    ] {
        let create = ["create", "-o", &options, "--key-file", "a", "new", "3M"];
        lab.refused(&create, says);
    }
}

/// A disk is shortened and lengthened in turns, here and by qemu-img, and both
/// show the same; the data file is as long as the disk.
#[test]
fn sizes_change_as_with_qemu() {
    let external = |lab: &Lab| format!("data_file={}", lab.file("data"));
    for (seed, name, options, raw) in [
        (1, "x", "", false),
        (2, "x", ",data_file_raw=on", true),
        (3, "x", ",extended_l2=on,cluster_size=16k", false),
        (5, "x.a", ",encrypt.format=luks,encrypt.iter-time=1", false),
    ] {
        let (ours, theirs) = (Lab::new(), Lab::new());
        let first = disk(4 << 20, seed);
        for lab in [&ours, &theirs] {
            fs::write(lab.path("first.raw"), &first).unwrap();
            let options = format!("{}{options}", external(lab));
            lab.good(&[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                "--key-file",
                "a",
                "first.raw",
                name,
            ]);
        }
        let opts = Lab::opts(&[name]);
        let mut model = first;
        for (nth, (size, more)) in [
            (1_000_448, &["--shrink"][..]),
            (2 << 20, &[]),
            (3 << 20, &["--preallocation=metadata"]),
            (4 << 20, &["--preallocation=falloc"]),
            (5_000_704, &["--preallocation=full"]),
            (64 << 10, &["--shrink"]),
            (6 << 20, &[]),
        ]
        .into_iter()
        .enumerate()
        {
            let what = format!("{options}, step {nth}: {size}");
            let (before, len) = (allocated(&ours, "data"), model.len());
            let bytes = size.to_string();
            let resize = [&["resize", "-q", "--key-file", "a"], more, &[name, &bytes]].concat();
            ours.good(&resize);
            let resize = [&["resize", "-q"], more, &["--image-opts", &opts, &bytes]].concat();
            theirs.qemu_img(&resize);
            model.resize(size, 0);
            ours.check(name);
            assert_same(&ours.content(&[name]), &model, &what);
            let data = ours.read("data");
            assert_eq!(data.len(), size, "{what}: the data file");
            if raw {
                assert_same(&data, &model, &what);
            }
            if name == "x" {
                // Theirs shows noise where encrypted space is preallocated.
                assert_same(&theirs.content(&[name]), &model, &what);
            }
            if more
                .iter()
                .any(|m| m.ends_with("falloc") || m.ends_with("full"))
            {
                let (space, new) = (allocated(&ours, "data"), size - len);
                assert!(
                    space >= before + new as u64 - (64 << 10),
                    "{what}: {space} bytes"
                );
            }
            // Something new at the end, to be lost or kept.
            let at = size - 5 * 512;
            let write = format!("write -P {} {at} 2048", 100 + nth);
            ours.good(&["io", "--key-file", "a", name, "-c", &write]);
            theirs.qemu_io(&opts, &[&write]);
            model[at..at + 2048].fill(100 + nth as u8);
        }
        assert_same(&ours.content(&[name]), &model, "in the end");
        ours.good(&["convert", "--key-file", "a", name, "flat.raw"]);
        assert_same(&ours.read("flat.raw"), &model, "in the end, for us");
    }
}
