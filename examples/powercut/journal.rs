//! What was asked of the device, and when it was acknowledged.
#![allow(unreachable_pub, reason = "a part of a program")]

use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::path::Path;

use crate::Outcome;

/// The unit of the work, in bytes.
pub const BLOCK: u64 = 4096;

/// A change of some blocks. Those of one block follow each other.
pub struct Change {
    pub first: u64,
    pub count: u64,
    /// What it puts there; 0 for zeros.
    pub value: u64,
    /// Times by a clock of its own.
    pub started: u64,
    pub acknowledged: u64,
}

/// A flush, whose end is marked in the log.
pub struct Mark {
    pub flush_started: u64,
    pub marked: u64,
}

#[derive(Default)]
pub struct Journal {
    pub changes: Vec<Change>,
    pub marks: Vec<Mark>,
}

/// The bytes of a block: different in every word and every block.
pub fn stamp(value: u64, block: u64) -> Vec<u8> {
    let word = |i: u64| match value {
        0 => 0,
        _ => value << 32 | block << 10 | i | 1 << 63,
    };
    (0..BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

impl Journal {
    pub fn save(&self, path: &Path) -> Outcome<()> {
        let mut text = String::new();
        for change in &self.changes {
            let Change {
                first,
                count,
                value,
                started,
                acknowledged,
            } = change;
            writeln!(text, "{first} {count} {value} {started} {acknowledged}")?;
        }
        for mark in &self.marks {
            writeln!(text, "{} {}", mark.flush_started, mark.marked)?;
        }
        Ok(fs::write(path, text)?)
    }

    pub fn load(path: &Path) -> Outcome<Self> {
        let mut journal = Self::default();
        for line in fs::read_to_string(path)?.lines() {
            let words: Result<Vec<u64>, _> = line.split(' ').map(str::parse).collect();
            match words?[..] {
                [first, count, value, started, acknowledged] => journal.changes.push(Change {
                    first,
                    count,
                    value,
                    started,
                    acknowledged,
                }),
                [flush_started, marked] => journal.marks.push(Mark {
                    flush_started,
                    marked,
                }),
                _ => return Err(format!("no line of a journal: {line}").into()),
            }
        }
        Ok(journal)
    }

    /// The values that each block may have when `marks.start` marks are
    /// durable, and nothing is there that came after mark `marks.end`.
    pub fn allowed(&self, blocks: u64, marks: Range<usize>) -> Vec<Vec<u64>> {
        let flushed = match marks.start {
            0 => 0,
            n => self.marks[n - 1].flush_started,
        };
        let next = self.marks.get(marks.end);
        let next = next.map_or(u64::MAX, |mark| mark.marked);
        let mut allowed = vec![vec![0]; blocks as usize];
        let mut changes: Vec<&Change> = self.changes.iter().collect();
        changes.sort_by_key(|change| change.started);
        for change in changes {
            if change.started > next {
                continue;
            }
            for block in change.first..change.first + change.count {
                let values = &mut allowed[block as usize];
                if change.acknowledged < flushed {
                    values.clear();
                }
                values.push(change.value);
            }
        }
        allowed
    }
}
