//! Power cuts under recorded bitmaps: whatever survives, each bitmap of the
//! image has all changes since it was enabled or cleared, or it is marked in
//! use, or an action on it was under way. After a clean close it is exact.

use std::collections::BTreeMap;

use super::common::check::Checked;
use super::common::lab::{self, How};
use super::common::qemu_img;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::BitmapAction;
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapFlags};
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, crash_images};

const SECTOR: usize = 512;

/// Dirty sectors.
type Sectors = Vec<bool>;

/// A bitmap as its owner believes it to be.
#[derive(Clone)]
struct Model {
    granularity: u64,
    enabled: bool,
    /// What the disk held when recording began from nothing.
    base: Vec<u8>,
    /// What it held when recording ended.
    frozen: Option<Vec<u8>>,
    /// Sectors that are dirty, rounded to granules.
    dirty: Sectors,
    /// Those that another bitmap brought.
    merged: Sectors,
}

/// What is known of a bitmap from some moment on.
struct Version {
    /// Records in the history before and after the action.
    started: usize,
    complete: usize,
    /// None: there is none.
    model: Option<Model>,
}

/// After a clean close everything is exact, until something else is done.
struct Closed {
    complete: usize,
    until: usize,
    exact: BTreeMap<String, Sectors>,
}

struct Trial {
    disk: SimDisk,
    rng: Rng,
    models: BTreeMap<String, Model>,
    versions: BTreeMap<String, Vec<Version>>,
    closed: Vec<Closed>,
}

fn mark(sectors: &mut Sectors, start: u64, end: u64, granularity: u64) {
    let first = start / granularity * granularity / SECTOR as u64;
    let last = (end.next_multiple_of(granularity) / SECTOR as u64) as usize;
    if sectors.len() < last {
        sectors.resize(last, false);
    }
    sectors[first as usize..last].fill(true);
}

impl Trial {
    fn new(image: sim::Image, seed: u64) -> Self {
        let mut trial = Self {
            disk: SimDisk::with_image(image),
            rng: Rng::new(seed),
            models: BTreeMap::new(),
            versions: BTreeMap::new(),
            closed: Vec::new(),
        };
        trial.disk.shuffle(Some(seed));
        let content = lab::block_on(async {
            let engine = lab::open(&trial.disk, &How::default()).await.unwrap();
            let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            for info in engine.chain().top().bitmaps().await.unwrap() {
                let model = Model {
                    granularity: info.granularity,
                    enabled: info.enabled,
                    base: content.clone(),
                    frozen: (!info.enabled).then(|| content.clone()),
                    dirty: Vec::new(),
                    merged: Vec::new(),
                };
                trial
                    .models
                    .insert(String::from_utf8(info.name).unwrap(), model);
            }
            content
        });
        assert!(content.iter().all(|&b| b == 0));
        for bitmap in trial.models.keys().cloned().collect::<Vec<_>>() {
            trial.publish(&bitmap, 0);
        }
        trial
    }

    /// Notes what a bitmap has become.
    fn publish(&mut self, bitmap: &str, started: usize) {
        let version = Version {
            started,
            complete: self.disk.recorded(),
            model: self.models.get(bitmap).cloned(),
        };
        let versions = self.versions.entry(bitmap.to_owned()).or_default();
        versions.push(version);
    }

    async fn work(&mut self, steps: u32) {
        let how = How::default();
        let mut engine = lab::open(&self.disk, &how).await.unwrap();
        for step in 0..steps {
            match self.rng.below(20) {
                0..2 => engine.flush().await.unwrap(),
                2..6 => self.act(&engine).await,
                6..8 => {
                    engine.close().await.unwrap();
                    let complete = self.disk.recorded();
                    engine = lab::open(&self.disk, &how).await.unwrap();
                    let exact =
                        |(name, model): (&String, &Model)| (name.clone(), model.dirty.clone());
                    self.closed.push(Closed {
                        complete,
                        until: self.disk.recorded(),
                        exact: self.models.iter().map(exact).collect(),
                    });
                }
                8 if step > steps / 2 => self.grow(&engine).await,
                _ => self.change(&engine).await,
            }
        }
        engine.close().await.unwrap();
    }

    async fn change(&mut self, engine: &Engine) {
        let size = engine.size();
        let start = self.rng.below(size / 512) * 512;
        let len = (1 + self.rng.below(40)) * 512;
        let len = if self.rng.chance(1, 8) { len * 40 } else { len }.min(size - start);
        match self.rng.below(5) {
            0 => engine.discard(0, start, len).await.unwrap(),
            1 => engine.write_zeroes(0, start, len, true).await.unwrap(),
            _ => {
                let byte = 1 + self.rng.below(255) as u8;
                let bytes = vec![byte; len as usize];
                lab::write(engine, 0, start, &bytes, false).await.unwrap();
            }
        }
        for model in self.models.values_mut().filter(|model| model.enabled) {
            mark(&mut model.dirty, start, start + len, model.granularity);
        }
    }

    async fn grow(&mut self, engine: &Engine) {
        // Bitmaps whose tables change may be lost from here on.
        engine
            .grow(engine.size() + (1 + self.rng.below(4)) * (512 << 10))
            .await
            .unwrap();
    }

    async fn act(&mut self, engine: &Engine) {
        let names = ["a", "b", "c", "d"];
        let name = names[self.rng.below(4) as usize];
        let image = engine.chain().top();
        let started = self.disk.recorded();
        let content = lab::read(engine, 0, 0, engine.size()).await.unwrap();
        let other = self.models.keys().find(|other| *other != name).cloned();
        let action = self.rng.below(5);
        let Some(model) = self.models.get_mut(name) else {
            let granularity = 512 << self.rng.below(5);
            let add = BitmapAction::Add {
                granularity: Some(granularity),
            };
            image.change_bitmap(name.as_bytes(), &add).await.unwrap();
            let model = Model {
                granularity,
                enabled: true,
                base: content,
                frozen: None,
                dirty: Vec::new(),
                merged: Vec::new(),
            };
            self.models.insert(name.to_owned(), model);
            self.publish(name, started);
            return;
        };
        let merged;
        let action = match (action, other) {
            (0, _) => {
                self.models.remove(name);
                BitmapAction::Remove
            }
            (1, _) => {
                model.dirty.clear();
                model.merged.clear();
                model.base = content.clone();
                model.frozen = (!model.enabled).then_some(content);
                BitmapAction::Clear
            }
            (2, _) if model.enabled => {
                model.enabled = false;
                model.frozen = Some(content);
                BitmapAction::Disable
            }
            (2, _) => {
                // What changed meanwhile it does not know: a new beginning,
                // with what it has.
                model.enabled = true;
                model.merged = model.dirty.clone();
                model.base = content;
                model.frozen = None;
                BitmapAction::Enable
            }
            (_, Some(other)) => {
                let granularity = model.granularity;
                let theirs = self.models[&other].dirty.clone();
                let model = self.models.get_mut(name).unwrap();
                for (sector, _) in theirs.iter().enumerate().filter(|(_, dirty)| **dirty) {
                    let start = (sector * SECTOR) as u64;
                    if start < engine.size() {
                        mark(&mut model.dirty, start, start + 512, granularity);
                        mark(&mut model.merged, start, start + 512, granularity);
                    }
                }
                merged = image.bitmap(other.as_bytes()).await.unwrap();
                BitmapAction::Merge(&merged)
            }
            _ => return,
        };
        image.change_bitmap(name.as_bytes(), &action).await.unwrap();
        self.publish(name, started);
    }

    /// Judges what power cuts leave; how many bitmaps were found consistent,
    /// and how many marked.
    fn judge(&self, seed: u64, wanted: u64) -> (u64, u64) {
        let history = self.disk.history();
        let mut rng = Rng::new(seed);
        // Each point has this many states.
        let all = history.records.len() as u64 * 7;
        let (mut states, mut consistent, mut marked) = (0, 0, 0);
        for crash in crash_images(&history, seed, 4) {
            let closed = self
                .closed
                .iter()
                .find(|closed| (closed.complete..=closed.until).contains(&crash.point));
            if closed.is_none() && !rng.chance(wanted.min(all), all) {
                continue;
            }
            states += 1;
            let image = &crash.images[0];
            let checked = Checked::open(image).unwrap_or_else(|e| panic!("{crash}: {e}"));
            let found = checked.check();
            assert!(found.corruptions.is_empty(), "{crash}: {found:?}");
            let directory = checked.bitmaps();
            let disk = SimDisk::with_image(image.clone());
            lab::block_on(async {
                let engine = lab::open(&disk, &How::default()).await.unwrap();
                let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
                for (name, versions) in &self.versions {
                    let bitmap = directory.iter().find(|b| b.name == name.as_bytes());
                    let dirty = match bitmap {
                        Some(bitmap) if !bitmap.flags.contains(BitmapFlags::IN_USE) => {
                            consistent += 1;
                            Some(dirty_sectors(&engine, name, content.len()).await)
                        }
                        Some(_) => {
                            marked += 1;
                            None
                        }
                        None => None,
                    };
                    let possible: Vec<_> = candidates(versions, crash.point).collect();
                    let fits = possible
                        .iter()
                        .any(|model| fits(bitmap, dirty.as_ref(), *model, &content));
                    assert!(fits, "{crash}: bitmap {name} is {bitmap:?}");
                    if let Some(exact) = closed.and_then(|closed| closed.exact.get(name)) {
                        let dirty = dirty.unwrap_or_else(|| panic!("{crash}: {name} is lost"));
                        let mut exact = exact.clone();
                        exact.resize(dirty.len(), false);
                        assert!(dirty == exact, "{crash}: bitmap {name} is not exact");
                    }
                }
                // Life goes on.
                let bytes = [0xcd; 4096];
                lab::write(&engine, 0, 8192, &bytes, false).await.unwrap();
                engine.close().await.unwrap();
            });
            let image = disk.image();
            let checked = Checked::open(&image).unwrap();
            let found = checked.check();
            assert!(found.corruptions.is_empty(), "{crash}, later: {found:?}");
            for bitmap in &directory {
                let later = checked.bitmaps();
                let later = later.iter().find(|b| b.name == bitmap.name).unwrap();
                assert_eq!(later.flags, bitmap.flags, "{crash}");
            }
            if states % 70 == 0 {
                let mut image = image;
                lab::with_file(&mut image, |path| {
                    lab::qemu_check(path, true);
                    qemu_img(&["info", path.to_str().unwrap()]);
                });
            }
        }
        assert!(states > 80, "too few states to mean anything: {states}");
        eprintln!("  {states} states, bitmaps: {consistent} consistent, {marked} marked");
        (consistent, marked)
    }
}

/// What a bitmap may be when the power is cut after `point` records.
fn candidates(versions: &[Version], point: usize) -> impl Iterator<Item = Option<&Model>> {
    let done = versions.iter().rfind(|version| version.complete <= point);
    let settled = done.map_or(Some(None), |version| Some(version.model.as_ref()));
    let under_way = versions
        .iter()
        .filter(move |version| version.started <= point && point < version.complete);
    settled
        .into_iter()
        .chain(under_way.map(|version| version.model.as_ref()))
}

fn fits(
    bitmap: Option<&Bitmap>,
    dirty: Option<&Sectors>,
    model: Option<&Model>,
    content: &[u8],
) -> bool {
    let (Some(bitmap), Some(model)) = (bitmap, model) else {
        return bitmap.is_none() && model.is_none();
    };
    // Marked, nothing is claimed.
    let Some(dirty) = dirty else {
        return true;
    };
    if bitmap.flags.contains(BitmapFlags::AUTO) != model.enabled
        || 1 << bitmap.granularity_bits != model.granularity
    {
        return false;
    }
    let shown = model.frozen.as_deref().unwrap_or(content);
    let changed = |sector: usize| {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        match (model.base.get(range.clone()), shown.get(range)) {
            (Some(old), Some(new)) => old != new,
            (None, Some(new)) => new.iter().any(|&b| b != 0),
            _ => false,
        }
    };
    let merged = |sector: usize| model.merged.get(sector).copied().unwrap_or(false);
    (0..dirty.len()).all(|sector| dirty[sector] || !(changed(sector) || merged(sector)))
}

async fn dirty_sectors(engine: &Engine, name: &str, len: usize) -> Sectors {
    let mut sectors = vec![false; len / SECTOR];
    let content = engine.chain().top().bitmap(name.as_bytes()).await.unwrap();
    content
        .ranges(|start, len| {
            let first = start as usize / SECTOR;
            sectors[first..first + len as usize / SECTOR].fill(true);
            Ok(())
        })
        .unwrap();
    sectors
}

fn image(options: &str, size: u64) -> sim::Image {
    let mut image = lab::created(options, size);
    lab::with_file(&mut image, |path| {
        let path = path.to_str().unwrap();
        qemu_img(&["bitmap", "--add", "-g", "512", path, "a"]);
        qemu_img(&["bitmap", "--add", "--disable", "-g", "4k", path, "b"]);
        qemu_img(&["bitmap", "--add", "-g", "64k", path, "c"]);
    });
    image
}

#[test]
fn bitmaps_are_complete_or_marked_after_every_power_cut() {
    for (seed, options) in [
        (1, "cluster_size=512"),
        (2, "cluster_size=512"),
        (3, "cluster_size=4096"),
        (4, "cluster_size=65536"),
        (5, "cluster_size=65536"),
    ] {
        eprintln!("seed {seed}, {options}");
        lab::watched(120, || {
            let mut trial = Trial::new(image(options, 2560 << 10), seed);
            lab::block_on(trial.work(60));
            let (consistent, marked) = trial.judge(seed, 130);
            assert!(consistent > 80 && marked > 80, "one of them is not tested");
        });
    }
}
