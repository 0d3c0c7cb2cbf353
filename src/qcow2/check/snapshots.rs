//! The snapshot table and the L1 tables it lists.

use super::{Checker, Part, Problem, Severity};
use crate::error::{Error, Result};
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::geometry::MAX_L1_BYTES;
use crate::qcow2::spec::snapshot::{HEAD_LEN, MAX_EXTRA, MAX_TABLE_BYTES, Parts};

/// What a check needs to know of the snapshots.
pub(super) struct SnapshotTable {
    /// Of each snapshot: first byte and number of entries of its L1 table.
    l1s: Vec<(u64, u32)>,
    /// Length of the table in bytes.
    len: u64,
}

impl Checker<'_> {
    /// Reads the snapshot table.
    pub(super) async fn read_snapshots(&mut self) -> Result<SnapshotTable> {
        let start = self.header.snapshots_offset;
        let mut table = SnapshotTable {
            l1s: Vec::new(),
            len: 0,
        };
        // A window on the table; its entries are short and many.
        const WINDOW: u64 = 1 << 20;
        let mut window = (0, Vec::new());
        let mut at = 0u64;
        for index in 0..self.header.nb_snapshots as usize {
            at = at.next_multiple_of(8);
            let in_window = at.checked_sub(window.0).map_or(usize::MAX, |n| n as usize);
            if in_window.saturating_add(HEAD_LEN) > window.1.len() {
                let bytes = self.reader.read(start.0 + at, WINDOW).await?;
                let bytes = bytes.map_or_else(|| vec![0; WINDOW as usize], |bytes| bytes.to_vec());
                window = (at, bytes);
            }
            let head = &window.1[(at - window.0) as usize..][..HEAD_LEN];
            let here = HostOffset(start.0 + at);
            let parts = Parts::parse(head, here)?;
            let number = |from: usize, len: usize| {
                let bytes = head[from..from + len].iter();
                bytes.fold(0u64, |n, &byte| n << 8 | u64::from(byte))
            };
            table.l1s.push((number(0, 8), number(8, 4) as u32));
            if self.geometry.version >= 3 && parts.extra < 16 {
                let problem = Problem::IncompleteSnapshot { index };
                self.found(Severity::Corruption, 1, problem);
            }
            if parts.extra > MAX_EXTRA {
                let bytes = parts.extra as u64;
                let problem = Problem::ExtraSnapshotData { index, bytes };
                self.found(Severity::Error, 1, problem);
            }
            at += parts.end() as u64;
            if at > MAX_TABLE_BYTES {
                return Err(Error::corrupt(
                    format!("the snapshot table is longer than {MAX_TABLE_BYTES} bytes"),
                    start.0,
                ));
            }
        }
        table.len = at;
        Ok(table)
    }

    /// Counts the snapshots' L1 tables and what they point to.
    pub(super) async fn check_snapshot_l1s(&mut self, table: &SnapshotTable) -> Result<()> {
        if self.external && !table.l1s.is_empty() {
            let count = self.header.nb_snapshots;
            let problem = Problem::SnapshotsWithDataFile { count };
            self.found(Severity::Corruption, 1, problem);
        }
        let mut places = Vec::new();
        for (index, &(offset, entries)) in table.l1s.iter().enumerate() {
            let len = u64::from(entries) * 8;
            if !offset.is_multiple_of(self.geometry.cluster_size()) || len > MAX_L1_BYTES {
                let problem = Problem::BadSnapshotL1 { index };
                self.found(Severity::Corruption, 1, problem);
            } else if offset > i64::MAX as u64 - len {
                let part = Part::L1Table;
                let problem = Problem::OutsideFile { part, offset, len };
                self.found(Severity::Corruption, 1, problem);
            } else if entries > 0 {
                // Counted as QEMU counts it. But the table is somewhere else: an
                // L1 table is not in the header's cluster.
                self.seen.blind |= offset == 0;
                places.push((offset, len));
            }
        }
        self.check_inactive_l1s(&places).await?;
        self.snapshot_l1s = places;
        Ok(())
    }

    /// Counts the snapshot table itself.
    pub(super) fn count_snapshot_table(&mut self, table: &SnapshotTable) {
        let offset = self.header.snapshots_offset.0;
        self.count(Part::SnapshotTable, offset, table.len, 1);
    }
}
