//! A failed sync stays failed, for everybody.

use std::rc::Rc;

use super::super::sim::{Change, Fault, SimDisk, SimKind};
use super::super::*;
use crate::runtime::{JoinHandle, Runtime, spawn, yield_now};

fn syncs(disk: &SimDisk) -> usize {
    let records = disk.history().records;
    records.iter().filter(|r| r.change == Change::Sync).count()
}

#[test]
fn a_failed_sync_is_final() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    Runtime::inline().unwrap().block_on(async {
        storage.write(0, &[1; 100]).await.unwrap();
        disk.fail_nth(0, libc::EIO);
        let error = storage.sync().await.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EIO));
        assert!(storage.is_latched());
        for result in [
            storage.sync().await,
            storage.write(0, &[1]).await,
            storage.write_zeroes(0, 1, false).await,
            storage.punch(0, 1).await.map(drop),
            storage.set_len(5).await,
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Latched);
            assert!(
                error.to_string().starts_with("simulated disk 0: "),
                "{error}"
            );
        }
        // What is there can still be read, and nothing more was done.
        storage.read(0, &mut [0; 100]).await.unwrap();
    });
    assert_eq!(disk.history().records.len(), 2);
}

#[test]
fn an_interrupted_sync_is_tried_again() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    disk.fail_nth(0, libc::EINTR);
    Runtime::inline().unwrap().block_on(storage.sync()).unwrap();
    assert!(!storage.is_latched());
    assert_eq!(syncs(&disk), 1);
}

#[test]
fn concurrent_syncs_share_one_that_begins_after_them() {
    let disk = SimDisk::new();
    let storage = Rc::new(Storage::simulated(&disk, 1));
    Runtime::inline().unwrap().block_on(async {
        let hold = disk.hold(|request| request.kind == SimKind::Sync);
        let start = || {
            let storage = Rc::clone(&storage);
            spawn(async move { storage.sync().await })
        };
        let first = start();
        hold.wait_for(1).await;
        // The sync under way does not cover this write, so these need another,
        // but one is enough for all of them.
        storage.write(0, &[1]).await.unwrap();
        let later: Vec<_> = (0..10).map(|_| start()).collect();
        for _ in 0..5 {
            yield_now().await;
        }
        assert_eq!(hold.arrived(), 1);
        hold.release_one();
        first.await.unwrap();
        assert!(!later.iter().any(JoinHandle::is_finished));
        hold.release();
        for sync in later {
            sync.await.unwrap();
        }
    });
    assert_eq!(syncs(&disk), 2);
}

#[test]
fn all_who_wait_learn_of_the_failure() {
    let disk = SimDisk::new();
    let storage = Rc::new(Storage::simulated(&disk, 1));
    disk.inject(|request| (request.kind == SimKind::Sync).then_some(Fault::Errno(libc::EIO)));
    disk.shuffle(Some(2));
    Runtime::inline().unwrap().block_on(async {
        let all: Vec<_> = (0..10)
            .map(|_| {
                let storage = Rc::clone(&storage);
                spawn(async move { storage.sync().await })
            })
            .collect();
        for sync in all {
            assert_eq!(sync.await.unwrap_err().errno(), libc::EIO);
        }
    });
    assert_eq!(disk.operations(), 1);
}

#[test]
fn a_sync_dropped_half_way_counts_as_failed() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    Runtime::inline().unwrap().block_on(async {
        let hold = disk.hold(|_| true);
        {
            let mut sync = std::pin::pin!(storage.sync());
            let once = std::future::poll_fn(|context| {
                std::task::Poll::Ready(sync.as_mut().poll(context).is_pending())
            });
            assert!(once.await);
        }
        drop(hold);
    });
    assert!(storage.is_latched());
}

#[test]
fn a_held_write_is_not_covered_by_a_sync() {
    let disk = SimDisk::new();
    let storage = Rc::new(Storage::simulated(&disk, 512));
    Runtime::inline().unwrap().block_on(async {
        let hold = disk.hold(|request| request.kind == SimKind::Write && request.offset == 512);
        let writing = Rc::clone(&storage);
        let held = spawn(async move { writing.write(512, &[2; 512]).await });
        hold.wait_for(1).await;
        storage.write(0, &[1; 512]).await.unwrap();
        storage.sync().await.unwrap();
        assert_eq!(disk.len(), 512);
        hold.release();
        held.await.unwrap();
    });
    let changes: Vec<Change> = disk
        .history()
        .records
        .into_iter()
        .map(|r| r.change)
        .collect();
    assert!(matches!(changes[0], Change::Write { offset: 0, .. }));
    assert_eq!(changes[1], Change::Sync);
    assert!(matches!(changes[2], Change::Write { offset: 512, .. }));
}
