//! Several queues at once: the same cluster hit from several threads (row 19),
//! and clusters that are freed while a slow request still uses them (grace
//! periods, row 24): nobody ever gets somebody else's bytes.

use std::sync::Arc;

use crate::common::check::Checked;
use crate::common::half_random;
use crate::common::lab::{self, Below, How};
use crate::common::storm::{Owner, Storm};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::runtime::{spawn, yield_now};
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, SimKind};

fn storm(cache: CacheMode, seed: u64, steps: u32) -> Storm {
    Storm {
        threads: 3,
        tasks: 3,
        cache,
        seed,
        steps,
    }
}

/// Row 19.
#[test]
fn row_19_many_queues_in_the_same_clusters() {
    lab::watched(120, || {
        for (seed, cluster) in [(1, "512"), (2, "4096"), (3, "65536")] {
            let size = if seed == 3 { 4 << 20 } else { 1 << 20 };
            let image = lab::created(&format!("cluster_size={cluster}"), size);
            storm(CacheMode::Writeback, seed, 400).over(&image);
        }
    });
}

/// The same where writes go through read-modify-write of whole sectors.
#[test]
fn row_19_many_queues_with_direct_io() {
    lab::watched(120, || {
        for (seed, cluster) in [(11, "4096"), (12, "65536")] {
            let image = lab::created(&format!("cluster_size={cluster}"), 6 << 20);
            storm(CacheMode::None, seed, 250).over(&image);
        }
    });
}

/// Three sub-cluster writes in one new cluster, started together.
#[test]
fn row_19_three_writes_in_one_new_cluster() {
    for seed in 0..40 {
        let disk = SimDisk::with_image(lab::created("cluster_size=65536", 1 << 20));
        disk.shuffle(Some(seed));
        lab::block_on(async {
            let engine = Arc::new(lab::open(&disk, &How::default()).await.unwrap());
            let writes: Vec<_> = (0..3_u8)
                .map(|n| {
                    let engine = Arc::clone(&engine);
                    spawn(async move {
                        let offset = u64::from(n) * 20 * 1024;
                        lab::write(&engine, 0, offset, &[n + 1; 4096], false).await
                    })
                })
                .collect();
            for write in writes {
                write.await.unwrap();
            }
            let bytes = lab::read(&engine, 0, 0, 64 << 10).await.unwrap();
            for (n, chunk) in bytes.chunks(4096).enumerate() {
                let expected = if n % 5 == 0 && n < 15 {
                    n as u8 / 5 + 1
                } else {
                    0
                };
                assert!(
                    chunk.iter().all(|&b| b == expected),
                    "seed {seed} chunk {n}"
                );
            }
        });
    }
}

/// Guest clusters at the other end of the disk are written, flushed and given
/// up until every free cluster of the file has been in use.
async fn churn(engine: &Engine, rounds: u64) {
    let cluster = engine.chain().top().cluster_size();
    let first = engine.size() / cluster / 2;
    let mut last = Vec::new();
    for round in 0..rounds {
        last.clear();
        for n in 0..20 {
            let offset = (first + n) * cluster;
            let bytes = vec![0x80 | round as u8; cluster as usize];
            lab::write(engine, 1, offset, &bytes, false).await.unwrap();
            last.push((offset, bytes));
        }
        engine.flush().await.unwrap();
        if round + 1 < rounds {
            engine
                .discard(1, first * cluster, 20 * cluster)
                .await
                .unwrap();
            engine.flush().await.unwrap();
        }
    }
    for (offset, bytes) in last {
        assert!(lab::read(engine, 1, offset, cluster).await.unwrap() == bytes);
    }
}

/// All that `churn` left is untouched.
async fn assert_churned(engine: &Engine, rounds: u64) {
    let cluster = engine.chain().top().cluster_size();
    let first = engine.size() / cluster / 2;
    let bytes = lab::read(engine, 0, first * cluster, 20 * cluster)
        .await
        .unwrap();
    let byte = 0x80 | (rounds - 1) as u8;
    assert!(
        bytes.iter().all(|&b| b == byte),
        "a late write landed in somebody else's cluster"
    );
}

fn two_queues() -> How {
    How {
        queues: 2,
        ..How::default()
    }
}

/// A slow request of `kind` on the first cluster is under way while the
/// cluster is given up by `free`, and all that is free gets used.
fn slow(image: sim::Image, how: How, kind: SimKind, old: u8, free: impl AsyncFn(&Engine) + Copy) {
    for same_queue in [false, true] {
        let disk = SimDisk::with_image(image.clone());
        lab::block_on(async {
            let engine = Arc::new(lab::open(&disk, &how).await.unwrap());
            let cluster = engine.chain().top().cluster_size();
            // The mapping is in the cache: what is held below is data.
            lab::read(&engine, 0, cluster, 512).await.unwrap();
            let mut first = true;
            let hold = disk
                .hold(move |request| request.kind == kind && std::mem::replace(&mut first, false));
            let queue = u16::from(same_queue);
            let task = spawn({
                let engine = Arc::clone(&engine);
                async move {
                    match kind {
                        SimKind::Read => lab::read(&engine, queue, 0, cluster).await,
                        _ => lab::write(&engine, queue, 0, &vec![0x5a; cluster as usize], false)
                            .await
                            .map(|()| Vec::new()),
                    }
                }
            });
            hold.wait_for(1).await;
            free(&engine).await;
            engine.flush().await.unwrap();
            churn(&engine, 6).await;
            hold.release();
            let result = task.await.unwrap();
            if kind == SimKind::Read {
                assert!(
                    result.iter().all(|&b| b == old) || result.iter().all(|&b| b == 0),
                    "the read gave {:02x?}",
                    &result[..16]
                );
            }
            assert_churned(&engine, 6).await;
            engine.flush().await.unwrap();
            assert_churned(&engine, 6).await;
            // With nobody left, what was freed comes through.
            engine.flush().await.unwrap();
            engine.close().await.unwrap();
            let found = Checked::open(&disk.image()).unwrap().check();
            assert!(found.corruptions.is_empty(), "{found:?}");
            assert_eq!(found.leaks, 0, "what was freed late leaked");
        });
    }
}

fn filled(cluster: &str, compressed: bool) -> sim::Image {
    let mut content = vec![0; 4 << 20];
    content[..1 << 20].fill(0x11);
    let options = format!("cluster_size={cluster}");
    let mut arguments = vec!["-o", &options];
    if compressed {
        arguments.push("-c");
    }
    lab::converted(&content, &arguments)
}

async fn discard_first(engine: &Engine) {
    let cluster = engine.chain().top().cluster_size();
    engine.discard(1, 0, cluster).await.unwrap();
}

async fn zero_first(engine: &Engine) {
    let cluster = engine.chain().top().cluster_size();
    engine.write_zeroes(1, 0, cluster, true).await.unwrap();
}

/// As [`slow`], for clusters of all sizes.
fn slow_at_first(kind: SimKind) {
    lab::watched(60, || {
        for cluster in ["512", "4096", "65536"] {
            let image = filled(cluster, false);
            slow(image.clone(), two_queues(), kind, 0x11, discard_first);
            slow(image, two_queues(), kind, 0x11, zero_first);
        }
    });
}

#[test]
pub(crate) fn a_slow_read_never_sees_the_next_owner() {
    slow_at_first(SimKind::Read);
}

#[test]
fn a_slow_write_never_lands_on_the_next_owner() {
    slow_at_first(SimKind::Write);
}

/// A write is under way while its cluster is zeroed, which keeps the host
/// cluster, and while others fill the cluster again: whether zeros or the slow
/// write came last is open, but not after both are over.
#[test]
pub(crate) fn a_slow_write_does_not_come_back_where_zeros_kept_its_place() {
    for options in ["4096", "65536", "65536,extended_l2=on"] {
        let disk = SimDisk::with_image(filled(options, false));
        lab::block_on(async {
            let engine = Arc::new(lab::open(&disk, &two_queues()).await.unwrap());
            let cluster = engine.chain().top().cluster_size();
            let half = cluster / 2;
            lab::read(&engine, 0, cluster, 512).await.unwrap();
            let write = |offset: u64, len: u64, byte: u8| {
                let engine = Arc::clone(&engine);
                spawn(async move {
                    let data = vec![byte; len as usize];
                    lab::write(&engine, 0, offset, &data, false).await.unwrap();
                })
            };
            // Holds the `nth` write from now on.
            let hold = |nth: u32| {
                let mut seen = 0;
                disk.hold(move |request| {
                    seen += u32::from(request.kind == SimKind::Write);
                    request.kind == SimKind::Write && seen == nth
                })
            };
            let slow = hold(1);
            let early = write(half, 512, 0x5a);
            slow.wait_for(1).await;
            let zeroes = engine.write_zeroes(1, 0, 3 * cluster, false);
            zeroes.await.unwrap();
            // Writes what is around it first, then the rest, then the mapping.
            let rest = hold(2);
            let late = write(half + 1024, 2 * cluster, 0x77);
            for _ in 0..1000 {
                yield_now().await;
            }
            slow.release();
            early.await;
            let before = lab::read(&engine, 1, half, 512).await.unwrap();
            rest.release();
            late.await;
            let behind = lab::read(&engine, 1, half, 512).await.unwrap();
            assert_eq!(before[0], behind[0], "{options}");
            engine.close().await.unwrap();
        });
        let found = Checked::open(&disk.image()).unwrap().check();
        assert!(found.corruptions.is_empty(), "{found:?}");
    }
}

#[test]
fn a_slow_read_of_a_compressed_cluster_never_sees_the_next_owner() {
    lab::watched(60, || {
        for cluster in ["4096", "65536"] {
            // All compressed clusters of one host cluster go, so that it is
            // free in the end.
            slow(
                filled(cluster, true),
                two_queues(),
                SimKind::Read,
                0x11,
                async |engine: &Engine| engine.discard(1, 0, 1 << 20).await.unwrap(),
            );
        }
    });
}

/// Compressed clusters come and go in the same few places, and each is read
/// while it is there: what was inflated before is not shown again.
#[test]
pub(crate) fn a_place_used_again_shows_what_is_in_it_now() {
    let disk = SimDisk::with_image(lab::created("cluster_size=4096", 1 << 20));
    lab::block_on(async {
        let engine = lab::open(&disk, &two_queues()).await.unwrap();
        for round in 0..200 {
            let data = half_random(4096, round);
            engine.write_compressed(0, 0, &data, None).await.unwrap();
            let seen = lab::read(&engine, 0, 0, 4096).await.unwrap();
            assert!(seen == data, "round {round}");
            engine.flush().await.unwrap();
        }
        engine.close().await.unwrap();
    });
    assert!(disk.image().len() < 1 << 18, "no place was used again");
}

/// Random requests, some of whose operations take very long.
#[test]
fn slow_operations_of_all_kinds() {
    lab::watched(120, || {
        for seed in 0..12 {
            let cluster = [512, 4096, 65536][seed as usize % 3];
            let size = if cluster == 65536 { 4 << 20 } else { 1 << 20 };
            let options = format!("cluster_size={cluster}");
            let disk = SimDisk::with_image(lab::created(&options, size));
            let mut how = two_queues();
            how.alignment = [1, 512][seed as usize / 3 % 2];
            if seed >= 9 {
                how.below = Below::Raw(sim::Image::from_bytes(&vec![0; 512 << 10]));
            }
            disk.shuffle(Some(seed));
            lab::block_on(async {
                let engine = Arc::new(lab::open(&disk, &how).await.unwrap());
                let mut rng = Rng::new(seed);
                let hold = disk.hold(move |request| {
                    matches!(request.kind, SimKind::Read | SimKind::Write) && rng.chance(1, 12)
                });
                let owners = 4;
                let tasks: Vec<_> = (0..owners)
                    .map(|number| {
                        let queue = (number % 2) as u16;
                        spawn(Owner::new(&engine, queue, number, owners, seed).work(150))
                    })
                    .collect();
                // Lets one go now and then, long after it was started.
                while tasks.iter().any(|task| !task.is_finished()) {
                    for _ in 0..40 {
                        yield_now().await;
                    }
                    hold.release_one();
                }
                hold.release();
                for task in tasks {
                    let owner = task.await;
                    let all = lab::read(&engine, 0, 0, size).await.unwrap();
                    owner.compare(0, &all);
                }
                engine.close().await.unwrap();
            });
            let found = Checked::open(&disk.image()).unwrap().check();
            assert!(found.corruptions.is_empty(), "{found:?}");
            assert_eq!(found.leaks, 0, "seed {seed}");
        }
    });
}
