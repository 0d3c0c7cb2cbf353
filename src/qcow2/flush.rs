//! Write-back: making mappings durable, in the order [`meta`](super::meta)
//! lays down, once for all who ask at the same time.

use std::sync::{Arc, Mutex, OnceLock};

use super::alloc::{Allocator, Freed};
use super::{Image, lock};
use crate::error::Result;
use crate::rule::Rule;
use crate::runtime::sync;
use crate::runtime::{Buf, Payload};

/// Flushes waiting for the same write-back.
#[derive(Debug, Default)]
struct Batch {
    result: OnceLock<Result<()>>,
}

/// The flushes of one image.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// The batch that a flush arriving now joins: not begun yet.
    next: Mutex<Arc<Batch>>,
    /// Held by the one write-back under way.
    turn: sync::Mutex<()>,
}

impl Image {
    /// Makes everything completed before this call durable. Concurrent calls
    /// share one write-back.
    ///
    /// With nothing allocated since the last one it is a single fdatasync.
    pub(crate) async fn flush(&self) -> Result<()> {
        let batch = Arc::clone(&lock(&self.flushes.next));
        let _turn = self.flushes.turn.lock().await;
        if let Some(result) = batch.result.get() {
            return copy(result);
        }
        // Ours is the next batch: whoever comes from now on joins another one,
        // because what they completed may miss our copies.
        *lock(&self.flushes.next) = Arc::default();
        let result = self.write_back().await;
        let answer = copy(&result);
        let _ = batch.result.set(result);
        answer
    }

    /// Waits for the flush under way, and holds others up until the guard is
    /// dropped.
    pub(super) async fn pause_flushes(&self) -> sync::MutexGuard<'_, ()> {
        self.flushes.turn.lock().await
    }

    /// True when a flush would have metadata to write. What another one has
    /// under way does not count.
    pub(crate) fn has_dirty_metadata(&self) -> bool {
        self.l2.has_dirty()
            || self.l1.has_dirty()
            || !self.postpones_refcounts() && self.refblocks.has_dirty()
            || !self.frees.is_empty()
            || self.header_is_suspect()
    }

    async fn write_back(&self) -> Result<()> {
        if !self.has_dirty_metadata() && !self.refblocks.is_crowded() {
            self.sync_data().await?;
            return self.sync_flushed().await;
        }
        // The frees first, then the copies: what is on the list was unmapped
        // before, so the copies show it unmapped.
        let unmapped = std::mem::take(&mut *lock(&self.frees.unmapped));
        let l2 = self.l2.take_dirty();
        let l1 = self.l1.take_dirty();
        if Rule::UnmappingBeforeFree.is_broken() {
            self.retire(unmapped.clone());
            self.release_frees().await?;
            self.write_refcounts().await?;
        }
        if Rule::UnmappingBeforePunch.is_broken() {
            for freed in &unmapped {
                let bits = self.geometry.cluster_bits;
                self.storage
                    .punch(freed.first << bits, freed.count << bits)
                    .await?;
            }
        }
        let written = self.write_frozen(&l2, &l1).await;
        if let Err(error) = written {
            // Nothing is dropped: all of it is written again next time.
            for (slice, _) in &l2 {
                self.l2.mark_dirty(slice);
            }
            for (block, ..) in &l1 {
                self.l1.mark_dirty(*block);
            }
            let mut list = lock(&self.frees.unmapped);
            let newer = std::mem::replace(&mut *list, unmapped);
            list.extend(newer);
            return Err(error);
        }
        if !Rule::UnmappingBeforeFree.is_broken() {
            self.retire(unmapped);
        }
        self.release_frees().await
    }

    /// What was flushed is durable.
    async fn sync_flushed(&self) -> Result<()> {
        if Rule::FlushSyncs.is_broken() {
            return Ok(());
        }
        self.storage.sync().await
    }

    fn retire(&self, unmapped: Vec<Freed>) {
        if !unmapped.is_empty() {
            let tag = self.grace.generation();
            lock(&self.frees.durable).push((tag, unmapped));
        }
    }

    /// Writes refcounts, unless they may wait, `|` L2 slices and L1 blocks `|`.
    async fn write_frozen(
        &self,
        l2: &[(Arc<super::meta::Slice>, Buf)],
        l1: &[(usize, super::spec::addr::HostOffset, Buf)],
    ) -> Result<()> {
        self.restore_header().await?;
        let postponed = self.postpones_refcounts() && !self.refblocks.is_crowded();
        if !postponed && !Rule::CountBeforeMapping.is_broken() {
            self.write_refcounts().await?;
        }
        self.sync_data().await?;
        if !Rule::DataBeforeMapping.is_broken() {
            self.storage.sync().await?;
        }
        if l2.is_empty() && l1.is_empty() {
            return Ok(());
        }
        let slices = l2.iter().map(|(slice, bytes)| (slice.offset(), bytes));
        let blocks = l1.iter().map(|(_, offset, bytes)| (*offset, bytes));
        let writes: Vec<_> = slices
            .chain(blocks)
            .map(|(offset, bytes)| self.storage.start_write(offset.0, &Payload::of_buf(bytes)))
            .collect();
        let mut result = Ok(());
        for write in writes {
            if let Err(error) = write.await {
                result = Err(error);
            }
        }
        result?;
        if !postponed && Rule::CountBeforeMapping.is_broken() {
            self.write_refcounts().await?;
        }
        self.sync_flushed().await
    }

    /// Makes what is in an external data file durable; what is in the image's
    /// own is so with the next sync of that.
    async fn sync_data(&self) -> Result<()> {
        match &self.data_file {
            Some(data) if !Rule::FlushSyncsData.is_broken() => data.sync().await,
            _ => Ok(()),
        }
    }

    /// Writes the dirty refcount blocks and then, if it changed, the refcount
    /// table that names new ones.
    async fn write_refcounts(&self) -> Result<()> {
        // Under the allocator's lock: growing the table writes slices too, and
        // an older copy must not land on a newer one.
        let mut alloc = self.alloc.lock().await;
        self.write_slices(&self.refblocks).await?;
        if alloc.refcounts.table_dirty.is_empty() {
            return Ok(());
        }
        // A table entry must not become durable before its block.
        if !Rule::BlockBeforeTable.is_broken() {
            self.storage.sync().await?;
        }
        self.write_refcount_table(&mut alloc).await
    }

    /// Writes what has changed in the refcount table.
    pub(super) async fn write_refcount_table(&self, alloc: &mut Allocator) -> Result<()> {
        let refcounts = &mut alloc.refcounts;
        while let Some(&block) = refcounts.table_dirty.first() {
            let first = block * super::refcount::TABLE_BLOCK;
            let end = refcounts
                .table
                .len()
                .min(first + super::refcount::TABLE_BLOCK);
            let mut bytes = Buf::take((end - first) * 8);
            for (raw, entry) in bytes.chunks_exact_mut(8).zip(&refcounts.table[first..end]) {
                raw.copy_from_slice(&entry.to_be_bytes());
            }
            let offset = refcounts.table_offset + first as u64 * 8;
            self.storage.write(offset.0, &bytes).await?;
            refcounts.table_dirty.remove(&block);
        }
        Ok(())
    }
}

fn copy(result: &Result<()>) -> Result<()> {
    result
        .as_ref()
        .map(|&()| ())
        .map_err(crate::Error::duplicate)
}
