//! P1 and P2: whatever the host drops at a power cut, in whatever order, the
//! image opens again with at most leaked clusters, and every sector has its
//! value at the last completed flush or a later one.
//!
//! Random work is recorded on a simulated disk; then the power is cut after
//! each record, in several ways, and what is left is judged by content, by a
//! checker of its own and, now and then, by QEMU.

mod common;

#[path = "crash/scenarios.rs"]
mod scenarios;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use common::check::Checked;
use common::lab::{self, Below, How};
use qcow2_ublk::block::{BlockHandler, Op, Payload, Request};
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, crash_images};

const SECTOR: u64 = 512;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// What it held at first.
    Original,
    Zeros,
    /// What write number so-and-so put there.
    Stamp(u32),
}

/// The bytes that write `id` puts into a sector: different in every word.
fn stamp(id: u32, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = u64::from(id) << 32 | sector << 8 | i as u64 | 1 << 63;
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// A change to some sectors by one request.
#[derive(Clone, Debug)]
struct Change {
    sectors: Range<u64>,
    value: Value,
    /// Sectors it turned out to leave alone.
    spared: BTreeSet<u64>,
    /// Records in the history when it was started.
    started: usize,
    /// Time of its completion.
    acknowledged: Option<u64>,
    /// Records when it was durable by itself (FUA).
    durable: Option<usize>,
}

#[derive(Clone, Debug)]
struct Flush {
    /// Time of its start.
    started: u64,
    /// Records in the history when it was complete.
    complete: usize,
}

struct Grow {
    started: usize,
    complete: usize,
    size: u64,
}

/// What was asked for and answered, with time.
#[derive(Default)]
struct Log {
    changes: Vec<Change>,
    flushes: Vec<Flush>,
    grows: Vec<Grow>,
    now: u64,
}

impl Log {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }
}

/// One kind of image and work.
#[derive(Clone)]
struct Scenario {
    name: &'static str,
    image: sim::Image,
    how: How,
    /// The external data file.
    data: Option<sim::Image>,
    /// That file is the disk as it is.
    raw: bool,
    /// What the layer below shows.
    below: Vec<u8>,
    tasks: u64,
    steps: u32,
    /// Rounds of work; between them the disk may grow or be opened anew.
    rounds: u32,
    grows: bool,
    reopens: bool,
    /// States to judge, about.
    states: u64,
    seed: u64,
}

impl Scenario {
    fn new(name: &'static str, image: sim::Image, seed: u64) -> Self {
        Self {
            name,
            image,
            how: How {
                queues: 2,
                ..How::default()
            },
            data: None,
            raw: false,
            below: Vec::new(),
            tasks: 4,
            steps: 12,
            rounds: 2,
            grows: false,
            reopens: true,
            states: 250,
            seed,
        }
    }

    fn run(self) {
        let name = self.name;
        eprintln!("{name}, seed {}", self.seed);
        lab::watched(120, || Trial::new(self).run());
    }
}

struct Trial {
    scenario: Scenario,
    disk: SimDisk,
    log: Rc<RefCell<Log>>,
    original: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    cluster: u64,
    zero_flag: bool,
}

impl Trial {
    fn new(mut scenario: Scenario) -> Self {
        let disk = SimDisk::with_image(scenario.image.clone());
        scenario.how.data = scenario.data.clone().map(|data| disk.beside(data));
        let checked = Checked::open(&scenario.image)
            .unwrap()
            .with_data(scenario.data.as_ref());
        let snapshots = (0..checked.snapshots().len())
            .map(|i| checked.snapshot_content(i, &scenario.below))
            .collect();
        let original = checked.active_content(&scenario.below);
        assert!(checked.check().corruptions.is_empty(), "as made");
        Self {
            disk,
            log: Rc::default(),
            original,
            snapshots,
            cluster: checked.header.cluster_size(),
            zero_flag: checked.header.version >= 3,
            scenario,
        }
    }

    fn run(self) {
        let scenario = &self.scenario;
        let mut rng = Rng::new(scenario.seed);
        self.disk.shuffle(Some(scenario.seed));
        lab::block_on(async {
            let how = &scenario.how;
            let mut engine = Arc::new(lab::open(&self.disk, how).await.unwrap());
            for round in 0..scenario.rounds {
                if round > 0 && scenario.grows {
                    self.grow(&engine, &mut rng).await;
                }
                let tasks: Vec<_> = (0..scenario.tasks)
                    .map(|number| {
                        let task = Task {
                            engine: Arc::clone(&engine),
                            disk: self.disk.clone(),
                            log: Rc::clone(&self.log),
                            number,
                            tasks: scenario.tasks,
                            cluster: self.cluster,
                            zeros_certain: self.zero_flag || scenario.below.is_empty(),
                            rng: Rng::new(rng.next_u64()),
                        };
                        spawn(task.work(scenario.steps))
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
                if scenario.reopens && rng.chance(1, 2) {
                    let started = self.log.borrow_mut().tick();
                    engine.close().await.unwrap();
                    let complete = self.disk.recorded();
                    self.log
                        .borrow_mut()
                        .flushes
                        .push(Flush { started, complete });
                    engine = Arc::new(lab::open(&self.disk, how).await.unwrap());
                }
            }
        });
        self.judge_all(&mut rng);
    }

    async fn grow(&self, engine: &lab::Shared, rng: &mut Rng) {
        let started = self.disk.recorded();
        let size = engine.size() + (1 + rng.below(3)) * engine.size() / 4 / SECTOR * SECTOR;
        engine.grow(size).await.unwrap();
        self.log.borrow_mut().grows.push(Grow {
            started,
            complete: self.disk.recorded(),
            size,
        });
    }

    fn judge_all(&self, rng: &mut Rng) {
        let history = self.disk.history();
        let random = 5;
        let total = history.records.len() as u64 * (3 + random as u64);
        let chance = self.scenario.states.min(total);
        let mut judged = 0_u64;
        for crash in crash_images(&history, self.scenario.seed, random) {
            // Where a flush has just completed, always: nothing later may be
            // needed.
            let flushed = self
                .log
                .borrow()
                .flushes
                .iter()
                .any(|f| f.complete == crash.point);
            if !flushed && !rng.chance(chance, total) {
                continue;
            }
            judged += 1;
            let [image, data @ ..] = &crash.images[..] else {
                panic!("there is a disk");
            };
            let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.judge(crash.point, image, data.first(), judged.is_multiple_of(60));
            }));
            if let Err(panic) = verdict {
                let name = self.scenario.name;
                eprintln!("{name}, seed {}: {crash}", self.scenario.seed);
                for (number, record) in history.records.iter().enumerate().take(crash.point) {
                    eprintln!("#{number} {record}");
                }
                std::panic::resume_unwind(panic);
            }
        }
        eprintln!(
            "  {judged} states of {} records judged",
            history.records.len()
        );
        assert!(judged > 20, "too few states to mean anything");
    }

    fn judge(&self, point: usize, image: &sim::Image, data: Option<&sim::Image>, ask_qemu: bool) {
        let checked = Checked::open(image).expect("the image opens");
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
        for (index, snapshot) in self.snapshots.iter().enumerate() {
            let now = checked.snapshot_content(index, &self.scenario.below);
            assert!(now == *snapshot, "snapshot {index} changed");
        }
        let disk = SimDisk::with_image(image.clone());
        let mut how = self.scenario.how.clone();
        how.data = data.map(|data| disk.beside(data.clone()));
        let content = lab::block_on(async {
            let engine = lab::open(&disk, &how).await.unwrap();
            let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            // Life goes on with the image.
            let bytes = vec![0xcd; (2 * self.cluster).min(engine.size()) as usize];
            lab::write(&engine, 0, 0, &bytes, false).await.unwrap();
            engine.discard(0, 0, self.cluster).await.unwrap();
            engine.close().await.unwrap();
            content
        });
        let found = Checked::open(&disk.image()).unwrap().check();
        assert!(
            found.corruptions.is_empty(),
            "after more work: {:#?}",
            found.corruptions
        );
        self.judge_content(point, &content);
        if let Some(data) = data.filter(|_| self.scenario.raw) {
            let bytes = data.bytes(0, content.len() as u64);
            assert!(bytes == content, "the raw file is not the disk");
        }
        if ask_qemu {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.qcow2");
            image.save(&path).unwrap();
            if let Some(data) = data {
                data.save(&dir.path().join("data")).unwrap();
            }
            qemu_in(dir.path(), &["check", "-f", "qcow2", "a.qcow2"], &[0, 3]);
            if self.scenario.below.is_empty() {
                let raw = dir.path().join("raw");
                std::fs::write(&raw, &content).unwrap();
                let args = [
                    "compare", "-q", "-f", "qcow2", "-F", "raw", "a.qcow2", "raw",
                ];
                qemu_in(dir.path(), &args, &[0]);
            }
        }
    }

    fn judge_content(&self, point: usize, content: &[u8]) {
        let log = self.log.borrow();
        let mut sizes = vec![self.original.len() as u64];
        for grow in &log.grows {
            if grow.complete <= point {
                sizes.clear();
            }
            if grow.started <= point {
                sizes.push(grow.size);
            }
        }
        assert!(sizes.contains(&(content.len() as u64)), "size {sizes:?}");
        let flushed = log
            .flushes
            .iter()
            .filter(|flush| flush.complete <= point)
            .map(|flush| flush.started)
            .max()
            .unwrap_or(0);
        let sectors = content.len() as u64 / SECTOR;
        let mut allowed = vec![vec![Value::Original]; sectors as usize];
        for change in &log.changes {
            if change.started > point {
                continue;
            }
            let durable = change.acknowledged.is_some_and(|time| time < flushed)
                || change.durable.is_some_and(|at| at <= point);
            for sector in change.sectors.clone() {
                if sector < sectors && !change.spared.contains(&sector) {
                    let values = &mut allowed[sector as usize];
                    if durable {
                        values.clear();
                    }
                    values.push(change.value);
                }
            }
        }
        for (sector, (bytes, values)) in content.chunks_exact(512).zip(&allowed).enumerate() {
            let sector = sector as u64;
            let fits = values.iter().any(|&value| match value {
                Value::Zeros => bytes.iter().all(|&b| b == 0),
                Value::Stamp(id) => bytes == stamp(id, sector),
                Value::Original => {
                    let at = (sector * SECTOR) as usize;
                    match self.original.get(at..at + 512) {
                        Some(original) => bytes == original,
                        None => bytes.iter().all(|&b| b == 0),
                    }
                }
            });
            assert!(
                fits,
                "sector {sector} is none of {values:?}: {:02x?}",
                &bytes[..16]
            );
        }
    }
}

struct Task {
    engine: lab::Shared,
    disk: SimDisk,
    log: Rc<RefCell<Log>>,
    number: u64,
    tasks: u64,
    cluster: u64,
    /// A discarded cluster reads as zeros.
    zeros_certain: bool,
    rng: Rng,
}

impl Task {
    /// Clusters that one task has for itself, side by side.
    const GROUP: u64 = 4;
    /// Sectors of a task between those of the others, in shared clusters.
    const CHUNK: u64 = 3;

    async fn work(mut self, steps: u32) {
        for _ in 0..steps {
            match self.rng.below(16) {
                0..2 => self.flush().await,
                2 => self.check_own().await,
                3..8 => self.shared().await,
                _ => self.private().await,
            }
        }
    }

    fn queue(&self) -> u16 {
        self.number as u16
    }

    async fn flush(&self) {
        let started = self.log.borrow_mut().tick();
        self.engine.flush().await.unwrap();
        let complete = self.disk.recorded();
        self.log
            .borrow_mut()
            .flushes
            .push(Flush { started, complete });
    }

    /// Half of the groups are shared by all tasks, sector by sector.
    fn group(&mut self, shared: bool) -> Option<Range<u64>> {
        let size = self.engine.size();
        let len = Self::GROUP * self.cluster;
        let groups = size.div_ceil(len);
        for _ in 0..50 {
            let group = self.rng.below(groups);
            let is_shared = group % (self.tasks + 2) >= self.tasks;
            if is_shared == shared && (shared || group % (self.tasks + 2) == self.number) {
                return Some(group * len / SECTOR..size.min((group + 1) * len) / SECTOR);
            }
        }
        None
    }

    async fn shared(&mut self) {
        let Some(group) = self.group(true) else {
            return;
        };
        let chunk = Self::CHUNK * self.tasks;
        let chunks = (group.end - group.start) / chunk;
        if chunks == 0 {
            return;
        }
        let start = group.start + self.rng.below(chunks) * chunk + self.number * Self::CHUNK;
        let first = start + self.rng.below(Self::CHUNK);
        let sectors = first..first + 1 + self.rng.below(start + Self::CHUNK - first);
        match self.rng.below(6) {
            0 => self.zero(sectors).await,
            _ => self.write(sectors).await,
        }
    }

    async fn private(&mut self) {
        let Some(group) = self.group(false) else {
            return;
        };
        let mut first = group.start + self.rng.below(group.end - group.start);
        let mut end = first + 1 + self.rng.below(group.end - first);
        match self.rng.below(8) {
            0..2 => self.discard(first..end).await,
            2..4 => self.zero(first..end).await,
            action => {
                if action < 6 {
                    let per_cluster = self.cluster / SECTOR;
                    first = first / per_cluster * per_cluster;
                    end = end.next_multiple_of(per_cluster).min(group.end);
                }
                self.write(first..end).await;
            }
        }
    }

    /// What the task wrote is there, flushed or not.
    async fn check_own(&mut self) {
        let Some(group) = self.group(false) else {
            return;
        };
        let offset = group.start * SECTOR;
        let len = (group.end - group.start) * SECTOR;
        let bytes = lab::read(&self.engine, self.queue(), offset, len)
            .await
            .unwrap();
        for (bytes, sector) in bytes.chunks_exact(512).zip(group) {
            let log = self.log.borrow();
            let last = log
                .changes
                .iter()
                .rev()
                .find(|c| c.sectors.contains(&sector) && !c.spared.contains(&sector));
            match last.map(|change| change.value) {
                Some(Value::Stamp(id)) => assert!(bytes == stamp(id, sector), "sector {sector}"),
                Some(Value::Zeros) => assert!(bytes.iter().all(|&b| b == 0), "sector {sector}"),
                _ => {}
            }
        }
    }

    fn begin(&self, sectors: Range<u64>, value: Value) -> usize {
        let mut log = self.log.borrow_mut();
        log.changes.push(Change {
            sectors,
            value,
            spared: BTreeSet::new(),
            started: self.disk.recorded(),
            acknowledged: None,
            durable: None,
        });
        log.changes.len() - 1
    }

    fn end(&self, change: usize, fua: bool) {
        let mut log = self.log.borrow_mut();
        let now = log.tick();
        let change = &mut log.changes[change];
        change.acknowledged = Some(now);
        change.durable = fua.then(|| self.disk.recorded());
    }

    async fn write(&mut self, sectors: Range<u64>) {
        let id = self.log.borrow().changes.len() as u32 + 1;
        let bytes: Vec<u8> = sectors.clone().flat_map(|s| stamp(id, s)).collect();
        let fua = self.rng.chance(1, 12);
        let change = self.begin(sectors.clone(), Value::Stamp(id));
        let offset = sectors.start * SECTOR;
        lab::write(&self.engine, self.queue(), offset, &bytes, fua)
            .await
            .unwrap();
        self.end(change, fua);
    }

    async fn zero(&mut self, sectors: Range<u64>) {
        let (unmap, fua) = (self.rng.chance(1, 2), self.rng.chance(1, 12));
        let len = (sectors.end - sectors.start) * SECTOR;
        let offset = sectors.start * SECTOR;
        let change = self.begin(sectors, Value::Zeros);
        let request = Request {
            op: Op::WriteZeroes { unmap, fua },
            offset,
            len,
            payload: Payload::zeros(len),
        };
        self.engine.handle(self.queue(), request).await.unwrap();
        self.end(change, fua);
    }

    async fn discard(&mut self, sectors: Range<u64>) {
        let per_cluster = self.cluster / SECTOR;
        let end = sectors.end * SECTOR;
        let first = sectors.start.next_multiple_of(per_cluster);
        let whole_end = if end == self.engine.size() {
            sectors.end
        } else {
            sectors.end / per_cluster * per_cluster
        };
        let (offset, len) = (
            sectors.start * SECTOR,
            (sectors.end - sectors.start) * SECTOR,
        );
        if first >= whole_end {
            self.engine
                .discard(self.queue(), offset, len)
                .await
                .unwrap();
            return;
        }
        let change = self.begin(first..whole_end, Value::Zeros);
        self.engine
            .discard(self.queue(), offset, len)
            .await
            .unwrap();
        self.end(change, false);
        let (offset, len) = (first * SECTOR, (whole_end - first) * SECTOR);
        let bytes = lab::read(&self.engine, self.queue(), offset, len)
            .await
            .unwrap();
        for (bytes, sector) in bytes.chunks_exact(512).zip(first..) {
            if bytes.iter().any(|&b| b != 0) {
                assert!(!self.zeros_certain, "sector {sector} after its discard");
                self.log.borrow_mut().changes[change].spared.insert(sector);
            }
        }
    }
}

/// `qemu-img`, in the folder: names of data files are relative to it.
#[track_caller]
fn qemu_in(folder: &std::path::Path, args: &[&str], codes: &[i32]) {
    let output = std::process::Command::new("qemu-img")
        .args(args)
        .current_dir(folder)
        .output()
        .expect("run qemu-img");
    assert!(
        output
            .status
            .code()
            .is_some_and(|code| codes.contains(&code)),
        "qemu-img {args:?}: {output:?}"
    );
}
