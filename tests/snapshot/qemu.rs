//! Files that QEMU made, files for QEMU, and the program's own commands.

use std::path::{Path, PathBuf};

use crate::common::{self, lab, qemu_img, qemu_io};
use qcow2_ublk::{Disk, chain, report};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of 4 MiB, made by QEMU.
    pub(crate) fn image(&self, options: &str) -> PathBuf {
        let path = self.path("a.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&path), "4M"]);
        qemu_img(&args);
        path
    }

    /// A snapshot's content as QEMU sees it.
    pub(crate) fn content(&self, path: &Path, which: &str) -> Vec<u8> {
        let raw = self.path("content.raw");
        qemu_img(&["convert", "-l", which, "-O", "raw", text(path), text(&raw)]);
        std::fs::read(raw).unwrap()
    }

    /// The active disk as QEMU sees it.
    pub(crate) fn active(&self, path: &Path) -> Vec<u8> {
        let raw = self.path("content.raw");
        qemu_img(&["convert", "-O", "raw", text(path), text(&raw)]);
        std::fs::read(raw).unwrap()
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs our program, which must succeed.
pub(crate) fn ours(args: &[&str]) -> String {
    let (code, out) = common::run(PROGRAM, args);
    assert_eq!(code, Some(0), "{args:?}: {out}");
    out
}

/// Runs our program, which must fail as qemu-img does.
pub(crate) fn refused(args: &[&str]) -> String {
    let (code, out) = common::run(PROGRAM, args);
    assert_eq!(code, Some(1), "{args:?}: {out}");
    out
}

pub(crate) fn sound(path: &Path) {
    lab::qemu_check(path, false);
}

fn names(path: &Path) -> Vec<(String, String)> {
    let snapshots = report::snapshots(path, false).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    snapshots
        .iter()
        .map(|s| (text(&s.id), text(&s.name)))
        .collect()
}

/// A snapshot's content as we see it.
pub(crate) fn our_content(path: &Path, which: &str) -> Vec<u8> {
    let options = chain::Options {
        snapshot: Some(qcow2_ublk::qcow2::Selector::parse(which.as_bytes())),
        ..chain::Options::default()
    };
    let disk = Disk::open(path, &options).unwrap();
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    disk.close().unwrap();
    content
}

#[test]
fn qemu_and_we_make_and_read_each_others() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    for round in 1..=6 {
        qemu_io(&path, &[&format!("write -P {round} {}k 300k", round * 100)]);
        let tag = format!("round {round}");
        if round % 2 == 0 {
            ours(&["snapshot", "create", name, &tag]);
        } else {
            qemu_img(&["snapshot", "-c", &tag, name]);
        }
        sound(&path);
    }
    for round in 1..=6 {
        let tag = format!("round {round}");
        let theirs = place.content(&path, &tag);
        assert_eq!(theirs[(round * 100) << 10], round as u8);
        // The last 200k of the round before are written over by this one.
        assert_eq!(theirs[((round + 2) * 100) << 10], round as u8);
        assert_eq!(theirs[((round + 3) * 100) << 10], 0);
        assert!(our_content(&path, &tag) == theirs);
        assert!(our_content(&path, &round.to_string()) == theirs, "by ID");
    }
    let third = place.content(&path, "round 3");
    let fourth = place.content(&path, "round 4");
    ours(&["snapshot", "-a", "round 3", name]);
    sound(&path);
    assert!(place.active(&path) == third);
    qemu_img(&["snapshot", "-a", "round 4", name]);
    assert!(place.active(&path) == fourth);
    for round in [1, 6, 3, 4, 2, 5] {
        let tag = format!("round {round}");
        if round % 2 == 0 {
            qemu_img(&["snapshot", "-d", &tag, name]);
        } else {
            ours(&["snapshot", "-d", &tag, name]);
        }
        sound(&path);
        assert!(place.active(&path) == fourth);
    }
    assert!(names(&path).is_empty());
    // Everything is the disk's own again.
    qemu_io(&path, &["write -P 9 0 4M"]);
    sound(&path);
}

#[test]
fn found_as_qemu_finds_them() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    for tag in ["one", "1", "", "two", "two", "7"] {
        ours(&["snapshot", "-c", tag, name]);
    }
    let twin = place.path("twin.qcow2");
    let both = |args: &[&str]| {
        std::fs::copy(&path, &twin).unwrap();
        let theirs = [&["snapshot"], args, &[text(&twin)]].concat();
        let (theirs, _) = common::run("qemu-img", &theirs);
        let (code, _) = common::run(PROGRAM, &[&["snapshot"], args, &[name]].concat());
        assert_eq!(code, theirs, "{args:?}");
        assert_eq!(names(&path), names(&twin), "{args:?}");
    };
    // By name alone, the first of several.
    both(&["-d", "1"]);
    both(&["-d", "3"]);
    both(&["-a", "7"]);
    both(&["-d", "two"]);
    both(&["-a", "nope"]);
    both(&["-d", ""]);
    both(&["-d", ""]);
    both(&["-c", "next"]);
    both(&["-d", "next"]);
    both(&["-d", "7"]);
    both(&["-c", "again"]);
    let hint = refused(&["snapshot", "-d", "5", name]);
    assert!(hint.contains("snapshot.id=5"), "{hint}");
    ours(&["snapshot", "delete", name, "snapshot.id=5"]);
    assert_eq!(names(&path).len(), 2);
    refused(&["snapshot", "-d", "snapshot.id=1,snapshot.name=two", name]);
    ours(&["snapshot", "-d", "snapshot.id=1,snapshot.name=one", name]);
    sound(&path);
}

#[test]
fn listed_as_qemu_lists_them() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    assert_eq!(ours(&["snapshot", "-l", name]), "");
    qemu_img(&["snapshot", "-c", "theirs", name]);
    ours(&["snapshot", "create", name, "ours"]);
    // The time zone is the host's there, and UTC here.
    let theirs = std::process::Command::new("qemu-img")
        .args(["snapshot", "-l", name])
        .env("TZ", "UTC")
        .output()
        .unwrap();
    let theirs = String::from_utf8(theirs.stdout).unwrap();
    assert!(theirs.contains("ours") && theirs.contains("theirs"));
    for args in [
        ["snapshot", "-l", name].as_slice(),
        &["snapshot", name],
        &["snapshot", "list", name],
        &["snapshot", "-U", "-l", name],
    ] {
        assert_eq!(ours(args), theirs);
    }
    let json: serde_json::Value =
        serde_json::from_str(&ours(&["snapshot", "list", "--json", name])).unwrap();
    let info = qemu_img(&["info", "--output=json", name]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(json, info["snapshots"]);
    refused(&["snapshot", "-l", "-c", "x", name]);
    refused(&["snapshot", "-c", "x"]);
    refused(&["snapshot", "create", "nothing.qcow2", "x"]);
}

#[test]
fn names_of_every_kind() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    let longest = "x".repeat(255);
    let unicode = "Schnappschuß 快照 📷";
    for tag in ["", unicode, &longest, "same", "same", "a,b=c %s"] {
        ours(&["snapshot", "create", name, tag]);
    }
    let too_long = "x".repeat(256);
    let message = refused(&["snapshot", "create", name, &too_long]);
    assert!(message.contains("255"), "{message}");
    refused(&["snapshot", "rename", name, "same", &too_long]);
    let seen: Vec<String> = names(&path).into_iter().map(|(_, name)| name).collect();
    assert_eq!(seen, ["", unicode, &longest, "same", "same", "a,b=c %s"]);
    let listed = qemu_img(&["snapshot", "-l", name]);
    assert!(listed.contains(unicode) && listed.contains(&longest));
    ours(&["snapshot", "rename", name, "same", unicode]);
    let ids: Vec<_> = names(&path).into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, ["1", "2", "3", "4", "5", "6"]);
    qemu_img(&["snapshot", "-d", &longest, name]);
    sound(&path);
}

#[test]
fn row_12_a_snapshot_of_another_size() {
    let place = Place::new();
    let path = place.image("cluster_size=4096");
    let name = text(&path);
    qemu_io(&path, &["write -P 1 0 4M"]);
    ours(&["snapshot", "create", name, "small"]);
    qemu_img(&["resize", "-q", name, "300M"]);
    qemu_io(&path, &["write -P 2 299M 1M"]);
    ours(&["snapshot", "create", name, "large"]);
    for (tag, size) in [("small", 4 << 20), ("large", 300 << 20), ("small", 4 << 20)] {
        ours(&["snapshot", "apply", name, tag]);
        sound(&path);
        let options = chain::Options::default();
        let disk = Disk::open(&path, &options).unwrap();
        assert_eq!(disk.size(), size, "{tag}");
        let mut last = [0];
        disk.read_at(&mut last, size - 1).unwrap();
        assert_eq!(last, [if size > 4 << 20 { 2 } else { 1 }]);
        disk.close().unwrap();
        qemu_img(&["compare", "-q", name, name]);
    }
    assert_eq!(our_content(&path, "large").len(), 300 << 20);
    qemu_img(&["snapshot", "-a", "large", name]);
    sound(&path);
}

#[test]
fn hundreds() {
    let place = Place::new();
    let path = place.image("cluster_size=4096");
    let name = text(&path);
    qemu_io(&path, &["write -P 1 0 64k"]);
    for n in 0..300 {
        let job = qcow2_ublk::qcow2::SnapshotJob::Create(qcow2_ublk::qcow2::NewSnapshot::now(
            format!("number {n}"),
        ));
        qcow2_ublk::offline::snapshot(&path, &job).unwrap();
    }
    sound(&path);
    assert_eq!(names(&path).len(), 300);
    qemu_io(&path, &["write -P 2 0 64k"]);
    assert!(our_content(&path, "number 299")[..64 << 10] == [1; 64 << 10]);
    // The file does not creep: what is free is used again.
    let long = std::fs::metadata(&path).unwrap().len();
    for n in 0..300 {
        let which = qcow2_ublk::qcow2::Selector::Name(format!("number {n}").into_bytes());
        let job = qcow2_ublk::qcow2::SnapshotJob::Delete(which);
        qcow2_ublk::offline::snapshot(&path, &job).unwrap();
    }
    sound(&path);
    assert!(names(&path).is_empty());
    assert!(std::fs::metadata(&path).unwrap().len() <= long + (64 << 10));
    for _ in 0..20 {
        ours(&["snapshot", "-c", "x", name]);
        ours(&["snapshot", "-d", "x", name]);
    }
    assert!(std::fs::metadata(&path).unwrap().len() <= long + (128 << 10));
}

/// Locks: an image that is in use is left alone, one that is read can be
/// listed.
#[test]
fn locked_images() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    ours(&["snapshot", "-c", "x", name]);
    let disk = Disk::open(&path, &options).unwrap();
    refused(&["snapshot", "-c", "y", name]);
    refused(&["snapshot", "-l", name]);
    ours(&["snapshot", "-l", "-U", name]);
    disk.close().unwrap();
    let reader = chain::Options {
        snapshot: Some(qcow2_ublk::qcow2::Selector::parse(b"x")),
        ..chain::Options::default()
    };
    let disk = Disk::open(&path, &reader).unwrap();
    let writer = Disk::open(&path, &options);
    assert_eq!(writer.unwrap_err().kind(), qcow2_ublk::ErrorKind::Busy);
    refused(&["snapshot", "-d", "x", name]);
    ours(&["snapshot", "-l", name]);
    disk.close().unwrap();
    ours(&["snapshot", "-d", "x", name]);
}

#[test]
fn io_on_a_snapshot_and_on_a_temporary_file() {
    let place = Place::new();
    let path = place.image("");
    let name = text(&path);
    qemu_io(&path, &["write -P 1 0 64k"]);
    ours(&["snapshot", "-c", "x", name]);
    qemu_io(&path, &["write -P 2 0 64k"]);
    let before = std::fs::read(&path).unwrap();
    ours(&["io", "--snapshot", "x", "-c", "read -P 1 0 64k", name]);
    ours(&["io", "-r", "-c", "read -P 2 0 64k", name]);
    refused(&["io", "--snapshot", "x", "-c", "write 0 64k", name]);
    let folder = format!("--temporary={}", text(place.0.path()));
    for extra in [["--temporary", "-v"], [&folder, "-v"]] {
        let args = [
            "io",
            extra[0],
            "-c",
            "read -P 2 0 64k",
            "-c",
            "write -P 3 4k 4k",
            "-c",
            "read -P 3 4k 4k",
            "-c",
            "read -P 2 8k 56k",
            "-c",
            "discard 0 64k",
            "-c",
            "read -P 0 0 64k",
            "-c",
            "write -P 7 3M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 7 3M 1M",
            name,
        ];
        ours(&args);
        assert!(
            std::fs::read(&path).unwrap() == before,
            "the image is untouched"
        );
    }
    let over = [
        "io",
        "--temporary",
        "--snapshot",
        "x",
        "-c",
        "write -P 4 0 4k",
        "-c",
        "read -P 1 4k 60k",
        name,
    ];
    ours(&over);
    assert!(std::fs::read(&path).unwrap() == before);
    let left: Vec<_> = std::fs::read_dir(place.0.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing but the image: {left:?}");
    // Several may do so at once, and readers besides.
    let options = chain::Options {
        writable: true,
        temporary: Some(place.0.path().to_owned()),
        ..chain::Options::default()
    };
    let one = Disk::open(&path, &options).unwrap();
    let two = Disk::open(&path, &options).unwrap();
    one.write_at(&[5; 4096], 0).unwrap();
    two.write_at(&[6; 4096], 0).unwrap();
    let mut seen = [0; 8192];
    one.read_at(&mut seen, 0).unwrap();
    assert!(seen[..4096] == [5; 4096] && seen[4096..] == [2; 4096]);
    qemu_img(&["info", name]);
    one.close().unwrap();
    two.close().unwrap();
    let elsewhere = ["io", "--temporary=/nonexistent", "-c", "read 0 4k", name];
    let (code, wrong) = common::run(PROGRAM, &elsewhere);
    assert_eq!(code, Some(4), "{wrong}");
    assert!(wrong.contains("/nonexistent"), "{wrong}");
}
