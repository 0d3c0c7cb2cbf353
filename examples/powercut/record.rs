//! The work: several threads write, zero and discard at random, each in
//! blocks of its own; now and then all of it is flushed, and that is marked.
#![allow(unreachable_pub, reason = "a part of a program")]

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use qcow2_ublk::runtime::Runtime;
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::storage::{self, CacheMode, Storage};

use crate::Outcome;
use crate::journal::{BLOCK, Change, Journal, Mark, stamp};

/// Threads.
const THREADS: u64 = 4;
/// Blocks that one thread has side by side: those of a cluster of 64 KiB.
const GROUP: u64 = 16;
/// Changes between two flushes that are marked, at least.
const ROUND: u64 = 20;

pub struct Work<'a> {
    pub device: &'a Path,
    /// The name of the device that records.
    pub recorder: &'a str,
    pub rounds: u64,
    pub seed: u64,
}

#[derive(Default)]
struct Shared {
    clock: AtomicU64,
    done: AtomicBool,
    changes: Mutex<Vec<Change>>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

impl Work<'_> {
    pub fn run(&self) -> Outcome<Journal> {
        let shared = Shared::default();
        let options = storage::OpenOptions::read_write().cache(CacheMode::None);
        let storage = Storage::open(self.device, &options)?;
        let flushed = OpenOptions::new().write(true).open(self.device)?;
        let marks = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|number| {
                    let (shared, storage) = (&shared, &storage);
                    scope.spawn(move || self.thread(number, shared, storage))
                })
                .collect();
            let marks = self.flush_often(&flushed, &shared);
            shared.done.store(true, Ordering::SeqCst);
            for worker in workers {
                worker.join().map_err(|_| "a thread panicked")??;
            }
            marks
        })?;
        let changes = shared.changes.into_inner().map_err(|e| e.to_string())?;
        println!("{} changes, {} flushes", changes.len(), marks.len());
        Ok(Journal { changes, marks })
    }

    fn flush_often(&self, device: &File, shared: &Shared) -> Outcome<Vec<Mark>> {
        let changes = || shared.changes.lock().map(|changes| changes.len() as u64);
        let mut marks: Vec<Mark> = Vec::new();
        for number in 0..self.rounds {
            while changes().map_err(|e| e.to_string())? < (number + 1) * ROUND {
                std::thread::sleep(Duration::from_millis(1));
            }
            let flush_started = shared.now();
            device.sync_all()?;
            let text = format!("mark powercut-{number}");
            let status = Command::new("dmsetup")
                .args(["message", self.recorder, "0", &text])
                .status()?;
            if !status.success() {
                return Err("dmsetup cannot mark the log".into());
            }
            let marked = shared.now();
            marks.push(Mark {
                flush_started,
                marked,
            });
        }
        Ok(marks)
    }

    fn thread(&self, number: u64, shared: &Shared, storage: &Storage) -> Outcome<()> {
        let mut rng = Rng::new(self.seed * THREADS + number);
        let groups = storage.len() / BLOCK / GROUP / THREADS;
        let runtime = Runtime::best(8)?;
        let mut value = 0;
        while !shared.done.load(Ordering::SeqCst) {
            let group = (rng.below(groups) * THREADS + number) * GROUP;
            let (mut first, mut count) = (group, GROUP);
            let kind = rng.below(16);
            if kind > 1 {
                first += rng.below(GROUP);
                count = 1 + rng.below(group + GROUP - first);
            }
            value += 1;
            let started = shared.now();
            let mut put = value * THREADS + number;
            let (offset, len) = (first * BLOCK, count * BLOCK);
            match kind {
                0 => self.discard(offset, len)?,
                1..4 => runtime.block_on(storage.write_zeroes(offset, len, kind < 3))?,
                4 => runtime.block_on(storage.sync())?,
                _ => {
                    let blocks = first..first + count;
                    let bytes: Vec<u8> = blocks.flat_map(|block| stamp(put, block)).collect();
                    runtime.block_on(storage.write(offset, &bytes))?;
                }
            }
            let acknowledged = shared.now();
            if kind == 4 {
                continue;
            }
            if kind < 4 {
                put = 0;
            }
            let change = Change {
                first,
                count,
                value: put,
                started,
                acknowledged,
            };
            shared
                .changes
                .lock()
                .map_err(|e| e.to_string())?
                .push(change);
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Outcome<()> {
        let status = Command::new("blkdiscard")
            .args(["-f", "-o", &offset.to_string(), "-l", &len.to_string()])
            .arg(self.device)
            .stderr(Stdio::null())
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err("blkdiscard failed".into())
        }
    }
}
