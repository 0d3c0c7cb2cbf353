//! Growing the disk and the L1 table.

use std::sync::atomic::Ordering;

use super::alloc::Freed;
use super::spec::addr::{GuestOffset, HostOffset};
use super::spec::header::{L1_AT, SIZE_AT};
use super::{Change, Image, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::rule::Rule;

impl Image {
    /// Lets the disk in memory have `size` bytes, a multiple of 512 not below
    /// the current size; the L1 table is grown to match.
    ///
    /// [`Self::store_size`] makes it last, once the new part reads as it
    /// should, and [`Self::end_bitmap_resize`] comes last in any case.
    pub(crate) async fn grow_in_memory(&self, size: u64) -> Result<()> {
        self.check_resizable(size)?;
        debug_assert!(size >= self.size());
        if size > self.geometry.max_size() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "with this cluster size an image can have {} bytes at most",
                    self.geometry.max_size()
                ),
            )
            .path(self.path()));
        }
        let needed = self.geometry.l1_entries_for(size) as usize;
        if needed > self.l1.len() {
            self.grow_l1(needed).await?;
        }
        self.begin_bitmap_resize(size).await?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Maps the part from `start` to `end` of the disk to the external data
    /// file, whatever it was; as `space`, what is there is not shown.
    pub(crate) async fn map_data_file(
        &self,
        slot: usize,
        start: u64,
        end: u64,
        space: bool,
    ) -> Result<()> {
        /// Clusters mapped between looks at how much is dirty.
        const STEP: u64 = 1 << 13;
        let bits = self.geometry.cluster_bits;
        let mut cluster = start >> bits;
        let end = end.div_ceil(1 << bits);
        while cluster < end {
            let count = STEP.min(end - cluster);
            let at = GuestOffset(cluster << bits);
            let change = if space {
                Change::Space(None)
            } else {
                Change::DataFile
            };
            self.change(slot, at, count, change).await?;
            if self.is_crowded() {
                self.flush().await?;
            }
            cluster += count;
        }
        Ok(())
    }

    /// Refuses a size, or an image, with which the disk cannot be resized.
    pub(super) fn check_resizable(&self, size: u64) -> Result<()> {
        let header = self.header();
        if !size.is_multiple_of(512) {
            return Err(
                Error::new(ErrorKind::Usage, "The new size must be a multiple of 512")
                    .path(self.path()),
            );
        }
        if self.version() < 3 && header.nb_snapshots > 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Can't resize a v2 image which has snapshots",
            )
            .path(self.path()));
        }
        Ok(())
    }

    /// Undoes [`Self::grow_in_memory`].
    pub(crate) fn ungrow(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Writes the size to the header, durably.
    pub(crate) async fn store_size(&self) -> Result<()> {
        let size = self.size();
        self.write_header(SIZE_AT, &size.to_be_bytes()).await?;
        if !Rule::SizeSyncs.is_broken() {
            self.storage.sync().await?;
        }
        lock(&self.header).size = size;
        Ok(())
    }

    /// Moves the L1 table to a larger place.
    ///
    /// On disk: refcounts of the new place, the new table `|` header `|`. A
    /// power cut leaves the old table in use, or the new one; the other leaks.
    async fn grow_l1(&self, entries: usize) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let len = (entries as u64 * 8).div_ceil(cluster_size);
        let first = self.claim_at_end(len).await?;
        let offset = HostOffset(first << self.geometry.cluster_bits);
        let (old_offset, old_len) = (self.l1.offset(), self.l1.len());
        // No L1 entry may change between the copy and the move.
        let _turn = self.new_tables.lock().await;
        // Refcounts of the new place, and everything the old table names.
        self.flush().await?;
        let mut table = self.l1.encode_grown(entries);
        self.storage.write(offset.0, &table).await?;
        table.truncate(0);
        if !Rule::L1BeforeHeader.is_broken() {
            self.storage.sync().await?;
        }
        // l1_size and l1_table_offset are neighbours: one write, one sector.
        let mut field = [0; 12];
        field[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        field[4..].copy_from_slice(&offset.0.to_be_bytes());
        self.write_header(L1_AT, &field).await?;
        self.storage.sync().await?;
        self.l1.moved(offset, entries);
        {
            let mut header = lock(&self.header);
            header.l1_size = entries as u32;
            header.l1_table_offset = offset;
        }
        self.metadata.add_range(offset, entries as u64 * 8);
        let freed = Freed {
            first: old_offset.cluster(self.geometry.cluster_bits),
            count: (old_len as u64 * 8).div_ceil(cluster_size),
            table: false,
        };
        for cluster in freed.first..freed.first + freed.count {
            self.metadata.remove(cluster);
        }
        if freed.count > 0 {
            self.frees.push(freed);
        }
        Ok(())
    }
}
