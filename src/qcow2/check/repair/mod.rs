//! Repairing an image: refcounts, COPIED flags and entries that cannot be
//! right. Knows the file alone: neither open images nor layers below.
//!
//! # What is on disk at each moment
//!
//! | step | what the power may leave |
//! |---|---|
//! | unknown autoclear bits cleared `|` | old bits or new |
//! | bitmaps that cannot be told: marked `|` ones `|` mark off `|`, or their bit cleared `|` | see [`bitmaps`] |
//! | entries that refer to nothing, in tables that are nothing else, cleaned or zeroed `|` | any of them old or new: what they show is the same, and nothing that is counted loses a reference that somebody can follow |
//! | a new refcount table with its blocks in new space `|` the header's field `|` | the old refcounts, or the new ones; the others are space behind the end |
//! | refcounts that are too low raised `|` | any of them old or new: higher ones protect, and leak at most |
//! | data apart from metadata: copies in counted, new clusters `|` | unused copies |
//! | entries of those, COPIED flags `|` | any of them: a flag is set only where there is one reference, whatever its refcount |
//! | refcounts that are too high lowered `|` | any of them |
//! | entries of the snapshot table completed, as a new state `|` the header's first sector `|` | the old table with its refcounts, or the new one with its |
//! | dirty and corrupt bit cleared `|` | old bits or new |
//!
//! So at no moment is a cluster counted less than it is used unless it was so
//! before, none is marked as its owner's alone that is not, and what the disk
//! and its snapshots show stays what it was. A repair that was cut off is
//! begun anew.
//!
//! Where references may be out of sight (a table that cannot be read, a
//! snapshot whose L1 table is nowhere), nothing is changed at all: what looks
//! unused may be in use. And data that LUKS encrypts is not moved: it can be
//! read at its place only, and there is no key here.

mod bitmaps;
mod entries;
mod flags;
mod rebuild;
mod refcounts;
mod seen;
mod separate;
mod snapshots;

use super::{CheckReport, Checker, Finding};
use crate::error::Result;
use crate::qcow2::open::read_damaged_header;
use crate::qcow2::spec::header::{AUTOCLEAR_AT, Autoclear, INCOMPATIBLE_AT, Incompatible};
use crate::storage::Storage;

pub(super) use seen::Seen;

/// How often clusters are told apart, and entries put right each time: a copied
/// table may have to be looked into again.
const ROUNDS: u32 = 6;

/// What a repair may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high, in an image that is sound otherwise.
    Leaks,
    /// Everything.
    All,
}

/// What a repair has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Corruptions that are no more.
    pub corruptions_fixed: u64,
    /// Clusters that can be used again.
    pub leaks_fixed: u64,
    /// What a check finds now.
    pub report: CheckReport,
}

/// Repairs the image in `storage`, which is open for writing and which nobody
/// else uses. `observe` is told what is found before anything is changed.
///
/// # Errors
///
/// As [`super::check`], and when a change cannot be written. What could not be
/// repaired is in the report.
pub async fn repair(
    storage: &Storage,
    what: Repair,
    observe: &mut dyn FnMut(&Finding),
) -> Result<Repaired> {
    let mut repairer = Repairer {
        storage,
        done: Repaired::default(),
    };
    repairer
        .run(what, observe)
        .await
        .map_err(|e| e.path(storage.path()))?;
    Ok(repairer.done)
}

struct Repairer<'a> {
    storage: &'a Storage,
    done: Repaired,
}

impl Repairer<'_> {
    async fn run(&mut self, what: Repair, observe: &mut dyn FnMut(&Finding)) -> Result<()> {
        self.storage.check_writable()?;
        let header = read_damaged_header(self.storage).await?;
        let mut checker = Checker::new(self.storage, header, observe)?;
        checker.run().await?;
        let (report, seen) = (checker.report, checker.seen);
        drop(checker);
        self.done.report = report;
        match what {
            _ if seen.blind => return Ok(()),
            Repair::Leaks if seen.may_lower() && report.leaks > 0 => {
                self.keep_autoclear().await?;
                self.lower_only(&seen).await?;
            }
            Repair::All
                if seen.entries || report.corruptions + report.leaks + report.check_errors > 0 =>
            {
                self.keep_autoclear().await?;
                self.everything(seen, report).await?;
            }
            _ => {}
        }
        let mut left = seen;
        if self.done.corruptions_fixed + self.done.leaks_fixed > 0 {
            left = self.look_again().await?;
        }
        let report = self.done.report;
        // What was in the way of a bitmap may be gone now.
        if what == Repair::All && left.bitmaps && !left.blind {
            self.everything(left, report).await?;
            left = self.look_again().await?;
        }
        let report = self.done.report;
        if what == Repair::All && self.complete_snapshots(&left, &report).await? {
            let left = self.look_again().await?;
            let report = self.done.report;
            // The file has grown to where refcounts had counted nothing real.
            if report.leaks > 0 {
                self.everything(left, report).await?;
                self.look_again().await?;
            }
        }
        let report = &self.done.report;
        if report.corruptions == 0 && report.check_errors == 0 {
            self.mark_clean().await?;
        }
        Ok(())
    }

    /// Reports what is left.
    async fn look_again(&mut self) -> Result<Seen> {
        let header = read_damaged_header(self.storage).await?;
        let mut ignore = |_: &Finding| {};
        let mut checker = Checker::new(self.storage, header, &mut ignore)?;
        checker.run().await?;
        self.done.report = checker.report;
        Ok(checker.seen)
    }

    async fn lower_only(&mut self, seen: &Seen) -> Result<()> {
        let mut checked = Checked::look(self.storage, true).await?;
        if !seen.is_undercounted() {
            self.done.corruptions_fixed += checked.set_flags().await?;
            self.storage.sync().await?;
        }
        self.done.leaks_fixed += checked.store_counts(false).await?;
        self.storage.sync().await
    }

    async fn everything(&mut self, mut seen: Seen, mut report: CheckReport) -> Result<()> {
        let mut before = Before {
            file_len: self.storage.len().next_multiple_of(512),
            copies: Vec::new(),
        };
        for _ in 0..ROUNDS {
            let rebuilt = !before.copies.is_empty();
            if (seen.bitmaps || seen.clash) && self.mend_bitmaps().await? {
                let again = Checked::look(self.storage, true).await?;
                (seen, report) = (again.seen, again.report);
            }
            // Entries that led behind the end may lead to a copy by now; and those
            // that are put right may have been what kept others from it.
            let mut again = seen.entries || rebuilt;
            for _ in 0..ROUNDS {
                if !again {
                    break;
                }
                let mut checked = Checked::look(self.storage, true).await?;
                checked.before = before.clone();
                let fixed = checked.fix_entries().await?;
                self.storage.sync().await?;
                if fixed == 0 {
                    // An entry that stays as it is may lead nowhere. The first look
                    // counted what it seems to be, as QEMU does; this one says whether
                    // new refcounts would help.
                    (seen, report) = (checked.seen, checked.report);
                    break;
                }
                self.done.corruptions_fixed += fixed;
                let now = Checked::look(self.storage, true).await?;
                (seen, report) = (now.seen, now.report);
                again = seen.entries;
            }
            if seen.blind {
                return Ok(());
            }
            if !(seen.needs_rebuild() || seen.clash) {
                break;
            }
            let mut checked = Checked::look(self.storage, false).await?;
            let Some(moves) = checked.clashes().await? else {
                break;
            };
            let bits = checked.geometry.cluster_bits;
            let copies = moves.counts(bits);
            if copies.is_empty() && checked.counts.clashes() > 0 && !seen.needs_rebuild() {
                // What shares a cluster cannot be copied apart.
                if self.give_up_clashing_bitmaps(&checked).await? {
                    let again = Checked::look(self.storage, true).await?;
                    (seen, report) = (again.seen, again.report);
                    continue;
                }
                // New refcounts help only if the old ones are in it.
                let again = Checked::look(self.storage, true).await?;
                if again.counts.clashes() == checked.counts.clashes() {
                    break;
                }
            }
            if copies.is_empty() && rebuilt {
                break;
            }
            let Some(start) = checked.rebuild(&copies).await? else {
                return Ok(());
            };
            self.done.corruptions_fixed += report.corruptions.saturating_sub(seen.flags);
            self.done.leaks_fixed += report.leaks;
            checked.separate(&moves, start).await?;
            let end = start + copies.len() as u64;
            before.copies.push(start << bits..end << bits);
            let again = Checked::look(self.storage, true).await?;
            (seen, report) = (again.seen, again.report);
        }
        let mut checked = Checked::look(self.storage, true).await?;
        if checked.seen.needs_rebuild() {
            return Ok(());
        }
        self.done.corruptions_fixed += checked.store_counts(true).await?;
        self.storage.sync().await?;
        self.done.corruptions_fixed += checked.set_flags().await?;
        self.storage.sync().await?;
        self.done.leaks_fixed += checked.store_counts(false).await?;
        self.storage.sync().await
    }

    /// As before every write to an image: autoclear bits that are unknown go.
    async fn keep_autoclear(&mut self) -> Result<()> {
        let header = read_damaged_header(self.storage).await?;
        let bits = header.autoclear & Autoclear::KNOWN;
        if header.version < 3 || bits == header.autoclear {
            return Ok(());
        }
        self.store_autoclear(bits).await
    }

    /// Puts right what the bitmaps say, or lets nobody believe them where that
    /// cannot be done; true if something was changed.
    async fn mend_bitmaps(&mut self) -> Result<bool> {
        let mut checked = Checked::look(self.storage, true).await?;
        let Some(mended) = checked.mend_bitmaps().await? else {
            let bits = checked.header.autoclear & Autoclear::KNOWN;
            self.store_autoclear(bits - Autoclear::BITMAPS).await?;
            self.done.corruptions_fixed += 1;
            return Ok(true);
        };
        self.done.corruptions_fixed += mended;
        Ok(mended > 0)
    }

    async fn store_autoclear(&self, bits: Autoclear) -> Result<()> {
        let field = bits.bits().to_be_bytes();
        self.storage.write(AUTOCLEAR_AT.0, &field).await?;
        self.storage.sync().await
    }

    /// Bitmaps that share clusters with each other or with other metadata
    /// cannot be right: nobody is to believe them. True if that was it.
    async fn give_up_clashing_bitmaps(&mut self, checked: &Checked<'_>) -> Result<bool> {
        let mut header = checked.header.clone();
        if !header.bitmaps_consistent() {
            return Ok(false);
        }
        header.autoclear.remove(Autoclear::BITMAPS);
        let bits = header.autoclear & Autoclear::KNOWN;
        let mut ignore = |_: &Finding| {};
        let mut without = Checker::new(self.storage, header, &mut ignore)?;
        without.with_refcounts = false;
        without.strict = true;
        without.count_all().await?;
        if without.counts.clashes() == checked.counts.clashes() {
            return Ok(false);
        }
        self.store_autoclear(bits).await?;
        self.done.corruptions_fixed += 1;
        Ok(true)
    }

    /// Says that the image is in order, where it says that it is not.
    async fn mark_clean(&self) -> Result<()> {
        let header = read_damaged_header(self.storage).await?;
        let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
        if header.version < 3 || !header.incompatible.intersects(marks) {
            return Ok(());
        }
        // All else is durable before anybody relies on it.
        self.storage.sync().await?;
        let field = (header.incompatible - marks).bits().to_be_bytes();
        self.storage.write(INCOMPATIBLE_AT.0, &field).await?;
        self.storage.sync().await
    }
}

/// What an entry could refer to when the repair began: what the repair puts
/// behind the end does not make entries right that led there.
#[derive(Clone, Default)]
struct Before {
    file_len: u64,
    /// Bytes that were put there for entries, each time refcounts were built anew:
    /// there may have been no entries.
    copies: Vec<std::ops::Range<u64>>,
}

/// An image that has been looked at, to be changed.
struct Checked<'a> {
    storage: &'a Storage,
    header: super::Header,
    geometry: super::Geometry,
    reader: super::Reader<'a>,
    file_len: u64,
    clusters: u64,
    counts: super::Counts,
    stored: super::StoredRefcounts,
    l2_tables: super::L2Tables,
    snapshot_l1s: Vec<(u64, u64)>,
    external: bool,
    report: CheckReport,
    seen: Seen,
    before: Before,
}

impl<'a> Checked<'a> {
    /// A fresh look at the image.
    async fn look(storage: &'a Storage, with_refcounts: bool) -> Result<Self> {
        let header = read_damaged_header(storage).await?;
        let mut ignore = |_: &Finding| {};
        let mut checker = Checker::new(storage, header, &mut ignore)?;
        checker.with_refcounts = with_refcounts;
        checker.strict = true;
        if with_refcounts {
            checker.run().await?;
        } else {
            checker.count_all().await?;
        }
        let Checker {
            header,
            geometry,
            file_len,
            clusters,
            counts,
            stored,
            l2_tables,
            snapshot_l1s,
            external,
            report,
            seen,
            ..
        } = checker;
        Ok(Self {
            storage,
            header,
            geometry,
            reader: super::Reader::new(storage)?,
            file_len,
            clusters,
            counts,
            stored,
            l2_tables,
            snapshot_l1s,
            external,
            report,
            seen,
            before: Before::default(),
        })
    }
}
