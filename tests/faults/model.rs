//! What the disk may show: while it is open, and after a power cut.
#![allow(unreachable_pub, reason = "a part of a test program")]

use qcow2_ublk::qcow2::Barrier;

use crate::work::{Step, Work};

const SECTOR: u64 = 512;

/// One of the work's sources at its place; below that, a byte throughout.
const SOURCE: u16 = 256;

/// The values a sector may have.
type Sector = Vec<u16>;

/// A state of the image, with what is not known of it.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub sectors: Vec<Sector>,
    pub snapshots: Vec<(String, Vec<Sector>)>,
}

impl State {
    fn resized(&self, size: u64) -> Self {
        let mut state = self.clone();
        state.sectors.resize((size / SECTOR) as usize, vec![0]);
        state
    }

    /// The state after a step that is done as a whole or not at all.
    fn after(&self, step: &Step) -> Self {
        let mut state = self.clone();
        match step {
            Step::Grow(size) | Step::Shrink(size) => return self.resized(*size),
            Step::Snapshot(name) => {
                let snapshot = ((*name).to_owned(), state.sectors.clone());
                state.snapshots.push(snapshot);
            }
            Step::Delete(name) => state.snapshots.retain(|(n, _)| n != name),
            Step::Apply(name) => {
                let found = state.snapshots.iter().find(|(n, _)| n == name);
                state.sectors = found.unwrap().1.clone();
            }
            _ => {}
        }
        state
    }

    /// The first sector of `content` that is none of what it may be.
    fn misfit(sectors: &[Sector], content: &[u8], sources: &[Vec<u8>]) -> Option<String> {
        if content.len() as u64 != sectors.len() as u64 * SECTOR {
            let (is, expected) = (content.len(), sectors.len() * 512);
            return Some(format!("{is} bytes, not {expected}"));
        }
        let chunks = content.chunks_exact(SECTOR as usize);
        for (number, (bytes, values)) in chunks.zip(sectors).enumerate() {
            let at = number * SECTOR as usize;
            let fits = values.iter().any(|&value| {
                if value < SOURCE {
                    return bytes.iter().all(|&b| u16::from(b) == value);
                }
                let source = &sources[usize::from(value - SOURCE)];
                source.get(at..at + 512) == Some(bytes)
            });
            if !fits {
                let seen = &bytes[..8];
                return Some(format!(
                    "sector {number} is none of {values:x?}: {seen:02x?}"
                ));
            }
        }
        None
    }

    /// What is wrong with a disk that should be this; nothing is said of its
    /// snapshots if they are not known.
    pub fn wrong(&self, shown: &Shown, sources: &[Vec<u8>]) -> Option<String> {
        if let Some(bad) = Self::misfit(&self.sectors, &shown.content, sources) {
            return Some(bad);
        }
        let snapshots = shown.snapshots.as_ref()?;
        let names = |list: &mut dyn Iterator<Item = &String>| list.cloned().collect::<Vec<_>>();
        let expected = names(&mut self.snapshots.iter().map(|(name, _)| name));
        let found = names(&mut snapshots.iter().map(|(name, _)| name));
        if expected != found {
            return Some(format!("snapshots {found:?}, not {expected:?}"));
        }
        let pairs = self.snapshots.iter().zip(snapshots);
        pairs.into_iter().find_map(|((name, sectors), (_, bytes))| {
            Self::misfit(sectors, bytes, sources).map(|bad| format!("snapshot {name}: {bad}"))
        })
    }
}

/// What an image was found to show.
pub struct Shown {
    pub content: Vec<u8>,
    pub snapshots: Option<Vec<(String, Vec<u8>)>>,
}

/// What a bitmap has to have.
#[derive(Clone)]
pub struct Recorded {
    pub name: String,
    /// Sectors changed, or perhaps changed, since it was last empty.
    pub must: Vec<bool>,
    pub may: Vec<bool>,
}

pub struct Model<'a> {
    work: &'a Work,
    /// What requests see.
    pub now: State,
    /// What the file may show when the power fails now.
    pub safe: State,
    /// Or these: something was done to the file, and failed.
    pub or_else: Vec<State>,
    pub bitmaps: Vec<Recorded>,
    /// Bitmaps that are there or not, empty or not: an action on them failed
    /// in a way that leaves it open.
    pub doubtful: Vec<String>,
}

impl<'a> Model<'a> {
    pub fn new(work: &'a Work) -> Self {
        let source = |n: usize| vec![vec![SOURCE + n as u16]; work.sources[n].len() / 512];
        let snapshot = work.snapshot.iter().map(|name| (name.clone(), source(1)));
        let state = State {
            sectors: source(0),
            snapshots: snapshot.collect(),
        };
        let mut model = Self {
            work,
            now: state.clone(),
            safe: state,
            or_else: Vec::new(),
            bitmaps: Vec::new(),
            doubtful: Vec::new(),
        };
        for name in &work.bitmaps {
            model.add_bitmap(name);
        }
        model
    }

    fn add_bitmap(&mut self, name: &str) {
        self.bitmaps.push(Recorded {
            name: name.to_owned(),
            must: Vec::new(),
            may: Vec::new(),
        });
    }

    /// Everything is durable.
    pub fn settle(&mut self) {
        self.safe = self.now.clone();
        self.or_else.clear();
    }

    fn states(&mut self) -> impl Iterator<Item = &mut State> {
        [&mut self.now, &mut self.safe]
            .into_iter()
            .chain(&mut self.or_else)
    }

    fn change(&mut self, offset: u64, len: u64, value: u8, certain: bool) {
        let range = (offset / SECTOR) as usize..((offset + len) / SECTOR) as usize;
        for state in self.states() {
            // A disk that might be smaller has nothing there.
            let end = range.end.min(state.sectors.len());
            for sector in &mut state.sectors[range.start.min(end)..end] {
                if !sector.contains(&value.into()) {
                    sector.push(value.into());
                }
            }
        }
        if certain {
            for sector in &mut self.now.sectors[range.clone()] {
                *sector = vec![value.into()];
            }
        }
        for bitmap in &mut self.bitmaps {
            let mark = |sectors: &mut Vec<bool>| {
                if sectors.len() < range.end {
                    sectors.resize(range.end, false);
                }
                sectors[range.clone()].fill(true);
            };
            mark(&mut bitmap.may);
            if certain {
                mark(&mut bitmap.must);
            }
        }
    }

    /// A step is over; what failed may have happened in part. `size` is that
    /// of the open disk.
    pub fn done(&mut self, step: &Step, ok: bool, size: u64) {
        match *step {
            Step::Write { offset, len, byte } | Step::Compressed { offset, len, byte } => {
                self.change(offset, len, byte, ok);
            }
            Step::Zero { offset, len, .. } => self.change(offset, len, 0, ok),
            // In version 2 it may leave what the layer below shows.
            Step::Discard { offset, len } => {
                self.change(offset, len, 0, ok && self.work.zeros_certain);
            }
            Step::AddBitmap(name) if ok => self.add_bitmap(name),
            Step::RemoveBitmap(name) if ok => self.bitmaps.retain(|b| b.name != name),
            Step::ClearBitmap(name) if ok => {
                self.bitmaps.retain(|b| b.name != name);
                self.add_bitmap(name);
            }
            Step::AddBitmap(name) | Step::RemoveBitmap(name) | Step::ClearBitmap(name) => {
                self.doubtful.push(name.to_owned());
            }
            Step::Flush | Step::Reopen => {}
            _ if ok => {
                self.now = self.now.after(step);
                self.settle();
            }
            _ => {
                let after = self.safe.after(step);
                self.or_else.push(after);
                if size == self.now.after(step).sectors.len() as u64 * SECTOR {
                    // All that counts was done; or it changes no size.
                    if let Step::Grow(_) | Step::Shrink(_) = step {
                        self.or_else.push(self.now.clone());
                        self.now = self.now.after(step);
                    }
                }
            }
        }
        let barrier = self.work.how.barrier;
        let flushed = matches!(step, Step::Flush | Step::Reopen) && barrier != Barrier::None;
        if ok && (flushed || barrier == Barrier::Full) {
            self.settle();
        }
    }
}
