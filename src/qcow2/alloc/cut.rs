//! Making the file as short as it can be, once much of it has become free.

use std::ops::Range;

use super::{Allocator, Image};
use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;
use crate::rule::Rule;

impl Image {
    /// The close is to cut off everything that nobody uses at the file's end,
    /// not only what the allocator added.
    pub(in crate::qcow2) async fn cut_at_close(&self) {
        self.alloc.lock().await.cut = true;
    }

    /// Finds the end of what is used anew, and lets [`Self::trim_file`] cut
    /// off all that is behind it. Refcounts are durable.
    ///
    /// A refcount block at the very end that counts nothing but itself goes
    /// too. On disk: its table entry `|` the file's length. Without the block
    /// nothing there is counted, and nothing is used.
    pub(super) async fn find_lower_end(&self, alloc: &mut Allocator) -> Result<()> {
        let per_block = alloc.refcounts.per_block();
        loop {
            alloc.end = None;
            let end = self.find_end(alloc).await?;
            let Some(last) = end.checked_sub(1) else {
                break;
            };
            let own = HostOffset::of_cluster(last, self.geometry.cluster_bits);
            if last / per_block == 0
                || alloc.refcounts.block_of(last)? != Some(own)
                || self
                    .is_any_used(alloc, last - last % per_block..last)
                    .await?
            {
                break;
            }
            alloc.refcounts.set_block(last / per_block, HostOffset(0));
            self.refblocks.forget(own, self.geometry.cluster_size());
            self.metadata.remove(last);
        }
        if !alloc.refcounts.table_dirty.is_empty() {
            self.write_refcount_table(alloc).await?;
            if !Rule::EntryBeforeCut.is_broken() {
                self.storage.sync().await?;
            }
        }
        alloc.length_before = Some(0);
        Ok(())
    }

    /// True when one of these clusters, which one refcount block counts, is
    /// used.
    async fn is_any_used(&self, alloc: &Allocator, clusters: Range<u64>) -> Result<bool> {
        let per_slice = alloc.refcounts.per_slice(&self.refblocks);
        let mut first = clusters.start;
        while first < clusters.end {
            let end = clusters.end.min(first + per_slice);
            let counts = alloc
                .refcounts
                .counts(&self.refblocks, &self.storage, first)
                .await?;
            if counts.is_some_and(|counts| counts.first(first..end, true) < end) {
                return Ok(true);
            }
            first = end;
        }
        Ok(false)
    }
}
