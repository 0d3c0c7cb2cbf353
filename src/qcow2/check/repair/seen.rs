//! Which kinds of findings there were: what decides about the way of a repair.

use super::super::{Part, Problem};

/// Kinds of findings.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::qcow2::check) struct Seen {
    /// References may be out of sight.
    pub(in crate::qcow2::check) blind: bool,
    /// Entries of L1 or L2 tables break rules or point outside.
    pub(in crate::qcow2::check) entries: bool,
    /// The refcount table or its blocks are not what they should be.
    pub(in crate::qcow2::check) refcounts: bool,
    /// A used cluster has no refcount block.
    pub(in crate::qcow2::check) no_block: bool,
    /// The bitmaps cannot be right.
    pub(in crate::qcow2::check) bitmaps: bool,
    /// Some refcount is too low.
    pub(in crate::qcow2::check) low: bool,
    /// How many COPIED flags are wrong.
    pub(in crate::qcow2::check) flags: u64,
    /// How many entries of the snapshot table lack their disk's size.
    pub(in crate::qcow2::check) incomplete_snapshots: u64,
    /// How many of them have more extra data than anybody handles.
    pub(in crate::qcow2::check) overlong_snapshots: u64,
    /// More uses than can be counted, or uses that exclude each other.
    pub(in crate::qcow2::check) clash: bool,
    /// Something is where the file is not, and cannot be moved.
    pub(in crate::qcow2::check) stuck: bool,
}

impl Seen {
    pub(in crate::qcow2::check) fn note(&mut self, problem: &Problem) {
        match problem {
            Problem::Refcount {
                stored, counted, ..
            } => self.low |= stored < counted,
            Problem::Overflow { .. } | Problem::Overlap { .. } => self.clash = true,
            Problem::UnreadableRefcounts { .. } => self.refcounts = true,
            Problem::UnreadableTable { .. } | Problem::BadSnapshotL1 { .. } => self.blind = true,
            Problem::Copied { .. } => self.flags += 1,
            Problem::BadBitmapDirectory { .. } => self.bitmaps = true,
            Problem::IncompleteSnapshot { .. } => self.incomplete_snapshots += 1,
            Problem::ExtraSnapshotData { .. } => self.overlong_snapshots += 1,
            Problem::SnapshotsWithDataFile { .. } => {}
            Problem::OutsideFile { part, .. } | Problem::BadEntry { table: part, .. } => {
                match part {
                    Part::L2Table | Part::Data | Part::Compressed => self.entries = true,
                    Part::L1Table if matches!(problem, Problem::BadEntry { .. }) => {
                        self.entries = true;
                    }
                    Part::RefcountTable | Part::RefcountBlock => self.refcounts = true,
                    Part::BitmapDirectory | Part::BitmapTable | Part::BitmapData => {
                        self.bitmaps = true;
                    }
                    // A table behind the end, whose content nobody knows.
                    Part::L1Table | Part::SnapshotTable => self.blind = true,
                    Part::Header | Part::CryptoHeader => self.stuck = true,
                }
            }
        }
    }

    /// Lowering refcounts takes nothing from anybody.
    pub(super) fn may_lower(&self) -> bool {
        !(self.blind || self.entries || self.refcounts || self.no_block || self.bitmaps)
    }

    /// Some cluster is used more often than it is counted.
    pub(super) fn is_undercounted(&self) -> bool {
        self.low || self.clash
    }

    /// Refcounts cannot be put right where they are.
    pub(super) fn needs_rebuild(&self) -> bool {
        self.refcounts || self.no_block
    }
}
