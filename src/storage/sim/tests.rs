//! The simulation keeps its own promises.

use std::collections::HashSet;

use super::super::Storage;
use super::*;
use crate::error::Result;
use crate::runtime::{Runtime, spawn};

fn block_on<T>(future: impl Future<Output = T>) -> T {
    Runtime::inline().unwrap().block_on(future)
}

/// All states that may be left after the whole of the history, by the bytes
/// that `look` takes from them.
fn outcomes<T: std::hash::Hash + Eq>(disk: &SimDisk, look: impl Fn(&[Image]) -> T) -> HashSet<T> {
    let history = disk.history();
    (0..200)
        .flat_map(|seed| crash_images(&history, seed, 20).collect::<Vec<_>>())
        .filter(|crash| crash.point == history.records.len())
        .map(|crash| look(&crash.images))
        .collect()
}

async fn store(storage: &Storage, writes: &[(u64, &[u8])]) -> Result<()> {
    for (offset, bytes) in writes {
        storage.write(*offset, bytes).await?;
    }
    Ok(())
}

#[test]
fn what_was_synced_survives_and_all_subsets_of_the_rest_occur() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    block_on(async {
        store(&storage, &[(0, b"a"), (512, b"b"), (1024, b"c")]).await?;
        storage.sync().await?;
        store(&storage, &[(0, b"A"), (512, b"B"), (1024, b"C")]).await
    })
    .unwrap();
    let seen = outcomes(&disk, |images| {
        [0, 512, 1024].map(|at| images[0].bytes(at, 1)[0] as char)
    });
    assert_eq!(seen.len(), 8, "{seen:?}");
    for point in 0..=3 {
        let history = disk.history();
        let durable = crash_images(&history, 1, 9).filter(|crash| crash.point == point);
        assert!(
            durable
                .into_iter()
                .all(|crash| crash.images[0].len() <= 1025)
        );
    }
    let history = disk.history();
    let after_sync: Vec<_> = crash_images(&history, 1, 9)
        .filter(|c| c.point == 4)
        .collect();
    assert_eq!(after_sync.len(), 1);
    assert_eq!(after_sync[0].images[0].bytes(512, 1), b"b");
}

#[test]
fn writes_tear_between_sectors_and_never_inside() {
    let disk = SimDisk::with_image(Image::from_bytes(&[b'.'; 2048]));
    let storage = Storage::simulated(&disk, 1);
    block_on(storage.write(100, &[b'x'; 1500])).unwrap();
    let seen = outcomes(&disk, |images| {
        let bytes = images[0].bytes(0, 2048);
        assert!(
            bytes[..100]
                .iter()
                .chain(&bytes[1600..])
                .all(|&b| b == b'.')
        );
        [100..512, 512..1024, 1024..1536, 1536..1600].map(|sector| {
            let first = bytes[sector.start];
            assert!(bytes[sector].iter().all(|&b| b == first));
            first == b'x'
        })
    });
    assert_eq!(seen.len(), 16, "{seen:?}");
}

#[test]
fn a_sector_is_only_ever_in_a_state_that_it_was_in() {
    let disk = SimDisk::with_image(Image::from_bytes(b"..."));
    let storage = Storage::simulated(&disk, 1);
    block_on(store(&storage, &[(0, b"1"), (1, b"2"), (0, b"33")])).unwrap();
    let seen = outcomes(&disk, |images| {
        String::from_utf8(images[0].bytes(0, 3)).unwrap()
    });
    let wanted = ["...", "1..", "12.", "33."].map(str::to_owned);
    assert_eq!(seen, HashSet::from(wanted));
}

#[test]
fn lost_writes_may_leave_their_length() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    block_on(storage.write(0, &[1; 1024])).unwrap();
    let seen = outcomes(&disk, |images| {
        (
            images[0].len(),
            images[0].bytes(0, 1024).iter().any(|&b| b != 0),
        )
    });
    assert!(seen.contains(&(0, false)) && seen.contains(&(1024, false)));
}

#[test]
fn zeroing_punching_and_cutting_are_lost_or_survive() {
    for operation in 0..3 {
        let disk = SimDisk::with_image(Image::from_bytes(&[b'x'; 4096]));
        let storage = Storage::simulated(&disk, 1);
        block_on(async {
            match operation {
                0 => storage.write_zeroes(700, 2000, false).await.unwrap(),
                1 => assert!(storage.punch(700, 2000).await.unwrap()),
                _ => storage.set_len(700).await.unwrap(),
            }
        });
        let all = disk.image();
        let seen = outcomes(&disk, |images| {
            let bytes = images[0].bytes(0, 4096);
            assert!(bytes[..700].iter().all(|&b| b == b'x'));
            (images[0] == all, bytes.iter().all(|&b| b == b'x'))
        });
        assert!(seen.contains(&(true, false)) && seen.contains(&(false, true)));
    }
}

#[test]
fn a_failed_sync_saves_nothing_then_or_later() {
    let disk = SimDisk::new();
    let first = Storage::simulated(&disk, 1);
    block_on(first.write(0, b"1")).unwrap();
    disk.fail_nth(0, libc::EIO);
    block_on(first.sync()).unwrap_err();
    // A second opener knows nothing of it.
    let second = Storage::simulated(&disk, 1);
    block_on(async {
        second.write(512, b"2").await.unwrap();
        second.sync().await.unwrap();
    });
    let seen = outcomes(&disk, |images| {
        assert_eq!(images[0].bytes(512, 1), b"2");
        images[0].bytes(0, 1)[0]
    });
    assert_eq!(seen, HashSet::from([0, b'1']));
}

#[test]
fn disks_of_a_machine_lose_power_together_but_sync_alone() {
    let disk = SimDisk::new();
    let beside = disk.beside(Image::new());
    let (a, b) = (Storage::simulated(&disk, 1), Storage::simulated(&beside, 1));
    block_on(async {
        a.write(0, b"a").await.unwrap();
        b.write(0, b"b").await.unwrap();
        a.sync().await.unwrap();
    });
    let seen = outcomes(&disk, |images| {
        (images[0].bytes(0, 1)[0], images[1].bytes(0, 1)[0])
    });
    assert_eq!(seen, HashSet::from([(b'a', 0), (b'a', b'b')]));
}

#[test]
fn the_same_seed_gives_the_same_crashes() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 1);
    block_on(async {
        for i in 0..20 {
            storage.write(i * 700, &[i as u8; 3000]).await.unwrap();
        }
    });
    let history = disk.history();
    let run = |seed| {
        crash_images(&history, seed, 5)
            .map(|crash| (crash.to_string(), crash.images))
            .collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert_eq!(run(1).len(), 1 + 20 * 8);
    for crash in crash_images(&history, 3, 5) {
        let again = crash_image(&history, crash.point, &crash.fates);
        assert_eq!(again.images, crash.images, "{crash}");
    }
}

#[test]
fn the_nth_operation_fails_and_partial_writes_are_partial() {
    let disk = SimDisk::new();
    let storage = Storage::simulated(&disk, 512);
    disk.fail_nth(1, libc::EIO);
    disk.inject(|request| {
        (request.offset == 4096).then_some(Fault::Partial {
            stored: 512,
            errno: libc::EIO,
        })
    });
    block_on(async {
        storage.write(0, &[1; 512]).await.unwrap();
        assert!(storage.write(512, &[1; 512]).await.is_err());
        storage.write(512, &[1; 512]).await.unwrap();
        assert!(storage.write(4096, &[1; 1024]).await.is_err());
    });
    assert_eq!(disk.operations(), 4);
    assert_eq!(disk.len(), 4608);
    assert_eq!(disk.history().to_string().lines().count(), 3);
}

#[test]
fn held_operations_take_effect_in_order_of_arrival_when_let_go() {
    let disk = SimDisk::new();
    let storage = std::rc::Rc::new(Storage::simulated(&disk, 1));
    block_on(async {
        let hold = disk.hold(|request| request.kind == SimKind::Write);
        let tasks: Vec<_> = (1..=3_u8)
            .map(|i| {
                let storage = std::rc::Rc::clone(&storage);
                spawn(async move { storage.write(0, &[i]).await.unwrap() })
            })
            .collect();
        hold.wait_for(3).await;
        let mut held = tasks.into_iter();
        for i in 1..=2 {
            assert_eq!(disk.operations(), 3);
            assert_eq!(disk.history().records.len(), i - 1);
            hold.release_one();
            held.next().unwrap().await;
            assert_eq!(disk.image().bytes(0, 1), [i as u8]);
        }
        drop(hold);
        held.next().unwrap().await;
        storage.write(1, b"x").await.unwrap();
    });
}

#[test]
fn shuffled_operations_take_effect_in_other_orders() {
    let orders: HashSet<Vec<u64>> = (0..20)
        .map(|seed| {
            let disk = SimDisk::new();
            disk.shuffle(Some(seed));
            let storage = std::rc::Rc::new(Storage::simulated(&disk, 1));
            block_on(async {
                let tasks: Vec<_> = (0..4)
                    .map(|i| {
                        let storage = std::rc::Rc::clone(&storage);
                        spawn(async move { storage.write(i, &[1]).await.unwrap() })
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
            });
            let offset = |record: Record| match record.change {
                Change::Write { offset, .. } => offset,
                _ => unreachable!(),
            };
            disk.history().records.into_iter().map(offset).collect()
        })
        .collect();
    assert!(orders.len() > 5, "{orders:?}");
}
