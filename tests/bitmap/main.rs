//! Dirty bitmaps, with QEMU as the oracle in both directions: what changes
//! the disk is recorded, what QEMU recorded is read, and the actions do what
//! qemu-img's do.

#[path = "../common/mod.rs"]
mod common;

mod actions;
mod crash;
mod format;
mod recording;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::Checked;
use common::lab::qemu_check;
use common::{qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::BitmapAction;
use qcow2_ublk::qcow2::spec::bitmap::BitmapTableEntry;
use qcow2_ublk::storage::sim::{self, Rng};
use qcow2_ublk::{Disk, ErrorKind, chain};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn create(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.0.path().join(name);
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path.to_str().unwrap(), &size]);
        qemu_img(&args);
        path
    }
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path, writable: bool) -> Disk {
    let options = chain::Options {
        writable,
        ..chain::Options::default()
    };
    Disk::open(path, &options).unwrap()
}

fn ours(args: &[&str]) -> (Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_qcow2-ublk");
    run(program, &[&["bitmap"], args].concat())
}

fn ours_ok(args: &[&str]) -> String {
    let (code, text) = ours(args);
    assert_eq!(code, Some(0), "{args:?}: {text}");
    text
}

/// The dirty ranges (start, length) as this program's library reads them.
fn ranges(path: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    let disk = open(path, false);
    let mut ranges = Vec::new();
    let content = disk.bitmap(bitmap).unwrap();
    content
        .ranges(|start, len| {
            ranges.push((start, len));
            Ok(())
        })
        .unwrap();
    let granules: u64 = ranges
        .iter()
        .map(|(_, len)| len.next_multiple_of(content.granularity()))
        .sum();
    assert_eq!(granules, content.count());
    ranges
}

/// The dirty ranges as QEMU reads them, through the bitmap's NBD export.
fn qemu_ranges(path: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let pid = folder.path().join("pid");
    let (code, text) = run(
        "qemu-nbd",
        &[
            "-r",
            "--fork",
            "-f",
            "qcow2",
            "-B",
            bitmap,
            "--pid-file",
            name(&pid),
            "-k",
            name(&socket),
            name(path),
        ],
    );
    assert_eq!(code, Some(0), "qemu-nbd: {text}");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        name(&socket)
    );
    let map = qemu_img(&["map", "--output=json", "--image-opts", &options]);
    // Without -t it ends with its client, and gives the image free.
    while pid_lives(&pid) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for part in map.as_array().unwrap() {
        let number = |key: &str| part[key].as_u64().unwrap();
        if part["data"] == false {
            ranges.push((number("start"), number("length")));
        }
    }
    ranges
}

fn pid_lives(file: &Path) -> bool {
    let Ok(pid) = std::fs::read_to_string(file) else {
        return false;
    };
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Bytes rounded out to granules, as ranges.
fn rounded(dirty: &[bool], granularity: u64, size: u64) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for start in (0..size).step_by(granularity as usize) {
        let end = (start + granularity).min(size);
        let sectors = (start / 512) as usize..end.div_ceil(512) as usize;
        if dirty[sectors].contains(&true) {
            match ranges.last_mut() {
                Some(last) if last.0 + last.1 == start => last.1 += end - start,
                _ => ranges.push((start, end - start)),
            }
        }
    }
    ranges
}

/// The lines of `info` about bitmaps.
fn listed(path: &Path) -> serde_json::Value {
    let info = qemu_img(&["info", "--output=json", name(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// What a program says without its name and the image's, and without hints.
fn message(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let at = line.find("Operation").unwrap_or_default();
    // The node has a name there that only QEMU has.
    let line = line[at..].split(" in '#block").collect::<Vec<_>>();
    match line[..] {
        [a, b] => format!("{a}{}", &b[b.find('\'').unwrap() + 1..]),
        _ => line.concat(),
    }
}
