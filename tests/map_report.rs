//! `map` prints what `qemu-img map` prints, to the byte: scripts compare it.

mod common;

use std::fs;
use std::path::Path;

use common::{half_random, qemu_create, qemu_img, qemu_io, run};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// Both programs print the same, as JSON and as a table.
fn assert_same(image: &Path, more: &[&str]) {
    for output in ["--output=json", "--output=human"] {
        let mut args = vec!["map", "-f", "qcow2", output];
        args.extend(more);
        args.push(image.to_str().unwrap());
        let (code, expected) = run("qemu-img", &args);
        let (our_code, printed) = run(OURS, &args);
        assert_eq!(our_code, code, "{args:?}: {printed}\n{expected}");
        if code == Some(0) {
            assert_eq!(printed, expected, "{args:?}");
        }
    }
}

/// Some writes that leave every kind of cluster and boundary.
fn scribble(image: &Path, salt: u64) {
    let at = |n: u64| (n * 7919 + salt * 104_729) % 3000;
    let commands = [
        format!("write {}k 100k", at(1)),
        format!("write -z {}k 64k", at(1) + 16),
        format!("write -z {}k 200k", at(2)),
        format!("write -z -u {}k 128k", at(3)),
        format!("write -P 3 {}k 1k", at(4)),
        format!("discard {}k 64k", at(1) + 64),
        format!("write {}k 300k", at(5)),
        format!("discard {}k 128k", at(6)),
    ];
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io(image, &commands);
}

/// A raw file with data and holes, that does not end with a cluster.
fn raw_with_holes(path: &Path, len: u64) {
    let file = fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    use std::os::unix::fs::FileExt;
    for at in [0, 300 << 10, 1 << 20, len - 1000] {
        let bytes = half_random(40_000, at + 1);
        let n = bytes.len().min((len - at) as usize);
        file.write_all_at(&bytes[..n], at).unwrap();
    }
}

#[test]
fn single_images() {
    let dir = tempfile::tempdir().unwrap();
    for (i, options) in [
        "cluster_size=64k",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M",
        "cluster_size=8k,preallocation=metadata",
        "cluster_size=64k,preallocation=falloc",
        "cluster_size=64k,preallocation=full",
        "compression_type=zstd,lazy_refcounts=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        let image = dir.path().join(format!("{i}.qcow2"));
        let path = image.to_str().unwrap();
        qemu_create(path, options, "3500k");
        assert_same(&image, &[]);
        if !options.contains("preallocation") {
            // Only clusters that are not allocated can be written compressed.
            qemu_io(&image, &["write -c 0 2M"]);
            assert_same(&image, &[]);
        }
        scribble(&image, i as u64);
        assert_same(&image, &[]);
        for range in [
            &["--start-offset=1M"][..],
            &["--start-offset=1000001", "--max-length=5000"],
            &["-s", "100k", "-l", "1G"],
            &["--max-length=0"],
            &["--start-offset=1G"],
        ] {
            assert_same(&image, range);
        }
    }
}

#[test]
fn chains_short_and_long_raw_and_not() {
    let dir = tempfile::tempdir().unwrap();
    let bases = [
        ("none", None, 0),
        ("short.raw", Some("raw"), 1_234_567),
        ("long.raw", Some("raw"), 6 << 20),
        ("base.qcow2", Some("qcow2"), 2 << 20),
    ];
    for (name, format, len) in bases {
        let base = dir.path().join(name);
        match format {
            Some("raw") => raw_with_holes(&base, len),
            Some(_) => {
                let path = base.to_str().unwrap();
                let size = len.to_string();
                let options = "compat=0.10,cluster_size=1k";
                qemu_create(path, options, &size);
                qemu_io(&base, &["write 0 100k", "write 1M 1M", "discard 10k 20k"]);
            }
            None => {}
        }
        for (i, options) in [
            "cluster_size=64k",
            "cluster_size=512",
            "compat=0.10",
            "extended_l2=on",
        ]
        .iter()
        .enumerate()
        {
            // Each over the one before, of another size.
            let middle = dir.path().join(format!("{name}-{i}-middle"));
            let top = dir.path().join(format!("{name}-{i}-top"));
            let [middle_path, top_path] = [&middle, &top].map(|path| path.to_str().unwrap());
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
            if let Some(format) = format {
                args.extend(["-F", format, "-b", name]);
            }
            args.extend([middle_path, "3300k"]);
            qemu_img(&args);
            scribble(&middle, i as u64);
            assert_same(&middle, &[]);
            let below = format!("{name}-{i}-middle");
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below, top_path, "4M",
            ]);
            assert_same(&top, &[]);
            scribble(&top, i as u64 + 10);
            assert_same(&top, &[]);
            assert_same(&top, &["--start-offset=1230000", "--max-length=1M"]);
        }
    }
}

/// An image whose entries cannot be right has no map.
#[test]
fn damage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let path = image.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", path, "1M"]);
    qemu_io(&image, &["write 0 128k"]);
    let reader = common::Reader::open(&image);
    let l1 = reader.header.l1_table_offset;
    let l2 = reader.be64(l1) & 0x00ff_ffff_ffff_fe00;
    let mut bytes = reader.file;
    bytes[l2 as usize + 7] = 0x10;
    fs::write(&image, bytes).unwrap();
    let (code, text) = run(OURS, &["map", "-J", path]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("reserved bits"), "{text}");
}

/// Only files that the policy allows are opened for a map.
#[test]
fn the_policy_holds() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let base = elsewhere.path().join("base.raw");
    raw_with_holes(&base, 2 << 20);
    let image = dir.path().join("image.qcow2");
    let (base, image) = (base.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image,
    ]);
    let (code, text) = run(OURS, &["map", image]);
    assert_eq!(code, Some(1), "{text}");
    let folder = elsewhere.path().to_str().unwrap();
    let (code, _) = run(OURS, &["map", "--allow-path", folder, image]);
    assert_eq!(code, Some(0));
}
