//! A storm: threads with a ring each and tasks on each of them, all in the same
//! clusters of one image, and every task knows what its sectors hold.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_ublk::block::BlockHandler;
use qcow2_ublk::chain;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::ImageOptions;
use qcow2_ublk::runtime::{Runtime, spawn};
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::{self, Rng};

use super::{lab, qemu_img};

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
pub struct Owner {
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

    pub fn new(engine: &lab::Shared, queue: u16, number: u64, owners: u64, seed: u64) -> Self {
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

    pub async fn work(mut self, steps: u32) -> Self {
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

    pub fn compare(&self, first: u64, bytes: &[u8]) {
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

pub fn scratch() -> tempfile::TempDir {
    // Beside the build, not in /tmp, which may know no direct I/O.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn open_file(path: &Path, cache: CacheMode, queues: usize) -> Engine {
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

/// How many do how much.
#[derive(Clone, Copy)]
pub struct Storm {
    pub threads: u64,
    /// On each thread; at most 127 on all of them.
    pub tasks: u64,
    pub cache: CacheMode,
    pub seed: u64,
    /// Of each task.
    pub steps: u32,
}

impl Storm {
    /// In a copy of `image`.
    pub fn over(self, image: &sim::Image) {
        let dir = scratch();
        let path = dir.path().join("a.qcow2");
        image.save(&path).unwrap();
        let engine = Arc::new(open_file(&path, self.cache, self.threads as usize));
        let done = AtomicBool::new(false);
        let owners: Vec<(u64, Vec<Option<u32>>)> = std::thread::scope(|scope| {
            // And a flusher with plain system calls, as the housekeeper is.
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    lab::block_on(engine.write_back()).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
            });
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| {
                    let engine = Arc::clone(&engine);
                    scope.spawn(move || self.queue(&engine, thread))
                })
                .collect();
            let owners = threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect();
            done.store(true, Ordering::SeqCst);
            owners
        });
        lab::block_on(engine.close()).unwrap();
        drop(engine);
        lab::qemu_check(&path, false);
        // What QEMU reads is what every owner knows.
        let raw = dir.path().join("raw");
        let names = [path.to_str().unwrap(), raw.to_str().unwrap()];
        qemu_img(&[["convert", "-O", "raw"].as_slice(), &names].concat());
        let content = std::fs::read(&raw).unwrap();
        let engine = Arc::new(open_file(&path, self.cache, 1));
        for (number, known) in owners {
            let mut owner = self.owner(&engine, 0, number);
            owner.known = known;
            owner.compare(0, &content);
        }
    }

    /// What a thread does; what its owners know afterwards.
    fn queue(self, engine: &lab::Shared, thread: u64) -> Vec<(u64, Vec<Option<u32>>)> {
        Runtime::uring(32).unwrap().block_on(async {
            let queue = thread as u16;
            engine.queue_started(queue).unwrap();
            let tasks: Vec<_> = (0..self.tasks)
                .map(|task| self.owner(engine, queue, thread * self.tasks + task))
                .map(|owner| spawn(owner.work(self.steps)))
                .collect();
            let mut known = Vec::new();
            for task in tasks {
                let owner = task.await;
                known.push((owner.number, owner.known));
            }
            known
        })
    }

    fn owner(self, engine: &lab::Shared, queue: u16, number: u64) -> Owner {
        Owner::new(engine, queue, number, self.threads * self.tasks, self.seed)
    }
}
