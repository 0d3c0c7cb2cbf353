//! The refcounts as the image has them.

use super::finding::Rule;
use super::{Checker, Part, Problem, Severity};
use crate::error::Result;
use crate::qcow2::spec::refcount;
use crate::runtime::Buf;

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET: u64 = !0x1ff;
/// Bits 0 to 8.
const RESERVED: u64 = 0x1ff;

/// The refcount table. The counts themselves are not kept, but whether they
/// are 1, for the clusters of the file: that is what COPIED flags say.
#[derive(Default)]
pub(super) struct StoredRefcounts {
    table: Vec<u64>,
    /// Indices of blocks that cannot be read.
    bad: std::collections::BTreeSet<u64>,
    /// The block that was read last for a cluster behind the file's end.
    far: Option<(u64, Option<Buf>)>,
}

impl StoredRefcounts {
    /// True when some block was found to be unreadable.
    #[inline]
    pub(super) fn has_bad(&self) -> bool {
        !self.bad.is_empty()
    }

    /// Where block number `index` is said to be; 0 for nowhere.
    pub(super) fn block_offset(&self, index: u64) -> u64 {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.table.get(index))
            .map_or(0, |entry| entry & BLOCK_OFFSET)
    }
}

impl Checker<'_> {
    /// Reads the refcount table, and notes which clusters have a refcount of
    /// exactly 1.
    pub(super) async fn read_refcounts(&mut self) -> Result<()> {
        let (at, len) = (
            self.header.refcount_table_offset,
            self.header.reftable_bytes(),
        );
        self.stored.table = self.reader.words(at, len).await?;
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        // A file may be said to be far longer than what its table covers.
        let covered = self.stored.table.len() as u64;
        for index in 0..self.clusters.div_ceil(per_block).min(covered) {
            let first = index * per_block;
            let Some(block) = self.refcount_block(index).await? else {
                continue;
            };
            let last = per_block.min(self.clusters - first);
            for i in 0..last {
                if refcount::get(&block, order, i as usize) == 1 {
                    self.counts.set_single(first + i);
                }
            }
            self.counts.within_memory()?;
        }
        self.counts.within_memory()
    }

    /// Refcount block number `index`; `None` if all its counts are 0 or
    /// nobody can tell ([`Self::refcounts_unreadable`]).
    pub(super) async fn refcount_block(&mut self, index: u64) -> Result<Option<Buf>> {
        let offset = self.refcount_block_offset(index);
        if offset == 0 {
            return Ok(None);
        }
        let len = self.geometry.cluster_size();
        if !offset.is_multiple_of(len) || offset > i64::MAX as u64 - len {
            self.stored.bad.insert(index);
            return Ok(None);
        }
        match self.reader.read(offset, len).await {
            Ok(block) => Ok(block),
            Err(_) => {
                self.stored.bad.insert(index);
                Ok(None)
            }
        }
    }

    /// No refcount block is said to be anywhere from number `index` on.
    pub(super) fn refcounts_end_before(&self, index: u64) -> bool {
        index >= self.stored.table.len() as u64
    }

    /// Where refcount block number `index` is said to be; 0 for nowhere.
    pub(super) fn refcount_block_offset(&self, index: u64) -> u64 {
        self.stored.block_offset(index)
    }

    /// True when refcount block number `index` was found to be unreadable.
    pub(super) fn refcounts_unreadable(&self, index: u64) -> bool {
        self.stored.bad.contains(&index)
    }

    /// Whether the stored refcount of a cluster is 1; `None` if nobody can
    /// tell.
    #[inline]
    pub(super) async fn is_single(&mut self, cluster: u64) -> Result<Option<bool>> {
        let single = cluster < self.clusters && self.counts.is_single(cluster);
        if single {
            return Ok(Some(true));
        }
        let index = cluster >> self.geometry.refcounts_per_block_bits();
        if !self.stored.bad.is_empty() && self.refcounts_unreadable(index) {
            return Ok(None);
        }
        if cluster < self.clusters {
            return Ok(Some(false));
        }
        self.is_single_behind_end(cluster, index).await
    }

    /// [`Self::is_single`] of a cluster that is not in the file: seldom asked,
    /// so that one block is kept at most.
    #[cold]
    async fn is_single_behind_end(&mut self, cluster: u64, index: u64) -> Result<Option<bool>> {
        if self.stored.far.as_ref().is_none_or(|(of, _)| *of != index) {
            let block = self.refcount_block(index).await?;
            self.stored.far = Some((index, block));
        }
        if self.refcounts_unreadable(index) {
            return Ok(None);
        }
        let in_block = cluster & (self.geometry.refcounts_per_block() - 1);
        let single = match &self.stored.far {
            Some((_, Some(block))) => {
                refcount::get(block, self.geometry.refcount_order, in_block as usize) == 1
            }
            _ => false,
        };
        Ok(Some(single))
    }

    /// Checks and counts the refcount blocks. Last, because each must be its
    /// cluster's only use.
    pub(super) fn check_refcount_blocks(&mut self) {
        let len = self.geometry.cluster_size();
        for index in 0..self.stored.table.len() {
            let entry = self.stored.table[index];
            let offset = entry & BLOCK_OFFSET;
            let rule = if entry & RESERVED != 0 {
                Some(Rule::ReservedBits)
            } else if !offset.is_multiple_of(len) {
                Some(Rule::Misaligned)
            } else if offset / len >= self.clusters {
                Some(Rule::BlockOutside)
            } else if offset != 0 {
                self.count(Part::RefcountBlock, offset, len, 1);
                (self.counts.get(offset / len) != 1).then_some(Rule::BlockShared)
            } else {
                None
            };
            if let Some(rule) = rule {
                let problem = Problem::BadEntry {
                    table: Part::RefcountTable,
                    at: self.header.refcount_table_offset + index as u64 * 8,
                    entry,
                    rule,
                };
                self.found(Severity::Corruption, 1, problem);
            }
        }
    }
}
