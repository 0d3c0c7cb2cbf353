//! `info` says what `qemu-img info` says, under the same keys, and opens
//! nothing it was not asked to.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use common::{qemu_img, qemu_io, run};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

fn json(program: &str, args: &[&str], image: &str) -> Value {
    let output = std::process::Command::new(program)
        .args(args)
        .arg(image)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?} {image}: {output:?}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Both programs say the same, in JSON and in lines.
fn assert_same(image: &Path) {
    let image = image.to_str().unwrap();
    let args = ["info", "--output=json"];
    assert_eq!(
        json(OURS, &args, image),
        json("qemu-img", &args, image),
        "{image}"
    );
    let lines = |program: &str| {
        let (code, text) = run(program, &["info", image]);
        assert_eq!(code, Some(0), "{text}");
        text
    };
    assert_eq!(lines(OURS), lines("qemu-img"), "{image}");
}

fn create(dir: &Path, name: &str, more: &[&str], size: &str) -> PathBuf {
    let image = dir.join(name);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(more);
    args.push(image.to_str().unwrap());
    if !size.is_empty() {
        args.push(size);
    }
    qemu_img(&args);
    image
}

#[test]
fn shapes_and_features() {
    let dir = tempfile::tempdir().unwrap();
    let secret = ["--object", "secret,id=s,data=abc", "-o"];
    let data_file = format!(
        "data_file={},data_file_raw=on",
        dir.path().join("d").display()
    );
    let cases: &[&[&str]] = &[
        &[],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512,refcount_bits=1"],
        &["-o", "cluster_size=2M,refcount_bits=64"],
        &["-o", "lazy_refcounts=on,compression_type=zstd"],
        &["-o", "extended_l2=on"],
        &["-o", &data_file],
        &[&secret[..], &["encrypt.format=aes,encrypt.key-secret=s"]].concat(),
        &[
            &secret[..],
            &["encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"],
        ]
        .concat(),
    ];
    for (i, options) in cases.iter().enumerate() {
        let image = create(dir.path(), &format!("{i}"), options, "1000500");
        assert_same(&image);
    }
}

#[test]
fn snapshots_bitmaps_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "image", &[], "10M");
    let path = image.to_str().unwrap();
    qemu_io(&image, &["write 0 1M"]);
    for name in ["first", "the second one, with a longer name", ""] {
        qemu_img(&["snapshot", "-c", name, path]);
    }
    qemu_img(&["bitmap", "--add", path, "b0"]);
    qemu_img(&["bitmap", "--add", "--disable", "-g", "4k", path, "b1"]);
    assert_same(&image);
    let good = fs::read(&image).unwrap();
    for (at, byte) in [(79, 1), (79, 2), (79, 3), (87, 1)] {
        let mut poked = good.clone();
        poked[at] = byte;
        fs::write(&image, &poked).unwrap();
        assert_same(&image);
    }
    // Bitmaps that were abandoned are not listed.
    let mut poked = good;
    poked[95] = 0;
    fs::write(&image, &poked).unwrap();
    let ours = json(OURS, &["info", "-J"], path);
    assert!(ours["format-specific"]["data"].get("bitmaps").is_none());
    assert_eq!(ours, json("qemu-img", &["info", "--output=json"], path));
}

#[test]
fn chains_are_shown_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("base.raw"), vec![1; 70_001]).unwrap();
    create(dir.path(), "middle", &["-F", "raw", "-b", "base.raw"], "");
    let top = create(
        dir.path(),
        "sub/top",
        &["-F", "qcow2", "-b", "../middle"],
        "3M",
    );
    let (middle, path) = (dir.path().join("middle"), top.to_str().unwrap());
    assert_same(&middle);
    assert_same(&top);
    let args = ["info", "--backing-chain", "--output=json"];
    let middle = middle.to_str().unwrap();
    assert_eq!(json(OURS, &args, middle), json("qemu-img", &args, middle));

    // Outside the image's folder only with permission.
    let (code, text) = run(OURS, &["info", "--backing-chain", path]);
    assert_eq!(code, Some(1), "{text}");
    let layers = json(
        OURS,
        &["info", "-J", "--backing-chain", "--trust-chain"],
        path,
    );
    assert_eq!(layers.as_array().unwrap().len(), 3);

    // A loop ends.
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "sub/top", middle,
    ]);
    let (code, text) = run(OURS, &["info", "--backing-chain", "--trust-chain", path]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("loop"), "{text}");
}

/// A stranger's image names what it likes: nothing of it is opened, and it
/// does not play with the terminal.
#[test]
fn hostile_names_are_only_shown() {
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "image", &[], "1M");
    let path = image.to_str().unwrap();
    for name in [
        "json:{\"driver\":\"nbd\"}",
        "/etc/shadow",
        "nbd://host/x",
        "\x1b[2Jx",
    ] {
        qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, path]);
        let report = json(OURS, &["info", "-J"], path);
        assert_eq!(report["backing-filename"], name);
        let (code, text) = run(OURS, &["info", path]);
        assert_eq!(code, Some(0), "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }
}

#[test]
fn damaged_images_still_tell() {
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "image", &[], "10M");
    let path = image.to_str().unwrap();
    qemu_io(&image, &["write 0 1M"]);
    qemu_img(&["snapshot", "-c", "s", path]);
    let good = fs::read(&image).unwrap();
    // Cut off behind the header, and the snapshot table far away.
    fs::write(&image, &good[..0x10000]).unwrap();
    assert_eq!(json(OURS, &["info", "-J"], path)["virtual-size"], 10 << 20);
    let mut far = good;
    far[64] = 0x7f;
    fs::write(&image, far).unwrap();
    let (code, text) = run(OURS, &["info", path]);
    assert_eq!(code, Some(1), "{text}");
}
