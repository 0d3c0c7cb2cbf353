//! What is done to which image.
#![allow(unreachable_pub, reason = "a part of a test program")]

use qcow2_ublk::storage::sim::{self, Rng, SimDisk};

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};

#[derive(Clone, Debug)]
pub enum Step {
    Write { offset: u64, len: u64, byte: u8 },
    Compressed { offset: u64, len: u64, byte: u8 },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
    Grow(u64),
    Shrink(u64),
    Snapshot(&'static str),
    Delete(&'static str),
    Apply(&'static str),
    AddBitmap(&'static str),
    ClearBitmap(&'static str),
    RemoveBitmap(&'static str),
    Reopen,
}

/// What the image is made of, besides itself.
#[derive(Clone, Default)]
pub struct Files {
    pub data: Option<sim::Image>,
    /// Images below it, top first.
    pub layers: Vec<sim::Image>,
    /// What is below those.
    pub raw: Option<sim::Image>,
}

/// One image and what is done to it.
#[derive(Clone)]
pub struct Work {
    pub name: &'static str,
    pub image: sim::Image,
    pub files: Files,
    pub how: How,
    pub steps: Vec<Step>,
    /// What the disk shows at first, and the snapshot that the image has.
    pub sources: Vec<Vec<u8>>,
    pub snapshot: Option<String>,
    /// Names of its bitmaps, all of which record.
    pub bitmaps: Vec<String>,
    /// What the layers below show.
    pub below: Vec<u8>,
    pub cluster: u64,
    /// What is discarded reads as zeros.
    pub zeros_certain: bool,
    /// Each run takes long: some faults at each operation have to do.
    pub is_slow: bool,
}

impl Work {
    /// Without steps.
    pub fn new(name: &'static str, image: sim::Image, files: Files, how: How) -> Self {
        let mut work = Self {
            name,
            image,
            files,
            how,
            steps: Vec::new(),
            sources: Vec::new(),
            snapshot: None,
            bitmaps: Vec::new(),
            below: Vec::new(),
            cluster: 0,
            zeros_certain: true,
            is_slow: false,
        };
        work.below = lab::block_on(work.read_below());
        let checked = Checked::open(&work.image).unwrap();
        work.cluster = checked.header.cluster_size();
        work.zeros_certain = checked.header.version >= 3;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        work.bitmaps = checked.bitmaps().iter().map(|b| text(&b.name)).collect();
        work.snapshot = checked.snapshots().first().map(|s| text(&s.name));
        let snapshot = work
            .snapshot
            .as_ref()
            .map(|_| checked.snapshot_content(0, &work.below));
        let active = lab::block_on(async {
            let (disk, how) = work.machine(&work.images());
            let engine = lab::open(&disk, &how).await.unwrap();
            lab::read(&engine, 0, 0, engine.size()).await.unwrap()
        });
        work.sources = [Some(active), snapshot].into_iter().flatten().collect();
        work
    }

    async fn read_below(&self) -> Vec<u8> {
        let Some((top, rest)) = self.files.layers.split_first() else {
            let raw = self.files.raw.as_ref();
            return raw.map_or(Vec::new(), |raw| raw.bytes(0, raw.len()));
        };
        let disk = SimDisk::with_image(top.clone());
        let images = rest.iter().map(|image| disk.beside(image.clone()));
        let raw = self.files.raw.as_ref();
        let how = How {
            below: Below::Disks(images.collect(), raw.map(|raw| disk.beside(raw.clone()))),
            ..How::default()
        };
        let engine = lab::open(&disk, &how).await.unwrap();
        lab::read(&engine, 0, 0, engine.size()).await.unwrap()
    }

    /// All files, as they are at first: the image, its data file, the layers
    /// below, the raw one.
    pub fn images(&self) -> Vec<sim::Image> {
        let mut images = vec![self.image.clone()];
        images.extend(self.files.data.clone());
        images.extend(self.files.layers.clone());
        images.extend(self.files.raw.clone());
        images
    }

    /// Disks with these contents, and how to open the first.
    pub fn machine(&self, images: &[sim::Image]) -> (SimDisk, How) {
        let disk = SimDisk::with_image(images[0].clone());
        let mut others = images[1..].iter().map(|image| disk.beside(image.clone()));
        let mut next = |wanted: bool| wanted.then(|| others.next().unwrap());
        let data = next(self.files.data.is_some());
        let layers = self.files.layers.iter().map(|_| next(true).unwrap());
        let layers: Vec<_> = layers.collect();
        let raw = next(self.files.raw.is_some());
        let mut how = self.how.clone();
        how.data = data;
        if !layers.is_empty() || raw.is_some() {
            how.below = Below::Disks(layers, raw);
        }
        (disk, how)
    }

    pub fn size(&self) -> u64 {
        self.sources[0].len() as u64
    }

    /// With `count` random steps, and `others` among them.
    #[must_use]
    pub fn steps(mut self, seed: u64, count: u64, others: &[Step]) -> Self {
        let mut rng = Rng::new(seed);
        for number in 0..count {
            let step = self.random_step(&mut rng, number);
            self.steps.push(step);
            // Spread evenly, and what comes first is done to something.
            let due = (others.len() as u64 * (number + 1) / count) as usize;
            let before = (others.len() as u64 * number / count) as usize;
            self.steps.extend_from_slice(&others[before..due]);
        }
        self
    }

    /// The same with compressed writes in place of others.
    #[must_use]
    pub fn compressing(mut self) -> Self {
        for step in &mut self.steps {
            if let Step::Write { offset, len, byte } = *step {
                *step = Step::Compressed { offset, len, byte };
            }
        }
        self
    }

    fn random_step(&self, rng: &mut Rng, number: u64) -> Step {
        // The disk may be smaller by then.
        let size = self.size() * 3 / 4 / 512 * 512;
        let offset = rng.below(size / 512) * 512;
        let largest = (size - offset).min(6 * self.cluster.max(4096));
        let len = (1 + rng.below(largest / 512)) * 512;
        match rng.below(8) {
            0 => {
                let unmap = rng.chance(1, 2);
                Step::Zero { offset, len, unmap }
            }
            1 | 2 => {
                let start = offset.next_multiple_of(self.cluster).min(size);
                let end = (offset + len).next_multiple_of(self.cluster).min(size);
                let len = end - start;
                Step::Discard { offset: start, len }
            }
            3 => Step::Flush,
            _ => {
                let byte = 0x41 + number as u8;
                Step::Write { offset, len, byte }
            }
        }
    }
}
