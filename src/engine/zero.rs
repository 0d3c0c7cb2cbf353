//! Write-zeroes and discard: whole clusters (zeroes: subclusters too) by their
//! mapping, the rest by writing zeros or not at all.
//!
//! Where data is given up and the host cluster stays, the next write fills it
//! again before that is mapped. A request that found the data before must not
//! read or write there by then, and there is no grace period for what is not
//! freed: so the mapping changes only when no other request is under way, and
//! else the zeros are written.

use std::ops::Range;

use super::Engine;
use crate::block::Payload;
use crate::error::Result;
use crate::qcow2::spec::{L2Entry, subcluster};
use crate::qcow2::{Change, GuestOffset, HostOffset, Mapping};
use crate::race::Guard;

/// Clusters changed under one range lock: the reach of one L2 slice.
const STEP: u64 = 512;

impl Engine {
    pub(super) async fn zero_range(
        &self,
        slot: usize,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        let (start, end) = self.whole_units(offset, len, self.top().geometry().subcluster_bits());
        if start >= end {
            return self.write_range(slot, offset, Payload::zeros(len)).await;
        }
        if offset < start {
            self.write_range(slot, offset, Payload::zeros(start - offset))
                .await?;
        }
        self.change_clusters(slot, start, end, Wish::Zeros { unmap })
            .await?;
        if end < offset + len {
            self.write_range(slot, end, Payload::zeros(offset + len - end))
                .await?;
        }
        Ok(())
    }

    pub(super) async fn discard_range(&self, slot: usize, offset: u64, len: u64) -> Result<()> {
        let (start, end) = self.whole_units(offset, len, self.top().cluster_bits());
        if start < end {
            self.change_clusters(slot, start, end, Wish::Discard)
                .await?;
        }
        Ok(())
    }

    /// The part of the range that is whole units of 2^`bits` bytes. The last
    /// one of the disk counts as whole when the range reaches the disk's end.
    fn whole_units(&self, offset: u64, len: u64, bits: u32) -> (u64, u64) {
        let unit = 1 << bits;
        let end = offset + len;
        let end_aligned = if end == self.size() {
            end
        } else {
            end - end % unit
        };
        (offset.next_multiple_of(unit), end_aligned)
    }

    async fn change_clusters(&self, slot: usize, start: u64, end: u64, wish: Wish) -> Result<()> {
        let image = self.top();
        let bits = image.cluster_bits();
        let unmap = !matches!(wish, Wish::Zeros { unmap: false });
        if image.has_raw_data_file() {
            // The file is the disk, with or without us: the zeros have to be
            // in it, and what maps it need not change. Those who write to a
            // part of a block put back what was in the rest of it: not now.
            let _range = loop {
                let last = end.div_ceil(1 << bits);
                if let Some(range) = self.ranges.take_or_wait(start >> bits, last).await {
                    break range;
                }
            };
            let guest = GuestOffset(start);
            return self
                .zero_data(guest, HostOffset(start), end - start, unmap)
                .await;
        }
        let mut at = start;
        while at < end {
            let extent = image.lookup(GuestOffset(at), end - at).await?;
            if self.is_done(at, extent.len, extent.mapping, wish).await? {
                at += extent.len;
                continue;
            }
            if image.has_subclusters()
                && (!at.is_multiple_of(1 << bits)
                    || extent.len < (1 << bits) && at + extent.len < self.size())
            {
                at = self.change_parts(slot, start..end, at, wish).await?;
                continue;
            }
            let mut stop = (at + extent.len.min(STEP << bits)).min(end);
            if image.has_subclusters() && stop < self.size() {
                stop -= stop % (1 << bits);
            }
            let clusters = at >> bits..stop.div_ceil(1 << bits);
            let Some(range) = self.ranges.take_or_wait(clusters.start, clusters.end).await else {
                continue;
            };
            // Under the lock: what is it now?
            let extent = image.lookup(GuestOffset(at), stop - at).await?;
            if image.has_subclusters() && extent.len < stop - at {
                continue;
            }
            if self.is_done(at, extent.len, extent.mapping, wish).await? {
                at += extent.len;
                continue;
            }
            let count = extent.len.div_ceil(1 << bits);
            let mut change = self.change_for(extent.mapping, wish);
            let mut alone = None;
            if let Mapping::Data { copied: true, .. } = extent.mapping
                && change.as_ref().is_some_and(|c| self.keeps_place(c))
            {
                alone = image.alone();
                change = change.filter(|_| alone.is_some());
            }
            match change {
                Some(change) => {
                    image.change(slot, GuestOffset(at), count, change).await?;
                    drop(alone);
                    if unmap {
                        self.drop_data(at, at + extent.len).await;
                    }
                }
                None => match extent.mapping {
                    // Zeros in place of a cluster that has to stay mapped.
                    Mapping::Data { host, copied: true } => {
                        self.zero_in_place(GuestOffset(at), host, count << bits, unmap)
                            .await?;
                    }
                    _ => {
                        drop(range);
                        self.write_range(slot, at, Payload::zeros(extent.len))
                            .await?;
                    }
                },
            }
            at += extent.len;
        }
        Ok(())
    }

    /// Fulfils the wish for a cluster with subclusters from `at` to its end,
    /// or to that of `range`; how far it came. Where the range has the whole
    /// cluster, the whole cluster goes.
    async fn change_parts(
        &self,
        slot: usize,
        range: Range<u64>,
        at: u64,
        wish: Wish,
    ) -> Result<u64> {
        let image = self.top();
        let first = GuestOffset(at).align_down(image.cluster_bits());
        let cluster = first.0..self.size().min(first.0 + image.cluster_size());
        let stop = range.end.min(cluster.end);
        let number = first.cluster(image.cluster_bits());
        let Some(lock) = self.ranges.take_or_wait(number, number + 1).await else {
            return Ok(at);
        };
        let unmap = !matches!(wish, Wish::Zeros { unmap: false });
        let entry = image.entry_at(first).await?;
        let geometry = image.geometry();
        let whole = range.start <= cluster.start && cluster.end <= range.end;
        let from = if whole { cluster.start } else { at };
        let mask = geometry.subclusters_touched(0, &(from - first.0..stop - first.0));
        let mut change = if whole {
            if unmap {
                Change::Zero
            } else {
                Change::ZeroKept
            }
        } else if matches!(entry, L2Entry::Compressed(_)) {
            drop(lock);
            let zeros = Payload::zeros(stop - at);
            return self.write_range(slot, at, zeros).await.map(|()| stop);
        } else {
            Change::ZeroParts { mask, unmap }
        };
        let mut alone = None;
        let data = entry.subclusters().allocated() & mask;
        if let Some(host) = entry.own_host()
            && data != 0
            && self.keeps_place(&change)
        {
            alone = image.alone();
            if alone.is_none() {
                let bits = geometry.subcluster_bits();
                for run in subcluster::runs(data) {
                    let (start, end) = (u64::from(run.start) << bits, u64::from(run.end) << bits);
                    self.zero_in_place(first + start, host + start, end - start, unmap)
                        .await?;
                }
                let mask = mask & !data;
                change = Change::ZeroParts { mask, unmap };
            }
        }
        image.change(slot, first, 1, change).await?;
        drop(alone);
        if unmap {
            self.drop_data(at, stop).await;
        }
        Ok(stop)
    }

    /// True when what is data before the change may keep its place without
    /// being data behind it.
    fn keeps_place(&self, change: &Change<'_>) -> bool {
        let in_data_file = self.top().data_file().is_some();
        let keeps = matches!(change, Change::ZeroKept | Change::ZeroParts { .. });
        (keeps || in_data_file) && !Guard::Alone.is_away()
    }

    /// Zeros over data that stays mapped.
    async fn zero_in_place(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        self.top().check_overlap(host, len)?;
        self.zero_data(guest, host, len, unmap).await
    }

    /// The mapping that fulfils the wish; None where only writing zeros does.
    fn change_for(&self, mapping: Mapping, wish: Wish) -> Option<Change<'static>> {
        let has_zero_flag = self.top().version() >= 3;
        let has_backing = self.chain.layers().len() > 1;
        match wish {
            Wish::Discard | Wish::Zeros { unmap: true } if has_zero_flag => Some(Change::Zero),
            // Version 2 without backing: nothing mapped reads as zeros.
            Wish::Discard | Wish::Zeros { unmap: true } if !has_backing => {
                Some(Change::Unallocated)
            }
            Wish::Zeros { unmap: false } if has_zero_flag => Some(match mapping {
                Mapping::Unallocated => Change::Zero,
                _ => Change::ZeroKept,
            }),
            _ => None,
        }
    }

    /// True when the range needs no change.
    async fn is_done(&self, at: u64, len: u64, mapping: Mapping, wish: Wish) -> Result<bool> {
        let unmap = !matches!(wish, Wish::Zeros { unmap: false });
        Ok(match mapping {
            Mapping::Unallocated if wish == Wish::Discard && self.top().version() < 3 => {
                // Nothing of ours is there, and without the zero flag the
                // layer below can only be hidden by writing.
                true
            }
            Mapping::Unallocated => self.reads_zero(1, at, len).await?,
            Mapping::Zero { host, .. } => host.is_none() || !unmap,
            Mapping::Data { .. } | Mapping::Compressed(_) => false,
        })
    }
}

/// What clusters are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Given up: zeros where that costs nothing.
    Discard,
    /// Zeros, for certain.
    Zeros { unmap: bool },
}
