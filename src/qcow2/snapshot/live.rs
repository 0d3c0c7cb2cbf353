//! Snapshots of an open image, beside requests: those under way come first,
//! others wait. What is in memory goes to the file, and afterwards the new
//! tables take the place of the old ones.

use std::sync::atomic::Ordering;

use super::job::{NewSnapshot, SnapshotJob};
use super::table::{self, Selector};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::Allocator;
use crate::qcow2::shadow::{Ready, words};
use crate::qcow2::spec::header::SIZE_AT;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::qcow2::{Image, lock};
use crate::race::Guard;
use crate::runtime::{Buf, sync};

/// A snapshot that is not deleted from the open image as long as this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct HeldSnapshot<'a> {
    image: &'a Image,
    id: Vec<u8>,
}

impl HeldSnapshot<'_> {
    pub(crate) fn id(&self) -> &[u8] {
        &self.id
    }
}

impl Drop for HeldSnapshot<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.image.held);
        if let Some(index) = held.iter().position(|id| *id == self.id) {
            held.swap_remove(index);
        }
    }
}

/// Each of these happens at one moment, between requests: it waits until those
/// under way are over, and those that come wait for it.
///
/// After an error the image is as it was, in the file and in memory; unless
/// the storage is latched (see
/// [`ErrorKind::Latched`](crate::ErrorKind::Latched)), in which case the file
/// has either state.
impl Image {
    /// The snapshots, in the order of their table.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        // Or their table might move meanwhile.
        let _turn = self.reshape().await;
        let (snapshots, _) = table::read(self.storage(), &self.header()).await?;
        Ok(snapshots)
    }

    /// Makes a snapshot of the active disk: of what it shows after all requests
    /// that are over when this is called, and some of those under way.
    pub async fn create_snapshot(&self, new: NewSnapshot) -> Result<()> {
        self.change_snapshots(&SnapshotJob::Create(new)).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    ///
    /// `Busy` if it is being read through this image.
    pub async fn delete_snapshot(&self, which: Selector) -> Result<()> {
        self.change_snapshots(&SnapshotJob::Delete(which)).await
    }

    /// Makes the active disk what it was. Its size may be another afterwards:
    /// a request that waited and is not inside the disk any more is refused.
    pub async fn apply_snapshot(&self, which: Selector) -> Result<()> {
        self.change_snapshots(&SnapshotJob::Apply(which)).await
    }

    /// Gives a snapshot another name.
    pub async fn rename_snapshot(&self, which: Selector, name: Vec<u8>) -> Result<()> {
        self.change_snapshots(&SnapshotJob::Rename(which, name))
            .await
    }

    /// Does what is to be done with the snapshots.
    pub async fn change_snapshots(&self, job: &SnapshotJob) -> Result<()> {
        self.check_writable()?;
        let turn = self.reshape().await;
        let _quiet = self.quiet(&turn).await;
        // It may have been found corrupt meanwhile.
        self.check_writable()?;
        // The header is exchanged as a whole: nobody else changes it meanwhile.
        let bitmaps = self.bitmaps.state.lock().await;
        self.refuse_held(job).await?;
        let _no_flush = self.settle().await?;
        let done = self.build_and_switch(job).await;
        match &done {
            Ok(()) => self.note_bitmaps(&bitmaps),
            Err(_) => self.doubt_free_space().await,
        }
        done
    }

    /// Holds a snapshot, so that it is not deleted; see [`HeldSnapshot`]. Its
    /// place is where the table says until the caller's turn is over, and what
    /// it refers to stays as it is until the hold is.
    pub(crate) async fn hold_snapshot(
        &self,
        _turn: &sync::MutexGuard<'_, ()>,
        which: &Selector,
    ) -> Result<HeldSnapshot<'_>> {
        let (snapshots, _) = table::read(self.storage(), &self.header()).await?;
        let found = which.require(&snapshots).map_err(|e| e.path(self.path()))?;
        let id = snapshots[found].id.clone();
        lock(&self.held).push(id.clone());
        Ok(HeldSnapshot { image: self, id })
    }

    async fn refuse_held(&self, job: &SnapshotJob) -> Result<()> {
        let SnapshotJob::Delete(which) = job else {
            return Ok(());
        };
        if lock(&self.held).is_empty() || Guard::Held.is_away() {
            return Ok(());
        }
        let (snapshots, _) = table::read(self.storage(), &self.header()).await?;
        let found = which.find(&snapshots).map(|index| &snapshots[index]);
        let held = lock(&self.held);
        if found.is_some_and(|snapshot| held.contains(&snapshot.id)) {
            let what = format!("the snapshot {which} is being read");
            return Err(Error::new(ErrorKind::Busy, what)
                .path(self.path())
                .cure("delete it when its readers are done"));
        }
        Ok(())
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

    /// Writes everything back, and gives back what is reserved. No flush is
    /// under way then, nor comes until the guard is dropped.
    async fn settle(&self) -> Result<sync::MutexGuard<'_, ()>> {
        // As a close does; with no request under way, the second flush finds
        // nothing in use.
        self.flush().await?;
        self.give_back_runs().await?;
        self.flush().await?;
        // Postponed refcounts too: the job works with those of the file.
        self.end_lazy().await?;
        for _ in 0..3 {
            let no_flush = self.pause_flushes().await;
            if !self.has_dirty_metadata() {
                return Ok(no_flush);
            }
            drop(no_flush);
            self.flush().await?;
        }
        let what = "what has been freed cannot be given back, so that nothing is certain";
        Err(Error::new(ErrorKind::Io, what)
            .path(self.path())
            .cure("close the image, and run `qcow2-ublk check`"))
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
        if !Guard::CachesCleared.is_away() {
            self.l2.clear();
        }
        self.refblocks.clear();
        self.inflated.clear();
        self.size
            .store(ready.header.virtual_size(), Ordering::Release);
        *lock(&self.header) = ready.header.clone();
        self.metadata.clear();
        self.note_metadata().await;
    }
}
