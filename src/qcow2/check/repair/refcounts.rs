//! Refcounts, put right where they are.

use super::Checked;
use crate::error::Result;
use crate::qcow2::spec::refcount;
use crate::runtime::Buf;

impl Checked<'_> {
    /// Stores the number of references of each cluster as its refcount, in
    /// blocks that exist; how many were changed. With `raise` those that are
    /// too high stay, without it those that are too low.
    pub(super) async fn store_counts(&mut self, raise: bool) -> Result<u64> {
        let mut clusters = self.clusters;
        if clusters < self.counts.len() && self.counts.get(clusters) > 0 {
            clusters += 1;
        }
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        let mut fixed = 0;
        for index in 0..clusters.div_ceil(per_block) {
            let offset = self.stored.block_offset(index);
            if offset == 0 {
                continue;
            }
            let mut block = Buf::take(self.geometry.cluster_size() as usize);
            self.storage.read(offset, &mut block).await?;
            let before = fixed;
            let first = index * per_block;
            for i in 0..per_block.min(clusters - first) as usize {
                let stored = refcount::get(&block, order, i);
                let counted = self.counts.get(first + i as u64);
                if raise && stored < counted || !raise && stored > counted {
                    refcount::set(&mut block, order, i, counted);
                    fixed += 1;
                }
            }
            if fixed > before {
                self.storage.write(offset, &block).await?;
            }
        }
        Ok(fixed)
    }
}
