//! Host clusters: reserving, giving back, freeing late. See
//! [`meta`](super::meta) for why frees wait.
//!
//! A queue takes clusters from a run of its own, so that most reservations
//! touch no shared state. Refcounts rise when a run is taken; what remains of
//! it goes back at close.

mod cut;
mod end;
mod release;

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::{Image, lock};
use crate::error::{Error, Result};
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::spec::addr::HostOffset;
use crate::rule::Rule;
use crate::runtime::Payload;

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
    pub(crate) const EMPTY: Self = Self {
        first: 0,
        count: 0,
        zeroed: false,
    };

    /// Splits off up to `count` clusters from the front.
    pub(crate) fn take(&mut self, count: u64) -> Self {
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
    /// Whatever is unused at the file's end goes at the close.
    cut: bool,
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
            cut: false,
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
                    let mut run = run.take(wanted);
                    // In the file they do; decrypted, that is not zeros.
                    run.zeroed &= !self.is_encrypted();
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
        if Rule::UnmappingBeforeReuse.is_broken()
            && let Some(freed) = lock(&self.frees.unmapped).pop_if(|freed| !freed.table)
        {
            return Ok(Run {
                first: freed.first,
                count: freed.count,
                zeroed: false,
            });
        }
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
            let counts = alloc
                .refcounts
                .counts(&self.refblocks, &self.storage, alloc.scanned)
                .await?;
            if let Some(counts) = counts {
                let mut at = alloc.scanned;
                while at < stop {
                    let first = counts.first(at..stop, false);
                    at = counts.first(first..stop, true);
                    if at > first {
                        alloc.add_free(first, at - first, false);
                    }
                }
            }
            alloc.scanned = stop;
        }
        Ok(())
    }

    /// Writes the dirty slices of a cache whose order does not matter.
    pub(in crate::qcow2) async fn write_slices(
        &self,
        cache: &crate::qcow2::meta::SliceCache,
    ) -> Result<()> {
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
