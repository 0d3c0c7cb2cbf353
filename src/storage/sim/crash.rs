//! Power cuts: what disks may hold afterwards.

use std::fmt;

use super::history::SECTOR;
use super::{Change, History, Image, Record, Rng};

/// What the disks hold after a power cut.
#[derive(Clone, Debug)]
pub struct Crash {
    /// How many records of the history had happened.
    pub point: usize,
    /// Records that were not durable and did not survive as a whole.
    pub fates: Vec<(usize, Fate)>,
    /// What each of the disks holds.
    pub images: Vec<Image>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = |torn: bool| -> Vec<usize> {
            let fates = self.fates.iter();
            fates
                .filter(|(_, fate)| matches!(fate, Fate::Torn(_)) == torn)
                .map(|&(record, _)| record)
                .collect()
        };
        write!(
            f,
            "power cut after {} records; lost {:?}, torn {:?}",
            self.point,
            numbers(false),
            numbers(true)
        )
    }
}

/// What the disks may hold when the power is cut after each record of
/// `history`: for each of these points the state in which all survived that
/// had happened, the one in which only what was durable did, the one in which
/// the last change alone did besides, and `random` others. The same `seed`
/// gives the same ones.
///
/// The rules:
///
/// - A change is durable when a sync of its disk followed it in the history.
///   An operation enters the history when it takes effect, so everything that
///   was complete before the sync was started is durable when it succeeds.
/// - Of the other changes any subset may survive, in whatever order they were
///   made: there is no order without a sync.
/// - A write survives in sectors of 512 bytes, each wholly or not at all. A
///   torn write has lost any of its sectors: the first, the last, or some
///   between. Zeroing and punching may survive at their start or their end
///   only.
/// - A sector holds what it held after one of the changes to it, or its
///   durable contents. Where changes overlap, the later may be lost and the
///   earlier survive; but an earlier one never replaces a later one that
///   survived, and one that changed a part of a sector takes along what was in
///   its other parts at that moment, as the page cache and read-modify-write
///   do.
/// - A write past the end that was lost may have lengthened the file all the
///   same: the new bytes are zeros then.
/// - A sync that failed makes nothing durable, then or later: whatever was not
///   durable before it is lost or survives, as if the power had been cut.
///
/// Disks of one machine lose power together, but a sync of one does nothing
/// for the others.
pub fn crash_images(history: &History, seed: u64, random: usize) -> CrashImages<'_> {
    CrashImages {
        history,
        rng: Rng::new(seed),
        random,
        point: 0,
        variant: 0,
        durable: history.start.clone(),
        pending: Vec::new(),
    }
}

/// What the disks hold when the power is cut after `point` records of
/// `history`, and `fates` says what became of those that are not durable then:
/// a [`Crash`] of [`crash_images`] again, or one like it. Records that are not
/// named survive; what is said of durable ones does not count.
///
/// Where a sync failed, what becomes of the changes before it is not said by
/// `fates` once another one has succeeded.
pub fn crash_image(history: &History, point: usize, fates: &[(usize, Fate)]) -> Crash {
    let mut images = crash_images(history, 0, 0);
    for record in &history.records[..point] {
        images.step(record);
        images.point += 1;
    }
    let fate = |pending: &Pending| {
        let told = fates.iter().find(|(number, _)| *number == pending.record);
        told.filter(|(_, fate)| *fate != Fate::Survives).copied()
    };
    let fates = images.pending.iter().filter_map(fate).collect();
    images.crash(fates)
}

/// The iterator of [`crash_images`].
#[derive(Debug)]
pub struct CrashImages<'a> {
    history: &'a History,
    rng: Rng,
    random: usize,
    /// Records that have happened.
    point: usize,
    /// The next state to give for this point.
    variant: usize,
    durable: Vec<Image>,
    pending: Vec<Pending>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    record: usize,
    /// A sync failed since: no other will save it.
    doomed: bool,
}

/// How much of a change survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All.
    Survives,
    /// Some of its sectors: which, this number decides.
    Torn(u64),
    /// Nothing.
    Lost,
    /// Nothing, but the file is as long as if it had.
    LostButLength,
}

impl Fate {
    fn random(rng: &mut Rng, survivors: u64) -> Self {
        if rng.chance(survivors, 8) {
            if rng.chance(1, 4) {
                Self::Torn(rng.next_u64())
            } else {
                Self::Survives
            }
        } else if rng.chance(1, 4) {
            Self::LostButLength
        } else {
            Self::Lost
        }
    }
}

impl Iterator for CrashImages<'_> {
    type Item = Crash;

    fn next(&mut self) -> Option<Crash> {
        self.choose(|_, _| true)
    }
}

impl CrashImages<'_> {
    /// The next of the states that `wanted` picks, by its point and its fates:
    /// for the others nothing is copied.
    pub fn choose(
        &mut self,
        mut wanted: impl FnMut(usize, &[(usize, Fate)]) -> bool,
    ) -> Option<Crash> {
        loop {
            // With nothing pending there is but one state.
            let variants = match self.pending.len() {
                0 => 1,
                _ => 3 + self.random,
            };
            if self.variant == variants {
                let record = self.history.records.get(self.point)?;
                self.step(record);
                self.point += 1;
                self.variant = 0;
            }
            let fates = self.fates(self.variant);
            self.variant += 1;
            if wanted(self.point, &fates) {
                return Some(self.crash(fates));
            }
        }
    }

    /// Goes on to the states after `point` records, past those before it.
    #[must_use]
    pub fn from_point(mut self, point: usize) -> Self {
        for record in self.history.records[..point].iter().skip(self.point) {
            self.step(record);
            self.point += 1;
        }
        self.variant = 0;
        self
    }

    fn step(&mut self, record: &Record) {
        let number = self.point;
        let same_disk = |p: &Pending| self.history.records[p.record].disk == record.disk;
        match record.change {
            Change::Sync => {
                let (settled, rest) = self.pending.iter().partition(|p| same_disk(p));
                self.pending = rest;
                let settled: Vec<Pending> = settled;
                for pending in settled {
                    let fate = if pending.doomed {
                        Fate::random(&mut self.rng, 4)
                    } else {
                        Fate::Survives
                    };
                    let record = &self.history.records[pending.record];
                    apply(&mut self.durable, record, fate);
                }
            }
            Change::FailedSync => {
                let records = &self.history.records;
                for pending in &mut self.pending {
                    pending.doomed |= records[pending.record].disk == record.disk;
                }
            }
            _ => self.pending.push(Pending {
                record: number,
                doomed: false,
            }),
        }
    }

    /// What becomes of the pending records; those not named survive.
    fn fates(&mut self, variant: usize) -> Vec<(usize, Fate)> {
        let survivors = 1 + self.rng.below(7);
        let last = self.pending.len().wrapping_sub(1);
        let mut fates = Vec::new();
        for (i, pending) in self.pending.iter().enumerate() {
            let fate = match variant {
                0 => break,
                1 => Fate::Lost,
                2 if i == last => Fate::Survives,
                2 => Fate::Lost,
                _ => Fate::random(&mut self.rng, survivors),
            };
            if fate != Fate::Survives {
                fates.push((pending.record, fate));
            }
        }
        fates
    }

    /// `fates` are in the order of the records, and all of them pending.
    fn crash(&self, fates: Vec<(usize, Fate)>) -> Crash {
        let mut images = self.durable.clone();
        let mut told = fates.iter().peekable();
        for pending in &self.pending {
            let fate = match told.next_if(|&&(record, _)| record == pending.record) {
                Some(&(_, fate)) => fate,
                None => Fate::Survives,
            };
            apply(&mut images, &self.history.records[pending.record], fate);
        }
        Crash {
            point: self.point,
            fates,
            images,
        }
    }
}

fn apply(images: &mut [Image], record: &Record, fate: Fate) {
    let image = &mut images[record.disk];
    let range = match &record.change {
        Change::Write { offset, bytes } => *offset..*offset + bytes.len() as u64,
        Change::Zero { offset, len } | Change::Punch { offset, len } => *offset..*offset + *len,
        Change::SetLen(len) => {
            if matches!(fate, Fate::Survives | Fate::Torn(_)) {
                image.set_len(*len);
            }
            return;
        }
        Change::Sync | Change::FailedSync => return,
    };
    let grows = !matches!(record.change, Change::Punch { .. });
    let lengthen = |image: &mut Image| {
        if grows && range.end > image.len() {
            image.set_len(range.end);
        }
    };
    let keep = match fate {
        Fate::Lost => return,
        Fate::LostButLength => {
            lengthen(image);
            return;
        }
        Fate::Survives => Survivors::All,
        Fate::Torn(seed) => Survivors::some(&mut Rng::new(seed), range.start, range.end),
    };
    match &record.change {
        Change::Write { offset, bytes } if matches!(keep, Survivors::All) => {
            image.write(*offset, bytes);
        }
        Change::Write { offset, bytes } => {
            let mut at = *offset;
            while at < range.end {
                let end = ((at / SECTOR + 1) * SECTOR).min(range.end);
                if keep.has(at) {
                    let part = (at - offset) as usize..(end - offset) as usize;
                    image.write(at, &bytes[part]);
                }
                at = end;
            }
        }
        _ => {
            let (start, end) = keep.range(range.start, range.end);
            image.punch(start, end - start);
            if end == range.end {
                lengthen(image);
            }
        }
    }
    for (at, bytes) in &record.edges {
        if keep.has(*at) {
            image.write(*at, bytes);
        }
    }
}

/// The sectors of a change that survive.
enum Survivors {
    All,
    /// Those from this offset up to that.
    Between(u64, u64),
    /// Each with even chances, by its number and this.
    Some(u64),
}

impl Survivors {
    fn some(rng: &mut Rng, start: u64, end: u64) -> Self {
        let first = start / SECTOR;
        let cut = (first + rng.below(end.div_ceil(SECTOR) - first + 1)) * SECTOR;
        match rng.below(3) {
            0 => Self::Between(0, cut),
            1 => Self::Between(cut, u64::MAX),
            _ => Self::Some(rng.next_u64()),
        }
    }

    fn has(&self, at: u64) -> bool {
        match self {
            Self::All => true,
            Self::Between(start, end) => (*start..*end).contains(&(at / SECTOR * SECTOR)),
            Self::Some(salt) => Rng::new(salt ^ (at / SECTOR)).chance(1, 2),
        }
    }

    /// The part of a range that survives, where it has to be in one piece.
    fn range(&self, start: u64, end: u64) -> (u64, u64) {
        match self {
            Self::Between(from, to) => {
                let start = start.max(*from).min(end);
                (start, end.min(*to).max(start))
            }
            _ => (start, end),
        }
    }
}
