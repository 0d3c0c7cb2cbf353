//! Host clusters: reserving, giving back, freeing late. See
//! [`meta`](super::meta) for why frees wait.
//!
//! A queue takes clusters from a run of its own, so that most reservations
//! touch no shared state. Refcounts rise when a run is taken; what remains of
//! it goes back at close.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use super::refcount::Refcounts;
use super::spec::addr::HostOffset;
use super::spec::geometry::MAX_REFTABLE_BYTES;
use super::spec::header::REFTABLE_AT;
use super::{Image, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Buf, Payload};

/// Clusters a queue takes at once, at most this many and this many bytes.
const RUN_CLUSTERS: u64 = 64;
const RUN_BYTES: u64 = 4 << 20;
/// Slices of refcounts searched for free clusters per allocation: bounded
/// work, and every slice is searched once.
const SCAN_SLICES: u32 = 4;

/// Adjacent host clusters with refcount 1 that nothing refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Cluster number (offset / cluster size).
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They read as zeros.
    pub(crate) zeroed: bool,
}

impl Run {
    /// Splits off up to `count` clusters from the front.
    fn take(&mut self, count: u64) -> Self {
        let count = count.min(self.count);
        let taken = Self { count, ..*self };
        self.first += count;
        self.count -= count;
        taken
    }
}

/// Host clusters that lost a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Freed {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They held an L2 table: its slices have to be forgotten.
    pub(crate) table: bool,
}

/// Frees on their way: still referenced on disk, or still in use by requests.
#[derive(Debug, Default)]
pub(crate) struct Frees {
    /// Unmapped in memory only.
    pub(crate) unmapped: Mutex<Vec<Freed>>,
    /// Unmapped durably, with the generation whose requests may still look.
    pub(crate) durable: Mutex<Vec<(u64, Vec<Freed>)>>,
}

impl Frees {
    /// Records that clusters lose a reference, now that the mapping in memory
    /// does not name them any more.
    pub(crate) fn push(&self, freed: Freed) {
        let mut list = lock(&self.unmapped);
        if let Some(last) = list.last_mut()
            && last.first + last.count == freed.first
            && last.table == freed.table
        {
            last.count += freed.count;
            return;
        }
        list.push(freed);
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.unmapped).is_empty() && lock(&self.durable).is_empty()
    }
}

/// The allocator's state, under its lock.
#[derive(Debug)]
pub(crate) struct Allocator {
    pub(crate) refcounts: Refcounts,
    /// Free runs that are known: first cluster -> (count, zeroed).
    free: BTreeMap<u64, (u64, bool)>,
    /// Clusters below have been searched for free ones.
    scanned: u64,
    /// Clusters from here on need no search: what is freed there is known.
    scan_end: u64,
    /// No cluster from here on is used; None until looked up.
    end: Option<u64>,
    /// From this cluster on the file has never been written: reads as zeros.
    fresh: u64,
    /// Runs that were reserved and not used; their refcounts are 1.
    returned: Vec<Run>,
    /// The file's length when the allocator first grew it.
    length_before: Option<u64>,
}

impl Allocator {
    pub(crate) fn new(refcounts: Refcounts) -> Self {
        Self {
            refcounts,
            free: BTreeMap::new(),
            scanned: 0,
            scan_end: 0,
            end: None,
            fresh: u64::MAX,
            returned: Vec::new(),
            length_before: None,
        }
    }

    fn add_free(&mut self, first: u64, count: u64, zeroed: bool) {
        // Merge with the run before, if it is alike.
        if let Some((&start, run)) = self.free.range_mut(..first).next_back()
            && start + run.0 == first
            && run.1 == zeroed
        {
            run.0 += count;
            return;
        }
        self.free.insert(first, (count, zeroed));
    }
}

/// Reserved clusters; they go back when dropped unless [used](Self::used).
#[derive(Debug)]
#[must_use = "dropping the reservation gives the clusters back"]
pub(crate) struct Reserved<'a> {
    image: &'a Image,
    run: Run,
}

impl Reserved<'_> {
    pub(crate) fn run(&self) -> Run {
        self.run
    }

    pub(crate) fn offset(&self) -> HostOffset {
        HostOffset(self.run.first << self.image.geometry.cluster_bits)
    }

    /// The first `count` clusters are referred to from now on; the others go
    /// back.
    pub(crate) fn used(mut self, count: u64) {
        self.run.take(count);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.run.count > 0 {
            // Somebody may have written to them.
            self.run.zeroed = false;
            lock(&self.image.given_back).push(self.run);
        }
    }
}

impl Image {
    /// Reserves up to `wanted` (at least 1) adjacent clusters for queue
    /// `slot`. They have refcount 1 and no reference.
    pub(crate) async fn reserve(&self, slot: usize, wanted: u64) -> Result<Reserved<'_>> {
        let runs = &self.runs[slot % self.runs.len()];
        loop {
            {
                let mut run = lock(runs);
                if run.count > 0 {
                    let run = run.take(wanted);
                    return Ok(Reserved { image: self, run });
                }
            }
            let batch = RUN_CLUSTERS
                .min(RUN_BYTES >> self.geometry.cluster_bits)
                .max(1);
            let run = self.take_run(wanted.max(batch)).await?;
            let mut mine = lock(runs);
            if mine.count == 0 {
                *mine = run;
            } else {
                // Another task of this queue was quicker.
                lock(&self.given_back).push(run);
            }
        }
    }

    /// Takes a run of up to `wanted` free clusters and counts them.
    async fn take_run(&self, wanted: u64) -> Result<Run> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        alloc.returned.append(&mut lock(&self.given_back));
        if let Some(run) = alloc.returned.last_mut() {
            let taken = run.take(wanted);
            if run.count == 0 {
                alloc.returned.pop();
            }
            return Ok(taken);
        }
        let run = self.find_free(alloc, wanted).await?;
        self.count_run(alloc, run).await?;
        Ok(run)
    }

    /// Raises the refcounts of a free run to 1; all or none.
    async fn count_run(&self, alloc: &mut Allocator, run: Run) -> Result<()> {
        for cluster in run.first..run.first + run.count {
            let raised = alloc
                .refcounts
                .adjust(&self.refblocks, &self.storage, cluster, 1)
                .await;
            let (error, undo_to) = match raised {
                Ok(1) => continue,
                Ok(_) => {
                    let at = cluster << self.geometry.cluster_bits;
                    (
                        Error::corrupt("a cluster taken for free is in use", at),
                        cluster + 1,
                    )
                }
                Err(error) => (error, cluster),
            };
            for cluster in run.first..undo_to {
                // They were just changed, so their slices are in the cache.
                let _ = alloc
                    .refcounts
                    .adjust(&self.refblocks, &self.storage, cluster, -1)
                    .await;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Finds up to `wanted` adjacent clusters with refcount 0 whose refcount
    /// block exists, and takes them out of the free list.
    async fn find_free(&self, alloc: &mut Allocator, wanted: u64) -> Result<Run> {
        if let Some(run) = take_known(alloc, wanted) {
            return Ok(run);
        }
        self.find_end(alloc).await?;
        if alloc.scanned < alloc.scan_end {
            self.scan(alloc).await?;
            if let Some(run) = take_known(alloc, wanted) {
                return Ok(run);
            }
        }
        self.extend(alloc, wanted).await
    }

    /// The first cluster from which on nothing is used.
    async fn find_end(&self, alloc: &mut Allocator) -> Result<u64> {
        if let Some(end) = alloc.end {
            return Ok(end);
        }
        let per_block = alloc.refcounts.per_block();
        let mut end = 0;
        'blocks: for index in (0..alloc.refcounts.table.len() as u64).rev() {
            if alloc.refcounts.table[index as usize] == 0 {
                continue;
            }
            let mut last = (index + 1) * per_block;
            while last > index * per_block {
                last -= 1;
                if alloc
                    .refcounts
                    .get(&self.refblocks, &self.storage, last)
                    .await?
                    != 0
                {
                    end = last + 1;
                    break 'blocks;
                }
            }
        }
        alloc.end = Some(end);
        alloc.scan_end = end;
        alloc.fresh = self.storage.len().div_ceil(self.geometry.cluster_size());
        if self.storage.is_block_device() {
            // Nothing says what a device holds past the image.
            alloc.fresh = u64::MAX;
        }
        Ok(end)
    }

    /// Searches the next few slices of refcounts for free clusters. The list
    /// of them is empty, so that none gets onto it twice.
    async fn scan(&self, alloc: &mut Allocator) -> Result<()> {
        let end = alloc.scan_end;
        let per_slice = alloc.refcounts.per_slice(&self.refblocks);
        for _ in 0..SCAN_SLICES {
            if alloc.scanned >= end {
                break;
            }
            let stop = end.min((alloc.scanned / per_slice + 1) * per_slice);
            // Without a block, nothing is used but nothing can be counted
            // either: left to `extend`'s kind of work, skipped here.
            if alloc.refcounts.block_of(alloc.scanned)?.is_some() {
                let mut first = alloc.scanned;
                for cluster in alloc.scanned..stop {
                    let count = alloc
                        .refcounts
                        .get(&self.refblocks, &self.storage, cluster)
                        .await?;
                    if count != 0 {
                        if cluster > first {
                            alloc.add_free(first, cluster - first, false);
                        }
                        first = cluster + 1;
                    }
                }
                if stop > first {
                    alloc.add_free(first, stop - first, false);
                }
            }
            alloc.scanned = stop;
        }
        Ok(())
    }

    /// Takes clusters at the end of the image, with a new refcount block where
    /// one is due.
    async fn extend(&self, alloc: &mut Allocator, wanted: u64) -> Result<Run> {
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
        if index >= alloc.refcounts.table.len() as u64 {
            return self.grow_refcount_table(alloc, index + 1).await;
        }
        self.count_at_end(alloc, cluster, 0).await?;
        Ok(())
    }

    /// Makes sure that the file reaches to `clusters`.
    async fn grow_file(&self, alloc: &mut Allocator, clusters: u64) -> Result<()> {
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

    /// Writes a cluster of zeros: metadata that must not show what was there.
    pub(super) async fn write_zero_cluster(&self, offset: HostOffset) -> Result<()> {
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
        self.grow_file(alloc, end).await?;
        // Whatever fails from here on, these clusters are not tried again.
        alloc.end = Some(end);
        let indices = start / per_block..=(end - 1) / per_block;
        let saved = alloc.refcounts.table.clone();
        let counted = async {
            let mut block = start + count;
            for index in indices.clone() {
                if alloc.refcounts.table[index as usize] == 0 {
                    let offset = HostOffset(block << cluster_bits);
                    self.new_block(alloc, index, offset).await?;
                    block += 1;
                }
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
            for index in indices {
                if saved[index as usize] == 0 {
                    alloc.refcounts.set_block(index, HostOffset(0));
                }
            }
        }
        counted
    }

    /// Puts an empty refcount block at `offset` into the table.
    async fn new_block(&self, alloc: &mut Allocator, index: u64, offset: HostOffset) -> Result<()> {
        if offset.cluster(self.geometry.cluster_bits) < alloc.fresh {
            self.write_zero_cluster(offset).await?;
        }
        self.refblocks.forget(offset, self.geometry.cluster_size());
        self.metadata.add(offset);
        alloc.refcounts.set_block(index, offset);
        Ok(())
    }

    /// Takes exactly `count` adjacent clusters, at the end of the image.
    pub(super) async fn claim_at_end(&self, count: u64) -> Result<u64> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        loop {
            let start = self.find_end(alloc).await?;
            let end = start + count + self.missing_blocks(alloc, start, count)?;
            let needed = end.div_ceil(alloc.refcounts.per_block());
            if needed <= alloc.refcounts.table.len() as u64 {
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
        let old_entries = alloc.refcounts.table.len() as u64;
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
        alloc.refcounts.table.resize(entries as usize, 0);
        let start = offset.cluster(self.geometry.cluster_bits);
        self.count_at_end(alloc, start, clusters).await?;
        let mut bytes = Buf::take(alloc.refcounts.table.len() * 8);
        for (raw, entry) in bytes.chunks_exact_mut(8).zip(&alloc.refcounts.table) {
            raw.copy_from_slice(&entry.to_be_bytes());
        }
        self.storage.write(offset.0, &bytes).await?;
        self.write_slices(&self.refblocks).await?;
        self.storage.sync().await?;
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

    /// Drops the references of what has been unmapped durably and is out of
    /// use: counts fall, space is punched out, the allocator gets it back.
    ///
    /// The caller holds the flush lock.
    pub(super) async fn release_frees(&self) -> Result<()> {
        self.grace.advance();
        let ready: Vec<Freed> = {
            let mut durable = lock(&self.frees.durable);
            let (over, waiting) = std::mem::take(&mut *durable)
                .into_iter()
                .partition(|(tag, _)| self.grace.is_over(*tag));
            *durable = waiting;
            let over: Vec<(u64, Vec<Freed>)> = over;
            over.into_iter().flat_map(|(_, freed)| freed).collect()
        };
        for (index, freed) in ready.iter().enumerate() {
            if let Err(error) = self.release(*freed).await {
                // What cannot be given back leaks until it can, or until the
                // image is repaired; the others still go.
                tracing::error!("cannot give clusters back: {error}");
                if error.kind() == ErrorKind::Latched {
                    lock(&self.frees.durable).push((0, ready[index + 1..].to_vec()));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn release(&self, freed: Freed) -> Result<()> {
        let all = freed.first..freed.first + freed.count;
        // Ours is the last reference where the count is 1, and nobody can add
        // one to a cluster that no mapping names. The space goes before the
        // count: once the count is 0 the allocator may find the cluster, and a
        // late punch would hit its next owner.
        let last = {
            let alloc = self.alloc.lock().await;
            match self.last_references(&alloc, all.clone()).await {
                Ok(last) => last,
                Err(error) => {
                    lock(&self.frees.durable).push((0, vec![freed]));
                    return Err(error);
                }
            }
        };
        let mut runs = Vec::with_capacity(last.len());
        for run in last {
            let offset = HostOffset::of_cluster(run.start, self.geometry.cluster_bits);
            let len = (run.end - run.start) << self.geometry.cluster_bits;
            if freed.table {
                self.l2.forget(offset, len);
                for cluster in run.clone() {
                    self.metadata.remove(cluster);
                }
            }
            self.inflated.forget(offset, len);
            // Failing to give space back loses nothing.
            let zeroed =
                self.punch_frees && self.storage.punch(offset.0, len).await.unwrap_or(false);
            runs.push((run, zeroed));
        }

        let mut alloc = self.alloc.lock().await;
        let mut result = Ok(());
        for cluster in all.clone() {
            let dropped = alloc
                .refcounts
                .adjust(&self.refblocks, &self.storage, cluster, -1)
                .await;
            if let Err(error) = dropped {
                runs.retain(|(run, _)| !run.contains(&cluster));
                // What contradicts the count is skipped, what could not be
                // read is tried again.
                if error.kind() != ErrorKind::Corrupt {
                    lock(&self.frees.durable).push((
                        0,
                        vec![Freed {
                            first: cluster,
                            count: all.end - cluster,
                            ..freed
                        }],
                    ));
                    runs.retain(|(run, _)| run.end <= cluster);
                    result = Err(error);
                    break;
                }
                result = Err(error);
            }
        }
        for (run, zeroed) in runs {
            alloc.add_free(run.start, run.end - run.start, zeroed);
        }
        result
    }

    /// The runs of clusters whose refcount is 1.
    async fn last_references(
        &self,
        alloc: &Allocator,
        clusters: Range<u64>,
    ) -> Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in clusters {
            let count = alloc
                .refcounts
                .get(&self.refblocks, &self.storage, cluster)
                .await?;
            if count == 1 {
                match runs.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            }
        }
        Ok(runs)
    }

    /// Gives every unused reservation back, for a clean close. No request is
    /// under way.
    pub(super) async fn give_back_runs(&self) -> Result<()> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        let mut runs = std::mem::take(&mut alloc.returned);
        runs.append(&mut lock(&self.given_back));
        for run in &self.runs {
            let mut run = lock(run);
            let count = run.count;
            if count > 0 {
                runs.push(run.take(count));
            }
        }
        for run in runs {
            for cluster in run.first..run.first + run.count {
                alloc
                    .refcounts
                    .adjust(&self.refblocks, &self.storage, cluster, -1)
                    .await?;
            }
            alloc.add_free(run.first, run.count, run.zeroed);
        }
        Ok(())
    }

    /// Cuts off what the allocator added to the file's end and nobody uses,
    /// for a clean close.
    pub(super) async fn trim_file(&self) -> Result<()> {
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
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

    /// Writes the dirty slices of a cache whose order does not matter.
    pub(super) async fn write_slices(&self, cache: &super::meta::SliceCache) -> Result<()> {
        let dirty = cache.take_dirty();
        let writes: Vec<_> = dirty
            .iter()
            .map(|(slice, bytes)| {
                self.storage
                    .start_write(slice.offset().0, &Payload::of_buf(bytes))
            })
            .collect();
        let mut result = Ok(());
        for (write, (slice, _)) in writes.into_iter().zip(&dirty) {
            if let Err(error) = write.await {
                cache.mark_dirty(slice);
                result = Err(error);
            }
        }
        result
    }
}

fn take_known(alloc: &mut Allocator, wanted: u64) -> Option<Run> {
    let (first, (count, zeroed)) = alloc.free.pop_first()?;
    let mut run = Run {
        first,
        count,
        zeroed,
    };
    let taken = run.take(wanted);
    if run.count > 0 {
        alloc.free.insert(run.first, (run.count, run.zeroed));
    }
    Some(taken)
}
