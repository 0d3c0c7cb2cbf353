//! Changing mappings: the only place that stores L2 and L1 entries.
//!
//! The caller holds the range lock of the guest clusters it changes, and the
//! data they are to show is in the file (written, not yet durable).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Image;
use super::alloc::{Freed, Reserved};
use super::meta::Slice;
use super::pack::Packed;
use super::spec::addr::{GuestOffset, HostOffset};
use super::spec::entry::L1Entry;
use super::spec::l2::L2Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::race::Guard;
use crate::rule::Rule;
use crate::runtime::Buf;

/// What clusters are to become.
#[derive(Debug)]
pub(crate) enum Change<'a> {
    /// Data in these reserved clusters, which are as many as the clusters.
    Data(Reserved<'a>),
    /// Space in these reserved clusters, which are as many as the clusters, or
    /// in the external data file. Each shows zeros, or the layer below where
    /// it did before and entries have subclusters.
    Space(Option<Reserved<'a>>),
    /// Data in the external data file, in its own place.
    DataFile,
    /// This compressed data, for one cluster.
    Compressed(Packed<'a>),
    /// A kept host cluster (of a zero cluster) now holds data.
    ZeroToData,
    /// Reads as zeros; a host cluster of their own is kept.
    ZeroKept,
    /// Reads as zeros; host clusters are freed. Not in version 2.
    Zero,
    /// Shows the layer below; host clusters are freed.
    Unallocated,
    /// In images with subclusters: `written`, in bytes from the first
    /// cluster's begin, and what [`L2Entry::after_write`] adds to it, is data
    /// now: in the reserved clusters, which are as many as the clusters, or in
    /// the cluster's own, or in its place in the external data file.
    Parts {
        reserved: Option<Reserved<'a>>,
        written: Range<u64>,
    },
    /// In images with subclusters, for one cluster that is not compressed:
    /// the subclusters of the mask read as zeros. With `unmap`, a host cluster
    /// without any data left is freed.
    ZeroParts { mask: u32, unmap: bool },
}

impl L2Entry {
    /// The host cluster that may be written to in place.
    #[inline]
    pub(crate) fn own_host(self) -> Option<HostOffset> {
        self.host()
            .and_then(|(host, copied)| copied.then_some(host))
    }

    /// The mask of the subclusters that have to hold data when those of
    /// `written` do: in a cluster of its own it keeps what it has; what is in
    /// somebody else's cluster, or compressed, has to be copied. Zeros and
    /// what is not there stay so.
    pub(crate) fn after_write(self, written: u32) -> u32 {
        self.subclusters().with_data(written).allocated()
    }
}

impl Image {
    /// Makes sure that the L2 table for `at` exists and is not shared, so that
    /// a later [`Self::change`] there finds it.
    pub(crate) async fn own_l2(&self, slot: usize, at: GuestOffset) -> Result<HostOffset> {
        let index = self.geometry.l1_index(at);
        loop {
            let entry = L1Entry::decode(self.l1.get(index), &self.geometry).map_err(|bad| {
                bad.into_error("L1 table", self.l1.offset() + index * 8)
                    .path(self.storage.path())
            })?;
            if let L1Entry::Table { offset, .. } = entry
                && self.metadata.is_double(offset)
            {
                return Err(Error::corrupt(
                    "the L2 table is other metadata as well; the write is refused",
                    self.l1.offset().0 + index * 8,
                )
                .path(self.storage.path())
                .cure("close the image and run `qcow2-ublk check -r all`"));
            }
            match entry {
                L1Entry::Table {
                    offset,
                    copied: true,
                } => return Ok(offset),
                shared => self.make_l2(slot, index, shared).await?,
            }
        }
    }

    /// Gives L1 entry `index` a table of its own: zeros, or a copy of the
    /// shared one.
    ///
    /// On disk: the table's content, its refcount `|` the L1 entry. The shared
    /// table loses a reference only after that.
    async fn make_l2(&self, slot: usize, index: u64, shared: L1Entry) -> Result<()> {
        let _turn = if Guard::NewTables.is_away() {
            None
        } else {
            Some(self.new_tables.lock().await)
        };
        if L1Entry::decode(self.l1.get(index), &self.geometry).ok() != Some(shared) {
            return Ok(()); // somebody else was here; the caller looks again
        }
        let reserved = self.reserve(slot, 1).await?;
        let table = reserved.offset();
        let cluster_size = self.geometry.cluster_size();
        self.check_new_metadata(table, cluster_size)?;
        match shared {
            L1Entry::Unallocated => self.write_zero_cluster(table).await?,
            L1Entry::Table { offset, .. } => {
                let mut copy = Buf::take(cluster_size as usize);
                self.storage.read(offset.0, &mut copy).await?;
                self.storage.write(table.0, &copy).await?;
            }
        }
        self.l2.forget(table, cluster_size);
        self.metadata.add(table);
        let entry = L1Entry::Table {
            offset: table,
            copied: true,
        };
        self.l1.set(index, entry.encode(&self.geometry));
        if Rule::TableBeforeL1.is_broken() {
            let bytes = entry.encode(&self.geometry).to_be_bytes();
            let at = self.l1.offset() + index * 8;
            self.storage.write(at.0, &bytes).await?;
        }
        reserved.used(1);
        if let L1Entry::Table { offset, .. } = shared {
            self.frees.push(Freed {
                first: offset.cluster(self.geometry.cluster_bits),
                count: 1,
                table: true,
            });
        }
        Ok(())
    }

    /// Changes `count` clusters from the cluster-aligned `at`. After a failure
    /// the first of them may be changed.
    pub(crate) async fn change(
        &self,
        slot: usize,
        at: GuestOffset,
        count: u64,
        change: Change<'_>,
    ) -> Result<()> {
        let mut done = 0;
        let result = self
            .change_entries(slot, at, count, &change, &mut done)
            .await;
        self.changes.fetch_add(1, Ordering::Release);
        // What is mapped by now must not be given back, whatever failed.
        match change {
            Change::Data(reserved)
            | Change::Space(Some(reserved))
            | Change::Parts {
                reserved: Some(reserved),
                ..
            } => reserved.used(done),
            Change::Compressed(packed) if done > 0 => packed.used(),
            _ => {}
        }
        result
    }

    /// `done` counts the clusters that are changed.
    async fn change_entries(
        &self,
        slot: usize,
        at: GuestOffset,
        count: u64,
        change: &Change<'_>,
        done: &mut u64,
    ) -> Result<()> {
        while *done < count {
            let at = at + (*done << self.geometry.cluster_bits);
            let table = self.own_l2(slot, at).await?;
            let place = self.place_in(table, at);
            let slice = self.l2_slice(place).await?;
            let here = (count - *done).min((slice.entries() - place.index) as u64);
            for index in place.index..place.index + here as usize {
                self.change_entry(
                    &slice,
                    index,
                    at + ((index - place.index) as u64) * self.geometry.cluster_size(),
                    *done,
                    change,
                )?;
                *done += 1;
            }
        }
        Ok(())
    }

    fn change_entry(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        guest: GuestOffset,
        nth: u64,
        change: &Change<'_>,
    ) -> Result<()> {
        let old = self.decode(slice, index, guest)?;
        // Where the cluster is in an external data file.
        let in_data_file = HostOffset(guest.0);
        let new = match (change, old) {
            (Change::Data(reserved), _) => L2Entry::Data {
                host: reserved.offset() + (nth << self.geometry.cluster_bits),
                copied: true,
            },
            (Change::Space(reserved), _) => {
                let host = reserved.as_ref().map_or(in_data_file, |reserved| {
                    reserved.offset() + (nth << self.geometry.cluster_bits)
                });
                if self.geometry.extended_l2 {
                    let shown = old.subclusters();
                    L2Entry::with_host(host, true, shown.with_zeros(shown.allocated()))
                } else {
                    L2Entry::ZeroAllocated { host, copied: true }
                }
            }
            (Change::DataFile, _) => L2Entry::Data {
                host: in_data_file,
                copied: true,
            },
            (Change::Compressed(packed), _) => L2Entry::Compressed(packed.range()),
            (Change::ZeroToData, L2Entry::ZeroAllocated { host, copied: true }) => {
                L2Entry::Data { host, copied: true }
            }
            (Change::ZeroToData, _) => {
                return Err(self.changed_meanwhile(slice, index));
            }
            (
                Change::ZeroKept,
                L2Entry::Data { host, copied: true }
                | L2Entry::ZeroAllocated { host, copied: true }
                | L2Entry::Mixed {
                    host: Some(host),
                    copied: true,
                    ..
                },
            ) => L2Entry::ZeroAllocated { host, copied: true },
            (Change::ZeroKept | Change::Zero, _) => L2Entry::Zero,
            (Change::Unallocated, _) => L2Entry::Unallocated,
            (Change::Parts { reserved, written }, _) => {
                let bits = self.geometry.cluster_bits;
                let host = match reserved {
                    Some(reserved) => Some(reserved.offset() + (nth << bits)),
                    None if self.geometry.external_data => Some(in_data_file),
                    None => old.own_host(),
                };
                let host = host.ok_or_else(|| self.changed_meanwhile(slice, index))?;
                let mask = self.geometry.subclusters_touched(nth << bits, written);
                let data = old.after_write(mask);
                L2Entry::with_host(host, true, old.subclusters().with_data(data))
            }
            (Change::ZeroParts { .. }, L2Entry::Compressed(_)) => {
                return Err(self.changed_meanwhile(slice, index));
            }
            (&Change::ZeroParts { mask, unmap }, _) => {
                let subclusters = old.subclusters().with_zeros(mask);
                match old.host() {
                    Some((host, copied)) if subclusters.allocated() != 0 || !unmap => {
                        L2Entry::with_host(host, copied, subclusters)
                    }
                    _ => L2Entry::without_host(subclusters),
                }
            }
        };
        if new == old {
            return Ok(());
        }
        self.l2
            .store_entry(slice, index, new.encode(&self.geometry));
        self.free_old(old, new);
        Ok(())
    }

    #[cold]
    fn changed_meanwhile(&self, slice: &Slice, index: usize) -> Error {
        Error::corrupt(
            "a cluster changed while it was written to",
            slice.entry_offset(index).0,
        )
        .path(self.storage.path())
    }

    /// Puts the host clusters that an entry no longer names on the list.
    fn free_old(&self, old: L2Entry, new: L2Entry) {
        let host = |entry: L2Entry| entry.host().map(|(host, _)| host);
        if host(old).is_some() && host(old) == host(new) {
            return;
        }
        if let Some(clusters) = old.references(&self.geometry) {
            self.frees.push(Freed {
                first: *clusters.start(),
                count: clusters.end() - clusters.start() + 1,
                table: false,
            });
        }
    }

    /// Refuses writes to an image that must not be written, before anything
    /// else is done.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.storage.writable() {
            // After a failed sync nothing can become durable any more; a
            // change of the mapping alone would not meet that failure.
            self.storage.check_writable()?;
            self.data().check_writable()?;
            self.check_marks()
        } else {
            Err(
                Error::new(ErrorKind::ReadOnly, "the image is open read-only")
                    .path(self.storage.path()),
            )
        }
    }
}
