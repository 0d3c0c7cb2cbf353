//! Where qcow2 implementations have gone wrong, one test each, in both
//! directions: what QEMU wrote we read, what we wrote QEMU reads, and its
//! check is clean after each. Content is compared, not only metadata.
//!
//! Rows 19 and 24 are in concurrent.rs, 20 and T11 in faults.rs, 23 in
//! crash.rs.

mod common;

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

#[test]
fn row_1_and_t1_and_t2_copying_past_a_short_unaligned_backing_file() {
    let folder = Folder::new();
    folder.raw("base", &vec![0x77; 100_352]);
    let path = folder.overlay("top", "base", "raw", "", M);
    let disk = open_rw(&path);
    // T1: the buffer behind the backing file's end is filled.
    assert_reads(&disk, 0, 100_352, 0x77);
    assert_reads(&disk, 100_352, M - 100_352, 0);
    write(&disk, 96 * K, 512, 1);
    assert_reads(&disk, 96 * K, 512, 1);
    assert_reads(&disk, 64 * K, 32 * K, 0x77);
    assert_reads(&disk, 96 * K + 512, 100_352 - 96 * K - 512, 0x77);
    // T2: and so is the copy.
    assert_reads(&disk, 100_352, M - 100_352, 0);
    close_and_compare(disk, &path);
}

#[test]
fn row_2_growing_over_a_longer_backing_file_does_not_show_it() {
    for (compat, cluster) in [("1.1", "65536"), ("0.10", "65536"), ("1.1", "4096")] {
        let folder = Folder::new();
        folder.raw("base", &vec![0x77; 2 * M as usize]);
        let options = format!(",compat={compat},cluster_size={cluster}");
        let path = folder.overlay("top", "base", "raw", &options, M - 512);
        let disk = open_rw(&path);
        write(&disk, M - K, 512, 0x12);
        disk.grow(2 * M + 512).unwrap();
        assert_eq!(disk.size(), 2 * M + 512);
        assert_reads(&disk, 0, M - K, 0x77);
        assert_reads(&disk, M - K, 512, 0x12);
        assert_reads(&disk, M - 512, M + K, 0);
        let content = close_and_compare(disk, &path);
        assert_eq!(content.len() as u64, 2 * M + 512);
    }
}

#[test]
fn growing_moves_the_l1_table_and_an_empty_disk_can_grow() {
    for (cluster, from, to) in [("512", 0, M), ("512", 64 * K, 3 * M), ("65536", 0, 4 << 30)] {
        let folder = Folder::new();
        let path = folder.create("a", &format!("cluster_size={cluster}"), from);
        let disk = open_rw(&path);
        if from > 0 {
            write(&disk, 0, from, 0x31);
        }
        disk.grow(to).unwrap();
        write(&disk, to - 4 * K, 4 * K, 0x32);
        assert_reads(&disk, 0, from, 0x31);
        assert_reads(&disk, from, M - from.min(M) - 4 * K * u64::from(to == M), 0);
        disk.flush().unwrap();
        assert_eq!(disk.grow(to - 512).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(disk.grow(to + 100).unwrap_err().kind(), ErrorKind::Usage);
        disk.close().unwrap();
        qemu_check(&path, false);
        let tail = format!("read -P 0x32 {} 4k", to - 4 * K);
        let seen = qemu_io(&path, &[&tail, &format!("read -P 0x31 0 {from}")]);
        assert!(!seen.contains("verification failed"), "{seen}");
    }
}

#[test]
fn row_3_preallocated_zero_clusters() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    // Made by QEMU, written by us.
    qemu_io(&path, &["write -P 0x11 0 192k", "write -z 0 192k"]);
    let zero = Reader::open(&path).entry(GuestOffset(0));
    assert!(matches!(zero, L2Entry::ZeroAllocated { .. }), "{zero:?}");
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 192 * K, 0);
    write(&disk, 4 * K, 4 * K, 2);
    assert_reads(&disk, 0, 4 * K, 0);
    assert_reads(&disk, 4 * K, 4 * K, 2);
    assert_reads(&disk, 8 * K, 184 * K, 0);
    // Discarding gives the kept cluster back.
    disk.discard_at(64 * K, 64 * K).unwrap();
    write(&disk, 128 * K + 512, 512, 3);
    // Made by us.
    write(&disk, 256 * K, 128 * K, 0x44);
    disk.write_zeroes_at(256 * K, 128 * K, false).unwrap();
    assert_reads(&disk, 256 * K, 128 * K, 0);
    write(&disk, 260 * K, 4 * K, 5);
    assert_reads(&disk, 256 * K, 4 * K, 0);
    assert_reads(&disk, 264 * K, 120 * K, 0);
    close_and_compare(disk, &path);
    let kept = Reader::open(&path).entry(GuestOffset(320 * K));
    assert!(matches!(kept, L2Entry::ZeroAllocated { .. }), "{kept:?}");
    assert_eq!(
        Reader::open(&path).entry(GuestOffset(64 * K)),
        L2Entry::Zero
    );
}

#[test]
fn row_4_writing_into_compressed_clusters() {
    for kind in ["zlib", "zstd"] {
        for cluster in [4 * K, 64 * K, 2 * M] {
            let folder = Folder::new();
            let size = (4 * cluster).clamp(512 * K, 4 * M);
            let mut model = half_random(size as usize, cluster);
            let options = format!("compression_type={kind},cluster_size={cluster}");
            let path = folder.convert(&model, "a", &["-c", "-o", &options]);
            let disk = open_rw(&path);
            assert!(read(&disk, 0, size) == model);
            for at in (0..size).step_by(cluster as usize).map(|c| c + cluster / 2) {
                let len = 4 * K.min(cluster / 8);
                write(&disk, at, len, 0x99);
                model[at as usize..(at + len) as usize].fill(0x99);
            }
            assert!(close_and_compare(disk, &path) == model, "{kind} {cluster}");
        }
    }
}

#[test]
fn row_5_and_t4_snapshots_keep_their_tables_and_clusters() {
    for cluster in ["512", "65536"] {
        let folder = Folder::new();
        let size = 512 * K;
        let original = half_random(size as usize, 5);
        let path = folder.convert(&original, "a", &["-o", &format!("cluster_size={cluster}")]);
        qemu_img(&["snapshot", "-c", "one", name(&path)]);
        let in_snapshot = || qemu_content(&path, &["-l", "snapshot.name=one"]);
        let mut model = original.clone();

        let disk = open_rw(&path);
        write(&disk, 4 * K, 4 * K, 1);
        model[4096..8192].fill(1);
        assert!(close_and_compare(disk, &path) == model, "a write");
        assert!(in_snapshot() == original, "a write");

        let disk = open_rw(&path);
        disk.write_zeroes_at(64 * K, 64 * K, false).unwrap();
        disk.write_zeroes_at(128 * K, 64 * K, true).unwrap();
        model[65536..196_608].fill(0);
        assert!(close_and_compare(disk, &path) == model, "zeros");
        assert!(in_snapshot() == original, "zeros");

        let disk = open_rw(&path);
        disk.discard_at(192 * K, 64 * K).unwrap();
        model[196_608..262_144].fill(0);
        assert!(close_and_compare(disk, &path) == model, "a discard");
        assert!(in_snapshot() == original, "a discard");

        // Applied by QEMU, and written again.
        qemu_img(&["snapshot", "-a", "one", name(&path)]);
        qemu_check(&path, false);
        let disk = open_rw(&path);
        assert!(read(&disk, 0, size) == original, "applied");
        write(&disk, 300 * K, 8 * K, 7);
        close_and_compare(disk, &path);
        assert!(in_snapshot() == original, "after applying");

        // Deleted: the flags were made right by QEMU, and we go by them.
        qemu_img(&["snapshot", "-d", "one", name(&path)]);
        qemu_check(&path, false);
        let disk = open_rw(&path);
        write(&disk, 0, 16 * K, 8);
        disk.discard_at(64 * K, 64 * K).unwrap();
        close_and_compare(disk, &path);
    }
}

#[test]
fn row_6_version_2_discard_does_not_reveal_the_backing_file() {
    let folder = Folder::new();
    folder.raw("base", &vec![0x77; M as usize]);
    let path = folder.overlay("top", "base", "raw", ",compat=0.10", M);
    let disk = open_rw(&path);
    write(&disk, 64 * K, 128 * K, 1);
    disk.discard_at(64 * K, 64 * K).unwrap();
    assert_reads(&disk, 64 * K, 64 * K, 0);
    disk.write_zeroes_at(128 * K, 64 * K, true).unwrap();
    assert_reads(&disk, 128 * K, 64 * K, 0);
    disk.write_zeroes_at(512 * K, 100 * K, true).unwrap();
    assert_reads(&disk, 512 * K, 100 * K, 0);
    close_and_compare(disk, &path);
}

#[test]
fn row_7_refcounts_of_every_width() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let folder = Folder::new();
        let options = format!("refcount_bits={bits},cluster_size=4096");
        let path = folder.create("a", &options, 4 * M);
        let disk = open_rw(&path);
        write(&disk, 0, 2 * M, 1);
        disk.discard_at(512 * K, 512 * K).unwrap();
        disk.flush().unwrap();
        write(&disk, 3 * M, 700 * K, 2);
        let content = close_and_compare(disk, &path);
        assert!(content[..512 << 10].iter().all(|&b| b == 1));
        assert!(content[512 << 10..1 << 20].iter().all(|&b| b == 0));
        qemu_io(&path, &["write -P 0x55 1M 1M", "discard 0 256k"]);
        let disk = open_rw(&path);
        assert_reads(&disk, M, M, 0x55);
        write(&disk, 0, 64 * K, 9);
        close_and_compare(disk, &path);
    }
}

#[test]
fn row_8_a_refcount_never_wraps() {
    let folder = Folder::new();
    let path = folder.create("a", "refcount_bits=1", M);
    let disk = open_rw(&path);
    write(&disk, 0, 256 * K, 1);
    disk.close().unwrap();
    let (code, _) = run("qemu-img", &["snapshot", "-c", "one", name(&path)]);
    assert_ne!(code, Some(0), "a second reference does not fit");
    qemu_check(&path, true);
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 256 * K, 1);
    write(&disk, 128 * K, 256 * K, 2);
    assert_reads(&disk, 0, 128 * K, 1);
    disk.close().unwrap();
    qemu_check(&path, true);
}

#[test]
fn row_9_refcount_blocks_count_themselves_and_the_table_grows() {
    for bits in ["16", "64"] {
        let folder = Folder::new();
        let options = format!("cluster_size=512,refcount_bits={bits}");
        let path = folder.create("a", &options, 16 * M);
        let before = Reader::open(&path).header.refcount_table_clusters;
        let disk = open_rw(&path);
        for at in 0..16 {
            write(&disk, at * M, M, at as u8 + 1);
        }
        let content = close_and_compare(disk, &path);
        for (at, chunk) in content.chunks(1 << 20).enumerate() {
            assert!(chunk.iter().all(|&b| b == at as u8 + 1));
        }
        assert!(Reader::open(&path).header.refcount_table_clusters > before);
    }
}

#[test]
fn row_11_a_virtual_end_inside_a_cluster() {
    for compat in ["0.10", "1.1"] {
        let folder = Folder::new();
        let size = 1_000_448;
        let path = folder.create("a", &format!("compat={compat}"), size);
        let disk = open_rw(&path);
        let tail = size - 32 * K;
        write(&disk, tail, 32 * K, 1);
        assert_reads(&disk, tail, 32 * K, 1);
        let end = disk.write_at(&[0; 512], size).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::OutOfBounds);
        let end = disk.write_at(&[0; 1024], size - 512).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::OutOfBounds);
        disk.write_zeroes_at(size - 4 * K, 4 * K, true).unwrap();
        assert_reads(&disk, size - 4 * K, 4 * K, 0);
        assert_reads(&disk, tail, 28 * K, 1);
        disk.discard_at(size / (64 * K) * (64 * K), size % (64 * K))
            .unwrap();
        write(&disk, size - 512, 512, 3);
        close_and_compare(disk, &path);
    }
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

#[test]
fn row_13_unknown_bits_and_extensions() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    add_extension(&path);
    // Bit 40 of each, in big-endian words of 8 bytes at 80 and 88.
    let bit = (1_u64 << 40).to_be_bytes();
    poke(&path, 80, &bit);
    poke(&path, 88, &bit);
    let before = std::fs::read(&path).unwrap();

    // Who only reads changes nothing, nor does who could write but does not.
    let disk = open_ro(&path);
    assert_reads(&disk, 0, M, 0);
    disk.close().unwrap();
    assert!(
        std::fs::read(&path).unwrap() == before,
        "a read-only open wrote"
    );
    let disk = open_rw(&path);
    assert_reads(&disk, 0, M, 0);
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(
        std::fs::read(&path).unwrap() == before,
        "an idle open wrote"
    );

    // The first write clears the unknown autoclear bit, and nothing else.
    let disk = open_rw(&path);
    write(&disk, 0, 512, 1);
    assert_eq!(peek(&path, 88, 8), [0; 8], "cleared before anything else");
    disk.grow(2 * M).unwrap();
    disk.close().unwrap();
    let mut expected = before[..4096].to_vec();
    expected[88..96].fill(0);
    expected[24..32].copy_from_slice(&(2 * M).to_be_bytes());
    assert!(peek(&path, 0, 4096) == expected, "another field changed");
    qemu_check(&path, false);

    // An unknown incompatible bit is refused.
    poke(&path, 72, &bit);
    refused(&path, &chain::Options::default(), ErrorKind::Unsupported);
}

#[test]
fn row_14_and_t6_bitmaps_are_untouched_by_readers_and_recorded_by_writers() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_img(&["bitmap", "--add", name(&path), "b0"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    let before = std::fs::read(&path).unwrap();
    assert_eq!(peek(&path, 95, 1), [1], "bitmaps are consistent");
    let disk = open_ro(&path);
    assert_reads(&disk, 0, 64 * K, 1);
    disk.close().unwrap();
    let disk = open_rw(&path);
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "an open wrote");
    let disk = open_rw(&path);
    write(&disk, 128 * K, 512, 2);
    let marked = || qemu_img(&["info", "-U", name(&path)]).contains("in-use");
    assert!(marked(), "before the write, not after it");
    disk.grow(2 * M).unwrap();
    assert!(marked());
    disk.close().unwrap();
    assert!(!marked());
    let content = open_ro(&path).bitmap("b0").unwrap();
    let dirty = |offset| content.is_dirty(offset);
    assert!(dirty(0) && dirty(128 * K) && !dirty(64 * K) && !dirty(M));
    qemu_check(&path, false);
}

#[test]
fn row_16_an_image_marked_corrupt_is_not_written_to() {
    let folder = Folder::new();
    let path = folder.create("a", "lazy_refcounts=on", M);
    qemu_io(&path, &["write -P 5 0 64k"]);
    poke(&path, 79, &[2]);
    let before = std::fs::read(&path).unwrap();
    refused(&path, &writable(), ErrorKind::Corrupt);
    let disk = open_ro(&path);
    assert_reads(&disk, 0, 64 * K, 5);
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

/// Whether or not the image has lazy refcounts: whoever writes to it counts
/// first, and nobody else changes anything.
#[test]
fn row_15_an_image_marked_dirty_is_repaired_by_its_next_writer() {
    for options in ["lazy_refcounts=on", ""] {
        let folder = Folder::new();
        let path = folder.create("a", options, M);
        qemu_io(&path, &["write -P 5 0 128k"]);
        let reader = Reader::open(&path);
        let block = reader.be64(reader.header.refcount_table_offset);
        let data = reader.file.len() as u64 / 65536 - 1;
        poke(&path, block + data * 2, &[0, 0]);
        poke(&path, 79, &[1]);
        let before = std::fs::read(&path).unwrap();
        let disk = open_ro(&path);
        assert_reads(&disk, 0, 128 * K, 5);
        disk.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == before);

        // An open that fails for another reason changes nothing.
        let over = folder.path("over");
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "a"];
        qemu_img(&[args.as_slice(), &[name(&over)]].concat());
        poke(&over, 79, &[1]);
        let hidden = folder.path("hidden");
        std::fs::rename(&path, &hidden).unwrap();
        let dirty = std::fs::read(&over).unwrap();
        refused(&over, &writable(), ErrorKind::NotFound);
        assert!(std::fs::read(&over).unwrap() == dirty);
        std::fs::rename(&hidden, &path).unwrap();

        let disk = open_rw(&path);
        assert_eq!(peek(&path, 79, 1), [0], "the mark is gone");
        let found = qcow2_ublk::report::check(&path, true, |_| {}).unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0));
        assert_reads(&disk, 0, 128 * K, 5);
        write(&disk, 256 * K, 64 * K, 6);
        disk.close().unwrap();
        assert_eq!(peek(&path, 79, 1), [0]);
        check_clean(&path);
        qemu_io(&path, &["read -P 5 0 128k", "read -P 6 256k 64k"]);
    }
}

#[test]
fn row_18_l2_entry_aimed_at_the_reftable() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_io(&path, &["write -P 1 0 192k"]);
    let reader = Reader::open(&path);
    let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    let reftable = reader.header.refcount_table_offset.0;
    let entry = reftable | 1 << 63;
    poke(&path, l2 + 8, &entry.to_be_bytes());
    let before = peek(&path, reftable, 65536);
    let disk = open_rw(&path);
    for (offset, len) in [(64 * K, 512), (64 * K, 64 * K), (0, 192 * K)] {
        let error = disk
            .write_at(&vec![0xff; len as usize], offset)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    // Nobody writes from then on, and everybody reads; the image says why.
    let error = disk.write_at(&[3; 512], 128 * K).unwrap_err();
    assert!(error.to_string().contains("corrupt"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_reads(&disk, 128 * K, 64 * K, 1);
    disk.flush().unwrap();
    drop(disk);
    assert!(
        peek(&path, reftable, 65536) == before,
        "the table was written over"
    );
    assert_eq!(peek(&path, 79, 1), [2]);
    refused(&path, &writable(), ErrorKind::Corrupt);
    // Until it is repaired.
    qcow2_ublk::report::repair(&path, qcow2_ublk::qcow2::check::Repair::All, |_| {}).unwrap();
    assert_eq!(peek(&path, 79, 1), [0]);
    check_clean(&path);
    let disk = open_rw(&path);
    write(&disk, 64 * K, 512, 0xff);
    assert_reads(&disk, 128 * K, 64 * K, 1);
    disk.close().unwrap();
    check_clean(&path);
}

#[test]
fn row_21_chain_loops_are_refused_at_once() {
    let folder = Folder::new();
    for (top, below) in [
        ("l1", "l2"),
        ("l2", "l1"),
        ("self", "self"),
        ("above", "l1"),
    ] {
        let path = folder.path(top);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "1M"]].concat());
    }
    // By another name too.
    std::fs::hard_link(folder.path("self"), folder.path("other")).unwrap();
    for top in ["l1", "self", "other", "above"] {
        for options in [chain::Options::default(), writable()] {
            // Our own write lock may be in the way of the second opening.
            let error = Disk::open(&folder.path(top), &options).unwrap_err();
            let kind = error.kind();
            assert!(
                kind == ErrorKind::Corrupt || options.writable && kind == ErrorKind::Busy,
                "{top}: {error}"
            );
        }
    }
}

#[test]
fn row_22_a_raw_backing_file_is_never_probed() {
    let folder = Folder::new();
    let inner = folder.create("base", "", M);
    qemu_io(&inner, &["write -P 0x66 0 1M"]);
    let bytes = std::fs::read(&inner).unwrap();
    let path = folder.overlay("top", "base", "raw", "", 4 * M);
    let disk = open_rw(&path);
    assert!(
        read(&disk, 0, bytes.len() as u64) == bytes,
        "it was interpreted"
    );
    write(&disk, 512, 512, 1);
    close_and_compare(disk, &path);

    // No recorded format: refused, unless the user gives it.
    let path = folder.create("unsaid", "", 4 * M);
    qemu_img(&["rebase", "-u", "-F", "raw", "-b", "base", name(&path)]);
    let mut header = peek(&path, 0, 512);
    let at = header
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .expect("the format's extension");
    header[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x79]);
    poke(&path, 0, &header);
    refused(&path, &chain::Options::default(), ErrorKind::Policy);
    for (format, expected) in [("raw", bytes[0]), ("qcow2", 0x66)] {
        let options = chain::Options {
            backing_format: Some(format.to_owned()),
            ..chain::Options::default()
        };
        let disk = Disk::open(&path, &options).unwrap();
        assert_reads(&disk, 0, 1, expected);
    }
}

#[test]
fn row_24_discarded_and_reused_clusters_keep_the_new_data() {
    let folder = Folder::new();
    let path = folder.create("a", "cluster_size=4096", 4 * M);
    let disk = open_rw(&path);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let disk = &disk;
            scope.spawn(move || {
                let start = thread * M;
                for round in 0..60_u64 {
                    let at = start + round % 7 * 64 * K;
                    let byte = (thread * 60 + round + 1) as u8;
                    write(disk, at, 96 * K, byte);
                    if round % 5 == 0 {
                        disk.flush().unwrap();
                    }
                    assert_reads(disk, at, 96 * K, byte);
                    disk.discard_at(at, 64 * K).unwrap();
                    assert_reads(disk, at, 64 * K, 0);
                    assert_reads(disk, at + 64 * K, 32 * K, byte);
                }
            });
        }
    });
    close_and_compare(disk, &path);
}

#[test]
fn discarded_space_returns_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let path = folder.create("a", "", 16 * M);
    let disk = open_rw(&path);
    write(&disk, 0, 16 * M, 1);
    disk.flush().unwrap();
    let full = std::fs::metadata(&path).unwrap().blocks() * 512;
    disk.discard_at(0, 15 * M).unwrap();
    disk.flush().unwrap();
    let empty = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(full > 16 * M && empty < 3 * M, "{full} bytes, then {empty}");
    assert_reads(&disk, 15 * M, M, 1);
    close_and_compare(disk, &path);
}

#[test]
fn t3_a_new_cluster_in_used_space_shows_nothing_old() {
    for cluster in ["4096", "65536"] {
        let folder = Folder::new();
        let path = folder.create("a", &format!("cluster_size={cluster}"), 4 * M);
        qemu_io(&path, &["write -P 0x55 0 2M"]);
        // Free by the refcounts, not by the file system.
        qemu_io(&path, &["discard 0 2M"]);
        let reader = Reader::open(&path);
        for cluster in 3..reader.file.len() as u64 / reader.geometry().cluster_size() {
            if reader.refcount(cluster) == 0 {
                let size = reader.geometry().cluster_size();
                poke(&path, cluster * size, &vec![0x55; size as usize]);
            }
        }
        let disk = open_rw(&path);
        for at in (0..2 * M).step_by(128 << 10) {
            write(&disk, 2 * M + at + 1024, 512, 0x66);
            assert_reads(&disk, 2 * M + at, 1024, 0);
            assert_reads(&disk, 2 * M + at + 1536, 62 * K, 0);
        }
        close_and_compare(disk, &path);
    }
}

#[test]
fn t5_encrypted_images_are_refused_not_read_as_they_are() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    for method in [1_u8, 2, 3] {
        poke(&path, 35, &[method]);
        let error = Disk::open(&path, &chain::Options::default()).unwrap_err();
        let kind = error.kind();
        assert!(
            matches!(
                kind,
                ErrorKind::Unsupported | ErrorKind::InvalidFormat | ErrorKind::Permission
            ),
            "{method}: {error}"
        );
    }
}

#[test]
fn t7_the_largest_clusters_and_narrowest_refcounts() {
    watched(60, || {
        for (options, size) in [
            ("cluster_size=2M,refcount_bits=1", 64 * M),
            ("cluster_size=2M,refcount_bits=64", 64 * M),
            ("cluster_size=128k,refcount_bits=1", 16 * M),
        ] {
            let folder = Folder::new();
            let path = folder.create("a", options, size);
            let disk = open_rw(&path);
            write(&disk, M, 5 * M, 1);
            disk.discard_at(0, size).unwrap();
            disk.flush().unwrap();
            write(&disk, 3 * M, 512, 2);
            assert_reads(&disk, 0, 3 * M, 0);
            close_and_compare(disk, &path);
        }
    });
}

#[test]
fn t8_compressed_end_at_cluster_boundary() {
    let folder = Folder::new();
    let mut model = half_random(2 << 20, 8);
    let path = folder.convert(&model, "a", &["-c", "-o", "cluster_size=4096"]);
    let reader = Reader::open(&path);
    let at_boundary: Vec<u64> = (0..2 * M)
        .step_by(4096)
        .filter(|&at| {
            matches!(reader.entry(GuestOffset(at)), L2Entry::Compressed(range)
                if (range.offset.0 + range.max_len).is_multiple_of(4096))
        })
        .collect();
    assert!(at_boundary.len() > 5, "the image does not have the case");
    let disk = open_rw(&path);
    for &at in &at_boundary {
        write(&disk, at + 512, 512, 0xc3);
        model[at as usize + 512..at as usize + 1024].fill(0xc3);
    }
    disk.flush().unwrap();
    // What was freed is used again: nobody else's data may suffer.
    for at in (0..2 * M).step_by(16 << 10) {
        write(&disk, at, 512, 0x99);
        model[at as usize..at as usize + 512].fill(0x99);
    }
    assert!(close_and_compare(disk, &path) == model);
}

#[test]
fn t9_backing_names_are_relative_to_the_image() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("sub")).unwrap();
    folder.raw("base", &[0x77; 65536]);
    let path = folder.path("sub/top");
    let trusted = chain::Options {
        policy: chain::Policy {
            trust_chain: true,
            ..chain::Policy::default()
        },
        ..chain::Options::default()
    };
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "../base"];
    qemu_img(&[args.as_slice(), &[name(&path), "64k"]].concat());
    // The tests' own folder is another one.
    let disk = Disk::open(&path, &trusted).unwrap();
    assert_reads(&disk, 0, 64 * K, 0x77);
}

#[test]
fn t10_version_2_headers_end_at_byte_72() {
    let folder = Folder::new();
    folder.raw("base", &[0x77; 65536]);
    let path = folder.overlay("top", "base", "raw", ",compat=0.10", 64 * K);
    assert_eq!(
        peek(&path, 72, 4),
        [0xe2, 0x79, 0x2a, 0xca],
        "an extension at 72"
    );
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 64 * K, 0x77);
    write(&disk, 512, 512, 1);
    disk.flush().unwrap();
    disk.grow(M).unwrap();
    close_and_compare(disk, &path);
    assert_eq!(peek(&path, 72, 4), [0xe2, 0x79, 0x2a, 0xca]);
}

/// What a flush does, in order: data and refcounts, a sync that is one, the
/// mapping, another.
#[test]
fn t12_row_25_a_flush_is_two_real_syncs_around_the_mapping() {
    let disk = SimDisk::with_image(lab::created("", M));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0x11; 4096], false)
            .await
            .unwrap();
        engine.flush().await.unwrap();
        let image = disk.image();
        let checked = Checked::open(&image).unwrap();
        let header = &checked.header;
        let l1 = header.l1_table_offset.0;
        let word = image.bytes(l1, 8);
        let l2 = u64::from_be_bytes(word.try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        let (mut kinds, mut syncs) = (String::new(), 0);
        for record in disk.history().records {
            match record.change {
                Change::Sync => {
                    kinds.push('|');
                    syncs += 1;
                }
                // A new table's zeros are no mapping yet.
                Change::Write { bytes, .. } if bytes.iter().all(|&b| b == 0) => {}
                Change::Write { offset, .. } if offset == l2 => kinds.push('L'),
                Change::Write { offset, .. } if offset == l1 => kinds.push('1'),
                Change::Write { bytes, .. } if bytes.iter().all(|&b| b == 0x11) => kinds.push('D'),
                Change::Write { .. } => kinds.push('R'),
                _ => {}
            }
        }
        let mapping = kinds.find(['L', '1']).unwrap();
        let (before, after) = kinds.split_at(mapping);
        assert!(before.contains('D') && before.contains('R'), "{kinds}");
        assert!(before.ends_with('|') && after.ends_with('|'), "{kinds}");
        assert!(after.contains('L') && after.contains('1'), "{kinds}");
        assert_eq!(syncs, 2, "{kinds}");
        // With nothing allocated it is one.
        let records = disk.recorded();
        lab::write(&engine, 0, 512, &[0x22; 512], false)
            .await
            .unwrap();
        engine.flush().await.unwrap();
        assert_eq!(disk.recorded() - records, 2, "a write and a sync");
    });
}

#[test]
fn t13_copies_of_several_clusters_go_on_side_by_side() {
    let disk = SimDisk::with_image(lab::created("", 4 * M));
    // The backing file is on a disk of its own, which is slow.
    let how = How {
        below: Below::Raw(sim::Image::from_bytes(&vec![0x77; 4 << 20])),
        ..How::default()
    };
    watched(30, || {
        lab::block_on(async {
            let engine = Arc::new(lab::open(&disk, &how).await.unwrap());
            // The L2 table is there.
            lab::write(&engine, 0, 3 * M, &[1; 512], false)
                .await
                .unwrap();
            let hold = disk.hold(|request| request.kind == SimKind::Write && request.len >= 64 * K);
            let writes: Vec<_> = (0..8)
                .map(|n| {
                    let engine = Arc::clone(&engine);
                    spawn(async move {
                        lab::write(&engine, 0, n * 64 * K + 512, &[n as u8; 512], false).await
                    })
                })
                .collect();
            // All eight are copying before the first is done.
            hold.wait_for(8).await;
            hold.release();
            for write in writes {
                write.await.unwrap();
            }
            let bytes = lab::read(&engine, 0, 0, 512 * K).await.unwrap();
            for (n, cluster) in bytes.chunks(64 << 10).enumerate() {
                assert!(cluster[512..1024].iter().all(|&b| b == n as u8));
                assert!(
                    cluster[..512]
                        .iter()
                        .chain(&cluster[1024..])
                        .all(|&b| b == 0x77)
                );
            }
        });
    });
}

#[test]
fn sixty_four_layers_and_not_one_more() {
    let folder = Folder::new();
    let bottom = folder.create("0", "cluster_size=4096", 256 * K);
    qemu_io(&bottom, &["write -P 0x40 0 256k"]);
    for n in 1..65_u64 {
        let below = (n - 1).to_string();
        let layer = folder.overlay(
            &n.to_string(),
            &below,
            "qcow2",
            ",cluster_size=4096",
            256 * K,
        );
        if n % 16 == 0 && n < 64 {
            let command = format!("write -P {} {} 4k", 0x40 + n, n * 4096);
            let (code, text) = run("qemu-io", &["-f", "qcow2", "-c", &command, name(&layer)]);
            assert_eq!(code, Some(0), "{text}");
        }
    }
    let path = folder.path("63");
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 16 * 4096, 0x40);
    assert_reads(&disk, 16 * 4096, 4096, 0x50);
    assert_reads(&disk, 48 * 4096, 4096, 0x70);
    write(&disk, 20 * 4096 + 512, 512, 1);
    close_and_compare(disk, &path);
    refused(
        &folder.path("64"),
        &chain::Options::default(),
        ErrorKind::Unsupported,
    );
}

#[test]
fn protocol_names_are_refused_and_nothing_is_opened() {
    for backing in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/hostname\"}",
        "nbd://127.0.0.1:1/x",
        "file:base",
        "fat:rw:/tmp",
    ] {
        let folder = Folder::new();
        folder.raw("base", &[1; 512]);
        let path = folder.path("a");
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "1M"]].concat());
        refused(&path, &chain::Options::default(), ErrorKind::Policy);
        refused(&path, &writable(), ErrorKind::Policy);
    }
}

#[test]
fn backing_files_are_opened_only_where_the_policy_allows() {
    let (folder, outside) = (Folder::new(), Folder::new());
    let secret = outside.raw("secret", &[0x5e; 65536]);
    std::os::unix::fs::symlink(&secret, folder.path("link")).unwrap();
    let make = |top: &str, backing: &str| {
        let path = folder.path(top);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "64k"]].concat());
        path
    };
    let up = format!(
        "../{}/secret",
        outside.0.path().file_name().unwrap().to_str().unwrap()
    );
    let with = |trust_chain, allow_paths: &[&Path]| chain::Options {
        policy: chain::Policy {
            trust_chain,
            allow_paths: allow_paths.iter().map(|p| p.to_path_buf()).collect(),
        },
        ..chain::Options::default()
    };
    for (top, backing) in [("a", name(&secret)), ("b", up.as_str()), ("c", "link")] {
        let path = make(top, backing);
        refused(&path, &chain::Options::default(), ErrorKind::Policy);
        let disk = Disk::open(&path, &with(true, &[])).unwrap();
        assert_reads(&disk, 0, 64 * K, 0x5e);
        if top != "c" {
            let disk = Disk::open(&path, &with(false, &[outside.0.path()])).unwrap();
            assert_reads(&disk, 0, 64 * K, 0x5e);
        }
        refused(&path, &with(false, &[Path::new("/usr")]), ErrorKind::Policy);
    }
}

#[test]
fn locks_keep_qemu_and_us_apart() {
    let folder = Folder::new();
    folder.create("base", "", M);
    let path = folder.overlay("top", "base", "qcow2", "", M);
    let qemu = |args: &[&str]| run("qemu-io", args).0 == Some(0);
    let write_top = ["-f", "qcow2", "-c", "write 0 512", name(&path)];
    let read_top = ["-r", "-f", "qcow2", "-c", "read 0 512", name(&path)];
    let base = folder.path("base");
    let write_base = ["-f", "qcow2", "-c", "write 0 512", name(&base)];

    let disk = open_rw(&path);
    assert!(!qemu(&write_top), "QEMU wrote beside us");
    assert!(!qemu(&read_top));
    assert!(!qemu(&write_base), "QEMU wrote below us");
    refused(&path, &writable(), ErrorKind::Busy);
    refused(&path, &chain::Options::default(), ErrorKind::Busy);
    let shared = chain::Options {
        force_share: true,
        ..chain::Options::default()
    };
    Disk::open(&path, &shared).unwrap();
    disk.close().unwrap();

    let disk = open_ro(&path);
    assert!(qemu(&read_top), "readers go together");
    assert!(!qemu(&write_top));
    disk.close().unwrap();
    assert!(qemu(&write_top) && qemu(&write_base), "given up at close");

    for (flags, blocks_readers) in [(vec![], true), (vec!["-r"], false)] {
        let mut other = Command::new("qemu-io")
            .args(&flags)
            .args(["-f", "qcow2", name(&path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("run qemu-io");
        // It has the image open when it has its locks.
        let start = Instant::now();
        while Disk::open(&path, &writable()).is_ok() {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "QEMU took no locks"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        refused(&path, &writable(), ErrorKind::Busy);
        let reader = Disk::open(&path, &chain::Options::default());
        assert_eq!(reader.is_err(), blocks_readers, "{flags:?}");
        drop(other.stdin.take());
        other.wait().unwrap();
    }
    close_and_compare(open_rw(&path), &path);
}

#[test]
fn a_file_shorter_than_its_metadata_says() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_io(&path, &["write -P 0x21 0 128k"]);
    let len = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(len - 40 * K).unwrap();
    drop(file);
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 88 * K, 0x21);
    assert_reads(&disk, 88 * K, M - 88 * K, 0);
    write(&disk, 120 * K, 4 * K, 3);
    assert_reads(&disk, 88 * K, 32 * K, 0);
    assert_reads(&disk, 124 * K, 4 * K, 0);
    write(&disk, 512 * K, 64 * K, 4);
    close_and_compare(disk, &path);
}

#[test]
fn direct_io_with_clusters_of_every_size() {
    for cluster in ["512", "1024", "4096", "65536", "2M"] {
        let folder = Folder::new();
        folder.raw("base", &vec![0x77; 300 * 1024 + 512]);
        let options = format!(",cluster_size={cluster}");
        let path = folder.overlay("top", "base", "raw", &options, 8 * M);
        let options = chain::Options {
            cache: CacheMode::None,
            ..writable()
        };
        let disk = Disk::open(&path, &options).unwrap();
        assert_reads(&disk, 0, 300 * K + 512, 0x77);
        assert_reads(&disk, 300 * K + 512, 100 * K, 0);
        write(&disk, 1000, 10, 1);
        write(&disk, 300 * K, 4 * K, 2);
        write(&disk, 3 * M + 512, 2 * M, 3);
        disk.write_zeroes_at(4 * M, 100 * K + 512, true).unwrap();
        disk.discard_at(3 * M, 512 * K).unwrap();
        write(&disk, 3 * M + 1, 1, 9);
        disk.grow(8 * M + 512).unwrap();
        write(&disk, 8 * M, 512, 4);
        let content = close_and_compare(disk, &path);
        assert_eq!(content[1000..1010], [1; 10]);
        assert_eq!(content[999], 0x77);
        assert_eq!(content[1010], 0x77);
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    let before = std::fs::read(&path).unwrap();
    let disk = open_ro(&path);
    let results = [
        disk.write_at(&[1; 512], 0),
        disk.write_zeroes_at(0, 64 * K, true),
        disk.discard_at(0, 64 * K),
        disk.grow(2 * M),
    ];
    for result in results {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}
