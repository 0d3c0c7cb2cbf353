//! What only shows after a while: memory and descriptors that are not given
//! back, caches far too small for the disk, very large disks, many at once.
//!
//! `ENDURANCE=N` in the environment makes each test N times as long, and gives
//! the random ones another seed; `scripts/soak` does so.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::storm::{self, Storm};
use common::{lab, qemu_create};
use qcow2_ublk::qcow2::ImageOptions;
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::{Disk, chain};

/// One after the other: they look at what the whole process has.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much longer than usual.
fn factor() -> u64 {
    let factor = std::env::var("ENDURANCE").unwrap_or_else(|_| "1".to_owned());
    factor.parse().expect("ENDURANCE is a number")
}

fn options(writable: bool, l2_cache: u64) -> chain::Options {
    chain::Options {
        writable,
        image: ImageOptions {
            l2_cache,
            ..ImageOptions::default()
        },
        ..chain::Options::default()
    }
}

fn created(path: &Path, options: &str, size: &str) {
    let path = path.to_str().unwrap();
    qemu_create(path, options, size);
}

/// Open descriptors, threads, and bytes of memory in use.
fn held() -> (usize, usize, u64) {
    let entries = |of| std::fs::read_dir(of).unwrap().count();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    (
        entries("/proc/self/fd"),
        entries("/proc/self/task"),
        pages * 4096,
    )
}

/// 340 times, or ten thousand: nothing is left behind by an open image, by its
/// chain, by one that could not be opened, nor by the thread that writes back.
#[test]
fn opening_and_closing_leaves_nothing_behind() {
    let _turn = alone();
    let dir = storm::scratch();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    created(&base, "cluster_size=4k", "4M");
    created(
        &top,
        "cluster_size=4k,backing_file=base.qcow2,backing_fmt=qcow2",
        "4M",
    );
    let broken = dir.path().join("broken.qcow2");
    std::fs::write(&broken, &std::fs::read(&top).unwrap()[..100]).unwrap();
    let round = |n: u64| {
        let disk = Disk::open(&top, &options(n.is_multiple_of(2), 1 << 20)).unwrap();
        let at = n / 2 % 1000 * 4096;
        if n.is_multiple_of(2) {
            disk.write_at(&n.to_le_bytes(), at).unwrap();
        } else {
            let mut bytes = [0; 8];
            disk.read_at(&mut bytes, at).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), n - 1);
        }
        disk.close().unwrap();
        Disk::open(&broken, &options(false, 1 << 20)).unwrap_err();
    };
    // The first ones fill what is kept on purpose.
    (0..40).for_each(round);
    let before = held();
    (40..40 + 340 * factor()).for_each(round);
    let after = held();
    assert_eq!(after.0, before.0, "descriptors");
    assert_eq!(after.1, before.1, "threads");
    let grown = after.2.saturating_sub(before.2);
    assert!(grown < 4 << 20, "{grown} bytes more than before");
    lab::qemu_check(&top, false);
}

/// Writes, zeros and discards all over a disk of two tebibytes whose tables are
/// a thousand times what is cached; everything is there afterwards.
#[test]
fn two_tebibytes_through_a_small_cache() {
    const CLUSTER: u64 = 64 << 10;
    let _turn = alone();
    let dir = storm::scratch();
    let image = dir.path().join("a.qcow2");
    created(&image, "cluster_size=64k", "2T");
    let mut rng = Rng::new(factor());
    // By cluster: the number its first and last bytes hold, 0 for zeros.
    let mut model: BTreeMap<u64, u64> = BTreeMap::new();
    let verify = |disk: &Disk, cluster: u64, expected: u64| {
        let mut ends = [1; 2 * 8];
        let (first, last) = ends.split_at_mut(8);
        disk.read_at(first, cluster * CLUSTER).unwrap();
        disk.read_at(last, (cluster + 1) * CLUSTER - 8).unwrap();
        for end in ends.chunks(8) {
            let found = u64::from_le_bytes(end.try_into().unwrap());
            assert_eq!(found, expected, "cluster {cluster}");
        }
    };
    for _ in 0..4 {
        let disk = Disk::open(&image, &options(true, 128 << 10)).unwrap();
        for step in 1..=400 * factor() {
            // Now and then one that was written before.
            let cluster = match model.keys().nth(rng.below(64) as usize) {
                Some(known) if rng.chance(1, 4) => *known,
                _ => rng.below((2 << 40) / CLUSTER),
            };
            let known = model.get(&cluster).copied().unwrap_or(0);
            verify(&disk, cluster, known);
            let now = match rng.below(8) {
                0 => {
                    disk.discard_at(cluster * CLUSTER, CLUSTER).unwrap();
                    0
                }
                1 => {
                    disk.write_zeroes_at(cluster * CLUSTER, CLUSTER, step.is_multiple_of(2))
                        .unwrap();
                    0
                }
                _ => {
                    let number = rng.next_u64() | 1;
                    disk.write_at(&number.to_le_bytes(), cluster * CLUSTER)
                        .unwrap();
                    disk.write_at(&number.to_le_bytes(), (cluster + 1) * CLUSTER - 8)
                        .unwrap();
                    number
                }
            };
            model.insert(cluster, now);
            if step.is_multiple_of(100) {
                disk.flush().unwrap();
            }
        }
        disk.close().unwrap();
        lab::qemu_check(&image, false);
    }
    let disk = Disk::open(&image, &options(false, 128 << 10)).unwrap();
    for (cluster, number) in &model {
        verify(&disk, *cluster, *number);
    }
}

/// A hundred tasks on four rings in the same few clusters.
#[test]
fn a_hundred_tasks() {
    let _turn = alone();
    let storm = Storm {
        threads: 4,
        tasks: 25,
        cache: CacheMode::Writeback,
        seed: factor(),
        steps: 20 * factor() as u32,
    };
    lab::watched(120 * factor(), || {
        storm.over(&lab::created("cluster_size=4096", 4 << 20));
    });
}
