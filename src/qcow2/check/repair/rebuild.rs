//! A new refcount table with new blocks, in new space.

use std::collections::BTreeSet;

use super::Checked;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::spec::HostOffset;
use crate::qcow2::spec::geometry::MAX_REFTABLE_BYTES;
use crate::qcow2::spec::header::REFTABLE_AT;
use crate::qcow2::spec::{ReftableEntry, refcount};
use crate::runtime::Buf;

/// Where the new parts are, in clusters: copies of clusters, the table, then
/// the blocks.
struct Plan {
    start: u64,
    copies: u64,
    table: u64,
    /// What each of the blocks is number of.
    blocks: BTreeSet<u64>,
}

impl Plan {
    fn end(&self) -> u64 {
        self.table_at() + self.table + self.blocks.len() as u64
    }

    fn table_at(&self) -> u64 {
        self.start + self.copies
    }
}

impl Checked<'_> {
    /// Stores the counts, which do not have the old refcount table, in a new
    /// one, and makes that the valid one. Clusters with the counts `copies`
    /// are made before it; the number of the first. None if the image's end
    /// is not known.
    ///
    /// On disk: table and blocks `|` the header's field, inside one sector
    /// `|`. The old ones stay where they are, unused from then on.
    pub(super) async fn rebuild(&mut self, copies: &[u64]) -> Result<Option<u64>> {
        if self.seen.blind || self.seen.stuck {
            return Ok(None);
        }
        let plan = self.plan(copies.len() as u64)?;
        let bits = self.geometry.cluster_bits;
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        let mut table = Buf::zeroed((plan.table << bits) as usize);
        for (&index, at) in plan.blocks.iter().zip(plan.table_at() + plan.table..) {
            let mut block = Buf::zeroed(self.geometry.cluster_size() as usize);
            let first = index * per_block;
            for i in 0..per_block {
                let cluster = first + i;
                let count = if cluster < plan.start || cluster >= plan.end() {
                    self.counts.get(cluster)
                } else {
                    let copy = copies.get((cluster - plan.start) as usize);
                    copy.copied().unwrap_or(1)
                };
                if count > 0 {
                    refcount::set(&mut block, order, i as usize, count);
                }
            }
            self.storage.write(at << bits, &block).await?;
            let entry = ReftableEntry::Block(HostOffset(at << bits)).encode();
            table[index as usize * 8..][..8].copy_from_slice(&entry.to_be_bytes());
        }
        self.storage.write(plan.table_at() << bits, &table).await?;
        self.storage.sync().await?;
        self.header.refcount_table_offset = HostOffset(plan.table_at() << bits);
        // At most 8 MiB, as planned.
        self.header.refcount_table_clusters = plan.table as u32;
        let field = self.header.reftable_update();
        self.storage.write(REFTABLE_AT.0, &field).await?;
        self.storage.sync().await?;
        Ok(Some(plan.start))
    }

    /// Behind the file's end nothing can be in the way. A block device has no
    /// such place; there, what follows the last cluster in use.
    fn plan(&self, copies: u64) -> Result<Plan> {
        let per_block = self.geometry.refcounts_per_block();
        let mut used = BTreeSet::new();
        let mut end = 0;
        let mut cluster = self.counts.next_used(0);
        while cluster < self.counts.len() {
            if self.counts.get(cluster) > 0 {
                used.insert(cluster / per_block);
                end = cluster + 1;
            }
            cluster = self.counts.next_used(cluster + 1);
        }
        let start = if self.storage.is_block_device() {
            end
        } else {
            end.max(self.clusters)
        };
        let size = self.geometry.cluster_size();
        let mut plan = Plan {
            start,
            copies,
            table: 1,
            blocks: used.clone(),
        };
        loop {
            // They count themselves too: more of them until they suffice.
            let mut blocks = used.clone();
            blocks.extend(start / per_block..=(plan.end() - 1) / per_block);
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table = (entries * 8).div_ceil(size).max(1);
            if table == plan.table && blocks == plan.blocks {
                break;
            }
            plan = Plan {
                start,
                copies,
                table,
                blocks,
            };
        }
        if plan.table * size > MAX_REFTABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the file is too long for a refcount table of 8 MiB",
            )
            .cure("convert the image to one with larger clusters"));
        }
        let len = plan.end() * size;
        if self.storage.is_block_device() && len > self.storage.len() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "there is no room on the block device for a new refcount table",
            )
            .at(self.storage.len())
            .cure("enlarge the device"));
        }
        Ok(plan)
    }
}
