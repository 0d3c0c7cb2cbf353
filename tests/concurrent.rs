//! Several queues at once: the same cluster hit from several threads (row 19),
//! and clusters that are freed while a slow request still uses them (grace
//! periods, row 24): nobody ever gets somebody else's bytes.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::check::Checked;
use common::lab::{self, Below, How};
use qcow2_ublk::block::BlockHandler;
use qcow2_ublk::chain;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::ImageOptions;
use qcow2_ublk::runtime::{Runtime, spawn, yield_now};
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, SimKind};

const SECTOR: u64 = 512;

fn stamp(owner: u64, round: u32, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = 1 << 63 | owner << 56 | u64::from(round) << 32 | sector << 8 | i as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// What one task knows of the sectors it owns.
struct Owner {
    engine: lab::Shared,
    queue: u16,
    number: u64,
    owners: u64,
    cluster: u64,
    rng: Rng,
    /// Per sector: the round it was last written in, 0 for zeros; None where
    /// somebody else owns it.
    known: Vec<Option<u32>>,
    round: u32,
}

impl Owner {
    const GROUP: u64 = 4;
    const CHUNK: u64 = 3;

    fn new(engine: &lab::Shared, queue: u16, number: u64, owners: u64, seed: u64) -> Self {
        let cluster = engine.chain().top().cluster_size();
        let mut owner = Self {
            engine: Arc::clone(engine),
            queue,
            number,
            owners,
            cluster,
            rng: Rng::new(seed << 8 | number),
            known: Vec::new(),
            round: 0,
        };
        owner.known = (0..engine.size() / SECTOR)
            .map(|sector| owner.owns(sector).then_some(0))
            .collect();
        owner
    }

    /// Groups of clusters belong to one owner or, sector by sector, to all.
    fn owns(&self, sector: u64) -> bool {
        let group = sector / (Self::GROUP * self.cluster / SECTOR);
        match group % (2 * self.owners) {
            turn if turn < self.owners => turn == self.number,
            _ => sector / Self::CHUNK % self.owners == self.number,
        }
    }

    /// Some sectors in a row that are ours.
    fn pick(&mut self) -> (u64, u64) {
        loop {
            let first = self.rng.below(self.known.len() as u64);
            let wanted = 1 + self.rng.below(3 * self.cluster / SECTOR);
            let len = (first..self.known.len() as u64)
                .take(wanted as usize)
                .take_while(|&s| self.known[s as usize].is_some())
                .count() as u64;
            if len > 0 {
                return (first, len);
            }
        }
    }

    async fn work(mut self, steps: u32) -> Self {
        for _ in 0..steps {
            self.round += 1;
            let (first, len) = self.pick();
            let (offset, bytes) = (first * SECTOR, len * SECTOR);
            let known = first as usize..(first + len) as usize;
            match self.rng.below(20) {
                0 => self.engine.flush().await.unwrap(),
                1..4 => {
                    self.engine
                        .discard(self.queue, offset, bytes)
                        .await
                        .unwrap();
                    let per_cluster = self.cluster / SECTOR;
                    let whole = first.next_multiple_of(per_cluster)
                        ..(first + len) / per_cluster * per_cluster;
                    for sector in whole {
                        self.known[sector as usize] = Some(0);
                    }
                }
                4..6 => {
                    let unmap = self.rng.chance(1, 2);
                    self.engine
                        .write_zeroes(self.queue, offset, bytes, unmap)
                        .await
                        .unwrap();
                    self.known[known].fill(Some(0));
                }
                6..10 => self.verify(first, len).await,
                _ => {
                    let data: Vec<u8> = (first..first + len)
                        .flat_map(|s| stamp(self.number, self.round, s))
                        .collect();
                    lab::write(&self.engine, self.queue, offset, &data, false)
                        .await
                        .unwrap();
                    self.known[known].fill(Some(self.round));
                }
            }
        }
        self
    }

    async fn verify(&self, first: u64, len: u64) {
        let bytes = lab::read(&self.engine, self.queue, first * SECTOR, len * SECTOR)
            .await
            .unwrap();
        self.compare(first, &bytes);
    }

    fn compare(&self, first: u64, bytes: &[u8]) {
        for (bytes, sector) in bytes.chunks_exact(512).zip(first..) {
            let expected = match self.known[sector as usize] {
                None => continue,
                Some(0) => [0; 512],
                Some(round) => stamp(self.number, round, sector),
            };
            assert!(
                bytes == expected,
                "sector {sector} of owner {}: {:02x?}, not {:02x?}",
                self.number,
                &bytes[..16],
                &expected[..16]
            );
        }
    }
}

fn scratch() -> tempfile::TempDir {
    // Beside the build, not in /tmp, which may know no direct I/O.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open_file(path: &Path, cache: CacheMode, queues: usize) -> Engine {
    let options = chain::Options {
        writable: true,
        cache,
        image: ImageOptions {
            queues,
            ..ImageOptions::default()
        },
        ..chain::Options::default()
    };
    let chain = lab::block_on(chain::open(path, &options)).unwrap();
    let options = engine::Options {
        request_unit: 512,
        ..engine::Options::default()
    };
    Engine::new(chain, options)
}

/// Threads with a ring each, tasks on each of them, all in the same clusters.
fn storm(image: &sim::Image, cache: CacheMode, seed: u64, steps: u32) {
    const THREADS: u64 = 3;
    const TASKS: u64 = 3;
    let dir = scratch();
    let path: PathBuf = dir.path().join("a.qcow2");
    image.save(&path).unwrap();
    let engine = Arc::new(open_file(&path, cache, THREADS as usize));
    let done = std::sync::atomic::AtomicBool::new(false);
    let owners: Vec<(u64, Vec<Option<u32>>)> = std::thread::scope(|scope| {
        // And a flusher with plain system calls, as the housekeeper is.
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                lab::block_on(engine.write_back()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
        });
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let engine = Arc::clone(&engine);
                scope.spawn(move || {
                    Runtime::uring(32).unwrap().block_on(async {
                        engine.queue_started(thread as u16).unwrap();
                        let tasks: Vec<_> = (0..TASKS)
                            .map(|task| {
                                let number = thread * TASKS + task;
                                let queue = thread as u16;
                                let owner =
                                    Owner::new(&engine, queue, number, THREADS * TASKS, seed);
                                spawn(owner.work(steps))
                            })
                            .collect();
                        let mut known = Vec::new();
                        for task in tasks {
                            let owner = task.await;
                            known.push((owner.number, owner.known));
                        }
                        known
                    })
                })
            })
            .collect();
        let owners = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        owners
    });
    lab::block_on(engine.close()).unwrap();
    drop(engine);
    lab::qemu_check(&path, false);
    // What QEMU reads is what every owner knows.
    let raw = dir.path().join("raw");
    let names = [path.to_str().unwrap(), raw.to_str().unwrap()];
    common::qemu_img(&[["convert", "-O", "raw"].as_slice(), &names].concat());
    let content = std::fs::read(&raw).unwrap();
    let engine = Arc::new(open_file(&path, cache, 1));
    for (number, known) in owners {
        let mut owner = Owner::new(&engine, 0, number, THREADS * TASKS, seed);
        owner.known = known;
        owner.compare(0, &content);
    }
}

/// Row 19.
#[test]
fn row_19_many_queues_in_the_same_clusters() {
    lab::watched(120, || {
        for (seed, cluster) in [(1, "512"), (2, "4096"), (3, "65536")] {
            let size = if seed == 3 { 4 << 20 } else { 1 << 20 };
            let image = lab::created(&format!("cluster_size={cluster}"), size);
            storm(&image, CacheMode::Writeback, seed, 400);
        }
    });
}

/// The same where writes go through read-modify-write of whole sectors.
#[test]
fn row_19_many_queues_with_direct_io() {
    lab::watched(120, || {
        for (seed, cluster) in [(11, "4096"), (12, "65536")] {
            let image = lab::created(&format!("cluster_size={cluster}"), 6 << 20);
            storm(&image, CacheMode::None, seed, 250);
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

#[test]
fn a_slow_read_never_sees_the_next_owner() {
    lab::watched(60, || {
        for cluster in ["512", "4096", "65536"] {
            let image = filled(cluster, false);
            slow(
                image.clone(),
                two_queues(),
                SimKind::Read,
                0x11,
                discard_first,
            );
            slow(image, two_queues(), SimKind::Read, 0x11, zero_first);
        }
    });
}

#[test]
fn a_slow_write_never_lands_on_the_next_owner() {
    lab::watched(60, || {
        for cluster in ["512", "4096", "65536"] {
            let image = filled(cluster, false);
            slow(
                image.clone(),
                two_queues(),
                SimKind::Write,
                0x11,
                discard_first,
            );
            slow(image, two_queues(), SimKind::Write, 0x11, zero_first);
        }
    });
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
