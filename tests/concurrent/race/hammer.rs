//! Queues that do everything at once to the same few clusters, and others that
//! make, read, apply and delete snapshots meanwhile.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2_ublk::block::BlockHandler;
use qcow2_ublk::chain;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::{NewSnapshot, Selector};
use qcow2_ublk::runtime::{Runtime, spawn, yield_now};
use qcow2_ublk::storage::sim::Rng;

use super::history::{Change, Clock, Log, Seen, Span, Tag, ZEROS};
use super::sector::{SECTOR, decode, encode};
use super::shape::Shape;
use crate::common::{lab, storm};

/// After this time a trial that still runs says what it sees.
const LATE: Duration = Duration::from_secs(25);

/// What all of a trial share.
pub(crate) struct Arena {
    pub(crate) shape: Shape,
    pub(crate) path: PathBuf,
    pub(crate) engine: Arc<Engine>,
    clock: Clock,
    tags: AtomicU64,
    /// The disk changes its size.
    resizes: bool,
    folder: tempfile::TempDir,
}

/// The files of a trial, which nobody has open.
pub(crate) struct Files {
    pub(crate) shape: Shape,
    pub(crate) path: PathBuf,
    _folder: tempfile::TempDir,
}

/// How many do how much.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) queues: u64,
    /// On each queue.
    pub(crate) tasks: u64,
    /// Of each task.
    pub(crate) steps: u32,
    /// Threads that work on snapshots.
    pub(crate) keepers: u64,
    pub(crate) snapshots: u32,
    /// How often the disk loses its last clusters and gets others.
    pub(crate) resizes: u32,
}

/// A snapshot that is there in the end, and what it shows.
pub(crate) struct Kept {
    pub(crate) id: Vec<u8>,
    pub(crate) content: Vec<u8>,
}

impl Arena {
    pub(crate) fn new(shape: Shape, work: Work) -> Arc<Self> {
        let folder = storm::scratch();
        let path = folder.path().join("a.qcow2");
        shape.create(&path);
        let options = shape.options(work.queues as usize);
        let chain = lab::block_on(chain::open(&path, &options)).unwrap();
        let options = engine::Options {
            // With direct I/O, smaller than what is written at once: writers
            // of the same block have to exclude each other.
            request_unit: if shape.direct { 1 } else { SECTOR as u32 },
            ..engine::Options::default()
        };
        Arc::new(Self {
            shape,
            path,
            engine: Arc::new(Engine::new(chain, options)),
            clock: Clock::default(),
            // Beside the one of what lies below.
            tags: AtomicU64::new(2),
            resizes: work.resizes > 0,
            folder,
        })
    }

    /// Lets all work until each is done.
    pub(crate) fn work(self: &Arc<Self>, work: Work, seed: u64) -> (Log, Vec<Kept>) {
        let done = AtomicBool::new(false);
        // After what has shown at first.
        self.clock.now();
        std::thread::scope(|scope| {
            // As the housekeeper does, with plain system calls.
            scope.spawn(|| {
                let begin = Instant::now();
                let mut asked = false;
                while !done.load(Ordering::SeqCst) {
                    if begin.elapsed() > LATE && !std::mem::replace(&mut asked, true) {
                        eprintln!("what hangs? {:#?}", self.engine);
                    }
                    lab::block_on(self.engine.write_back()).unwrap();
                    std::thread::sleep(Duration::from_millis(3));
                }
            });
            let queues: Vec<_> = (0..work.queues)
                .map(|queue| scope.spawn(move || self.queue(queue, work, seed)))
                .collect();
            let keepers: Vec<_> = (0..work.keepers)
                .map(|number| scope.spawn(move || self.keeper(number, work, seed)))
                .collect();
            let resizer = scope.spawn(|| lab::block_on(self.resize(work.resizes)));
            let mut log = Log::default();
            let mut kept = Vec::new();
            let mut failed = None;
            match resizer.join() {
                Ok(changes) => log.changes.extend(changes),
                Err(panic) => failed = Some(panic),
            }
            for queue in queues {
                match queue.join() {
                    Ok(other) => log.add(other),
                    Err(panic) => failed = Some(panic),
                }
            }
            for keeper in keepers {
                match keeper.join() {
                    Ok((other, snapshots)) => {
                        log.add(other);
                        kept.extend(snapshots);
                    }
                    Err(panic) => failed = Some(panic),
                }
            }
            done.store(true, Ordering::SeqCst);
            if let Some(panic) = failed {
                std::panic::resume_unwind(panic);
            }
            (log, kept)
        })
    }

    fn queue(self: &Arc<Self>, queue: u64, work: Work, seed: u64) -> Log {
        Runtime::uring(32).unwrap().block_on(async {
            self.engine.queue_started(queue as u16).unwrap();
            let tasks: Vec<_> = (0..work.tasks)
                .map(|task| {
                    let hand = Hand {
                        arena: Arc::clone(self),
                        queue: queue as u16,
                        rng: Rng::new(seed << 16 | queue << 8 | task),
                        log: Log::default(),
                    };
                    spawn(hand.work(work.steps))
                })
                .collect();
            let mut log = Log::default();
            for task in tasks {
                log.add(task.await);
            }
            log
        })
    }

    async fn resize(&self, times: u32) -> Vec<Change> {
        let whole = self.engine.size();
        let less = 3 * self.shape.cluster;
        let mut changes = Vec::new();
        for _ in 0..times {
            let begin = self.now();
            self.engine.shrink(less).await.unwrap();
            let end = self.now();
            changes.push(Change {
                what: "shrink",
                span: Span { begin, end },
                first: less / SECTOR,
                tags: vec![ZEROS; ((whole - less) / SECTOR) as usize],
                surely: true,
            });
            self.engine.grow(whole).await.unwrap();
        }
        changes
    }

    fn keeper(self: &Arc<Self>, number: u64, work: Work, seed: u64) -> (Log, Vec<Kept>) {
        lab::block_on(async {
            let mut keeper = Keeper {
                arena: Arc::clone(self),
                number,
                rng: Rng::new(seed << 16 | 0xff00 | number),
                log: Log::default(),
                kept: Vec::new(),
            };
            for round in 0..work.snapshots {
                keeper.round(round).await;
            }
            (keeper.log, keeper.kept)
        })
    }

    /// Closes the image, when nobody works any more.
    pub(crate) fn close(self: Arc<Self>) -> Files {
        let arena = Arc::into_inner(self).expect("nobody works");
        lab::block_on(arena.engine.close()).unwrap();
        Files {
            shape: arena.shape,
            path: arena.path,
            _folder: arena.folder,
        }
    }

    /// The whole disk, by a read of its own.
    pub(crate) async fn read_all(&self, engine: &Engine) -> Vec<u8> {
        lab::read(engine, 0, 0, engine.size()).await.unwrap()
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.now()
    }
}

/// One request after the other.
struct Hand {
    arena: Arc<Arena>,
    queue: u16,
    rng: Rng,
    log: Log,
}

impl Hand {
    async fn work(mut self, steps: u32) -> Log {
        for _ in 0..steps {
            self.step().await;
        }
        self.log
    }

    /// Sectors in a row: often in the second cluster, where all meet.
    fn pick(&mut self) -> (u64, u64) {
        let shape = self.arena.shape;
        let per_cluster = shape.cluster / SECTOR;
        let first = if self.rng.chance(1, 2) {
            per_cluster + self.rng.below(per_cluster)
        } else {
            self.rng.below(shape.sectors)
        };
        let longest = if self.rng.chance(1, 3) {
            3 * per_cluster
        } else {
            1 + per_cluster / 4
        };
        let len = 1 + self.rng.below(longest);
        // What discards and zeroes need to be of effect.
        let (first, len) = if self.rng.chance(1, 4) {
            let first = first / per_cluster * per_cluster;
            (first, len.next_multiple_of(per_cluster))
        } else {
            (first, len)
        };
        (first, len.min(shape.sectors - first))
    }

    async fn step(&mut self) {
        let (first, len) = self.pick();
        let (offset, bytes) = (first * SECTOR, len * SECTOR);
        let arena = Arc::clone(&self.arena);
        let (engine, queue) = (&*arena.engine, self.queue);
        let begin = arena.now();
        // What it changes, if anything.
        let mut tag = None;
        let mut what = "write";
        let mut surely = true;
        let result = match self.rng.below(20) {
            0..7 => {
                let new = arena.tags.fetch_add(1, Ordering::SeqCst);
                tag = Some(new);
                let data = content(first, len, new);
                let fua = self.rng.chance(1, 30);
                lab::write(engine, queue, offset, &data, fua).await
            }
            7..9 if arena.shape.can_compress() => {
                let new = arena.tags.fetch_add(1, Ordering::SeqCst);
                tag = Some(new);
                what = "compressed write";
                let data = content(first, len, new);
                engine.write_compressed(queue, offset, &data, None).await
            }
            9..11 => {
                tag = Some(ZEROS);
                let unmap = self.rng.chance(1, 2);
                what = if unmap { "unmapping zero" } else { "zero" };
                engine.write_zeroes(queue, offset, bytes, unmap).await
            }
            11..13 => {
                tag = Some(ZEROS);
                (what, surely) = ("discard", false);
                engine.discard(queue, offset, bytes).await
            }
            13 => engine.flush().await,
            _ => {
                let read = lab::read(engine, queue, offset, bytes).await;
                read.map(|data| {
                    let end = arena.now();
                    match decode(first, &data) {
                        Ok(sectors) => self.log.reads.push(Seen {
                            span: Span { begin, end },
                            sectors,
                        }),
                        Err(what) => self
                            .log
                            .wrong
                            .push(format!("from {begin} to {end}, {what}")),
                    }
                })
            }
        };
        let end = arena.now();
        match (result, tag) {
            (Ok(()), Some(tag)) => self.log.changes.push(Change {
                what,
                span: Span { begin, end },
                first,
                tags: vec![tag; len as usize],
                surely,
            }),
            (Ok(()), None) => {}
            // The disk was smaller.
            (Err(error), _) if arena.resizes && error.kind() == ErrorKind::OutOfBounds => {}
            (Err(error), _) => self.log.wrong.push(error.to_string()),
        }
    }
}

fn content(first: u64, len: u64, tag: Tag) -> Vec<u8> {
    (first..first + len)
        .flat_map(|sector| encode(sector, tag))
        .collect()
}

/// Makes snapshots of the disk in use, and looks at what they show.
struct Keeper {
    arena: Arc<Arena>,
    number: u64,
    rng: Rng,
    log: Log,
    /// Ours that are there.
    kept: Vec<Kept>,
}

impl Keeper {
    async fn round(&mut self, round: u32) {
        let id = self.create(round).await;
        let content = self.read(&id).await;
        self.kept.push(Kept { id, content });
        if self.arena.shape.can_apply() && self.rng.chance(1, 3) {
            self.apply().await;
        }
        if self.kept.len() > 2 || self.rng.chance(1, 4) {
            self.delete().await;
        }
    }

    /// Makes a snapshot; its ID, which nobody else's has.
    async fn create(&mut self, round: u32) -> Vec<u8> {
        let image = self.arena.engine.chain().top();
        let name = format!("{} {round}", self.number).into_bytes();
        let begin = self.arena.now();
        let new = NewSnapshot::now(name.clone());
        image.create_snapshot(new).await.unwrap();
        let end = self.arena.now();
        let snapshots = image.snapshots().await.unwrap();
        let ids: HashSet<_> = snapshots.iter().map(|snapshot| &snapshot.id).collect();
        assert_eq!(ids.len(), snapshots.len(), "two have the same ID");
        let own: Vec<_> = snapshots.iter().filter(|s| s.name == name).collect();
        assert_eq!(own.len(), 1, "{snapshots:?}");
        self.log.snapshots.push(Seen {
            span: Span { begin, end },
            sectors: Vec::new(),
        });
        own[0].id.clone()
    }

    /// Reads the snapshot just made, twice; and others want to delete it.
    async fn read(&mut self, id: &[u8]) -> Vec<u8> {
        let arena = Arc::clone(&self.arena);
        let selector = Selector::Id(id.to_vec());
        let options = arena.shape.options(1);
        let reader = arena.engine.open_snapshot(selector.clone(), &options);
        let reader = reader.await.unwrap();
        let content = arena.read_all(&reader).await;
        let snapshot = self.log.snapshots.last_mut().unwrap();
        snapshot.sectors = decode(0, &content).unwrap();
        let image = arena.engine.chain().top();
        if self.rng.chance(1, 2) {
            let deleted = image.delete_snapshot(selector).await;
            let kind = deleted.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::Busy), "it is being read");
        }
        for _ in 0..self.rng.below(20) {
            yield_now().await;
        }
        let again = arena.read_all(&reader).await;
        assert!(again == content, "a snapshot that changes");
        content
    }

    /// Makes the disk what one of the snapshots shows.
    async fn apply(&mut self) {
        let which = self.rng.below(self.kept.len() as u64) as usize;
        let kept = &self.kept[which];
        let selector = Selector::Id(kept.id.clone());
        let begin = self.arena.now();
        let image = self.arena.engine.chain().top();
        image.apply_snapshot(selector).await.unwrap();
        let end = self.arena.now();
        let sectors = decode(0, &kept.content).unwrap();
        assert_eq!(
            sectors.len() as u64,
            self.arena.shape.sectors,
            "torn sectors"
        );
        self.log.changes.push(Change {
            what: "apply",
            span: Span { begin, end },
            first: 0,
            tags: sectors.into_iter().map(|(_, tag)| tag).collect(),
            surely: true,
        });
    }

    /// Deletes one that shows what it did at first.
    async fn delete(&mut self) {
        let which = self.rng.below(self.kept.len() as u64) as usize;
        let kept = self.kept.swap_remove(which);
        let selector = Selector::Id(kept.id);
        let arena = Arc::clone(&self.arena);
        {
            let options = arena.shape.options(1);
            let reader = arena.engine.open_snapshot(selector.clone(), &options);
            let reader = reader.await.unwrap();
            let content = arena.read_all(&reader).await;
            assert!(content == kept.content, "a snapshot that has changed");
        }
        let image = arena.engine.chain().top();
        image.delete_snapshot(selector).await.unwrap();
    }
}
