//! Images of whatever QEMU is in PATH on us, and ours on it. Run with several
//! versions by `scripts/qemu-matrix`, and with the machine's own like any test.

mod common;

use std::path::{Path, PathBuf};

use common::{qemu_create, qemu_img, run};
use qcow2_ublk::{Disk, chain};

const SIZE: u64 = 8 << 20;

/// A kind of image: what both `create` commands take after `-o`.
struct Shape {
    name: &'static str,
    options: &'static str,
}

const SHAPES: &[Shape] = &[
    shape("version 2", "compat=0.10"),
    shape(
        "version 2, 512-byte clusters",
        "compat=0.10,cluster_size=512",
    ),
    shape("version 3", "compat=1.1"),
    shape("4K clusters", "cluster_size=4k"),
    shape("2M clusters", "cluster_size=2M"),
    shape("1-bit refcounts", "cluster_size=4k,refcount_bits=1"),
    shape("2-bit refcounts", "cluster_size=512,refcount_bits=2"),
    shape("64-bit refcounts", "cluster_size=4k,refcount_bits=64"),
    shape("lazy refcounts", "lazy_refcounts=on"),
    shape("zstd", "compression_type=zstd"),
    shape("extended L2", "extended_l2=on,cluster_size=128k"),
];

const fn shape(name: &'static str, options: &'static str) -> Shape {
    Shape { name, options }
}

/// Commands that `qemu-io` and `qcow2-ublk io` understand alike: whole and
/// partial clusters, several tables, zeros, discards.
const FIRST: &[&str] = &[
    "write -P 0x11 0 64k",
    "write -P 0x22 100k 3k",
    "write -P 0x33 1M 1M",
    "write -z 1100k 130k",
    "write -z -u 1500k 200k",
    "write -P 0x44 8191k 1k",
];
/// And on top of them.
const SECOND: &[&str] = &[
    "write -P 0x55 32k 128k",
    "write -P 0x66 1110k 7k",
    "write -P 0x77 4M 700k",
    "write -P 0x88 8190k 1k",
];

fn ours(args: &[&str]) -> String {
    let (code, text) = run(env!("CARGO_BIN_EXE_qcow2-ublk"), args);
    assert_eq!(code, Some(0), "{args:?}: {text}");
    text
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn our_io(image: &Path, commands: &[&str]) {
    let mut args = vec!["io", "--trust-chain"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(name(image));
    ours(&args);
}

/// The whole disk, read by us.
fn our_content(image: &Path) -> Vec<u8> {
    let disk = Disk::open(image, &chain::Options::default()).unwrap();
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    disk.close().unwrap();
    bytes
}

/// The whole disk, read by QEMU, which finds the image in order.
fn their_content(image: &Path) -> Vec<u8> {
    qemu_img(&["check", "-q", "-f", "qcow2", name(image)]);
    let raw = image.with_extension("raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        name(image),
        name(&raw),
    ]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

#[track_caller]
fn same(what: &str, a: &[u8], b: &[u8]) {
    assert_eq!(a.len(), b.len(), "{what}: sizes");
    if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
        panic!("{what}: byte {at}: {:#x} and {:#x}", a[at], b[at]);
    }
}

/// Both create, both write, each on top of the other: everybody sees the same.
fn round(dir: &Path, shape: &Shape, arguments: &[&str]) {
    let what = shape.name;
    let size = SIZE.to_string();
    let path = |file: &str| dir.join(file);
    let (theirs, mine) = (path("theirs.qcow2"), path("mine.qcow2"));
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    create.extend(arguments);
    create.extend(["-o", shape.options]);
    qemu_img(&[&create[..], &[name(&theirs), &size]].concat());
    common::qemu_io(&theirs, FIRST);
    let mut create = vec!["create"];
    create.extend(arguments);
    create.extend(["-o", shape.options]);
    ours(&[&create[..], &[name(&mine), &size]].concat());
    our_io(&mine, FIRST);

    let first = their_content(&theirs);
    same(
        &format!("{what}: theirs, read by us"),
        &first,
        &our_content(&theirs),
    );
    same(
        &format!("{what}: ours, read by them"),
        &first,
        &their_content(&mine),
    );
    same(
        &format!("{what}: ours, read by us"),
        &first,
        &our_content(&mine),
    );

    // Crosswise.
    our_io(&theirs, SECOND);
    common::qemu_io(&mine, SECOND);
    let second = their_content(&mine);
    assert_ne!(first, second);
    same(
        &format!("{what}: theirs, written by us"),
        &second,
        &their_content(&theirs),
    );
    same(
        &format!("{what}: ours, written by them"),
        &second,
        &our_content(&mine),
    );
    same(
        &format!("{what}: theirs, read again"),
        &second,
        &our_content(&theirs),
    );
}

/// Whether this QEMU was built with zstd. Only old ones may be without.
fn they_have_zstd() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let probe = dir.path().join("probe.qcow2");
    let options = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compression_type=zstd",
        name(&probe),
        "1M",
    ];
    if run("qemu-img", &options).0 == Some(0) {
        return true;
    }
    let version = qemu_img(&["--version"]);
    assert!(version.contains("version 5."), "no zstd in {version}");
    false
}

/// The shapes that this QEMU can make.
fn shapes() -> impl Iterator<Item = &'static Shape> {
    let zstd = they_have_zstd();
    SHAPES
        .iter()
        .filter(move |shape| zstd || !shape.options.contains("zstd"))
}

/// A base image with its own content, of another shape than what is above.
fn base(dir: &Path) -> PathBuf {
    let base = dir.join("base.qcow2");
    qemu_create(name(&base), "cluster_size=16k", "7M");
    common::qemu_io(&base, &["write -P 0xb1 0 2M", "write -P 0xb2 5M 2M"]);
    base
}

#[test]
fn every_shape_both_ways() {
    for shape in shapes() {
        let dir = tempfile::tempdir().unwrap();
        round(dir.path(), shape, &[]);
    }
}

#[test]
fn every_shape_over_a_base() {
    for shape in shapes() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        // Relative: both find it beside the image.
        round(dir.path(), shape, &["-b", "base.qcow2", "-F", "qcow2"]);
    }
}

#[test]
fn their_compressed_images() {
    let kinds: &[&str] = if they_have_zstd() {
        &["zlib", "zstd"]
    } else {
        &["zlib"]
    };
    for kind in kinds {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("content.raw");
        let content = common::half_random(SIZE as usize, 7);
        std::fs::write(&raw, &content).unwrap();
        let image = dir.path().join("a.qcow2");
        let option = format!("compression_type={kind}");
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &option,
            name(&raw),
            name(&image),
        ]);
        same(kind, &content, &our_content(&image));
        our_io(&image, SECOND);
        let after = their_content(&image);
        assert_ne!(after, content);
        same(
            &format!("{kind}, written by us"),
            &after,
            &our_content(&image),
        );
    }
}

#[test]
fn their_snapshots_stay_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", name(&image), "8M"]);
    common::qemu_io(&image, FIRST);
    let before = their_content(&image);
    qemu_img(&["snapshot", "-c", "s1", name(&image)]);
    our_io(&image, SECOND);
    let after = their_content(&image);
    assert_ne!(before, after);
    same("after", &after, &our_content(&image));
    qemu_img(&["snapshot", "-a", "s1", name(&image)]);
    same("the snapshot", &before, &their_content(&image));
    same("the snapshot, read by us", &before, &our_content(&image));
}

#[test]
fn our_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    ours(&["create", name(&image), "8M"]);
    our_io(&image, FIRST);
    let before = our_content(&image);
    ours(&["snapshot", "create", name(&image), "s1"]);
    common::qemu_io(&image, SECOND);
    let after = their_content(&image);
    assert_ne!(before, after);
    ours(&["snapshot", "create", name(&image), "s2"]);
    qemu_img(&["snapshot", "-a", "s1", name(&image)]);
    same("theirs of our first", &before, &their_content(&image));
    ours(&["snapshot", "apply", name(&image), "s2"]);
    same("ours of the second", &after, &their_content(&image));
    qemu_img(&["snapshot", "-d", "s1", name(&image)]);
    ours(&["snapshot", "delete", name(&image), "s2"]);
    same("without any", &after, &their_content(&image));
}

#[test]
fn external_data_files() {
    for raw in ["off", "on"] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        // Whether a relative name is relative to the image is a matter of the
        // version.
        let options = format!("data_file={},data_file_raw={raw}", name(&data));
        let image = dir.path().join("a.qcow2");
        let mut contents = Vec::new();
        for by_us in [false, true] {
            if by_us {
                ours(&["create", "-o", &options, name(&image), "8M"]);
                our_io(&image, FIRST);
                common::qemu_io(&image, SECOND);
            } else {
                qemu_create(name(&image), &options, "8M");
                common::qemu_io(&image, FIRST);
                our_io(&image, SECOND);
            }
            let content = their_content(&image);
            let what = format!("raw {raw}, by us {by_us}");
            same(&what, &content, &trusting(&image));
            if raw == "on" {
                same(&what, &content, &std::fs::read(&data).unwrap());
            }
            contents.push(content);
            std::fs::remove_file(&image).unwrap();
            std::fs::remove_file(&data).unwrap();
        }
        same(raw, &contents[0], &contents[1]);
    }
}

/// As [`our_content`], with all files that the image names.
fn trusting(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("mine");
    ours(&[
        "convert",
        "--trust-chain",
        "-f",
        "qcow2",
        "-O",
        "raw",
        name(image),
        name(&raw),
    ]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

#[test]
fn luks() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "open sesame").unwrap();
    let secret = format!("secret,id=k,file={}", name(&key));
    let (theirs, mine) = (
        dir.path().join("theirs.qcow2"),
        dir.path().join("mine.qcow2"),
    );
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        &secret,
        "-o",
        "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10",
        name(&theirs),
        "8M",
    ]);
    ours(&[
        "create",
        "--key-file",
        name(&key),
        "-o",
        "encrypt.format=luks,encrypt.iter-time=10",
        name(&mine),
        "8M",
    ]);
    for image in [&theirs, &mine] {
        let options = format!(
            "driver=qcow2,encrypt.key-secret=k,file.driver=file,file.filename={}",
            name(image)
        );
        let (code, text) = run(
            "qemu-io",
            &[
                "--object",
                &secret,
                "--image-opts",
                &options,
                "-c",
                FIRST[0],
                "-c",
                FIRST[1],
            ],
        );
        assert_eq!(code, Some(0), "{text}");
        let ours_then = [
            "io",
            "--key-file",
            name(&key),
            "-c",
            SECOND[0],
            "-c",
            SECOND[2],
        ];
        ours(&[&ours_then[..], &[name(image)]].concat());
        let (code, text) = run(
            "qemu-io",
            &[
                "--object",
                &secret,
                "--image-opts",
                &options,
                "-c",
                "read -P 0x11 0 32k",
                "-c",
                "read -P 0x55 32k 128k",
                "-c",
                "read -P 0x77 4M 700k",
                "-c",
                "read -P 0 1M 1M",
            ],
        );
        assert_eq!(code, Some(0), "{text}");
        assert!(!text.contains("Pattern verification failed"), "{text}");
        qemu_img(&["check", "-q", "--object", &secret, "--image-opts", &options]);
    }
}
