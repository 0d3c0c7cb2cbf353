//! Lazy refcounts, write barriers and overlap checks on a simulated disk: what
//! each promises when the power fails, and what it costs in syncs.

mod common;

use common::check::Checked;
use common::lab::{self, How};
use common::{qemu_img, qemu_io};
use qcow2_ublk::codec::{self, CompressionType};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::check::{self, CheckReport, Repair};
use qcow2_ublk::qcow2::{Barrier, OverlapCheck};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, Change, SimDisk, crash_images};
use qcow2_ublk::{Disk, ErrorKind, chain};

const K: u64 = 1024;
const M: u64 = 1024 * K;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn with(barrier: Barrier) -> How {
    How {
        barrier,
        ..How::default()
    }
}

fn syncs(disk: &SimDisk) -> usize {
    let records = disk.history().records;
    let sync = |record: &&sim::Record| matches!(record.change, Change::Sync);
    records.iter().filter(sync).count()
}

fn marks(image: &sim::Image) -> u8 {
    image.bytes(79, 1)[0]
}

fn checked(image: &sim::Image) -> CheckReport {
    let storage = Storage::simulated(&SimDisk::with_image(image.clone()), 1);
    lab::block_on(check::check(&storage, &mut |_| {})).unwrap()
}

async fn write(engine: &Engine, offset: u64, len: u64, byte: u8) {
    lab::write(engine, 0, offset, &vec![byte; len as usize], false)
        .await
        .unwrap();
}

/// What a disk shows after the power was cut, opened by the next writer.
fn reopened(image: &sim::Image, how: &How, len: u64) -> (Vec<u8>, SimDisk) {
    let disk = SimDisk::with_image(image.clone());
    let content = lab::block_on(async {
        let engine = lab::open(&disk, how).await.unwrap();
        lab::read(&engine, 0, 0, len).await.unwrap()
    });
    (content, disk)
}

/// The mark comes before everything else, refcounts stay behind, and a clean
/// close leaves an image like any other.
#[test]
fn lazy_refcounts_are_written_at_the_end() {
    for options in ["", "lazy_refcounts=on"] {
        let lazy = !options.is_empty();
        let image = lab::created(options, 4 * M);
        let block = {
            let header = Checked::open(&image).unwrap().header.clone();
            let at = header.refcount_table_offset.0;
            u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap())
        };
        let disk = SimDisk::with_image(image.clone());
        lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            assert_eq!(disk.image(), image, "opening changes nothing");
            for n in 0..8 {
                write(&engine, n * 256 * K, 100 * K, n as u8 + 1).await;
                engine.flush().await.unwrap();
                engine.discard(0, n * 256 * K, 64 * K).await.unwrap();
                engine.flush().await.unwrap();
            }
            let touched = |record: &sim::Record| {
                matches!(&record.change, Change::Write { offset, bytes }
                    if *offset < block + 64 * K && offset + bytes.len() as u64 > block)
            };
            let records = disk.history().records;
            assert_eq!(records.iter().any(touched), !lazy, "refcounts are written");
            assert_eq!(marks(&disk.image()), u8::from(lazy));
            if lazy {
                // First the mark, durably.
                let first: Vec<_> = records.iter().take(2).map(|r| &r.change).collect();
                assert!(
                    matches!(first[..], [Change::Write { offset: 72, .. }, Change::Sync]),
                    "{first:?}"
                );
                assert!(checked(&disk.image()).corruptions > 0);
            }
            engine.close().await.unwrap();
        });
        assert_eq!(marks(&disk.image()), 0);
        let found = checked(&disk.image());
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{options}");
    }
}

/// Whatever survives a power cut, the next writer finds all that was flushed.
#[test]
fn lazy_images_are_repaired_after_a_power_cut() {
    for options in [
        "lazy_refcounts=on,cluster_size=4k",
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
    ] {
        let disk = SimDisk::with_image(lab::created(options, 2 * M));
        let how = How::default();
        let mut flushed: Vec<(usize, Vec<u8>)> = vec![(0, vec![0; M as usize])];
        lab::block_on(async {
            let engine = lab::open(&disk, &how).await.unwrap();
            let mut model = vec![0; M as usize];
            for n in 0..12_u64 {
                let (at, len) = (n * 37 % 11 * 80 * K, 30 * K);
                write(&engine, at, len, n as u8 + 1).await;
                model[at as usize..(at + len) as usize].fill(n as u8 + 1);
                if n % 3 == 2 {
                    let gone = (n - 2) * 37 % 11 * 80 * K;
                    engine.discard(0, gone, 8 * K).await.unwrap();
                    model[gone as usize..(gone + 8 * K) as usize].fill(0);
                }
                engine.flush().await.unwrap();
                flushed.push((disk.recorded(), model.clone()));
            }
            engine.close().await.unwrap();
        });
        let history = disk.history();
        let mut dirty = 0;
        for (n, crash) in crash_images(&history, 3, 2).enumerate() {
            let exact = flushed.iter().find(|(at, _)| *at == crash.point);
            if exact.is_none() && n % 7 != 0 {
                continue;
            }
            dirty += u32::from(marks(&crash.images[0]) == 1);
            // An image without the mark is as good as any.
            if marks(&crash.images[0]) == 0 {
                assert_eq!(checked(&crash.images[0]).corruptions, 0, "{crash}");
            }
            let (content, after) = reopened(&crash.images[0], &how, M);
            assert_eq!(marks(&after.image()), 0, "{crash}");
            let found = checked(&after.image());
            assert_eq!(found.corruptions, 0, "{crash}");
            if let Some((_, model)) = exact {
                assert!(content == *model, "{crash}: what was flushed is lost");
            }
        }
        assert!(dirty > 20, "only {dirty} states were dirty");
    }
}

/// QEMU too takes such an image for what it is.
#[test]
fn qemu_repairs_what_we_left_dirty() {
    let disk = SimDisk::with_image(lab::created("lazy_refcounts=on", 4 * M));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        write(&engine, M, 300 * K, 7).await;
        engine.flush().await.unwrap();
    });
    let mut image = disk.image();
    assert_eq!(marks(&image), 1);
    lab::with_file(&mut image, |path| {
        qemu_io(path, &["read -P 7 1M 300k", "write -P 8 0 64k"]);
        lab::qemu_check(path, false);
    });
    assert_eq!(marks(&image), 0);
}

/// What is durable when a request has been acknowledged.
#[test]
fn each_barrier_keeps_its_promise_and_no_more() {
    for barrier in [
        Barrier::None,
        Barrier::Batched,
        Barrier::Metadata,
        Barrier::Full,
    ] {
        let how = with(barrier);
        let disk = SimDisk::with_image(lab::created("", 8 * M));
        // Records and content after each request, and whether it is durable
        // then.
        let mut moments: Vec<(usize, Vec<u8>, bool)> = Vec::new();
        let mut model = vec![0; 2 * M as usize];
        lab::block_on(async {
            let engine = lab::open(&disk, &how).await.unwrap();
            let mut allocated = std::collections::BTreeSet::new();
            for n in 0..12_u64 {
                let at = [0, M, 64 * K, 0, M][n as usize % 5];
                let before = syncs(&disk);
                write(&engine, at, 4 * K, n as u8 + 1).await;
                model[at as usize..(at + 4 * K) as usize].fill(n as u8 + 1);
                let mapped = allocated.insert(at);
                let promised = match barrier {
                    Barrier::None | Barrier::Batched => false,
                    Barrier::Metadata => mapped,
                    Barrier::Full => true,
                };
                assert_eq!(syncs(&disk) > before, promised, "{barrier:?}, write {n}");
                moments.push((disk.recorded(), model.clone(), promised));
            }
            let before = syncs(&disk);
            engine.discard(0, M, 64 * K).await.unwrap();
            model[M as usize..(M + 64 * K) as usize].fill(0);
            let promised = barrier >= Barrier::Metadata;
            assert_eq!(syncs(&disk) > before, promised, "{barrier:?}, discard");
            moments.push((disk.recorded(), model.clone(), promised));
            write(&engine, 64 * K, K, 99).await;
            model[64 * K as usize..65 * K as usize].fill(99);
            let before = syncs(&disk);
            engine.flush().await.unwrap();
            let promised = barrier > Barrier::None;
            assert_eq!(syncs(&disk) > before, promised, "{barrier:?}, flush");
            moments.push((disk.recorded(), model.clone(), promised));
            engine.close().await.unwrap();
        });
        if barrier == Barrier::None {
            assert_eq!(syncs(&disk), 0);
            // A process that dies loses nothing that was flushed.
            let (content, _) = reopened(&disk.image(), &how, 2 * M);
            assert!(content == model);
            continue;
        }
        let mut kept = 0;
        for crash in crash_images(&disk.history(), 23, 4) {
            assert_eq!(checked(&crash.images[0]).corruptions, 0, "{crash}");
            for (at, model, promised) in &moments {
                if *at == crash.point && *promised {
                    let (content, _) = reopened(&crash.images[0], &how, 2 * M);
                    assert!(content == *model, "{barrier:?}, {crash}");
                    kept += 1;
                }
            }
        }
        assert!(kept > 0);
    }
}

/// The same for zeros and discards, and over a backing file, where first
/// writes copy what is below.
#[test]
fn barriers_hold_for_zeros_and_over_a_backing_file() {
    for barrier in [Barrier::Batched, Barrier::Metadata, Barrier::Full] {
        for over in [false, true] {
            let below = vec![0xbb; if over { M as usize } else { 0 }];
            let how = How {
                barrier,
                below: match over {
                    true => lab::Below::Raw(sim::Image::from_bytes(&below)),
                    false => lab::Below::Nothing,
                },
                ..How::default()
            };
            let mut image = lab::created("cluster_size=4k", M);
            if over {
                lab::with_file(&mut image, |path| {
                    let path = path.to_str().unwrap();
                    qemu_img(&["rebase", "-u", "-b", "below", "-F", "raw", path]);
                });
            }
            let disk = SimDisk::with_image(image);
            let mut model = below.clone();
            model.resize(M as usize, 0);
            let mut moments = Vec::new();
            lab::block_on(async {
                let engine = lab::open(&disk, &how).await.unwrap();
                for n in 0..12_u64 {
                    let (at, len) = ((n % 4) * 64 * K + 512, 9 * K);
                    let before = syncs(&disk);
                    let shown = &mut model[at as usize..(at + len) as usize];
                    match n % 3 {
                        0 => {
                            write(&engine, at, len, n as u8 + 1).await;
                            shown.fill(n as u8 + 1);
                        }
                        1 => {
                            engine.write_zeroes(0, at, len, n % 2 == 0).await.unwrap();
                            shown.fill(0);
                        }
                        _ => {
                            // Whole clusters of it.
                            engine.discard(0, at, len).await.unwrap();
                            shown[4096 - 512..8192 - 512].fill(0);
                        }
                    }
                    let synced = syncs(&disk) > before;
                    match barrier {
                        Barrier::Batched => assert!(!synced, "over {over}, change {n}"),
                        // Those of the rest that change nothing need no sync.
                        Barrier::Metadata if n >= 4 => {}
                        _ if n % 3 == 0 => assert!(synced, "over {over}, change {n}"),
                        _ => {}
                    }
                    if synced {
                        moments.push((disk.recorded(), model.clone()));
                    }
                }
                engine.flush().await.unwrap();
                moments.push((disk.recorded(), model.clone()));
            });
            let mut kept = 0;
            for crash in crash_images(&disk.history(), 37, 2) {
                let found = checked(&crash.images[0]);
                assert_eq!(found.corruptions, 0, "{barrier:?}, over {over}, {crash}");
                for (_, model) in moments.iter().filter(|moment| moment.0 == crash.point) {
                    let (content, _) = reopened(&crash.images[0], &how, M);
                    assert!(content == *model, "{barrier:?}, over {over}, {crash}");
                    kept += 1;
                }
            }
            assert!(kept > 0);
        }
    }
}

/// The same for compressed writes, of parts and of ready streams.
#[test]
fn barriers_hold_for_compressed_writes() {
    for barrier in [Barrier::Batched, Barrier::Metadata, Barrier::Full] {
        let how = with(barrier);
        let disk = SimDisk::with_image(lab::created("", 8 * M));
        let mut moments: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut model = vec![0; M as usize];
        lab::block_on(async {
            let engine = lab::open(&disk, &how).await.unwrap();
            for n in 0..8_u64 {
                let (at, byte) = ((n % 4) * 64 * K, n as u8 + 1);
                let before = syncs(&disk);
                let cluster = vec![byte; 64 * K as usize];
                if n % 2 == 0 {
                    let (at, part) = (at + K, &cluster[..4096]);
                    engine.write_compressed(0, at, part, None).await.unwrap();
                    model[at as usize..][..4096].fill(byte);
                } else {
                    let mut stream = vec![0; cluster.len()];
                    let kind = CompressionType::Deflate;
                    let len = codec::compress(kind, 6, &cluster, &mut stream).unwrap();
                    engine.write_stream(0, at, &stream[..len]).await.unwrap();
                    model[at as usize..][..cluster.len()].fill(byte);
                }
                // Each gets a new place: its mapping changes.
                let promised = barrier != Barrier::Batched;
                assert_eq!(syncs(&disk) > before, promised, "{barrier:?}, write {n}");
                if promised {
                    moments.push((disk.recorded(), model.clone()));
                }
            }
            engine.flush().await.unwrap();
            moments.push((disk.recorded(), model.clone()));
        });
        let mut kept = 0;
        for crash in crash_images(&disk.history(), 31, 3) {
            assert_eq!(checked(&crash.images[0]).corruptions, 0, "{crash}");
            for (_, model) in moments.iter().filter(|moment| moment.0 == crash.point) {
                let (content, _) = reopened(&crash.images[0], &how, M);
                assert!(content == *model, "{barrier:?}, {crash}");
                kept += 1;
            }
        }
        assert!(kept > 0);
    }
}

/// Places of an image with a snapshot.
struct Subject {
    image: sim::Image,
    l2: u64,
    targets: Vec<(&'static str, u64, OverlapCheck)>,
}

fn be64(image: &sim::Image, at: u64) -> u64 {
    u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap())
}

/// Places of metadata, and the least template that knows each.
fn subject() -> Subject {
    let mut image = lab::created("", 600 * M);
    lab::with_file(&mut image, |path| {
        qemu_io(path, &["write 0 128k", "write 513M 64k"]);
        qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
        qemu_io(path, &["write 0 64k", "write 513M 64k"]);
        qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "b"]);
    });
    let header = Checked::open(&image).unwrap().header.clone();
    let l1 = header.l1_table_offset.0;
    let snapshot = header.snapshots_offset.0;
    let inactive = be64(&image, snapshot);
    let reftable = header.refcount_table_offset.0;
    Subject {
        l2: be64(&image, l1) & OFFSET,
        targets: vec![
            ("L1 table", l1, OverlapCheck::Constant),
            ("refcount table", reftable, OverlapCheck::Constant),
            ("snapshot table", snapshot, OverlapCheck::Constant),
            (
                "bitmap directory",
                header.bitmaps().unwrap().directory_offset.0,
                OverlapCheck::Constant,
            ),
            (
                "L2 table",
                be64(&image, l1 + 8) & OFFSET,
                OverlapCheck::Cached,
            ),
            (
                "refcount block",
                be64(&image, reftable),
                OverlapCheck::Cached,
            ),
            ("L1 table of a snapshot", inactive, OverlapCheck::Cached),
            (
                "L2 table of a snapshot",
                be64(&image, inactive) & OFFSET,
                OverlapCheck::All,
            ),
        ],
        image,
    }
}

/// An L2 entry that aims at metadata: with a template that knows the target,
/// the write is refused, the image is marked and closed to writers; one that
/// does not lets it happen.
#[test]
fn templates_know_what_qemus_know() {
    let subject = subject();
    for &(what, target, least) in &subject.targets {
        for template in [
            OverlapCheck::None,
            OverlapCheck::Constant,
            OverlapCheck::Cached,
            OverlapCheck::All,
        ] {
            let mut image = subject.image.clone();
            image.write(subject.l2 + 8, &(target | COPIED).to_be_bytes());
            let disk = SimDisk::with_image(image.clone());
            let how = How {
                overlap_check: template,
                ..How::default()
            };
            let case = format!("{what}, {template:?}");
            lab::block_on(async {
                let engine = lab::open(&disk, &how).await.unwrap();
                let bytes = vec![0xff; 4096];
                let result = lab::write(&engine, 0, 64 * K, &bytes, false).await;
                if template < least {
                    result.unwrap_or_else(|e| panic!("{case}: {e:?}"));
                    return;
                }
                let error = result.expect_err(&case);
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{case}");
                assert_eq!(error.errno(), libc::EIO);
                let mut left = image.bytes(target, 4096);
                if what == "bitmap directory" {
                    // Whoever writes marks the bitmap as in use, before that.
                    left[15] |= 1;
                }
                assert!(disk.image().bytes(target, 4096) == left, "{case}");
                // The mark is durable before the answer.
                let history = disk.history();
                let last = crash_images(&history, 1, 0).last().unwrap();
                assert_eq!(marks(&last.images[0]), 2, "{case}");
                assert!(matches!(
                    history.records.last().unwrap().change,
                    Change::Sync
                ));
                let again = lab::write(&engine, 0, 0, &bytes, false).await;
                assert_eq!(lab::errno(&again), Some(libc::EIO), "{case}");
                assert!(engine.discard(0, 0, 64 * K).await.is_err());
                lab::read(&engine, 0, 0, M).await.unwrap();
                engine.flush().await.unwrap();
                engine.close().await.unwrap();
            });
            assert_eq!(marks(&disk.image()), if template < least { 0 } else { 2 });
        }
    }
}

/// Structures that cannot be, met by a write, have the same effect; met by a
/// read, none.
#[test]
fn impossible_entries_close_the_image_to_writers() {
    let subject = subject();
    let impossible = [
        COPIED | 0x1_0200, // misaligned
        1 << 58 | COPIED | 0x10_0000,
    ];
    for entry in impossible {
        let mut image = subject.image.clone();
        image.write(subject.l2 + 8, &entry.to_be_bytes());
        let disk = SimDisk::with_image(image);
        lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            assert!(lab::read(&engine, 0, 64 * K, 512).await.is_err());
            assert_eq!(marks(&disk.image()), 0, "a read marks nothing");
            let result = lab::write(&engine, 0, 64 * K, &[1; 512], false).await;
            assert_eq!(lab::errno(&result), Some(libc::EIO));
            assert_eq!(marks(&disk.image()), 2, "{entry:#x}");
            assert!(lab::write(&engine, 0, 0, &[1; 512], false).await.is_err());
            lab::read(&engine, 0, 0, 512).await.unwrap();
        });
        let opened = lab::block_on(lab::open(&disk, &How::default()));
        assert_eq!(opened.unwrap_err().kind(), ErrorKind::Corrupt);
        // A compressed write that meets it does the same.
        let mut image = subject.image.clone();
        image.write(subject.l2 + 8, &entry.to_be_bytes());
        let compressing = SimDisk::with_image(image);
        lab::block_on(async {
            let engine = lab::open(&compressing, &How::default()).await.unwrap();
            let written = engine.write_compressed(0, 64 * K, &[1; 512], None).await;
            assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt);
            assert_eq!(marks(&compressing.image()), 2, "{entry:#x}");
            assert!(
                engine
                    .write_compressed(0, 0, &[1; 512], None)
                    .await
                    .is_err()
            );
        });
        let storage = Storage::simulated(&disk, 1);
        lab::block_on(check::repair(&storage, Repair::All, &mut |_| {})).unwrap();
        drop(storage);
        assert_eq!(marks(&disk.image()), 0);
        lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            write(&engine, 64 * K, 512, 1).await;
            engine.close().await.unwrap();
        });
        assert_eq!(checked(&disk.image()).corruptions, 0);
    }
}

/// Damage in a layer below is not the image's own.
#[test]
fn a_damaged_backing_file_does_not_mark_the_image() {
    let subject = subject();
    let dir = tempfile::tempdir().unwrap();
    let (base, over) = (dir.path().join("base"), dir.path().join("over"));
    let mut below = subject.image.clone();
    below.write(subject.l2 + 8, &(COPIED | 0x1_0200).to_be_bytes());
    below.save(&base).unwrap();
    let name = over.to_str().unwrap();
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "base", name, "600M",
    ]);
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(&over, &options).unwrap();
    let error = disk.write_at(&[1; 512], 64 * K + 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(error.file(), Some(base.as_path()));
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(std::fs::read(&over).unwrap()[79], 0);
}
