//! Checking an image: every reference to a host cluster is counted and
//! compared with the refcounts, and every entry with the format's rules.
//!
//! What is counted, and how often, agrees with `qemu-img check`, so that the
//! numbers can be compared. The way there is another one: tables are read in
//! the order of the file, each once, however many snapshots share it; an
//! image made to keep a checker busy for years does not.
//!
//! [`check`] changes nothing. A [`Finding`] says where the wrong entry is;
//! [`repair`] puts it right.
//!
//! Differences from QEMU, all of them additions or limits:
//!
//! - A cluster that is used in two ways that exclude each other (the refcount
//!   table and guest data, say) is a corruption even if its refcount agrees.
//! - An active L1 table that begins just behind the end of the file, as in a
//!   file that was cut off, is a corruption: such an image is not opened.
//! - L2 tables at misaligned offsets are followed up to a number, not for
//!   ever.
//! - Encrypted images need no password, and images with an external data file
//!   not that file: neither is looked into.

mod bitmaps;
mod compare;
mod counts;
mod finding;
mod reader;
mod refcounts;
mod repair;
mod snapshots;
mod sweep;
mod tables;

use super::open::read_damaged_header;
use super::spec::geometry::Geometry;
use super::spec::header::{Header, Incompatible};
use crate::error::Result;
use crate::storage::Storage;

use counts::{Counts, Use};
use reader::Reader;
use refcounts::StoredRefcounts;
use repair::Seen;
use tables::L2Tables;

pub use finding::{Finding, Part, Problem, Rule, Severity};
pub use repair::{Repair, Repaired, repair};

/// What a check found, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Entries and refcounts that endanger data.
    pub corruptions: u64,
    /// Clusters that nobody uses but that cannot be used again.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Where the last cluster that is used or counted ends.
    pub image_end_offset: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Those of them that have a host cluster or a part of one.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

/// Checks the image in `storage`, which may be damaged in any way. `observe`
/// is told each finding as it is made; there may be very many.
///
/// # Errors
///
/// When nothing could be found out: no readable header, a feature the format
/// did not have when this was written, a snapshot table that cannot be read,
/// an image that is too large. What is merely wrong is in the report.
pub async fn check(storage: &Storage, observe: &mut dyn FnMut(&Finding)) -> Result<CheckReport> {
    check_and_tell(storage, observe, &mut |_| {}).await
}

/// As [`check()`]; `progress` is told now and then which part of the work is
/// done, from 0 to 1.
///
/// # Errors
///
/// As [`check()`].
pub async fn check_and_tell(
    storage: &Storage,
    observe: &mut dyn FnMut(&Finding),
    progress: &mut dyn FnMut(f64),
) -> Result<CheckReport> {
    let header = read_damaged_header(storage).await?;
    let mut checker = Checker::new(storage, header, observe)?;
    checker.progress = Some(progress);
    checker.run().await.map_err(|e| e.path(storage.path()))?;
    Ok(checker.report)
}

struct Checker<'a> {
    header: Header,
    geometry: Geometry,
    reader: Reader<'a>,
    /// Length of the file in whole sectors, as QEMU has it.
    file_len: u64,
    /// Host clusters of the file, the last one perhaps in part.
    clusters: u64,
    counts: Counts,
    stored: StoredRefcounts,
    /// L2 tables that were met.
    l2_tables: L2Tables,
    /// L1 tables of snapshots that can be read: first byte and length.
    snapshot_l1s: Vec<(u64, u64)>,
    /// The refcount table and its blocks are counted too.
    with_refcounts: bool,
    /// Places where no L2 table can be are not looked into. QEMU does, and so
    /// do reports.
    strict: bool,
    /// Who wants to know how far the work is.
    progress: Option<&'a mut dyn FnMut(f64)>,
    /// Which kinds of findings there were.
    seen: Seen,
    /// Guest data is in another file and not counted.
    external: bool,
    /// Misaligned L2 tables that may still be followed.
    misaligned_budget: u32,
    report: CheckReport,
    observe: &'a mut dyn FnMut(&Finding),
}

impl<'a> Checker<'a> {
    fn new(
        storage: &'a Storage,
        header: Header,
        observe: &'a mut dyn FnMut(&Finding),
    ) -> Result<Self> {
        let geometry = header.geometry();
        let reader = Reader::new(storage)?;
        let file_len = storage.len().next_multiple_of(512);
        let clusters = geometry.clusters_for(file_len);
        let counts = Counts::new(
            clusters + 1,
            geometry.max_refcount(),
            reader.allocated_bytes(),
        )?;
        Ok(Self {
            geometry,
            reader,
            file_len,
            clusters,
            counts,
            stored: StoredRefcounts::default(),
            l2_tables: L2Tables::default(),
            snapshot_l1s: Vec::new(),
            with_refcounts: true,
            strict: false,
            progress: None,
            seen: Seen::default(),
            external: header.incompatible.contains(Incompatible::DATA_FILE),
            misaligned_budget: 1024,
            report: CheckReport {
                total_clusters: geometry.clusters_for(header.virtual_size()),
                ..CheckReport::default()
            },
            observe,
            header,
        })
    }

    async fn run(&mut self) -> Result<()> {
        self.read_refcounts().await?;
        self.count_all().await?;
        self.seen.clash = self.counts.has_clashes();
        // Nothing of the guest's can be in the header.
        self.seen.entries |= self.counts.overlaps(0);
        self.compare().await
    }

    /// Counts every use.
    async fn count_all(&mut self) -> Result<()> {
        let snapshots = self.read_snapshots().await?;
        self.count(Part::Header, 0, self.geometry.cluster_size(), 1);
        self.check_active_l1().await?;
        self.check_snapshot_l1s(&snapshots).await?;
        self.check_l2_tables().await?;
        self.count_snapshot_table(&snapshots);
        if let Some((offset, len)) = self.header.crypto_header() {
            self.count(Part::CryptoHeader, offset.0, len, 1);
        }
        self.check_bitmaps().await?;
        if self.with_refcounts {
            let (offset, len) = (
                self.header.refcount_table_offset,
                self.header.reftable_bytes(),
            );
            self.count(Part::RefcountTable, offset.0, len, 1);
            self.check_refcount_blocks();
        }
        self.counts.within_memory()
    }

    /// Counts a use of the clusters that `len` bytes from `offset` touch,
    /// `times` over.
    fn count(&mut self, part: Part, offset: u64, len: u64, times: u64) {
        if len == 0 || times == 0 {
            return;
        }
        // The file's last cluster may end behind the file, nothing else may.
        let end = offset.saturating_add(len);
        if end >= self.file_len.saturating_add(self.geometry.cluster_size()) {
            self.found(
                Severity::Corruption,
                times,
                Problem::OutsideFile { part, offset, len },
            );
            return;
        }
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..=(end - 1) >> bits {
            if self.counts.is_exhausted() {
                break; // and said when all is counted
            }
            let refused = self.counts.add(cluster, times, part.usage());
            if refused > 0 {
                self.seen.refcounts |= matches!(part, Part::RefcountTable | Part::RefcountBlock);
                self.found(Severity::Corruption, refused, Problem::Overflow { cluster });
            }
        }
    }

    fn tell(&mut self, done: f64) {
        if let Some(progress) = &mut self.progress {
            progress(done);
        }
    }

    fn found(&mut self, severity: Severity, times: u64, problem: Problem) {
        let total = match severity {
            Severity::Corruption => &mut self.report.corruptions,
            Severity::Leak => &mut self.report.leaks,
            Severity::Error => &mut self.report.check_errors,
        };
        *total = total.saturating_add(times);
        self.seen.note(&problem);
        (self.observe)(&Finding {
            severity,
            times,
            problem,
        });
    }
}

impl Part {
    /// What kind of use of a cluster it is.
    fn usage(self) -> Use {
        match self {
            Self::L2Table => Use::Table,
            Self::Data | Self::Compressed => Use::Data,
            _ => Use::Exclusive,
        }
    }
}
