//! What the dirty bitmaps of an image have to have.

use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapFlags, BitmapTableEntry};
use qcow2_ublk::storage::sim::Image;

use super::super::common::check::Checked;
use super::model::SECTOR;

/// What is done with a bitmap.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Add { bits: u8 },
    Remove,
    Clear,
    Enable,
    Disable,
}

/// A bitmap, as its owner believes it to be.
#[derive(Clone, Debug)]
pub struct Tracked {
    pub name: Vec<u8>,
    bits: u8,
    enabled: bool,
    /// Changes were lost: only to be removed.
    pub lost: bool,
    /// What the disk held when recording began, and when it ended.
    base: Vec<u8>,
    frozen: Option<Vec<u8>>,
    /// Granules that were dirty when recording began.
    carried: Vec<bool>,
    /// Granules that have to be dirty, and those that may be.
    must: Vec<bool>,
    may: Vec<bool>,
}

/// A bitmap in the file.
pub struct Stored {
    entry: Bitmap,
    dirty: Vec<bool>,
}

/// The bitmaps in the file of a disk of `size` bytes, read as simply as can
/// be.
pub fn stored(checked: &Checked<'_>, image: &Image, size: u64) -> Vec<Stored> {
    let bitmaps = checked.bitmaps();
    let read = |entry: Bitmap| {
        let cluster = checked.header.geometry().cluster_size();
        let bits: Vec<u8> = checked
            .bitmap_table(&entry)
            .into_iter()
            .flat_map(|place| match place {
                BitmapTableEntry::Cluster(at) => image.bytes(at.0, cluster),
                BitmapTableEntry::Ones => vec![0xff; cluster as usize],
                BitmapTableEntry::Zeros => vec![0; cluster as usize],
            })
            .collect();
        let granules = size.div_ceil(1 << entry.granularity_bits);
        let is_set = |n: usize| bits.get(n / 8).is_some_and(|byte| byte >> (n % 8) & 1 == 1);
        let dirty = (0..granules as usize).map(is_set);
        Stored {
            dirty: dirty.collect(),
            entry,
        }
    };
    bitmaps.into_iter().map(read).collect()
}

fn is_set(granules: &[bool], n: usize) -> bool {
    granules.get(n).copied().unwrap_or(false)
}

impl Tracked {
    fn new(found: &Stored, content: &[u8]) -> Self {
        let flags = found.entry.flags;
        let enabled = flags.contains(BitmapFlags::AUTO);
        Self {
            name: found.entry.name.clone(),
            bits: found.entry.granularity_bits,
            enabled,
            lost: flags.contains(BitmapFlags::IN_USE) || !found.entry.extra.is_empty(),
            base: content.to_vec(),
            frozen: (!enabled).then(|| content.to_vec()),
            carried: found.dirty.clone(),
            must: found.dirty.clone(),
            may: found.dirty.clone(),
        }
    }

    fn mark(&mut self, start: u64, end: u64, surely: bool) {
        let last = ((end - 1) >> self.bits) as usize;
        let sets = [Some(&mut self.may), surely.then_some(&mut self.must)];
        for granules in sets.into_iter().flatten() {
            if granules.len() <= last {
                granules.resize(last + 1, false);
            }
            granules[(start >> self.bits) as usize..=last].fill(true);
        }
    }

    /// Whether the one in the file is this one, after a clean close.
    fn is_exactly(&self, found: &Stored) -> Result<(), String> {
        self.is_same(found)?;
        if found.entry.flags.contains(BitmapFlags::IN_USE) {
            return Err("it is marked in use".to_owned());
        }
        for (n, &dirty) in found.dirty.iter().enumerate() {
            if is_set(&self.must, n) && !dirty {
                return Err(format!("granule {n} is not dirty"));
            }
        }
        self.has_no_more(found)
    }

    /// Whether it may be what a death or a power cut left, with a disk that
    /// shows `content`: marked, or with all that differs.
    fn is_left(&self, found: &Stored, content: &[u8]) -> Result<(), String> {
        self.is_same(found)?;
        if found.entry.flags.contains(BitmapFlags::IN_USE) {
            return Ok(());
        }
        let shown = self.frozen.as_deref().unwrap_or(content);
        let len = 1 << self.bits;
        for (n, &dirty) in found.dirty.iter().enumerate() {
            let part = |disk: &[u8]| {
                let end = disk.len().min((n + 1) * len);
                let start = end.min(n * len);
                start..end
            };
            let (old, new) = (&self.base[part(&self.base)], &shown[part(shown)]);
            let common = old.len().min(new.len());
            // What is beyond either disk is as if it were zeros.
            let differs = old[..common] != new[..common]
                || new[common..].iter().any(|&b| b != 0)
                || is_set(&self.carried, n);
            if differs && !dirty {
                return Err(format!("granule {n} has changed"));
            }
        }
        self.has_no_more(found)
    }

    fn is_same(&self, found: &Stored) -> Result<(), String> {
        let entry = &found.entry;
        let enabled = entry.flags.contains(BitmapFlags::AUTO);
        if (entry.granularity_bits, enabled) != (self.bits, self.enabled) {
            return Err(format!("it is another: {entry:?}"));
        }
        Ok(())
    }

    fn has_no_more(&self, found: &Stored) -> Result<(), String> {
        let more = (0..found.dirty.len()).find(|&n| found.dirty[n] && !is_set(&self.may, n));
        more.map_or(Ok(()), |n| {
            Err(format!("granule {n} is dirty for no reason"))
        })
    }
}

/// All of an image.
#[derive(Clone, Debug, Default)]
pub struct Bitmaps(Vec<Tracked>);

impl Bitmaps {
    /// Those that an image begins with.
    pub fn of(found: &[Stored], content: &[u8]) -> Self {
        Self(found.iter().map(|b| Tracked::new(b, content)).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of them is good only to be removed.
    pub fn has_lost(&self) -> bool {
        self.0.iter().any(|tracked| tracked.lost)
    }

    pub fn names(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.0.iter().map(|tracked| &tracked.name)
    }

    pub fn find(&self, name: &[u8]) -> Option<&Tracked> {
        self.0.iter().find(|tracked| tracked.name == name)
    }

    /// A request for these sectors ended; `surely`, with success.
    pub fn mark(&mut self, first: u64, count: u64, surely: bool) {
        if count > 0 {
            for tracked in self.0.iter_mut().filter(|tracked| tracked.enabled) {
                tracked.mark(first * SECTOR, (first + count) * SECTOR, surely);
            }
        }
    }

    /// A change was made while the disk held `content`.
    pub fn change(&mut self, name: &[u8], change: Change, content: Vec<u8>) {
        if let Change::Add { bits } = change {
            return self.0.push(Tracked {
                name: name.to_vec(),
                bits,
                enabled: true,
                lost: false,
                base: content,
                frozen: None,
                carried: Vec::new(),
                must: Vec::new(),
                may: Vec::new(),
            });
        }
        if let Change::Remove = change {
            return self.0.retain(|tracked| tracked.name != name);
        }
        let Some(tracked) = self.0.iter_mut().find(|tracked| tracked.name == name) else {
            return;
        };
        match change {
            Change::Clear => {
                tracked.must.clear();
                tracked.may.clear();
                tracked.carried.clear();
                tracked.frozen = (!tracked.enabled).then(|| content.clone());
                tracked.base = content;
            }
            // What changed meanwhile it does not know: a new beginning, with
            // what it has.
            Change::Enable if !tracked.enabled => {
                tracked.enabled = true;
                tracked.carried.clone_from(&tracked.must);
                tracked.frozen = None;
                tracked.base = content;
            }
            Change::Disable if tracked.enabled => {
                tracked.enabled = false;
                tracked.frozen = Some(content);
            }
            _ => {}
        }
    }

    /// After a clean close they are exact.
    pub fn are_exactly(&self, found: &[Stored]) -> Result<(), String> {
        self.compare(found, |tracked, found| tracked.is_exactly(found))
    }

    /// After a death or a power cut they are complete, or marked.
    pub fn are_left(&self, found: &[Stored], content: &[u8]) -> Result<(), String> {
        self.compare(found, |tracked, found| tracked.is_left(found, content))
    }

    /// They are what was found, from now on.
    pub fn become_found(&mut self, found: &[Stored], content: &[u8]) {
        for (tracked, found) in self.0.iter_mut().zip(found) {
            *tracked = Tracked {
                lost: tracked.lost || found.entry.flags.contains(BitmapFlags::IN_USE),
                ..Tracked::new(found, content)
            };
        }
    }

    fn compare(
        &self,
        found: &[Stored],
        fits: impl Fn(&Tracked, &Stored) -> Result<(), String>,
    ) -> Result<(), String> {
        let found_names: Vec<_> = found.iter().map(|found| &found.entry.name).collect();
        if !self.names().eq(found_names.iter().copied()) {
            return Err(format!("the bitmaps are {found_names:?}"));
        }
        for (tracked, found) in self.0.iter().zip(found) {
            if !tracked.lost {
                let name = String::from_utf8_lossy(&tracked.name);
                fits(tracked, found).map_err(|what| format!("bitmap {name}: {what}"))?;
            }
        }
        Ok(())
    }
}
