//! Snapshots of an open image: what is in memory goes to the file first, and
//! afterwards the new tables take the place of the old ones.

use std::sync::atomic::Ordering;

use super::job::{NewSnapshot, SnapshotJob};
use super::table::{self, Selector};
use crate::error::Result;
use crate::qcow2::alloc::Allocator;
use crate::qcow2::shadow::{Ready, words};
use crate::qcow2::spec::header::SIZE_AT;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::qcow2::{Image, lock};
use crate::runtime::Buf;

/// None of these may meet a request: the caller sees to it that none is under
/// way and that none comes before they return.
///
/// After an error the image is as it was, in the file and in memory; unless
/// the storage is latched (see
/// [`ErrorKind::Latched`](crate::ErrorKind::Latched)), in which case the file
/// has either state.
impl Image {
    /// The snapshots, in the order of their table.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let (snapshots, _) = table::read(self.storage(), &self.header()).await?;
        Ok(snapshots)
    }

    /// Makes a snapshot of the active disk.
    pub async fn create_snapshot(&self, new: NewSnapshot) -> Result<()> {
        self.do_snapshot_job(&SnapshotJob::Create(new)).await
    }

    /// Deletes a snapshot.
    pub async fn delete_snapshot(&self, which: Selector) -> Result<()> {
        self.do_snapshot_job(&SnapshotJob::Delete(which)).await
    }

    /// Makes the active disk what it was. Its size may be another afterwards.
    pub async fn apply_snapshot(&self, which: Selector) -> Result<()> {
        self.do_snapshot_job(&SnapshotJob::Apply(which)).await
    }

    /// Gives a snapshot another name.
    pub async fn rename_snapshot(&self, which: Selector, name: Vec<u8>) -> Result<()> {
        self.do_snapshot_job(&SnapshotJob::Rename(which, name))
            .await
    }

    async fn do_snapshot_job(&self, job: &SnapshotJob) -> Result<()> {
        self.check_writable()?;
        // The header is exchanged as a whole: nobody else changes it meanwhile.
        let bitmaps = self.bitmaps.state.lock().await;
        self.settle().await?;
        let done = self.build_and_switch(job).await;
        match &done {
            Ok(()) => self.note_bitmaps(&bitmaps),
            Err(_) => self.doubt_free_space().await,
        }
        done
    }

    async fn build_and_switch(&self, job: &SnapshotJob) -> Result<()> {
        let ready = job.build(self.storage(), self.header()).await?;
        let l1 = self.read_l1(&ready).await?;
        if let Err(error) = self.write_header(SIZE_AT, &ready.switch()).await {
            // The file may have the new state already: until the old one is
            // back for certain, its clusters must not be used.
            if self.restore_header().await.is_err() {
                self.storage().latch();
            }
            return Err(error);
        }
        Ready::settle(self.storage()).await?;
        self.take_over(&ready, &l1).await;
        if self.punch_frees {
            ready.punch_freed(self.storage()).await;
        }
        Ok(())
    }

    /// Writes everything back, and gives back what is reserved.
    async fn settle(&self) -> Result<()> {
        // As a close does; with no request under way, the second flush finds
        // nothing in use.
        self.flush().await?;
        self.give_back_runs().await?;
        self.flush().await?;
        if self.has_dirty_metadata() {
            self.flush().await?;
        }
        // Postponed refcounts too: the job works with those of the file.
        self.end_lazy().await
    }

    /// An attempt that failed may have written to any free cluster: none is
    /// known to read as zeros any more.
    async fn doubt_free_space(&self) {
        let mut alloc = self.alloc.lock().await;
        let refcounts = &alloc.refcounts;
        let refcounts = refcounts.moved(
            refcounts.table_offset,
            refcounts.entries,
            refcounts.table.clone(),
        );
        *alloc = Allocator::new(refcounts);
    }

    async fn read_l1(&self, ready: &Ready) -> Result<Vec<u64>> {
        let mut bytes = Buf::take(ready.header.l1_bytes() as usize);
        let at = ready.header.l1_table_offset.0;
        self.storage().read(at, &mut bytes).await?;
        Ok(words(&bytes))
    }

    /// Works with the new state from now on. Cannot fail: the file has it.
    async fn take_over(&self, ready: &Ready, l1: &[u64]) {
        {
            let mut alloc = self.alloc.lock().await;
            let refcounts = alloc.refcounts.moved(
                ready.header.refcount_table_offset,
                ready.header.reftable_bytes() / 8,
                ready.reftable.clone(),
            );
            *alloc = Allocator::new(refcounts);
        }
        self.l1.replace(ready.header.l1_table_offset, l1);
        self.l2.clear();
        self.refblocks.clear();
        self.inflated.clear();
        self.size
            .store(ready.header.virtual_size(), Ordering::Release);
        *lock(&self.header) = ready.header.clone();
        self.metadata.clear();
        self.note_metadata().await;
    }
}
