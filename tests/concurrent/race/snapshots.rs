//! Snapshots of a disk in use: what go-qcow2's list asks for, by its names.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::{NewSnapshot, Selector};

use super::hammer::{Arena, Work};
use super::history::History;
use super::sector::{SECTOR, encode};
use super::{K4, K64, WORK, race_with};
use crate::common::lab;

fn named(name: &str) -> Selector {
    Selector::Name(name.into())
}

/// Writes every sector of the disk, each time with another tag, until told to
/// stop; how often.
fn write_until(arena: &Arena, done: &AtomicBool) -> u64 {
    lab::block_on(async {
        let mut round = 0;
        while !done.load(Ordering::SeqCst) {
            round += 1;
            write_all(arena, 100 + round).await;
        }
        round
    })
}

async fn write_all(arena: &Arena, tag: u64) {
    let sectors = arena.shape.sectors;
    let bytes: Vec<u8> = (0..sectors).flat_map(|s| encode(s, tag)).collect();
    for (sector, bytes) in (0..).step_by(8).zip(bytes.chunks(8 * SECTOR as usize)) {
        let offset = sector * SECTOR;
        lab::write(&arena.engine, 0, offset, bytes, false)
            .await
            .unwrap();
    }
}

/// A snapshot that is taken while many write shows one moment.
#[test]
fn snapshot_during_concurrent_writes() {
    let work = Work {
        snapshots: 12,
        ..WORK
    };
    lab::watched(120, || race_with(K4, work, 100));
}

/// Snapshots made by several at once: each is there, with an ID of its own.
#[test]
fn concurrent_snapshot_creation() {
    const EACH: u32 = 6;
    lab::watched(120, || {
        let arena = Arena::new(K4, WORK);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let arena = Arc::clone(&arena);
                scope.spawn(move || {
                    for n in 0..EACH {
                        let new = NewSnapshot::now(format!("{thread} {n}"));
                        let image = arena.engine.chain().top();
                        lab::block_on(image.create_snapshot(new)).unwrap();
                    }
                });
            }
        });
        let image = arena.engine.chain().top();
        let snapshots = lab::block_on(image.snapshots()).unwrap();
        let ids: HashSet<_> = snapshots.iter().map(|s| s.id.clone()).collect();
        let names: HashSet<_> = snapshots.iter().map(|s| s.name.clone()).collect();
        assert_eq!(ids.len(), 4 * EACH as usize);
        assert_eq!(names.len(), 4 * EACH as usize);
        // None lasts longer than the one before.
        lab::qemu_check(&arena.close().path, false);
    });
}

/// A snapshot that is read does not change while the disk is written to.
#[test]
fn write_during_snapshot_read() {
    lab::watched(120, || {
        let arena = Arena::new(K64, WORK);
        lab::block_on(write_all(&arena, 7));
        let image = arena.engine.chain().top();
        lab::block_on(image.create_snapshot(NewSnapshot::now("x"))).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| write_until(&arena, &done));
            lab::block_on(async {
                let options = arena.shape.options(1);
                let reader = arena.engine.open_snapshot(named("x"), &options);
                let reader = reader.await.unwrap();
                for _ in 0..50 {
                    let content = arena.read_all(&reader).await;
                    for (sector, bytes) in (0..).zip(content.chunks(SECTOR as usize)) {
                        assert!(bytes == encode(sector, 7), "sector {sector}");
                    }
                }
            });
            done.store(true, Ordering::SeqCst);
            assert!(writer.join().unwrap() > 0);
        });
        lab::qemu_check(&arena.close().path, false);
    });
}

/// Deleting a snapshot that is being read is refused, until nobody does.
#[test]
fn delete_snapshot_during_read() {
    lab::watched(120, || {
        let arena = Arena::new(K4, WORK);
        lab::block_on(async {
            write_all(&arena, 7).await;
            let image = arena.engine.chain().top();
            for name in ["x", "y"] {
                image.create_snapshot(NewSnapshot::now(name)).await.unwrap();
            }
            write_all(&arena, 8).await;
            let options = arena.shape.options(1);
            let open = || arena.engine.open_snapshot(named("x"), &options);
            let missing = arena.engine.open_snapshot(named("z"), &options).await;
            assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
            let (first, second) = (open().await.unwrap(), open().await.unwrap());
            let before = arena.read_all(&first).await;
            for reader in [first, second] {
                let error = image.delete_snapshot(named("x")).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Busy);
                assert!(error.to_string().contains("\"x\" is being read"), "{error}");
                // Others may go, and come, and be applied.
                image.create_snapshot(NewSnapshot::now("z")).await.unwrap();
                image.apply_snapshot(named("x")).await.unwrap();
                image.delete_snapshot(named("z")).await.unwrap();
                write_all(&arena, 9).await;
                arena.engine.flush().await.unwrap();
                assert!(arena.read_all(&reader).await == before);
            }
            image.delete_snapshot(named("x")).await.unwrap();
        });
        lab::qemu_check(&arena.close().path, false);
    });
}

/// While nobody works, nothing is to be judged: the judge is not that strict.
#[test]
fn nothing_is_nothing() {
    let arena = Arena::new(K4, WORK);
    let work = Work {
        steps: 0,
        snapshots: 0,
        ..WORK
    };
    let (log, kept) = arena.work(work, 1);
    assert!(kept.is_empty());
    History::new(&K4.at_first(), &log).judge(&log).unwrap();
}
