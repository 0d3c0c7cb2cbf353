//! Snapshots of images with other features, none of which they may lose.

use std::path::Path;

use crate::common::{self, qemu_create, qemu_img, qemu_io};
use crate::qemu::{Place, our_content, ours, refused, sound, text};

/// Zero clusters, with a host cluster of their own and without, are counted
/// and shared as data is.
#[test]
fn zero_clusters() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    qemu_io(
        &path,
        &["write -P 1 0 256k", "write -z 0 64k", "write -zu 64k 64k"],
    );
    ours(&["snapshot", "create", name, "x"]);
    sound(&path);
    let first = place.content(&path, "x");
    assert!(first[..128 << 10].iter().all(|&b| b == 0) && first[128 << 10] == 1);
    ours(&[
        "io",
        "-c",
        "write -P 2 4k 100k",
        "-c",
        "write -z 128k 64k",
        name,
    ]);
    sound(&path);
    let second = place.active(&path);
    assert!(second[4096] == 2 && second[0] == 0 && second[128 << 10] == 0);
    assert!(our_content(&path, "x") == first);
    ours(&["snapshot", "create", name, "y"]);
    ours(&["snapshot", "apply", name, "x"]);
    assert!(place.active(&path) == first);
    ours(&["io", "-c", "write -P 3 0 1M", name]);
    sound(&path);
    assert!(place.content(&path, "x") == first);
    assert!(place.content(&path, "y") == second);
    ours(&["snapshot", "delete", name, "x"]);
    ours(&["snapshot", "delete", name, "y"]);
    sound(&path);
}

/// Features that snapshots have nothing to do with, but must not lose.
#[test]
fn with_every_feature() {
    let place = Place::new();
    for (options, secret) in [
        ("extended_l2=on", false),
        ("extended_l2=on,cluster_size=16k", false),
        ("compression_type=zstd", false),
        ("lazy_refcounts=on", false),
        (
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            true,
        ),
    ] {
        let path = place.path("f.qcow2");
        let name = text(&path);
        let object = ["--object", "secret,id=s,data=xyzzy"];
        let object: &[&str] = if secret { &object } else { &[] };
        let opts = |path: &str| {
            let key = if secret { ",encrypt.key-secret=s" } else { "" };
            format!("driver=qcow2,file.filename={path}{key}")
        };
        let _ = std::fs::remove_file(&path);
        let create = ["create", "-q", "-f", "qcow2", "-o", options, name, "4M"];
        qemu_img(&[&create[..1], object, &create[1..]].concat());
        let write = |command: &str| {
            let image = opts(name);
            let args = [object, &["--image-opts", "-c", command, &image]].concat();
            let (code, out) = common::run("qemu-io", &args);
            assert_eq!(code, Some(0), "{out}");
        };
        let content = |path: &Path| {
            let raw = place.path("f.raw");
            let image = opts(text(path));
            let args = ["convert", "--image-opts", "-O", "raw", &image, text(&raw)];
            qemu_img(&[&args[..1], object, &args[1..]].concat());
            std::fs::read(raw).unwrap()
        };
        let check = || {
            let image = opts(name);
            let args = ["check", "-q", "--image-opts", &image];
            qemu_img(&[&args[..1], object, &args[1..]].concat());
        };
        write("write -P 1 3k 200k");
        write("write -z 40k 4k");
        let first = content(&path);
        ours(&["snapshot", "create", name, "first"]);
        check();
        write("write -P 2 1k 2M");
        write("discard 0 64k");
        let second = content(&path);
        ours(&["snapshot", "create", name, "second"]);
        check();
        write("write -P 3 0 4M");
        ours(&["snapshot", "apply", name, "first"]);
        check();
        assert!(content(&path) == first, "{options}");
        ours(&["snapshot", "apply", name, "second"]);
        ours(&["snapshot", "delete", name, "first"]);
        check();
        assert!(content(&path) == second, "{options}");
        write("write -P 4 5k 1k");
        ours(&["snapshot", "delete", name, "second"]);
        check();
    }
}

#[test]
fn not_with_a_data_file_nor_over_bitmaps() {
    let place = Place::new();
    let path = place.path("d.qcow2");
    let name = text(&path);
    let data = format!("data_file={}", text(&place.path("d.raw")));
    qemu_create(name, &data, "4M");
    let message = refused(&["snapshot", "create", name, "x"]);
    assert!(message.contains("external data file"), "{message}");

    let path = place.image("");
    let name = text(&path);
    qemu_img(&["bitmap", "--add", name, "b0"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    let bits = || {
        qemu_img(&[
            "map",
            "--output=json",
            "--image-opts",
            &format!("driver=qcow2,file.filename={name}"),
        ])
    };
    let bitmaps = || {
        let info = qemu_img(&["info", "--output=json", name]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    };
    let (before, map) = (bitmaps(), bits());
    assert_eq!(before[0]["name"], "b0");
    // The content stays, so the bitmap stays right.
    ours(&["snapshot", "create", name, "s"]);
    assert_eq!(bitmaps(), before);
    sound(&path);
    let message = refused(&["snapshot", "apply", name, "s"]);
    assert!(message.contains("bitmaps"), "{message}");
    let (code, _) = common::run("qemu-img", &["snapshot", "-a", "s", name]);
    assert_eq!(code, Some(1), "QEMU refuses it too");
    ours(&["snapshot", "rename", name, "s", "t"]);
    ours(&["snapshot", "delete", name, "t"]);
    assert_eq!(bitmaps(), before);
    assert_eq!(bits(), map);
    sound(&path);
    qemu_img(&["bitmap", "--remove", name, "b0"]);
}

/// Feature bits that a writer who does not know them has to clear go, in the
/// same write; what else is unknown stays.
#[test]
fn row_13_unknown_bits() {
    let place = Place::new();
    let path = place.image("");
    let mut file = std::fs::read(&path).unwrap();
    // Autoclear bit 40, compatible bit 41.
    file[88 + 2] |= 1;
    file[80 + 2] |= 2;
    std::fs::write(&path, &file).unwrap();
    ours(&["snapshot", "create", text(&path), "x"]);
    let after = std::fs::read(&path).unwrap();
    assert_eq!(after[90] & 1, 0, "autoclear");
    assert_eq!(after[82] & 2, 2, "compatible");
    assert_eq!(after[96..4096], file[96..4096]);
    sound(&path);
}
