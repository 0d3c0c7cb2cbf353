//! COPIED flags of the active tables: set where there is one reference.

use super::super::tables::{COMPRESSED, COPIED, OFFSET};
use super::Checked;
use crate::error::Result;

impl Checked<'_> {
    /// Puts the flags right; how many were wrong.
    ///
    /// What decides is the number of references, not the stored refcount:
    /// before too high ones are lowered both are safe to rely on.
    pub(super) async fn set_flags(&mut self) -> Result<u64> {
        let (offset, len) = (self.header.l1_table_offset.0, self.header.l1_bytes());
        let mut fixed = 0;
        if !self.is_shared(offset, len) {
            fixed += self
                .rewrite(offset, len, 1, |this, entry| {
                    if entry[0] & OFFSET != 0 {
                        entry[0] = this.flagged(entry[0]);
                    }
                })
                .await?;
        }
        let tables = std::mem::take(&mut self.l2_tables);
        let len = self.geometry.l2_table_bytes();
        let step = 1 << (self.geometry.l2_entry_bits() - 3);
        for table in &tables.list {
            if table.active == 0 || table.offset == 0 || self.is_shared(table.offset, len) {
                continue;
            }
            fixed += self
                .rewrite(table.offset, len, step, |this, entry| {
                    entry[0] = this.flagged_l2(entry[0]);
                })
                .await?;
        }
        self.l2_tables = tables;
        Ok(fixed)
    }

    fn flagged(&self, entry: u64) -> u64 {
        let cluster = (entry & OFFSET) >> self.geometry.cluster_bits;
        if self.counts.get(cluster) == 1 {
            entry | COPIED
        } else {
            entry & !COPIED
        }
    }

    fn flagged_l2(&self, entry: u64) -> u64 {
        if entry & COMPRESSED != 0 {
            return entry;
        }
        if self.external {
            // Data there has one owner, whatever its place.
            return if entry & OFFSET != 0 {
                entry | COPIED
            } else {
                entry
            };
        }
        if entry & OFFSET == 0 {
            return entry;
        }
        self.flagged(entry)
    }
}
