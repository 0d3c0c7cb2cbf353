//! One run of some work, on disks that fail.
#![allow(unreachable_pub, reason = "a part of a test program")]

use std::sync::{Arc, Mutex};

use qcow2_ublk::Result;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::spec::bitmap::BitmapFlags;
use qcow2_ublk::qcow2::spec::header::Incompatible;
use qcow2_ublk::qcow2::{Barrier, BitmapAction, NewSnapshot, Selector};
use qcow2_ublk::storage::sim::{self, Fault, SimDisk, SimRequest, crash_images};

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};
use crate::model::{Model, Recorded, Shown, State};
use crate::work::{Step, Work};

pub struct Run<'a> {
    pub work: &'a Work,
    pub disk: SimDisk,
    how: How,
    /// None: it could not be opened.
    pub engine: Option<Engine>,
    pub model: Model<'a>,
    /// The operations that failed.
    pub hits: Arc<Mutex<Vec<SimRequest>>>,
}

impl<'a> Run<'a> {
    /// Nothing is open yet.
    pub fn new(work: &'a Work) -> Self {
        let (disk, how) = work.machine(&work.images());
        Self {
            work,
            disk,
            how,
            engine: None,
            model: Model::new(work),
            hits: Arc::default(),
        }
    }

    /// Lets operations that `rule` picks fail.
    pub fn inject(&self, mut rule: impl FnMut(&SimRequest) -> Option<Fault> + Send + 'static) {
        let hits = Arc::clone(&self.hits);
        self.disk.inject(move |request| {
            let fault = rule(request);
            if fault.is_some() {
                hits.lock().unwrap().push(*request);
            }
            fault
        });
    }

    pub fn hit(&self) -> Vec<SimRequest> {
        self.hits.lock().unwrap().clone()
    }

    pub async fn open(&mut self) -> Result<()> {
        self.engine = None;
        self.engine = Some(lab::open(&self.disk, &self.how).await?);
        Ok(())
    }

    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("it is open")
    }

    pub fn is_latched(&self) -> bool {
        let image = self.engine().chain().top();
        image.storage().is_latched() || image.data().is_latched()
    }

    /// There is nothing to do it to, for something before it has failed.
    fn is_void(&self, step: &Step) -> bool {
        let model = &self.model;
        let size = model.now.sectors.len() as u64 * 512;
        match *step {
            Step::Grow(to) => to <= size,
            Step::Shrink(to) => to >= size,
            Step::Delete(name) | Step::Apply(name) => {
                !model.now.snapshots.iter().any(|(n, _)| n == name)
            }
            Step::ClearBitmap(name) | Step::RemoveBitmap(name) => {
                !model.bitmaps.iter().any(|b| b.name == name)
            }
            _ => false,
        }
    }

    /// Does a step and takes note of it.
    pub async fn step(&mut self, step: &Step) -> Result<()> {
        if self.is_void(step) {
            return Ok(());
        }
        let result = self.perform(step).await;
        let size = self.engine.as_ref().map_or(0, Engine::size);
        self.model.done(step, result.is_ok(), size);
        result
    }

    async fn perform(&mut self, step: &Step) -> Result<()> {
        if let Step::Reopen = step {
            self.engine().close().await?;
            self.model.settle();
            return self.open().await;
        }
        let engine = self.engine();
        let image = engine.chain().top();
        let named = |name: &str| Selector::Name(name.into());
        match *step {
            Step::Write { offset, len, byte } => {
                let bytes = vec![byte; len as usize];
                lab::write(engine, 0, offset, &bytes, false).await
            }
            Step::Compressed { offset, len, byte } => {
                let bytes = vec![byte; len as usize];
                engine.write_compressed(0, offset, &bytes, None).await
            }
            Step::Zero { offset, len, unmap } => engine.write_zeroes(0, offset, len, unmap).await,
            Step::Discard { offset, len } => engine.discard(0, offset, len).await,
            Step::Flush => engine.flush().await,
            Step::Grow(size) => engine.grow(size).await,
            Step::Shrink(size) => engine.shrink(size).await,
            Step::Snapshot(name) => image.create_snapshot(NewSnapshot::now(name)).await,
            Step::Delete(name) => image.delete_snapshot(named(name)).await,
            Step::Apply(name) => image.apply_snapshot(named(name)).await,
            Step::AddBitmap(name) => {
                let add = BitmapAction::Add {
                    granularity: Some(512),
                };
                image.change_bitmap(name.as_bytes(), &add).await
            }
            Step::ClearBitmap(name) => {
                let clear = BitmapAction::Clear;
                image.change_bitmap(name.as_bytes(), &clear).await
            }
            Step::RemoveBitmap(name) => {
                let remove = BitmapAction::Remove;
                image.change_bitmap(name.as_bytes(), &remove).await
            }
            Step::Reopen => unreachable!("it is above"),
        }
    }

    /// Reads what a step wrote.
    pub async fn read_back(&self, step: &Step) -> Result<()> {
        if let Step::Write { offset, len, .. } = *step {
            lab::read(self.engine(), 0, offset, len).await?;
        }
        Ok(())
    }

    /// The disk as requests see it is what it should be.
    pub async fn assert_reads(&self, what: &str) {
        let engine = self.engine();
        let before = self.hit().len();
        let mut content = lab::read(engine, 0, 0, engine.size()).await;
        if self.hit().len() > before {
            // It is the one that was hit; the next will not be.
            content = lab::read(engine, 0, 0, engine.size()).await;
        }
        let content = content.unwrap_or_else(|e| panic!("{what}: a read failed: {e}"));
        let snapshots = None;
        let shown = Shown { content, snapshots };
        if let Some(bad) = self.model.now.wrong(&shown, &self.work.sources) {
            panic!("{what}: as it reads: {bad}");
        }
    }

    /// Leaves so much room on the disks, or all there may be.
    pub fn limit(&self, room: Option<u64>) {
        for disk in self.disks() {
            let capacity = room.map(|room| disk.image().allocated() + room);
            disk.set_capacity(capacity.unwrap_or(u64::MAX));
        }
    }

    /// What the files hold, durable or not.
    pub fn images(&self) -> Vec<sim::Image> {
        self.disks().into_iter().map(SimDisk::image).collect()
    }

    fn disks(&self) -> Vec<&SimDisk> {
        let mut disks = vec![&self.disk];
        disks.extend(&self.how.data);
        if let Below::Disks(images, raw) = &self.how.below {
            disks.extend(images);
            disks.extend(raw);
        }
        disks
    }

    /// Judges what a power cut leaves now, in some ways.
    pub async fn judge_power_cuts(&self, seed: u64, what: &str) {
        let history = self.disk.history();
        let end = history.records.len();
        for crash in crash_images(&history, seed, 0).from_point(end) {
            let what = format!("{what}; {crash}");
            self.judge(&crash.images, false, &what).await;
        }
    }

    /// Judges files that nobody has open: closed in good order, or as a power
    /// cut or a death has left them.
    pub async fn judge(&self, images: &[sim::Image], closed: bool, what: &str) {
        let model = &self.model;
        if !closed && self.work.how.barrier == Barrier::None {
            return; // nothing was promised
        }
        let states: Vec<&State> = if closed {
            vec![&model.now]
        } else {
            [&model.safe].into_iter().chain(&model.or_else).collect()
        };
        let (disk, how) = self.work.machine(images);
        let header = Checked::open(&images[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
        let dirty = header.header.incompatible.contains(Incompatible::DIRTY);
        assert!(!(closed && dirty), "{what}: dirty");
        let engine = lab::open(&disk, &how)
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        // An image that is marked dirty has been repaired now.
        let image = if dirty {
            disk.image()
        } else {
            images[0].clone()
        };
        let checked = Checked::open(&image).unwrap().with_data(images.get(1));
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{what}: {:#?}", found);
        let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
        let encrypted = self.work.how.keys.is_some();
        let snapshots = (!encrypted).then(|| {
            let snapshots = checked.snapshots().into_iter().enumerate();
            let content = |i| checked.snapshot_content(i, &self.work.below);
            let name = |name| String::from_utf8(name).unwrap();
            snapshots.map(|(i, s)| (name(s.name), content(i))).collect()
        });
        let shown = Shown { content, snapshots };
        let wrong = |state: &&State| state.wrong(&shown, &self.work.sources);
        let wrong: Vec<_> = states.iter().map(wrong).collect();
        assert!(wrong.contains(&None), "{what}: {wrong:#?}");
        for bitmap in checked.bitmaps() {
            let name = String::from_utf8(bitmap.name).unwrap();
            let marked = bitmap.flags.contains(BitmapFlags::IN_USE);
            assert!(!(closed && marked), "{what}: bitmap {name} is lost");
            let recorded = model.bitmaps.iter().find(|b| b.name == name);
            if closed && !model.doubtful.contains(&name) {
                let recorded = recorded.unwrap_or_else(|| panic!("{what}: bitmap {name}"));
                exact(&engine, recorded, what).await;
            }
        }
        if closed {
            let expected = model.bitmaps.len();
            assert_eq!(checked.bitmaps().len(), expected, "{what}: bitmaps");
        }
        // Life goes on.
        if !closed {
            lab::write(&engine, 0, 0, &[1; 512], false).await.unwrap();
            engine.close().await.unwrap();
        }
    }
}

/// The bitmap has all it must have, and nothing that nobody touched.
async fn exact(engine: &Engine, recorded: &Recorded, what: &str) {
    let name = &recorded.name;
    let bitmap = engine.chain().top().bitmap(name.as_bytes()).await.unwrap();
    let sectors = (engine.size() / 512).max(recorded.may.len() as u64);
    let granule = bitmap.granularity() / 512;
    for sector in 0..engine.size() / 512 {
        let at = sector as usize;
        let must = recorded.must.get(at).copied().unwrap_or(false);
        let dirty = bitmap.is_dirty(sector * 512);
        assert!(dirty || !must, "{what}: {name} lacks sector {sector}");
        let first = sector / granule * granule;
        let mut around = first..(first + granule).min(sectors);
        let may = around.any(|s| recorded.may.get(s as usize).copied().unwrap_or(false));
        assert!(may || !dirty, "{what}: {name} has sector {sector}");
    }
}

/// The operations of the work when nothing fails, opening and closing
/// included; it must be work that matters, and leak nothing.
pub fn operations(work: &Work) -> Vec<SimRequest> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    lab::block_on(async {
        let mut run = Run::new(work);
        let list = Arc::clone(&seen);
        run.disk.inject(move |request| {
            list.lock().unwrap().push(*request);
            None
        });
        run.open().await.unwrap();
        for step in &work.steps {
            let result = run.step(step).await;
            assert!(result.is_ok(), "{}: {step:?}: {result:?}", work.name);
            run.read_back(step).await.unwrap();
        }
        run.assert_reads(work.name).await;
        run.engine().close().await.unwrap();
        run.model.settle();
        let images = run.images();
        run.judge(&images, true, work.name).await;
        let leaks = Checked::open(&images[0]).unwrap().check().leaks;
        assert_eq!(leaks, 0, "{}: undisturbed", work.name);
    });
    let seen = seen.lock().unwrap();
    seen.clone()
}
