//! What an image may show at each moment of its history: requests with the
//! times of their begin and end, and the worlds that actions make.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Zeros,
    /// What the request with this number put there.
    Stamp(u32),
    /// What it is in this one of [`Log::contents`].
    Content(u32),
}

/// The bytes that request `id` puts into a sector: different in every word.
pub(crate) fn stamp(id: u32, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = u64::from(id) << 32 | sector << 8 | i as u64 | 1 << 63;
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// A request that changes sectors.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) sectors: Range<u64>,
    /// Those that it names: a discard leaves parts of clusters alone.
    pub(crate) named: Range<u64>,
    pub(crate) value: Value,
    /// Records in the history when it began, and the time.
    pub(crate) started: usize,
    pub(crate) begun: u64,
    /// Time of its end.
    pub(crate) acked: Option<u64>,
    /// Records when it was durable by itself.
    pub(crate) durable: Option<usize>,
    /// It may as well have done nothing.
    pub(crate) optional: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Flush {
    /// Time of its begin.
    pub(crate) begun: u64,
    /// Records in the history when it was complete.
    pub(crate) complete: usize,
}

/// A snapshot and what it shows (encrypted, as it is in the file).
#[derive(Clone, Debug)]
pub(crate) struct Taken {
    pub(crate) name: String,
    pub(crate) content: Rc<Vec<u8>>,
    /// Which of [`Log::contents`] applying it makes the disk.
    pub(crate) shown: u32,
}

impl PartialEq for Taken {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.content == other.content
    }
}

/// A bitmap, as its owner believes it to be.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    pub(crate) granularity: u64,
    pub(crate) enabled: bool,
    /// What the disk held when recording began.
    pub(crate) base: Rc<Vec<u8>>,
    /// What it held when recording ended.
    pub(crate) frozen: Option<Rc<Vec<u8>>>,
    /// Sectors that were dirty when recording began.
    pub(crate) carried: Rc<Vec<bool>>,
    /// Sectors that are dirty now, in whole granules.
    pub(crate) dirty: Vec<bool>,
    /// Sectors, in whole granules, that somebody wrote to while recording
    /// began or ended: whether they are dirty is luck.
    pub(crate) unsure: Rc<Vec<bool>>,
    /// Nobody wrote it down when its recording ended: it is marked in use for
    /// good.
    pub(crate) lost: bool,
}

impl Bitmap {
    pub(crate) fn mark(&mut self, start: u64, end: u64) {
        mark(&mut self.dirty, self.granularity, start, end);
    }

    pub(crate) fn doubt(&mut self, start: u64, end: u64) {
        mark(Rc::make_mut(&mut self.unsure), self.granularity, start, end);
    }

    pub(crate) fn is_sure(&self, sector: usize) -> bool {
        !self.unsure.get(sector).copied().unwrap_or(false)
    }
}

/// Marks the sectors of all granules that these bytes touch.
fn mark(sectors: &mut Vec<bool>, granularity: u64, start: u64, end: u64) {
    let first = start / granularity * granularity / 512;
    let last = (end.next_multiple_of(granularity) / 512) as usize;
    if sectors.len() < last {
        sectors.resize(last, false);
    }
    sectors[first as usize..last].fill(true);
}

/// What holds between two actions: requests change sectors of it.
#[derive(Clone)]
pub(crate) struct World {
    /// Records in the history when what made it began and ended.
    pub(crate) started: usize,
    pub(crate) complete: usize,
    /// For each sector of the disk what it holds, and the first request that
    /// may have changed it since.
    pub(crate) sectors: Rc<Vec<(Value, usize)>>,
    pub(crate) snapshots: Rc<Vec<Taken>>,
    pub(crate) bitmaps: Rc<BTreeMap<char, Bitmap>>,
    /// Passphrases that open the image besides the first.
    pub(crate) keys: Rc<BTreeSet<char>>,
}

/// After a clean close bitmaps are exact, until something else is done.
pub(crate) struct Closed {
    pub(crate) complete: usize,
    pub(crate) exact: BTreeMap<char, Vec<bool>>,
}

/// What a sector may hold: nearly always one value.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    first: Option<Value>,
    others: Vec<Value>,
}

impl Choice {
    fn add(&mut self, value: Value) {
        match self.first {
            None => self.first = Some(value),
            Some(_) if self.values().any(|other| other == value) => {}
            Some(_) => self.others.push(value),
        }
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = Value> {
        self.first.iter().chain(&self.others).copied()
    }
}

/// What is promised at a point. Where it is the same at a later one, no state
/// that was right before is wrong there: more may have begun meanwhile, which
/// only adds to what may be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Promise {
    flushes: usize,
    durable: usize,
    world: usize,
    closed: Option<usize>,
}

/// A whole history.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) changes: Vec<Change>,
    pub(crate) flushes: Vec<Flush>,
    pub(crate) worlds: Vec<World>,
    pub(crate) contents: Vec<Rc<Vec<u8>>>,
    pub(crate) closes: Vec<Closed>,
    now: u64,
}

impl Log {
    pub(crate) fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub(crate) fn world(&self) -> &World {
        self.worlds.last().expect("there is one from the beginning")
    }

    /// Notes a disk's content; its number.
    pub(crate) fn add_content(&mut self, content: Rc<Vec<u8>>) -> u32 {
        self.contents.push(content);
        self.contents.len() as u32 - 1
    }

    /// The worlds that may be there after `point` records: the last one that
    /// was complete, and the one that was being made.
    pub(crate) fn worlds_at(&self, point: usize) -> impl Iterator<Item = &World> {
        self.worlds[self.world_at(point)..]
            .iter()
            .take_while(move |world| world.started <= point)
    }

    fn world_at(&self, point: usize) -> usize {
        let done = self.worlds.iter().rposition(|w| w.complete <= point);
        done.unwrap_or(0)
    }

    /// The clean close after which nothing has been done at this point.
    pub(crate) fn closed_at(&self, point: usize) -> Option<usize> {
        self.closes
            .iter()
            .position(|closed| closed.complete == point)
    }

    /// What is promised after `point` records.
    pub(crate) fn promise(&self, point: usize) -> Promise {
        let flushes = self.flushes.iter().filter(|f| f.complete <= point);
        let durable = self.changes.iter().filter_map(|change| change.durable);
        Promise {
            flushes: flushes.count(),
            durable: durable.filter(|&at| at <= point).count(),
            world: self.world_at(point),
            closed: self.closed_at(point),
        }
    }

    /// What each sector of `world` may hold after `point` records.
    pub(crate) fn allowed(&self, world: &World, point: usize) -> Vec<Choice> {
        let durable_before = self
            .flushes
            .iter()
            .filter(|flush| flush.complete <= point)
            .map(|flush| flush.begun)
            .max()
            .unwrap_or(0);
        self.allowed_if(world, point, |change| {
            change.acked.is_some_and(|time| time < durable_before)
                || change.durable.is_some_and(|at| at <= point)
        })
    }

    /// The process has died when the disk showed this, and nobody knows what
    /// of it is durable. The next flush makes it so.
    pub(crate) fn died(&mut self, recorded: usize, shown: Rc<Vec<u8>>) {
        let sectors = 0..shown.len() as u64 / 512;
        let value = Value::Content(self.add_content(shown));
        let begun = self.tick();
        let acked = Some(self.tick());
        self.changes.push(Change {
            named: sectors.clone(),
            sectors,
            value,
            started: recorded,
            begun,
            acked,
            durable: None,
            optional: false,
        });
    }

    /// The changes that were under way at some time between these two.
    pub(crate) fn under_way(&self, start: u64, end: u64) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |change| {
            change.begun < end && change.acked.is_none_or(|acked| acked > start)
        })
    }

    /// What each sector holds while no request is under way, for a reader.
    pub(crate) fn allowed_live(&self, world: &World) -> Vec<Choice> {
        self.allowed_if(world, usize::MAX, |change| change.acked.is_some())
    }

    fn allowed_if(
        &self,
        world: &World,
        point: usize,
        durable: impl Fn(&Change) -> bool,
    ) -> Vec<Choice> {
        // For each sector, the latest begin of a request that is durable: what
        // had ended before that is gone.
        let mut settled = vec![0; world.sectors.len()];
        let held = |number: usize, sector: u64| {
            world
                .sectors
                .get(sector as usize)
                .is_some_and(|&(_, first)| number >= first)
        };
        for (number, change) in self.changes.iter().enumerate() {
            if !change.optional && durable(change) {
                for sector in change.sectors.clone() {
                    if held(number, sector) {
                        let latest = &mut settled[sector as usize];
                        *latest = change.begun.max(*latest);
                    }
                }
            }
        }
        let mut allowed: Vec<Choice> = world
            .sectors
            .iter()
            .zip(&settled)
            .map(|(&(base, _), &settled)| Choice {
                first: (settled == 0).then_some(base),
                others: Vec::new(),
            })
            .collect();
        for (number, change) in self.changes.iter().enumerate() {
            if change.started > point {
                continue;
            }
            for sector in change.sectors.clone() {
                if !held(number, sector) {
                    continue;
                }
                let gone = change
                    .acked
                    .is_some_and(|end| end < settled[sector as usize]);
                if !gone {
                    allowed[sector as usize].add(change.value);
                }
            }
        }
        allowed
    }

    /// Whether a sector's bytes are this.
    pub(crate) fn is(&self, bytes: &[u8], sector: u64, value: Value) -> bool {
        match value {
            Value::Zeros => bytes == [0; 512],
            Value::Stamp(id) => {
                let word = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
                word == (u64::from(id) << 32 | sector << 8 | 1 << 63) && bytes == stamp(id, sector)
            }
            Value::Content(number) => {
                let content = &self.contents[number as usize];
                let at = sector as usize * 512;
                match content.get(at..at + 512) {
                    Some(wanted) => bytes == wanted,
                    None => bytes == [0; 512],
                }
            }
        }
    }
}
