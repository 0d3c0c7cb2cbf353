//! Taking mappings away at the end of the disk, or all of them: for shrinking
//! the disk and for emptying an overlay. Knows nothing of what was mapped.
//!
//! # What is on disk at each moment
//!
//! | change | order on disk (`|` is an fdatasync) |
//! |---|---|
//! | shrink | new size `|` L2 entries, L1 entries `|` refcounts, punch `|` file length |
//! | empty | L2 entries, L1 entries `|` refcounts, punch `|` file length |
//!
//! A shrink becomes true in one sector: a power cut leaves the old disk whole
//! or the new one. Mappings behind the new end that were not yet taken away
//! show nothing, and growing gives up whatever it finds there. An overlay is
//! emptied only when what lies below shows the same, so that it does not
//! matter which of its mappings went.

use std::sync::atomic::Ordering;

use super::Image;
use super::alloc::Freed;
use super::map::Change;
use super::spec::addr::GuestOffset;
use super::spec::entry::L1Entry;
use crate::error::Result;

impl Image {
    /// Makes the disk smaller, durably: `size` is a multiple of 512. What was
    /// behind it is still mapped; see [`Self::drop_mappings`].
    ///
    /// No request is under way.
    pub(crate) async fn store_smaller_size(&self, size: u64) -> Result<()> {
        self.check_resizable(size)?;
        // Whatever is dirty belongs to the old disk.
        self.flush().await?;
        self.begin_bitmap_resize(size).await?;
        let old = self.size();
        self.size.store(size, Ordering::Release);
        let stored = self.store_size().await;
        if stored.is_err() {
            self.size.store(old, Ordering::Release);
        }
        stored
    }

    /// Unmaps every cluster from `from`, which is where one begins, up to
    /// where the L1 table ends, and frees the L2 tables that map nothing else.
    /// The layer below shows there; the file gets shorter at the close.
    ///
    /// No request is under way.
    pub(crate) async fn drop_mappings(&self, slot: usize, from: GuestOffset) -> Result<()> {
        let span = self.geometry.l1_entry_span();
        for index in self.geometry.l1_index(from)..self.l1.len() as u64 {
            if self.l1.get(index) == 0 {
                continue;
            }
            let start = (index * span).max(from.0);
            let clusters = ((index + 1) * span - start) >> self.geometry.cluster_bits;
            self.change(slot, GuestOffset(start), clusters, Change::Unallocated)
                .await?;
            if start == index * span {
                self.drop_table(index)?;
            }
            if self.is_crowded() {
                self.flush().await?;
            }
        }
        self.flush().await?;
        self.cut_at_close().await;
        Ok(())
    }

    /// Takes the table out of L1 entry `index`. It maps nothing, and is ours
    /// alone.
    fn drop_table(&self, index: u64) -> Result<()> {
        let entry = L1Entry::decode(self.l1.get(index), &self.geometry).map_err(|bad| {
            bad.into_error("L1 table", self.l1.offset() + index * 8)
                .path(self.storage.path())
        })?;
        if let L1Entry::Table { offset, .. } = entry {
            self.l1
                .set(index, L1Entry::Unallocated.encode(&self.geometry));
            self.frees.push(Freed {
                first: offset.cluster(self.geometry.cluster_bits),
                count: 1,
                table: true,
            });
        }
        Ok(())
    }
}
