//! L1 and L2 tables: what they refer to, and whether their entries obey the
//! rules.

use super::finding::Rule;
use super::reader::words;
use super::sweep::pieces;
use super::{Checker, Part, Problem, Severity, Use};
use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;

/// Bits 9 to 55 of an L1 or standard L2 entry.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
/// Bits of an L1 entry that are zero.
pub(super) const L1_RESERVED: u64 = !(COPIED | OFFSET);
/// Bits of a standard L2 entry that are zero, whatever the image.
pub(super) const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | ZERO);
/// Bytes of a table that are read at a time.
pub(super) const PIECE: u64 = 1 << 20;
/// L2 tables that are noted before equal ones are put together.
const UNSORTED: usize = 1 << 16;

/// An L2 table and how many L1 entries point to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L2Table {
    pub(super) offset: u64,
    /// Entries of the active L1 table.
    pub(super) active: u64,
    /// Entries of all L1 tables.
    pub(super) total: u64,
}

/// L2 tables to be read.
#[derive(Default)]
pub(super) struct L2Tables {
    pub(super) list: Vec<L2Table>,
    /// Length at which the list is sorted the next time.
    sort_at: usize,
}

impl L2Tables {
    fn push(&mut self, table: L2Table) {
        self.list.push(table);
        if self.list.len() >= self.sort_at.max(UNSORTED) {
            self.sort();
            self.sort_at = self.list.len() * 2;
        }
    }

    /// In the order of the file, each table once.
    fn sort(&mut self) {
        self.list.sort_unstable_by_key(|table| table.offset);
        self.list.dedup_by(|next, table| {
            let same = next.offset == table.offset;
            if same {
                table.active += next.active;
                table.total += next.total;
            }
            same
        });
    }
}

impl Checker<'_> {
    /// Counts the active L1 table and what it points to.
    pub(super) async fn check_active_l1(&mut self) -> Result<()> {
        let (offset, len) = (self.header.l1_table_offset.0, self.header.l1_bytes());
        if len > 0
            && (self.file_len..self.file_len + self.geometry.cluster_size()).contains(&offset)
        {
            let part = Part::L1Table;
            let problem = Problem::OutsideFile { part, offset, len };
            self.found(Severity::Corruption, 1, problem);
        }
        self.count(Part::L1Table, offset, len, 1);
        self.check_l1_piece(offset, offset + len, 1, true).await
    }

    /// Counts the L1 tables at `places` (first byte, length), which belong to
    /// snapshots, and what they point to.
    pub(super) async fn check_inactive_l1s(&mut self, places: &[(u64, u64)]) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let inside = |&&(offset, len): &&(u64, u64)| offset + len < self.file_len + cluster;
        let whole: Vec<(u64, u64)> = places
            .iter()
            .filter(inside)
            .map(|&(offset, len)| (offset, (offset + len).next_multiple_of(cluster)))
            .collect();
        for (start, end, times) in pieces(whole) {
            // Such a piece begins and ends with clusters; the last one may be
            // the file's last, which is not whole.
            let end = end.min(self.file_len.max(start + 1));
            self.count(Part::L1Table, start, end - start, times);
        }
        for &(offset, len) in places {
            if offset + len >= self.file_len + cluster {
                self.count(Part::L1Table, offset, len, 1);
            }
        }
        let entries = places.iter().map(|&(offset, len)| (offset, offset + len));
        for (start, end, times) in pieces(entries) {
            self.check_l1_piece(start, end, times, false).await?;
        }
        Ok(())
    }

    /// The part `start..end` of an L1 table, or of `times` of them.
    async fn check_l1_piece(
        &mut self,
        start: u64,
        end: u64,
        times: u64,
        active: bool,
    ) -> Result<()> {
        let end = end.min(self.file_len);
        let mut at = start;
        while at < end {
            let len = PIECE.min(end - at);
            if let Some(bytes) = self.reader.read(at, len).await? {
                let entries = words(&bytes).enumerate();
                for (i, entry) in entries.filter(|&(_, entry)| entry != 0) {
                    let at = HostOffset(at + i as u64 * 8);
                    self.check_l1_entry(at, entry, times, active).await?;
                }
                self.counts.within_memory()?;
            }
            at += len;
        }
        Ok(())
    }

    async fn check_l1_entry(
        &mut self,
        at: HostOffset,
        entry: u64,
        times: u64,
        active: bool,
    ) -> Result<()> {
        let bad = |rule| Problem::BadEntry {
            table: Part::L1Table,
            at,
            entry,
            rule,
        };
        if entry & L1_RESERVED != 0 {
            self.found(Severity::Corruption, times, bad(Rule::ReservedBits));
        }
        let offset = entry & OFFSET;
        if self.strict && (offset == 0 || !offset.is_multiple_of(self.geometry.cluster_size())) {
            self.found(Severity::Corruption, times, bad(Rule::Misaligned));
            return Ok(());
        }
        self.count(Part::L2Table, offset, self.geometry.cluster_size(), times);
        let misaligned = !offset.is_multiple_of(self.geometry.cluster_size());
        if misaligned {
            self.found(Severity::Corruption, times, bad(Rule::Misaligned));
        }
        if active && offset != 0 {
            let cluster = offset >> self.geometry.cluster_bits;
            if let Some(single) = self.is_single(cluster).await?
                && single != (entry & COPIED != 0)
            {
                let table = Part::L1Table;
                self.found(
                    Severity::Corruption,
                    1,
                    Problem::Copied { table, at, entry },
                );
            }
        }
        if offset >= self.file_len {
            return Ok(());
        }
        if misaligned {
            // Each may be as long as a cluster and begin at any sector.
            if self.misaligned_budget == 0 {
                return Ok(());
            }
            self.misaligned_budget -= 1;
        }
        self.l2_tables.push(L2Table {
            offset,
            active: u64::from(active),
            total: times,
        });
        Ok(())
    }

    /// Checks the L2 tables that L1 tables point to, in the order of the
    /// file, adjacent ones in one read.
    pub(super) async fn check_l2_tables(&mut self) -> Result<()> {
        let mut tables = std::mem::take(&mut self.l2_tables);
        tables.sort();
        let size = self.geometry.l2_table_bytes();
        let mut rest = &tables.list[..];
        while let [first, ..] = rest {
            let mut n = 1;
            while n < rest.len()
                && rest[n].offset == rest[n - 1].offset + size
                && (n as u64 + 1) * size <= PIECE
            {
                n += 1;
            }
            let (run, others) = rest.split_at(n);
            rest = others;
            // Nearly all of the time goes into these tables.
            self.tell(1.0 - (rest.len() as f64 + 1.0) / (tables.list.len() as f64 + 1.0));
            match self.reader.read(first.offset, n as u64 * size).await {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    for (table, bytes) in run.iter().zip(bytes.chunks_exact(size as usize)) {
                        self.check_l2_table(table, bytes).await?;
                    }
                }
                Err(e) => {
                    for table in run {
                        let problem = Problem::UnreadableTable {
                            part: Part::L2Table,
                            offset: table.offset,
                            reason: e.to_string(),
                        };
                        self.found(Severity::Error, table.total, problem);
                    }
                }
            }
        }
        self.l2_tables = tables;
        Ok(())
    }

    async fn check_l2_table(&mut self, table: &L2Table, bytes: &[u8]) -> Result<()> {
        let step = 1usize << (self.geometry.l2_entry_bits() - 3);
        let mut far = Vec::new();
        let mut previous_end = 0;
        let mut entries = words(bytes);
        let mut at = HostOffset(table.offset);
        while let Some(entry) = entries.next() {
            let subclusters = if step == 2 {
                entries.next().unwrap_or_default()
            } else {
                0
            };
            if entry | subclusters != 0 {
                let entry = Entry {
                    at,
                    entry,
                    subclusters,
                };
                self.check_l2_entry(table, entry, &mut previous_end, &mut far);
            }
            at += step as u64 * 8;
        }
        for Entry { at, entry, .. } in far {
            let cluster = (entry & OFFSET) >> self.geometry.cluster_bits;
            if let Some(single) = self.is_single(cluster).await? {
                self.check_copied(table, at, entry, single);
            }
        }
        self.counts.within_memory()
    }

    /// Checks one entry. Those whose refcount has to be asked of the file are
    /// added to `far`.
    #[inline]
    fn check_l2_entry(
        &mut self,
        table: &L2Table,
        entry: Entry,
        previous_end: &mut u64,
        far: &mut Vec<Entry>,
    ) {
        let Entry {
            at,
            entry: raw,
            subclusters,
        } = entry;
        if raw & COMPRESSED != 0 {
            self.check_compressed(table, entry);
            return;
        }
        if raw & L2_RESERVED != 0 {
            self.bad_l2_entry(table, entry, Rule::ReservedBits);
        }
        let offset = raw & OFFSET;
        let zero = raw & ZERO != 0 && !self.geometry.extended_l2;
        let at_zero = self.external && raw & COPIED != 0;
        if offset == 0 && (zero || !at_zero) {
            // Not worth a finding, says QEMU; nobody can read it, say we. The
            // first cluster of a data file may well be one that is kept.
            self.seen.entries |= raw & COPIED != 0 && !self.external;
            // Allocated subclusters of a cluster that is not.
            if subclusters as u32 != 0 {
                self.bad_l2_entry(table, entry, Rule::SubclusterNowhere);
            }
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        let both = subclusters >> 32 & subclusters != 0;
        if both {
            self.bad_l2_entry(table, entry, Rule::SubclusterBoth);
        } else {
            if offset & (cluster_size - 1) != 0 {
                self.bad_l2_entry(table, entry, Rule::Misaligned);
            }
            if table.active > 0 {
                self.report.allocated_clusters += table.active;
                if *previous_end != 0 && offset != *previous_end {
                    self.report.fragmented_clusters += table.active;
                }
                *previous_end = offset + cluster_size;
            }
        }
        if self.external {
            self.check_copied(table, at, raw, true);
            return;
        }
        if !both {
            self.count_data(offset, table.total);
        }
        let cluster = offset >> self.geometry.cluster_bits;
        if table.active == 0 {
        } else if cluster < self.clusters && !self.stored.has_bad() {
            let single = self.counts.is_single(cluster);
            self.check_copied(table, at, raw, single);
        } else {
            far.push(entry);
        }
    }

    /// [`Self::count`] for an ordinary cluster.
    #[inline]
    fn count_data(&mut self, offset: u64, times: u64) {
        let cluster = offset >> self.geometry.cluster_bits;
        let aligned = cluster << self.geometry.cluster_bits == offset;
        if aligned && cluster < self.clusters {
            let refused = self.counts.add(cluster, times, Use::Data);
            if refused > 0 {
                self.found(Severity::Corruption, refused, Problem::Overflow { cluster });
            }
        } else {
            self.count(Part::Data, offset, self.geometry.cluster_size(), times);
        }
    }

    fn check_compressed(&mut self, table: &L2Table, entry: Entry) {
        let Entry {
            entry: mut raw,
            subclusters,
            ..
        } = entry;
        let shift = 62 - (self.geometry.cluster_bits - 8);
        let offset = raw & ((1 << shift) - 1);
        if raw & COPIED != 0 {
            self.bad_l2_entry(table, entry, Rule::CopiedCompressed);
            raw &= !COPIED;
        }
        if self.external {
            self.bad_l2_entry(table, entry, Rule::CompressedExternal);
            return;
        }
        if subclusters != 0 {
            self.bad_l2_entry(table, entry, Rule::CompressedSubclusters);
            return;
        }
        let sectors = ((raw & !COMPRESSED) >> shift) + 1;
        let len = sectors * 512 - offset % 512;
        self.count(Part::Compressed, offset, len, table.total);
        self.report.allocated_clusters += table.active;
        self.report.compressed_clusters += table.active;
        // Data that does not begin with a sector never follows smoothly.
        self.report.fragmented_clusters += table.active;
    }

    #[inline]
    fn check_copied(&mut self, table: &L2Table, at: HostOffset, entry: u64, single: bool) {
        // An L1 entry with an offset of 0 has led to the header, as it does in
        // QEMU; there, nobody expects COPIED flags.
        if table.active > 0 && table.offset != 0 && single != (entry & COPIED != 0) {
            let problem = Problem::Copied {
                table: Part::L2Table,
                at,
                entry,
            };
            self.found(Severity::Corruption, table.active, problem);
        }
    }

    #[cold]
    fn bad_l2_entry(&mut self, table: &L2Table, entry: Entry, rule: Rule) {
        let problem = Problem::BadEntry {
            table: Part::L2Table,
            at: entry.at,
            entry: entry.entry,
            rule,
        };
        self.found(Severity::Corruption, table.total, problem);
    }
}

/// An entry of an L2 table.
#[derive(Clone, Copy)]
struct Entry {
    at: HostOffset,
    entry: u64,
    /// The second half of an extended entry.
    subclusters: u64,
}
