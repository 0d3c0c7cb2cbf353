//! The end of the image: growing into it, with the refcount blocks and the
//! refcount table that this takes.

use super::{Allocator, Freed, Image, Run, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::geometry::MAX_REFTABLE_BYTES;
use crate::qcow2::spec::header::REFTABLE_AT;
use crate::rule::Rule;
use crate::runtime::Buf;

impl Image {
    /// The first cluster from which on nothing is used.
    pub(super) async fn find_end(&self, alloc: &mut Allocator) -> Result<u64> {
        if let Some(end) = alloc.end {
            return Ok(end);
        }
        let per_block = alloc.refcounts.per_block();
        let per_slice = alloc.refcounts.per_slice(&self.refblocks);
        let mut end = 0;
        'blocks: for index in (0..alloc.refcounts.table.len() as u64).rev() {
            let block = alloc.refcounts.entry(index);
            let extent = self.storage.extent_at(block);
            let hole = !extent.data && extent.end - block >= self.geometry.cluster_size();
            if block == 0 || hole {
                continue;
            }
            for slice in (0..per_block / per_slice).rev() {
                let first = index * per_block + slice * per_slice;
                let counts = alloc
                    .refcounts
                    .counts(&self.refblocks, &self.storage, first)
                    .await?;
                if let Some(last) = counts.and_then(|counts| counts.last_used()) {
                    end = last + 1;
                    break 'blocks;
                }
            }
        }
        if end > self.most_clusters() {
            let what = "the refcounts count clusters where no file reaches";
            return Err(Error::corrupt(
                what,
                alloc.refcounts.table_offset.0 + (end - 1) / per_block * 8,
            )
            .path(self.storage.path())
            .cure("close the image and run `qcow2-ublk check -r all`"));
        }
        alloc.end = Some(end);
        // What was freed there before anybody asked is behind the end now, and
        // taken from there.
        drop(alloc.free.split_off(&end));
        alloc.scan_end = end;
        alloc.fresh = self.storage.len().div_ceil(self.geometry.cluster_size());
        if self.storage.is_block_device() {
            // Nothing says what a device holds past the image.
            alloc.fresh = u64::MAX;
        }
        Ok(end)
    }

    /// Takes clusters at the end of the image, with a new refcount block where
    /// one is due.
    pub(super) async fn extend(&self, alloc: &mut Allocator, wanted: u64) -> Result<Run> {
        let per_block = alloc.refcounts.per_block();
        let end = loop {
            let end = self.find_end(alloc).await?;
            if alloc.refcounts.block_of(end)?.is_some() {
                break end;
            }
            // Takes clusters of its own, so the end moves.
            self.new_refcount_block(alloc, end).await?;
        };
        let in_block = per_block - end % per_block;
        let run = Run {
            first: end,
            count: wanted.min(in_block),
            zeroed: end >= alloc.fresh,
        };
        self.grow_file(alloc, run.first + run.count).await?;
        alloc.end = Some(run.first + run.count);
        Ok(run)
    }

    /// Makes the refcount block that counts `cluster`, which is the end of the
    /// image, in that very cluster: it counts itself.
    async fn new_refcount_block(&self, alloc: &mut Allocator, cluster: u64) -> Result<()> {
        let index = cluster / alloc.refcounts.per_block();
        if index >= alloc.refcounts.entries {
            return self.grow_refcount_table(alloc, index + 1).await;
        }
        self.count_at_end(alloc, cluster, 0).await?;
        Ok(())
    }

    /// Clusters at offsets that an entry can hold.
    fn most_clusters(&self) -> u64 {
        1 << (56 - self.geometry.cluster_bits)
    }

    /// Makes sure that the file reaches to `clusters`.
    async fn grow_file(&self, alloc: &mut Allocator, clusters: u64) -> Result<()> {
        if clusters > self.most_clusters() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the image cannot grow beyond 2^56 bytes",
            )
            .path(self.storage.path()));
        }
        let len = clusters << self.geometry.cluster_bits;
        let old = self.storage.len();
        if len > old {
            if self.storage.is_block_device() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "the block device that holds the image is full",
                )
                .path(self.storage.path())
                .at(old)
                .cure("enlarge the device"));
            }
            self.storage.set_len(len).await?;
            alloc.length_before.get_or_insert(old);
        }
        Ok(())
    }

    /// Writes a cluster of zeros for new metadata: what was there must not
    /// show. Also where zeros are already, because it makes the host find the
    /// space now: a mapping whose data has been acknowledged must not meet a
    /// full file system.
    pub(in crate::qcow2) async fn write_zero_cluster(&self, offset: HostOffset) -> Result<()> {
        let zeros = Buf::zeroed(self.geometry.cluster_size() as usize);
        self.storage.write(offset.0, &zeros).await
    }

    /// How many refcount blocks the clusters `start..start + count` and these
    /// blocks, which follow them, still need.
    fn missing_blocks(&self, alloc: &Allocator, start: u64, count: u64) -> Result<u64> {
        let per_block = alloc.refcounts.per_block();
        // Everything is at the end of the image: only the block that counts
        // its first cluster can exist.
        let have = u64::from(alloc.refcounts.block_of(start)?.is_some());
        let mut blocks = 0;
        loop {
            let last = (start + count + blocks).max(start + 1) - 1;
            let wanted = last / per_block + 1 - start / per_block - have;
            if wanted <= blocks {
                return Ok(blocks);
            }
            blocks = wanted;
        }
    }

    /// Counts clusters `start..start + count` at the end of the image as used,
    /// and makes the refcount blocks for that behind them; the new end. The
    /// refcount table is large enough.
    async fn count_at_end(&self, alloc: &mut Allocator, start: u64, count: u64) -> Result<u64> {
        let cluster_bits = self.geometry.cluster_bits;
        let per_block = alloc.refcounts.per_block();
        let end = start + count + self.missing_blocks(alloc, start, count)?;
        let range = (end - start) << cluster_bits;
        self.check_new_metadata(HostOffset(start << cluster_bits), range)?;
        self.grow_file(alloc, end).await?;
        // Whatever fails from here on, these clusters are not tried again.
        alloc.end = Some(end);
        let new: Vec<u64> = (start / per_block..=(end - 1) / per_block)
            .filter(|&index| alloc.refcounts.entry(index) == 0)
            .collect();
        let counted = async {
            for (block, &index) in (start + count..).zip(&new) {
                let offset = HostOffset(block << cluster_bits);
                self.new_block(alloc, index, offset).await?;
            }
            for cluster in start..end {
                alloc
                    .refcounts
                    .adjust(&self.refblocks, &self.storage, cluster, 1)
                    .await?;
            }
            Ok(end)
        }
        .await;
        if counted.is_err() {
            // A block that does not count itself must not get into the table.
            for index in new {
                alloc.refcounts.set_block(index, HostOffset(0));
            }
        }
        counted
    }

    /// Puts an empty refcount block at `offset` into the table.
    async fn new_block(&self, alloc: &mut Allocator, index: u64, offset: HostOffset) -> Result<()> {
        self.write_zero_cluster(offset).await?;
        self.refblocks.forget(offset, self.geometry.cluster_size());
        self.metadata.add(offset);
        alloc.refcounts.set_block(index, offset);
        Ok(())
    }

    /// Takes exactly `count` adjacent clusters, at the end of the image.
    pub(in crate::qcow2) async fn claim_at_end(&self, count: u64) -> Result<u64> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        loop {
            let start = self.find_end(alloc).await?;
            let end = start + count + self.missing_blocks(alloc, start, count)?;
            let needed = end.div_ceil(alloc.refcounts.per_block());
            if needed <= alloc.refcounts.entries {
                self.count_at_end(alloc, start, count).await?;
                return Ok(start);
            }
            self.grow_refcount_table(alloc, needed).await?;
        }
    }

    /// Moves the refcount table to a larger one that has at least `needed`
    /// entries.
    ///
    /// On disk: new table and the blocks that count it `|` header `|`. A power
    /// cut leaves the old table, or the new one; the other leaks.
    async fn grow_refcount_table(&self, alloc: &mut Allocator, needed: u64) -> Result<()> {
        let cluster_bits = self.geometry.cluster_bits;
        let per_cluster = self.geometry.cluster_size() / 8;
        let old_entries = alloc.refcounts.entries;
        let old_offset = alloc.refcounts.table_offset;
        let start = self.find_end(alloc).await?;

        // Half as much again, so that growing stays rare; and enough to count
        // itself.
        let mut clusters = needed
            .max(old_entries + old_entries / 2)
            .div_ceil(per_cluster);
        loop {
            let end = start + clusters + self.missing_blocks(alloc, start, clusters)?;
            if end.div_ceil(alloc.refcounts.per_block()) <= clusters * per_cluster {
                break;
            }
            clusters += 1;
        }
        if clusters << cluster_bits > MAX_REFTABLE_BYTES {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the refcount table cannot grow beyond 8 MiB",
            )
            .path(self.storage.path())
            .cure("convert the image to one with larger clusters"));
        }
        let saved = alloc.refcounts.table.clone();
        let saved_dirty = alloc.refcounts.table_dirty.clone();
        let offset = HostOffset(start << cluster_bits);
        if let Err(error) = self.move_refcount_table(alloc, offset, clusters).await {
            // The header still names the old table, or (if only its sync
            // failed) the storage is latched. What was made leaks.
            alloc.refcounts.table = saved;
            alloc.refcounts.entries = old_entries;
            alloc.refcounts.table_dirty = saved_dirty;
            return Err(error);
        }
        alloc.refcounts.table_offset = offset;
        alloc.refcounts.table_dirty.clear();
        self.metadata.add_range(offset, clusters << cluster_bits);
        let freed = Freed {
            first: old_offset.cluster(cluster_bits),
            count: (old_entries * 8).div_ceil(self.geometry.cluster_size()),
            table: false,
        };
        for cluster in freed.first..freed.first + freed.count {
            self.metadata.remove(cluster);
        }
        self.frees.push(freed);
        Ok(())
    }

    async fn move_refcount_table(
        &self,
        alloc: &mut Allocator,
        offset: HostOffset,
        clusters: u64,
    ) -> Result<()> {
        let entries = clusters * (self.geometry.cluster_size() / 8);
        alloc.refcounts.entries = entries;
        let start = offset.cluster(self.geometry.cluster_bits);
        self.count_at_end(alloc, start, clusters).await?;
        let mut bytes = Buf::zeroed(entries as usize * 8);
        for (raw, entry) in bytes.chunks_exact_mut(8).zip(&alloc.refcounts.table) {
            raw.copy_from_slice(&entry.to_be_bytes());
        }
        self.storage.write(offset.0, &bytes).await?;
        self.write_slices(&self.refblocks).await?;
        if !Rule::TableBeforeHeader.is_broken() {
            self.storage.sync().await?;
        }
        // Offset and number of clusters are neighbours: one write, one sector.
        let mut field = [0; 12];
        field[..8].copy_from_slice(&offset.0.to_be_bytes());
        field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        self.write_header(REFTABLE_AT, &field).await?;
        self.storage.sync().await?;
        let mut header = lock(&self.header);
        header.refcount_table_offset = offset;
        header.refcount_table_clusters = clusters as u32;
        Ok(())
    }

    /// Cuts off what the allocator added to the file's end and nobody uses,
    /// for a clean close.
    pub(in crate::qcow2) async fn trim_file(&self) -> Result<()> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        if std::mem::take(&mut alloc.cut) {
            // What was used when the end was looked up may be free now.
            self.find_lower_end(alloc).await?;
        }
        let (Some(before), Some(mut end)) = (alloc.length_before, alloc.end) else {
            return Ok(());
        };
        while let Some((&first, &(count, _))) = alloc.free.last_key_value() {
            if first + count != end {
                break;
            }
            end = first;
            alloc.free.pop_last();
        }
        alloc.end = Some(end);
        let len = (end << self.geometry.cluster_bits).max(before);
        if len < self.storage.len() {
            self.storage.set_len(len).await?;
        }
        alloc.fresh = alloc.fresh.max(end);
        Ok(())
    }
}
