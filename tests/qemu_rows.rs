//! Where qcow2 implementations have gone wrong, one test each, in both
//! directions: what QEMU wrote we read, what we wrote QEMU reads, and its
//! check is clean after each. Content is compared, not only metadata.
//!
//! Rows 19 and 24 are in concurrent.rs, 20 and T11 in faults, 23 in
//! crash.rs.

mod common;

#[path = "qemu_rows/opening.rs"]
mod opening;
#[path = "qemu_rows/peers.rs"]
mod peers;
#[path = "qemu_rows/rows.rs"]
mod rows;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::check::Checked;
use common::lab::{self, Below, How, qemu_check, watched};
use common::{Reader, half_random, qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::{self, Change, SimDisk, SimKind};
use qcow2_ublk::{Disk, ErrorKind, chain};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

/// A folder with images.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        // Beside the build: /tmp may know no direct I/O.
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path.to_str().unwrap(), &size]);
        qemu_img(&args);
        path
    }

    /// An overlay over `base`, by its name in this folder.
    fn overlay(&self, name: &str, base: &str, format: &str, options: &str, size: u64) -> PathBuf {
        let options = format!("backing_file={base},backing_fmt={format}{options}");
        self.create(name, &options, size)
    }

    fn raw(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn convert(&self, content: &[u8], name: &str, args: &[&str]) -> PathBuf {
        let raw = self.raw("converted.raw", content);
        let path = self.path(name);
        let names = [raw.to_str().unwrap(), path.to_str().unwrap()];
        qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2"], args, &names].concat());
        path
    }
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn writable() -> chain::Options {
    chain::Options {
        writable: true,
        ..chain::Options::default()
    }
}

fn open_rw(path: &Path) -> Disk {
    Disk::open(path, &writable()).unwrap()
}

fn open_ro(path: &Path) -> Disk {
    Disk::open(path, &chain::Options::default()).unwrap()
}

fn read(disk: &Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xaa; len as usize];
    disk.read_at(&mut bytes, offset).unwrap();
    bytes
}

#[track_caller]
fn assert_reads(disk: &Disk, offset: u64, len: u64, byte: u8) {
    let bytes = read(disk, offset, len);
    if let Some(at) = bytes.iter().position(|&b| b != byte) {
        panic!("byte {:#x} is {:#x}", offset + at as u64, bytes[at]);
    }
}

fn write(disk: &Disk, offset: u64, len: u64, byte: u8) {
    disk.write_at(&vec![byte; len as usize], offset).unwrap();
}

/// What QEMU reads from an image, whole; `args` as for convert.
fn qemu_content(path: &Path, args: &[&str]) -> Vec<u8> {
    let raw = path.with_extension("seen-by-qemu");
    let names = [name(path), name(&raw)];
    qemu_img(&[&["convert", "-O", "raw"], args, &names].concat());
    let content = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    content
}

/// Closes, and compares what QEMU sees with what we saw, and checks.
#[track_caller]
fn close_and_compare(disk: Disk, path: &Path) -> Vec<u8> {
    let ours = read(&disk, 0, disk.size());
    disk.close().unwrap();
    qemu_check(path, false);
    let theirs = qemu_content(path, &[]);
    assert!(theirs == ours, "QEMU reads something else");
    assert!(read(&open_ro(path), 0, ours.len() as u64) == ours);
    ours
}

fn check_clean(path: &Path) {
    qemu_check(path, false);
}

fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn peek(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn refused(path: &Path, options: &chain::Options, kind: ErrorKind) -> String {
    let start = Instant::now();
    let error = Disk::open(path, options).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "refused too late");
    error.to_string()
}

/// Puts an unknown extension where the list of them ends.
fn add_extension(path: &Path) -> Vec<u8> {
    let cluster0 = peek(path, 0, 4096);
    let word = |at: usize| u32::from_be_bytes(cluster0[at..at + 4].try_into().unwrap()) as usize;
    let mut at = word(100);
    while word(at) != 0 {
        at += 8 + word(at + 4).next_multiple_of(8);
    }
    let mut extension = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5];
    extension.extend(b"hello\0\0\0");
    extension.extend([0; 8]);
    poke(path, at as u64, &extension);
    cluster0[..at].to_vec()
}
