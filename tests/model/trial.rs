//! One seed: an image of some shape, and random work on it, opened in one way
//! after the other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmaps::Bitmaps;
use super::shape::{Data, Shape, Way, pick};
use super::task::Task;
use super::{assert_same, name};
use crate::common::check::Checked;
use crate::common::turns::Turn;
use crate::common::{lab, qemu_img};
use qcow2_ublk::chain;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::create::Preallocation;
use qcow2_ublk::qcow2::{NewSnapshot, Selector};
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::storage::sim::{self, Rng};

/// Most snapshots of an image.
const SNAPSHOTS: usize = 4;

struct Snapshot {
    id: Vec<u8>,
    content: Vec<u8>,
}

/// What the image is to be.
struct Model {
    active: Vec<u8>,
    snapshots: Vec<Snapshot>,
    bitmaps: Bitmaps,
}

pub(crate) struct Trial {
    shape: Shape,
    path: PathBuf,
    model: Model,
    rng: Rng,
    seed: u64,
}

impl Trial {
    pub(crate) fn new(folder: &Path, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let path = folder.join("a.qcow2");
        let active = shape.create(&path, seed);
        Self {
            shape,
            path,
            model: Model {
                active,
                snapshots: Vec::new(),
                bitmaps: Bitmaps::default(),
            },
            rng,
            seed,
        }
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Works on it; with `qemu`, that judges it too.
    pub(crate) fn run(mut self, qemu: bool) {
        let rounds = 2 + self.rng.below(2);
        for round in 0..rounds {
            let way = Way::random(&mut self.rng);
            eprintln!("round {round}: {way:?}");
            way.runtime().block_on(self.round(way));
            self.judge_file();
            if self.rng.chance(1, 4) {
                self.qemus_turn();
            }
        }
        if qemu && self.shape.is_qemus() {
            self.ask_qemu();
        }
    }

    async fn round(&mut self, way: Way) {
        let engine = way.open(&self.path).await;
        self.compare(&engine, "opened").await;
        for _ in 0..1 + self.rng.below(4) {
            self.burst(&engine, way).await;
            if self.rng.chance(1, 2) {
                self.compare(&engine, "after a burst").await;
            }
            self.act(&engine).await;
        }
        self.compare(&engine, "in the end").await;
        engine.close().await.unwrap();
    }

    async fn compare(&self, engine: &Engine, when: &str) {
        assert_eq!(engine.size(), self.model.active.len() as u64, "{when}");
        let seen = lab::read(engine, 0, 0, engine.size()).await.unwrap();
        assert_same(&seen, &self.model.active, when);
        self.model.bitmaps.compare(engine).await;
    }

    /// Requests by some tasks side by side. Where the part of one ends and the
    /// next begins is the middle of a cluster, in general.
    async fn burst(&mut self, engine: &Arc<Engine>, way: Way) {
        let size = self.model.active.len() as u64;
        let count = if size < 4096 {
            1
        } else {
            1 + self.rng.below(3)
        };
        let operations = 5 + self.rng.below(25) as u32;
        let mut tasks = Vec::new();
        let mut start = 0;
        for number in 1..=count {
            let end = if number == count {
                size
            } else {
                (size * number / count - self.rng.below(size / 8)) / 512 * 512
            };
            let task = Task {
                engine: Arc::clone(engine),
                queue: self.rng.below(way.queues.into()) as u16,
                start,
                model: self.model.active[start as usize..end as usize].to_vec(),
                rng: Rng::new(self.rng.next_u64()),
                compress: self.shape.can_compress(),
                discards: way.discards(),
            };
            tasks.push(spawn(task.work(operations)));
            start = end;
        }
        let mut active = Vec::with_capacity(size as usize);
        for task in tasks {
            let done = task.await;
            assert_eq!(done.start, active.len() as u64);
            active.extend(done.model);
            self.model.bitmaps.record(&done.changed);
        }
        self.model.active = active;
    }

    /// Something that changes more than what the disk shows.
    async fn act(&mut self, engine: &Engine) {
        match self.rng.below(5) {
            0..2 if self.shape.can_have_snapshots() => self.change_snapshots(engine).await,
            2 if self.shape.version == 3 => {
                let image = engine.chain().top();
                self.model.bitmaps.act(image, &mut self.rng).await;
            }
            3 => self.resize(engine).await,
            _ => {}
        }
    }

    async fn change_snapshots(&mut self, engine: &Engine) {
        let image = engine.chain().top();
        let count = self.model.snapshots.len();
        if count == 0 || count < SNAPSHOTS && self.rng.chance(1, 2) {
            let new = NewSnapshot::now(format!("at {}", self.rng.below(9)));
            match image.create_snapshot(new).await {
                Ok(()) => self.add_snapshot(),
                // Clusters that are shared too often already.
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                    assert!(self.shape.refcount_bits < 8, "{error}");
                }
            }
            return;
        }
        let which = self.rng.below(count as u64) as usize;
        let id = Selector::Id(self.model.snapshots[which].id.clone());
        match self.rng.below(3) {
            0 => {
                image.delete_snapshot(id).await.unwrap();
                self.model.snapshots.remove(which);
            }
            1 if self.model.bitmaps.is_empty() => {
                image.apply_snapshot(id).await.unwrap();
                self.model.active = self.model.snapshots[which].content.clone();
            }
            1 => {
                let refused = image.apply_snapshot(id).await.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
            }
            _ => {
                let name = b"another".to_vec();
                image.rename_snapshot(id, name).await.unwrap();
            }
        }
    }

    fn add_snapshot(&mut self) {
        let ids = self.model.snapshots.iter().map(|snapshot| &snapshot.id);
        let largest = ids.map(|id| String::from_utf8_lossy(id).parse::<u64>().unwrap());
        let id = largest.max().unwrap_or(0) + 1;
        self.model.snapshots.push(Snapshot {
            id: id.to_string().into_bytes(),
            content: self.model.active.clone(),
        });
    }

    async fn resize(&mut self, engine: &Engine) {
        let size = self.model.active.len() as u64;
        let shrinks = self.rng.chance(1, 2);
        let new = if shrinks {
            (size / 512 - self.rng.below(size / 512 / 3 + 1)) * 512
        } else {
            size + self.rng.below(1000) * 512
        };
        let done = if shrinks {
            engine.shrink(new).await
        } else {
            let space = pick(
                &mut self.rng,
                &[
                    Preallocation::Off,
                    Preallocation::Off,
                    Preallocation::Metadata,
                    Preallocation::Falloc,
                    Preallocation::Full,
                ],
            );
            engine.grow_preallocated(new, space).await
        };
        if self.shape.version == 2 && !self.model.snapshots.is_empty() {
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Unsupported);
            return;
        }
        done.unwrap();
        self.model.active.resize(new as usize, 0);
        self.model.bitmaps.resize(new);
    }

    /// No more and no less is counted than there is.
    fn judge_file(&self) {
        let image = sim::Image::load(&self.path).unwrap();
        let data = self.shape.data_path(&self.path);
        let data = data.map(|path| sim::Image::load(&path).unwrap());
        let checked = Checked::open(&image).unwrap().with_data(data.as_ref());
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
        assert_eq!(found.leaks, 0);
        let ids: Vec<_> = checked.snapshots().into_iter().map(|s| s.id).collect();
        let expected: Vec<_> = self.model.snapshots.iter().map(|s| &s.id).collect();
        assert_eq!(ids.iter().collect::<Vec<_>>(), expected);
        if self.shape.data == Data::RawFile {
            let bytes = std::fs::read(self.path.with_file_name("data")).unwrap();
            // QEMU makes it a little longer.
            let (disk, behind) = bytes.split_at(self.model.active.len());
            assert_same(disk, &self.model.active, "the raw data file");
            assert!(behind.iter().all(|&b| b == 0), "behind the disk");
        }
        // With the key, and what lies below.
        let way = Way::random(&mut Rng::new(self.seed));
        for snapshot in &self.model.snapshots {
            let options = chain::Options {
                snapshot: Some(Selector::Id(snapshot.id.clone())),
                ..way.options(false)
            };
            let seen = lab::block_on(async {
                let chain = chain::open(&self.path, &options).await.unwrap();
                let engine = Engine::new(chain, Default::default());
                lab::read(&engine, 0, 0, engine.size()).await.unwrap()
            });
            assert_same(&seen, &snapshot.content, "a snapshot");
        }
    }

    /// QEMU works on it, where it can.
    fn qemus_turn(&mut self) {
        if self.shape.luks != 0 || !self.model.bitmaps.is_empty() {
            return;
        }
        let size = self.model.active.len() as u64;
        let turn = Turn::random(&mut self.rng, size);
        turn.by_qemu(&self.path);
        turn.on_model(&mut self.model.active);
        let room = self.shape.refcount_bits >= 8 && self.model.snapshots.len() < SNAPSHOTS;
        if self.shape.can_have_snapshots() && room && self.rng.chance(1, 2) {
            qemu_img(&["snapshot", "-c", "QEMU's", name(&self.path)]);
            self.add_snapshot();
        }
    }

    /// QEMU sees what we see.
    fn ask_qemu(&self) {
        let (options, image) = self.shape.for_qemu(&self.path);
        let qemu = |command: &str, more: &[&str]| {
            let mut args = vec![command];
            args.extend(options.iter().map(String::as_str));
            args.extend(more);
            qemu_img(&args)
        };
        qemu("check", &["-q", &image]);
        let raw = self.path.with_file_name("raw");
        let convert = |which: &[&str]| {
            let names = [&*image, "-O", "raw", name(&raw)];
            qemu("convert", &[which, &names].concat());
            std::fs::read(&raw).unwrap()
        };
        assert_same(&convert(&[]), &self.model.active, "QEMU's view");
        for snapshot in &self.model.snapshots {
            let id = format!("snapshot.id={}", String::from_utf8_lossy(&snapshot.id));
            let seen = convert(&["-l", &id]);
            // It shows as much of it as the active disk is long.
            let len = seen.len().min(snapshot.content.len());
            assert_same(&seen[..len], &snapshot.content[..len], "QEMU's snapshot");
        }
    }
}
