//! An image is opened and worked on, while operations of its disk fail and the
//! power goes; all the time it shows what a flat disk would, and in the end it
//! is sound. The order of requests, the faults and the cuts are the input.

mod model;
mod ops;
mod shape;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_ublk::Result;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::storage::sim::{Fault, SimDisk, crash_images};

use super::common::check::Checked;
use super::common::lab::{self, How};
use super::input::Input;
use model::{End, Model, SECTOR};
use ops::Op;
use shape::Shape;

/// Most steps of one input.
const STEPS: usize = 48;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let Some(shape) = shape::choose(&mut input) else {
        return;
    };
    lab::block_on(async {
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
    if std::env::var_os("FUZZ_TRACE").is_some() {
        eprintln!("{}", what());
    }
}

struct Work {
    shape: Shape,
    disk: SimDisk,
    how: How,
    engine: Arc<Engine>,
    model: Model,
    /// The snapshot made here: what it has to show.
    made: Option<Model>,
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
        let how = shape.how.clone();
        let engine = lab::open(&disk, &how).await.expect("it is sound");
        Self {
            model: Model::new(shape.content.clone()),
            engine: Arc::new(engine),
            made: None,
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
                let op = Op::choose(input, &self.model, self.made.is_some());
                self.one(op).await;
            }
            160..190 => {
                let (seed, count) = (input.u8(), 2 + input.u8() % 3);
                let ops: Vec<Op> = (0..count)
                    .map(|_| Op::request(input, &self.model))
                    .collect();
                self.together(ops, seed).await;
            }
            190..215 => self.inject(input),
            215..230 => self.read(input).await,
            230..238 => self.reopen().await,
            238..244 => self.die().await,
            _ => {
                let (whole, part, seed) = (input.u8(), input.u8(), input.u8());
                let op = Op::choose(input, &self.model, self.made.is_some());
                self.cut_during(op, whole, part, seed).await;
            }
        }
        !self.over
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
            self.may_fail() || op.may_be_refused(error),
            "{op:?}: {error:?}"
        );
        self.leaky = true;
    }

    async fn one(&mut self, op: Op) {
        tell(|| format!("{op:?}"));
        let result = op.clone().run(Arc::clone(&self.engine)).await;
        self.judge(&op, &result);
        self.note(&op, &result);
    }

    /// Requests that meet each other.
    async fn together(&mut self, ops: Vec<Op>, seed: u8) {
        tell(|| format!("together: {ops:?}"));
        self.disk.shuffle(Some(seed.into()));
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
                self.note(op, result);
            } else {
                op.change(&mut self.model, End::Unknown);
            }
        }
    }

    fn note(&mut self, op: &Op, result: &Result<()>) {
        let end = match result {
            Ok(()) => op.end(),
            Err(_) => End::Unknown,
        };
        op.change(&mut self.model, end);
        match (op, result) {
            (Op::Flush, Ok(())) => self.model.flush(),
            (Op::Grow { sectors }, Ok(())) => self.model.grow(*sectors),
            (Op::CreateSnapshot, Ok(())) => {
                self.model.flush();
                self.made = Some(self.model.clone());
            }
            (Op::ApplySnapshot, Ok(())) => {
                self.model = self.made.clone().expect("there is one");
                self.model.flush();
            }
            (Op::DeleteSnapshot, Ok(())) => {
                self.model.flush();
                self.made = None;
            }
            // The file may have either state, if a sync failed.
            (op, Err(_)) if op.is_about_the_whole() => self.over |= self.may_fail(),
            _ => {}
        }
    }

    /// One of the next operations of the disk goes wrong.
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
        let (first, count) = ops::range(input, &self.model);
        let seen = lab::read(&self.engine, 0, first * SECTOR, count * SECTOR).await;
        match seen {
            Ok(seen) => self.model.sees(first, &seen, "a read"),
            Err(error) => assert!(self.may_fail(), "a read: {error:?}"),
        }
    }

    async fn reopen(&mut self) {
        tell(|| "reopen".to_owned());
        let closed = self.engine.close().await;
        assert!(closed.is_ok() || self.may_fail(), "a close: {closed:?}");
        if closed.is_ok() {
            self.model.flush();
        } else {
            self.leaky = true;
            self.model.cut();
        }
        self.open_again().await;
    }

    /// The program dies, and the host goes on.
    async fn die(&mut self) {
        tell(|| "death".to_owned());
        self.leaky = true;
        self.model.cut();
        self.open_again().await;
    }

    async fn open_again(&mut self) {
        self.disk.clear_faults();
        self.leaky |= self.may_fail();
        self.failed = Arc::default();
        self.check_soundness(&self.disk);
        let engine = lab::open(&self.disk, &self.how).await;
        self.engine = Arc::new(engine.expect("it can be opened again"));
        assert_eq!(
            self.engine.size(),
            self.model.sectors() * SECTOR,
            "the size"
        );
    }

    /// The power fails while `op` is under way, or behind it.
    async fn cut_during(&mut self, op: Op, whole: u8, part: u8, seed: u8) {
        let start = self.disk.recorded();
        let result = op.clone().run(Arc::clone(&self.engine)).await;
        self.judge(&op, &result);
        let end = self.disk.recorded();
        let point = if whole & 1 == 0 {
            self.note(&op, &result);
            end
        } else {
            op.change(&mut self.model, End::Unknown);
            self.over |= op.is_about_the_whole();
            start + usize::from(part) % (end - start + 1)
        };
        let history = self.disk.history();
        let mut states: Vec<_> = crash_images(&history, seed.into(), 2)
            .filter(|crash| crash.point == point)
            .collect();
        let crash = states.swap_remove(usize::from(seed) % states.len());
        let disk = SimDisk::with_image(crash.images[0].clone());
        tell(|| format!("{op:?}: {result:?}, then {crash} of {start}..{end}"));
        self.leaky = true;
        self.model.cut();
        if self.over {
            // Old or new, that is; and sound.
            self.check_soundness(&disk);
            let engine = lab::open(&disk, &self.how).await.expect("it opens");
            let size = engine.size();
            lab::read(&engine, 0, 0, size).await.expect("it is read");
            engine.close().await.expect("it is closed");
            self.disk = disk;
            self.check_soundness(&self.disk);
            return;
        }
        self.disk = disk;
        self.open_again().await;
    }

    /// Leaks at most; where refcounts are postponed, not even that is asked of
    /// an image that was not closed.
    fn check_soundness(&self, disk: &SimDisk) {
        let image = disk.image();
        let checked = Checked::open(&image).expect("a header");
        if self.shape.lazy {
            return;
        }
        let found = checked.check();
        assert_eq!(found.corruptions, Vec::<String>::new());
    }

    async fn end(mut self) {
        self.disk.clear_faults();
        if self.over {
            return self.check_soundness(&self.disk);
        }
        let seen = lab::read(&self.engine, 0, 0, self.engine.size()).await;
        self.model
            .sees(0, &seen.expect("it can be read"), "in the end");
        let closed = self.engine.close().await;
        if closed.is_err() {
            assert!(self.may_fail(), "the last close: {closed:?}");
            self.die().await;
            let seen = lab::read(&self.engine, 0, 0, self.engine.size()).await;
            self.model
                .sees(0, &seen.expect("it can be read"), "after a death");
            self.engine.close().await.expect("nothing fails any more");
        }
        let image = self.disk.image();
        let checked = Checked::open(&image).expect("a header");
        let found = checked.check();
        assert_eq!(found.corruptions, Vec::<String>::new());
        let leaks_allowed = self.leaky || self.may_fail();
        assert!(leaks_allowed || found.leaks == 0, "{} leaks", found.leaks);
        let shown = checked.active_content(&self.shape.below);
        self.model.sees(0, &shown, "closed");
        let count = self.shape.snapshots.len();
        for (index, old) in self.shape.snapshots.iter().enumerate() {
            let now = checked.snapshot_content(index, &self.shape.below);
            assert!(now == *old, "old snapshot {index} has changed");
        }
        let made = self.made.iter_mut();
        assert_eq!(checked.snapshots().len(), count + made.len());
        for made in made {
            let now = checked.snapshot_content(count, &self.shape.below);
            made.sees(0, &now, "a snapshot");
        }
    }
}
