//! Options of `convert` that are not about the result alone: what cannot be
//! read, bitmaps, how fast; and what only QEMU has.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use qcow2_ublk::{Disk, chain};

use crate::common::{Reader, half_random, qemu_img, qemu_io, run};
use crate::{Folder, PROGRAM, ours, well};

/// Damage of every kind that a read can meet; `--salvage` makes zeros of it,
/// and of nothing else, as qemu-img's.
#[test]
fn what_cannot_be_read_is_salvaged_as_zeros() {
    let folder = Folder::new();
    let [raw, image, out, theirs] = ["raw", "image", "out", "theirs"].map(|n| folder.file(n));
    let bytes = half_random(2 << 20, 5);
    fs::write(&raw, &bytes).unwrap();
    let convert = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "-o",
        "cluster_size=16k",
    ];
    qemu_img(&[&convert[..], &[&raw, &image]].concat());
    qemu_io(Path::new(&image), &["write -P 7 1M 512k"]);
    let reader = Reader::open(Path::new(&image));
    let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    let mut file = reader.file.clone();
    let L2Entry::Compressed(range) = reader.entry(GuestOffset(5 << 14)) else {
        panic!("a compressed cluster")
    };
    file[range.offset.0 as usize..][..200].fill(0xff);
    for (cluster, entry) in [(9, 1 << 58), (70, 0x1_0200), (71, 0x3_0200 | 1 << 63)] {
        let entry: u64 = entry;
        file[l2 as usize + cluster * 8..][..8].copy_from_slice(&entry.to_be_bytes());
    }
    fs::write(&image, &file).unwrap();
    for format in ["raw", "qcow2"] {
        let args = ["convert", "-O", format];
        let (code, text) = ours(&[&args[..], &[&image, &out]].concat());
        assert_eq!(code, Some(1), "{text}");
        let args = [&args[..], &["--salvage", &image]].concat();
        let text = well(&[&args[..], &[&out]].concat());
        assert!(text.contains("zeros for it"), "{text}");
        let (code, text) = run("qemu-img", &[&args[..], &[&theirs]].concat());
        assert_eq!(code, Some(0), "{text}");
        qemu_img(&["compare", "-f", format, "-F", format, &out, &theirs]);
    }
    let mut expected = bytes;
    expected[1 << 20..3 << 19].fill(7);
    for cluster in [5, 9, 70, 71] {
        expected[cluster << 14..(cluster + 1) << 14].fill(0);
    }
    well(&["convert", "--salvage", "-W", &image, &out]);
    assert!(fs::read(&out).unwrap() == expected);
}

/// Name, granularity and flags of the bitmaps, and what they say is dirty.
fn bitmaps(path: &str) -> Vec<(String, Vec<(u64, u64)>)> {
    let info = qemu_img(&["info", "--output=json", path]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let disk = Disk::open(Path::new(path), &chain::Options::default()).unwrap();
    let list = info["format-specific"]["data"]["bitmaps"].clone();
    let mut found: Vec<_> = list
        .as_array()
        .cloned()
        .unwrap_or_default()
        .into_iter()
        .map(|bitmap| {
            let mut ranges = Vec::new();
            let content = disk.bitmap(bitmap["name"].as_str().unwrap()).unwrap();
            content
                .ranges(|start, len| {
                    ranges.push((start, len));
                    Ok(())
                })
                .unwrap();
            (bitmap.to_string(), ranges)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn bitmaps_go_along_as_with_qemu_img() {
    let folder = Folder::new();
    let [image, out, theirs] = ["image", "out", "theirs"].map(|name| folder.file(name));
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "8M"]);
    qemu_img(&["bitmap", "--add", "-g", "512", &image, "fine"]);
    qemu_io(Path::new(&image), &["write -P 1 1M 100k"]);
    qemu_img(&["bitmap", "--disable", &image, "fine"]);
    qemu_img(&["bitmap", "--add", &image, "coarse"]);
    qemu_io(Path::new(&image), &["write -P 2 5M 1k"]);
    for options in ["cluster_size=64k", "cluster_size=4k,refcount_bits=64"] {
        let args = ["convert", "--bitmaps", "-O", "qcow2", "-o", options, &image];
        well(&[&args[..], &[&out]].concat());
        qemu_img(&[&args[..], &[&theirs]].concat());
        assert_eq!(bitmaps(&out), bitmaps(&theirs), "{options}");
        assert_eq!(bitmaps(&out).len(), 2);
        assert_eq!(bitmaps(&out)[1].1, [(1 << 20, 100 << 10)]);
        qemu_img(&["check", "-q", &out]);
        qemu_img(&["compare", "-q", &image, &out]);
        // One of them records in the copy as in the original.
        qemu_io(Path::new(&out), &["write 3M 1k"]);
        assert_eq!(bitmaps(&out)[0].1[0], (3 << 20, 64 << 10));
        assert_eq!(bitmaps(&out)[1].1, [(1 << 20, 100 << 10)]);
    }
    // Without the option none do.
    well(&["convert", "-O", "qcow2", &image, &out]);
    assert!(bitmaps(&out).is_empty());
    // Into an image that is there, and compressed.
    qemu_img(&["create", "-q", "-f", "qcow2", &out, "8M"]);
    well(&[
        "convert",
        "-n",
        "-c",
        "--bitmaps",
        "-O",
        "qcow2",
        &image,
        &out,
    ]);
    assert_eq!(bitmaps(&out), bitmaps(&theirs));
    let refused = |args: &[&str], says: &str| {
        fs::write(&out, "what was there before").unwrap();
        let (code, text) = ours(&[&["convert", "--bitmaps"], args].concat());
        assert!(code != Some(0) && text.contains(says), "{args:?}: {text}");
        assert_eq!(fs::read(&out).unwrap(), b"what was there before");
    };
    refused(&["-O", "raw", &image, &out], "does not support bitmaps");
    refused(
        &["-f", "raw", "-O", "qcow2", &image, &out],
        "lacks bitmap support",
    );
    refused(&["-O", "qcow2", "-o", "compat=0.10", &image, &out], "");
    // One is in use: somebody crashed.
    let reader = Reader::open(Path::new(&image));
    let directory = reader.header.bitmaps().unwrap().directory_offset;
    let mut file = reader.file.clone();
    file[directory.0 as usize + 15] |= 1;
    fs::write(&image, &file).unwrap();
    refused(
        &["-O", "qcow2", &image, &out],
        "Cannot copy inconsistent bitmap",
    );
    let args = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "-O",
        "qcow2",
        &image,
    ];
    let text = well(&[&args[..], &[&out]].concat());
    assert!(text.contains("Skipping inconsistent bitmap"), "{text}");
    qemu_img(&[&args[..], &[&theirs]].concat());
    assert_eq!(bitmaps(&out), bitmaps(&theirs));
    assert_eq!(bitmaps(&out).len(), 1);
}

/// A copy takes at least as long as the rate says, and may be ended at any
/// time.
#[test]
fn copies_are_held_back() {
    let folder = Folder::new();
    let [raw, out] = ["raw", "out"].map(|name| folder.file(name));
    fs::write(&raw, half_random(3 << 20, 8)).unwrap();
    for args in [&["-O", "raw"][..], &["-O", "qcow2"], &["-W", "-O", "qcow2"]] {
        let since = Instant::now();
        well(&[&["convert", "-r", "4M", "-f", "raw"], args, &[&raw, &out]].concat());
        assert!(since.elapsed() >= Duration::from_millis(500), "{args:?}");
        let format = args[args.len() - 1];
        qemu_img(&["compare", "-q", "-f", "raw", "-F", format, &raw, &out]);
    }
    let (code, text) = ours(&["convert", "-r", "0", "-f", "raw", &raw, &out]);
    assert!(
        code != Some(0) && text.contains("nothing would ever be written"),
        "{text}"
    );
    fs::write(&out, "what was there before").unwrap();
    for more in [&[][..], &["-W"]] {
        let mut child = Command::new(PROGRAM)
            .args(["convert", "-r", "1", "-f", "raw"])
            .args(more)
            .args([&raw, &out])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert!(child.try_wait().unwrap().is_none(), "it was not held back");
        run("kill", &["-INT", &child.id().to_string()]);
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert_eq!(fs::read(&out).unwrap(), b"what was there before");
    }
}

#[test]
fn commits_are_held_back() {
    let folder = Folder::new();
    let [base, top] = ["base", "top"].map(|name| folder.file(name));
    for format in ["raw", "qcow2"] {
        let _ = fs::remove_file(&base);
        qemu_img(&["create", "-q", "-f", format, &base, "8M"]);
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", format, &top,
        ]);
        qemu_io(Path::new(&top), &["write -P 3 0 6M"]);
        let since = Instant::now();
        well(&["commit", "-r", "8M", &top]);
        assert!(since.elapsed() >= Duration::from_millis(500));
        let disk = Disk::open(Path::new(&top), &chain::Options::default()).unwrap();
        let mut shown = vec![0; 8 << 20];
        disk.read_at(&mut shown, 0).unwrap();
        assert!(shown[..6 << 20].iter().all(|&byte| byte == 3));
        assert!(shown[6 << 20..].iter().all(|&byte| byte == 0));
        let entry = Reader::open(Path::new(&top)).entry(GuestOffset(0));
        assert_eq!(entry, L2Entry::Unallocated, "the top is empty");
    }
}

#[test]
fn what_only_qemu_img_has_is_refused_by_name() {
    let folder = Folder::new();
    let [raw, out] = ["raw", "out"].map(|name| folder.file(name));
    fs::write(&raw, [1; 512]).unwrap();
    for (option, instead) in [
        (&["-C"][..], "leave it out"),
        (&["--object", "secret,id=a,file=b"], "--key-file"),
        (&["--image-opts"], "-f"),
        (&["--target-image-opts"], "-n"),
    ] {
        let (code, text) = ours(&[&["convert", "-f", "raw"], option, &[&raw, &out]].concat());
        assert!(code != Some(0), "{text}");
        let said = format!("{} is not supported", option[0]);
        assert!(text.contains(&said) && text.contains(instead), "{text}");
        assert!(!Path::new(&out).exists());
    }
}
