//! Faults at certain places.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_ublk::ErrorKind;
use qcow2_ublk::qcow2::spec::bitmap::BitmapFlags;
use qcow2_ublk::qcow2::spec::header::Incompatible;
use qcow2_ublk::storage::sim::{Fault, SimDisk, SimKind, crash_images};

use crate::common::check::Checked;
use crate::common::lab::{self, How};
use crate::common::{qemu_img, qemu_io};
use crate::requests::{plain, with_bitmaps};
use crate::run::operations;
use crate::trial::{assert_sound, one_fault};
use crate::work::Step;

/// The refcount table is about to be full, and moves.
#[test]
fn an_error_while_the_refcount_table_grows() {
    let mut full = lab::created("cluster_size=512,refcount_bits=64", 2 << 20);
    lab::with_file(&mut full, |path| {
        qemu_io(path, &["write -P 0x33 0 1940k"]);
        qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    });
    let tables = |image| Checked::open(image).unwrap().header.refcount_table_clusters;
    let mut work = plain("a refcount table that grows", full);
    let write = |offset, byte| Step::Write {
        offset,
        len: 24 << 10,
        byte,
    };
    work.steps = vec![
        write(512, 0x41),
        Step::Flush,
        write(99 << 10, 0x42),
        write(299 << 10, 0x43),
    ];
    let disk = SimDisk::with_image(work.image.clone());
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        for step in &work.steps {
            if let Step::Write { offset, len, .. } = *step {
                let bytes = vec![1; len as usize];
                lab::write(&engine, 0, offset, &bytes, false).await.unwrap();
            }
        }
        engine.flush().await.unwrap();
    });
    assert!(tables(&disk.image()) > tables(&work.image), "it does not");
    for request in &operations(&work) {
        let fault = match request.kind {
            SimKind::Write if request.number % 2 == 0 => Fault::Partial {
                stored: 1 << 20,
                errno: libc::EIO,
            },
            _ => Fault::Errno(libc::EIO),
        };
        one_fault(&work, request, fault);
    }
}

/// T11: the failed write of an L2 table is reported once, and the next flush
/// really writes it.
#[test]
fn t11_a_failed_metadata_write_stays_dirty() {
    let image = lab::created("cluster_size=65536", 8 << 20);
    lab::block_on(async {
        let disk = SimDisk::with_image(image);
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0x77; 4096], false)
            .await
            .unwrap();
        // Every operation of the flush in turn; but a sync that fails is
        // another matter.
        for at in 0.. {
            let number = disk.operations() + at;
            let was_sync = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&was_sync);
            disk.clear_faults();
            disk.inject(move |request| {
                let ours = request.number == number;
                if ours && request.kind == SimKind::Sync {
                    seen.store(true, Ordering::SeqCst);
                    return None;
                }
                ours.then_some(Fault::Errno(libc::EIO))
            });
            let result = engine.flush().await;
            if disk.operations() <= number {
                break;
            }
            if !was_sync.load(Ordering::SeqCst) {
                assert_eq!(lab::errno(&result), Some(libc::EIO), "operation {at}");
            }
            engine.flush().await.unwrap();
            let history = disk.history();
            let end = history.records.len();
            for crash in crash_images(&history, at, 1).from_point(end) {
                assert_sound(&crash.images, "after the second flush");
                let disk = SimDisk::with_image(crash.images[0].clone());
                let engine = lab::open(&disk, &How::default()).await.unwrap();
                let content = lab::read(&engine, 0, 0, 4096).await.unwrap();
                assert!(content == [0x77; 4096], "operation {at}");
            }
            // Something to flush for the next round.
            lab::write(&engine, 0, (at + 1) << 16, &[0x78; 4096], false)
                .await
                .unwrap();
        }
    });
}

/// A close that fails leaves the dirty mark of an image with lazy refcounts;
/// the next one takes it off.
#[test]
fn a_second_close_takes_the_dirty_mark_off() {
    let image = lab::created("cluster_size=4k,lazy_refcounts=on", 128 << 10);
    let mut failed = 0;
    for at in 0.. {
        let disk = SimDisk::with_image(image.clone());
        let first = lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            lab::write(&engine, 0, 0, &[0x77; 9000], false)
                .await
                .unwrap();
            disk.inject({
                let number = disk.operations() + at;
                move |request| {
                    let ours = request.number == number && request.kind == SimKind::Write;
                    ours.then_some(Fault::Errno(libc::EIO))
                }
            });
            let first = engine.close().await;
            let done = disk.operations();
            disk.clear_faults();
            engine.close().await.unwrap();
            assert!(disk.operations() > done, "it looks again");
            first
        });
        let marks = Checked::open(&disk.image()).unwrap().header.incompatible;
        assert!(!marks.contains(Incompatible::DIRTY), "operation {at}");
        assert_sound(&[disk.image()], "closed");
        failed += u32::from(first.is_err());
        if at > 30 {
            break;
        }
    }
    assert!(failed > 2, "{failed} failed");
}

/// The first change marks the bitmaps, and fails then; so does the next, before
/// it has marked them. The close takes off what the first has left.
#[test]
fn marks_of_a_change_that_failed_come_off() {
    let disk = SimDisk::with_image(with_bitmaps("cluster_size=4k,lazy_refcounts=on"));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        let mut refused = 0;
        disk.inject(move |request| {
            // The first is the marks.
            refused += u32::from(request.kind == SimKind::Write);
            let fails = request.kind == SimKind::Write && refused > 1;
            fails.then_some(Fault::Errno(libc::ENOSPC))
        });
        for _ in 0..2 {
            let result = lab::write(&engine, 0, 0, &[0x77; 512], false).await;
            assert_eq!(lab::errno(&result), Some(libc::ENOSPC));
        }
        disk.clear_faults();
        engine.close().await.unwrap();
    });
    let image = disk.image();
    let bitmaps = Checked::open(&image).unwrap().bitmaps();
    assert_eq!(bitmaps.len(), 2);
    for bitmap in bitmaps {
        assert!(!bitmap.flags.contains(BitmapFlags::IN_USE), "{bitmap:?}");
    }
}

/// Of a close that fails in several places, the first is why.
#[test]
fn a_close_says_what_failed_first() {
    let disk = SimDisk::with_image(lab::created("cluster_size=4k", 128 << 10));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0x77; 512], false)
            .await
            .unwrap();
        disk.inject(|request| {
            (request.kind == SimKind::Sync).then_some(Fault::Errno(libc::ENOSPC))
        });
        let error = engine.close().await.unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC, "{error}");
        let error = engine.close().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Latched, "{error}");
    });
}
