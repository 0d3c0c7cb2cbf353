//! An image is opened and worked on, while operations of its disks fail and
//! the power goes; all the time it shows what a flat disk would, and in the end
//! it is sound. The order of requests, the faults and the cuts are the input.

mod bitmaps;
mod judge;
mod model;
mod ops;
mod shape;
mod state;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_ublk::Result;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::storage::sim::{Change, Fault, SimDisk, crash_images};

use super::common::check::Checked;
use super::common::lab::{self, How};
use super::common::{self, read_all};
use super::input::Input;
use model::{End, Model, SECTOR};
use ops::Op;
use shape::Shape;
use state::{Found, Made, State};

/// Most steps of one input.
const STEPS: usize = 48;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let Some(shape) = shape::choose(&mut input) else {
        return;
    };
    common::block_on(async {
        let mut work = Work::begin(shape).await;
        for _ in 0..STEPS {
            if input.is_empty() || !work.step(&mut input).await {
                break;
            }
        }
        work.end().await;
    });
}

/// With `FUZZ_TRACE` in the environment, what is done is told.
fn tell(what: impl FnOnce() -> String) {
    static TOLD: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| std::env::var_os("FUZZ_TRACE").is_some());
    if *TOLD {
        eprintln!("{}", what());
    }
}

struct Work {
    shape: Shape,
    disk: SimDisk,
    how: How,
    engine: Arc<Engine>,
    state: State,
    /// Clusters that requests were about.
    touched: BTreeSet<u64>,
    /// An operation has failed since the image was opened.
    failed: Arc<AtomicBool>,
    /// Space may have been lost.
    leaky: bool,
    /// Nothing more can be said about the content.
    over: bool,
}

impl Work {
    async fn begin(shape: Shape) -> Self {
        let disk = SimDisk::with_image(shape.image.clone());
        let mut how = shape.how.clone();
        how.data = shape.data.as_ref().map(|data| disk.beside(data.clone()));
        let engine = lab::open(&disk, &how).await.expect("it is sound");
        let checked = Checked::open(&shape.image).expect("it is sound");
        let found = Found::of(&checked, &shape.image);
        Self {
            state: State {
                model: Model::new(shape.content.clone()),
                made: None,
                bitmaps: bitmaps::Bitmaps::of(&found.bitmaps, &shape.content),
            },
            engine: Arc::new(engine),
            touched: BTreeSet::new(),
            failed: Arc::default(),
            leaky: false,
            over: false,
            shape,
            disk,
            how,
        }
    }

    /// False when there is no more to be done.
    async fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.u8() {
            0..160 => {
                let op = self.choose(input);
                self.one(op).await;
            }
            160..190 => {
                let (seed, count) = (input.u8(), 2 + input.u8() % 3);
                let ops: Vec<Op> = (0..count)
                    .map(|_| Op::request(input, &self.state.model))
                    .collect();
                self.together(ops, seed).await;
            }
            190..215 => self.inject(input),
            215..230 => self.read(input).await,
            230..238 => self.reopen().await,
            238..244 => self.die().await,
            _ => {
                let (whole, part, seed) = (input.u8(), input.u8(), input.u8());
                let op = self.choose(input);
                self.cut_during(op, whole & 1 == 0, part, seed).await;
            }
        }
        !self.over
    }

    fn choose(&self, input: &mut Input<'_>) -> Op {
        Op::choose(input, &self.state, self.shape.with_bitmaps)
    }

    fn may_fail(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// An error is somebody's fault.
    fn judge(&mut self, op: &Op, result: &Result<()>) {
        let Err(error) = result else {
            return;
        };
        assert!(
            self.may_fail() || op.may_be_refused(error, &self.state),
            "{op:?}: {error:?}"
        );
        self.leaky = true;
    }

    /// Whether the operation, which is about to begin, and all before it are
    /// durable when it succeeds.
    fn promises(&mut self, op: &Op) -> bool {
        let Some((first, count)) = op.sectors() else {
            return false;
        };
        let cluster = self.cluster();
        let mut maps = false;
        for number in first / cluster..=(first + count - 1) / cluster {
            maps |= self.touched.insert(number);
        }
        match self.how.barrier {
            Barrier::Full => true,
            // The first write to a cluster is sure to map it.
            Barrier::Metadata => maps && self.shape.empty && matches!(op, Op::Write { .. }),
            _ => false,
        }
    }

    /// Sectors of a cluster.
    fn cluster(&self) -> u64 {
        self.engine.chain().top().cluster_size() / SECTOR
    }

    async fn one(&mut self, op: Op) {
        tell(|| format!("{op:?}"));
        let promised = self.promises(&op);
        let result = op.clone().run(Arc::clone(&self.engine)).await;
        self.judge(&op, &result);
        self.note(&op, &result, promised).await;
    }

    /// Requests that meet each other.
    async fn together(&mut self, ops: Vec<Op>, seed: u8) {
        tell(|| format!("together: {ops:?}"));
        self.disk.shuffle(Some(seed.into()));
        let promised: Vec<_> = ops.iter().map(|op| self.promises(op)).collect();
        let tasks: Vec<_> = ops
            .iter()
            .map(|op| spawn(op.clone().run(Arc::clone(&self.engine))))
            .collect();
        let mut results = Vec::new();
        for task in tasks {
            results.push(task.await);
        }
        self.disk.shuffle(None);
        for (n, (op, result)) in ops.iter().zip(&results).enumerate() {
            self.judge(op, result);
            let alone = ops
                .iter()
                .enumerate()
                .all(|(m, other)| n == m || !op.meets(other));
            if alone {
                self.note(op, result, promised[n]).await;
            } else {
                self.change(op, End::Unknown, result.is_ok());
            }
        }
    }

    /// An operation changes sectors; bitmaps that record it `surely`.
    fn change(&mut self, op: &Op, end: End, surely: bool) {
        let cluster = self.cluster();
        let state = &mut self.state;
        op.change(&mut state.model, end, cluster, self.shape.hides_below);
        if let Some((first, count)) = op.sectors() {
            state.bitmaps.mark(first, count, surely);
        }
    }

    async fn note(&mut self, op: &Op, result: &Result<()>, promised: bool) {
        if result.is_err() {
            self.change(op, End::Unknown, false);
            // The file may have either state, if a sync failed.
            self.over |= op.is_about_the_whole() && self.may_fail();
            return;
        }
        self.change(op, op.end(), true);
        let state = &mut self.state;
        match op {
            Op::Flush => state.model.flush(),
            Op::Grow { sectors } => state.model.grow(*sectors),
            Op::CreateSnapshot => {
                state.model.flush();
                let image = self.disk.image();
                let checked = Checked::open(&image).expect("a header");
                let last = self.shape.snapshots.len();
                state.made = Some(Made {
                    model: state.model.clone(),
                    stored: checked.snapshot_content(last, &self.shape.below),
                });
            }
            Op::ApplySnapshot => {
                let made = state.made.as_ref().expect("there is one");
                state.model = made.model.clone();
                state.model.flush();
            }
            Op::DeleteSnapshot => {
                state.model.flush();
                state.made = None;
            }
            Op::Bitmap { name, change } => match read_all(&self.engine).await {
                Ok(content) => state.bitmaps.change(name, *change, content),
                Err(_) => self.over = true,
            },
            _ if promised => state.model.flush(),
            _ => {}
        }
    }

    /// One of the next operations of the disks goes wrong.
    fn inject(&mut self, input: &mut Input<'_>) {
        let (how, within) = (input.u8(), input.u8());
        let number = self.disk.operations() + u64::from(within % 32);
        let size = u64::from(how >> 3) * SECTOR;
        let fault = match how % 8 {
            0 | 1 => Fault::Errno(libc::EIO),
            2 | 3 => Fault::Errno(libc::ENOSPC),
            4 => Fault::Errno(libc::EINTR),
            5 => Fault::Short(size.max(1)),
            _ => Fault::Partial {
                stored: size,
                errno: libc::EIO,
            },
        };
        tell(|| format!("{fault:?} at {number}"));
        let harmless = matches!(fault, Fault::Short(_) | Fault::Errno(libc::EINTR));
        let failed = Arc::clone(&self.failed);
        self.disk.inject(move |request| {
            (request.number == number).then(|| {
                failed.fetch_or(!harmless, Ordering::Relaxed);
                fault
            })
        });
    }

    async fn read(&mut self, input: &mut Input<'_>) {
        let (first, count) = ops::range(input, &self.state.model);
        let seen = lab::read(&self.engine, 0, first * SECTOR, count * SECTOR).await;
        match seen {
            Ok(seen) => self.state.model.sees(first, &seen, "a read"),
            Err(error) => assert!(self.may_fail(), "a read: {error:?}"),
        }
    }

    async fn reopen(&mut self) {
        tell(|| "reopen".to_owned());
        let closed = self.engine.close().await;
        assert!(closed.is_ok() || self.may_fail(), "a close: {closed:?}");
        if closed.is_err() {
            return self.die().await;
        }
        self.state.model.flush();
        let state = self.state.clone();
        self.open_again(vec![state], true).await;
    }

    /// The program dies, and the host goes on.
    async fn die(&mut self) {
        tell(|| "death".to_owned());
        self.leaky = true;
        let mut state = self.state.clone();
        state.cut();
        // What it did not save is in the host's memory, and so in what the next
        // program reads; nobody is told any more that it is not on the disk.
        let records = self.disk.history().records;
        let lost = records
            .iter()
            .any(|record| matches!(record.change, Change::FailedSync));
        self.open_again(vec![state], false).await;
        self.over |= lost;
    }

    /// The power fails while `op` is under way, or behind it.
    async fn cut_during(&mut self, op: Op, behind: bool, part: u8, seed: u8) {
        let start = self.disk.recorded();
        let before = self.state.clone();
        let promised = self.promises(&op);
        let result = op.clone().run(Arc::clone(&self.engine)).await;
        self.judge(&op, &result);
        let end = self.disk.recorded();
        self.note(&op, &result, promised).await;
        if self.how.barrier == Barrier::None {
            // Nobody said anything about the power.
            return self.die().await;
        }
        let mut states = vec![self.state.clone()];
        let mut point = end;
        if !behind {
            // Of what is about the whole, old or new; of sectors, any.
            if !op.is_about_the_whole() {
                states.clear();
            }
            self.state = before;
            self.change(&op, End::Unknown, false);
            states.push(self.state.clone());
            point = start + usize::from(part) % (end - start + 1);
        }
        let history = self.disk.history();
        let mut crashes: Vec<_> = crash_images(&history, seed.into(), 2)
            .from_point(point)
            .take_while(|crash| crash.point == point)
            .collect();
        let crash = crashes.swap_remove(usize::from(seed) % crashes.len());
        tell(|| format!("{op:?}: {result:?}, then {crash} of {start}..{end}"));
        let mut images = crash.images.into_iter();
        self.disk = SimDisk::with_image(images.next().expect("there is one"));
        self.how.data = images.next().map(|data| self.disk.beside(data));
        self.leaky = true;
        states.iter_mut().for_each(State::cut);
        self.open_again(states, false).await;
    }
}
