//! The power is cut after every flush of the disk, with some of the writes
//! that the next one would have made durable.
#![allow(unreachable_pub, reason = "a part of a program")]

use std::ops::Range;
use std::path::Path;

use qcow2_ublk::storage::sim::{Image, Rng};

use crate::Outcome;
use crate::journal::Journal;
use crate::judge;
use crate::log::{Entry, Log};

pub struct Replay<'a> {
    pub log: Log,
    pub journal: Journal,
    pub folder: &'a Path,
    /// Flushes to stop at, about.
    pub points: u64,
}

impl Replay<'_> {
    pub fn run(&self, start: &Path, seed: u64) -> Outcome<()> {
        let entries = &self.log.entries;
        let marks = self.log.marks(entries.len());
        if marks != self.journal.marks.len() {
            let known = self.journal.marks.len();
            return Err(format!("{marks} marks in the log, {known} in the journal").into());
        }
        let flushes = entries.iter().filter(|e| e.is_flush()).count() as u64;
        let mut disk = Image::load(start)?;
        let mut rng = Rng::new(seed);
        let (mut states, mut leaks, mut at) = (0, 0, 0);
        while at < entries.len() {
            let end = self.next_flush(at);
            // Whether it is among the wanted ones, or a mark is near.
            if rng.chance(self.points.min(flushes), flushes) {
                for variant in 0..3 {
                    let mut left = disk.clone();
                    let pending = &entries[at..end];
                    let lost = apply_some(&mut left, pending, variant, &mut rng);
                    let found = self.judge(&left, at..end, states % 4 == 0);
                    leaks += found.map_err(|e| {
                        let of = pending.len();
                        format!("after entry {at}, {lost} of the next {of} lost: {e}")
                    })?;
                    states += 1;
                }
            }
            for entry in &entries[at..end] {
                entry.apply(&mut disk);
            }
            at = end;
        }
        self.judge(&disk, at..at, true)?;
        states += 1;
        let count = entries.len();
        println!("{count} entries, {flushes} flushes, {marks} marks");
        println!("{states} states judged, {leaks} clusters leaked in them");
        if states < 20 {
            return Err("too few states to mean anything".into());
        }
        Ok(())
    }

    /// The end of what begins at `at` and ends with a flush.
    fn next_flush(&self, at: usize) -> usize {
        let rest = &self.log.entries[at..];
        let flush = rest.iter().position(Entry::is_flush);
        flush.map_or(self.log.entries.len(), |n| at + n + 1)
    }

    fn judge(&self, disk: &Image, entries: Range<usize>, more: bool) -> Outcome<u64> {
        let path = self.folder.join("cut.qcow2");
        disk.save(&path)?;
        let leaks = judge::image(&path, more)?;
        let marks = self.log.marks(entries.start)..self.log.marks(entries.end);
        judge::content(&path, &self.journal, marks)?;
        if more {
            judge::writable(&path)?;
        }
        Ok(leaks)
    }
}

/// None of the entries, all, or some of them; how many not.
fn apply_some(disk: &mut Image, entries: &[Entry], variant: u32, rng: &mut Rng) -> usize {
    let chance = rng.below(9);
    let mut lost = 0;
    for entry in entries {
        let survives = match variant {
            0 => false,
            1 => true,
            _ => rng.chance(chance, 8),
        };
        if survives {
            entry.apply(disk);
        } else {
            lost += 1;
        }
    }
    lost
}
