//! Writes that change mappings of images with subclusters: only what is
//! written is copied and mapped, the rest of the cluster stays what it was.
//!
//! On disk: the data with what fills its subclusters up `|` the L2 entry. A
//! cluster that is ours alone already gets bits in its bitmap and nothing
//! else: until they are on disk, the old bitmap shows the old data, none of
//! which has been written over.

use std::ops::Range;

use super::Engine;
use super::flight::Flight;
use crate::block::Payload;
use crate::error::Result;
use crate::qcow2::spec::{L2Entry, Subcluster, Subclusters, subcluster};
use crate::qcow2::{Change, GuestOffset, HostOffset};
use crate::runtime::Buf;

impl Engine {
    /// Writes the first bytes of `payload` where a mapping has to change; how
    /// many, or 0 when the mapping changed before it was our turn.
    pub(super) async fn write_parts(
        &self,
        slot: usize,
        at: GuestOffset,
        payload: Payload,
    ) -> Result<u64> {
        let image = self.top();
        let bits = image.cluster_bits();
        let cluster_size = image.cluster_size();
        let first = at.align_down(bits);
        let head = at - first;
        let last = (at + (payload.len() - 1)).cluster(bits);
        let Some(_range) = self.ranges.take_or_wait(at.cluster(bits), last + 1).await else {
            return Ok(0);
        };
        let subcluster_bits = image.geometry().subcluster_bits();
        let index = (head >> subcluster_bits) as u32;
        let run_end = |run: u32| (u64::from(index + run) << subcluster_bits) - head;
        if payload.is_zeros() {
            // Zeros over zeros need no cluster.
            let len = payload.len().min(run_end(1));
            if self.reads_zero(0, at.0, len).await? {
                return Ok(len);
            }
        }

        let entry = image.entry_at(first).await?;
        if let Some(host) = entry.own_host() {
            let run = writable_run(entry.subclusters(), index);
            if run == 0 {
                return Ok(0); // by now it is written in place
            }
            let len = payload.len().min(run_end(run));
            image.check_overlap(host, cluster_size)?;
            image.own_l2(slot, first).await?;
            let target = Target {
                first,
                written: head..head + len,
                host,
                count: 1,
                own: true,
                zeroed: false,
            };
            self.fill_parts(&target, [entry; 2], payload.slice(0, len))
                .await?;
            let change = Change::Parts {
                reserved: None,
                written: target.written,
            };
            image.change(slot, first, 1, change).await?;
            return Ok(len);
        }

        let mut count = 1;
        let mut last_entry = entry;
        while first.cluster(bits) + count <= last {
            let next = image.entry_at(first + (count << bits)).await?;
            if next.own_host().is_some() {
                break;
            }
            last_entry = next;
            count += 1;
        }
        image.own_l2(slot, first).await?;
        if image.data_file().is_some() {
            let len = payload.len().min(count * cluster_size - head);
            let target = Target {
                first,
                written: head..head + len,
                host: HostOffset(first.0),
                count,
                own: false,
                zeroed: false,
            };
            self.fill_parts(&target, [entry, last_entry], payload.slice(0, len))
                .await?;
            let change = Change::Parts {
                reserved: None,
                written: target.written,
            };
            image.change(slot, first, count, change).await?;
            return Ok(len);
        }
        let reserved = image.reserve(slot, count).await?;
        if reserved.run().count < count {
            count = reserved.run().count;
            last_entry = image.entry_at(first + ((count - 1) << bits)).await?;
        }
        let len = payload.len().min(count * cluster_size - head);
        let target = Target {
            first,
            written: head..head + len,
            host: reserved.offset(),
            count,
            own: false,
            zeroed: reserved.run().zeroed,
        };
        image.check_overlap(target.host, count << bits)?;
        self.fill_parts(&target, [entry, last_entry], payload.slice(0, len))
            .await?;
        let change = Change::Parts {
            reserved: Some(reserved),
            written: target.written,
        };
        image.change(slot, first, count, change).await?;
        Ok(len)
    }

    /// Writes the payload, and of its first and its last cluster, whose
    /// entries are given, what else is to be data there.
    async fn fill_parts(
        &self,
        target: &Target,
        entries: [L2Entry; 2],
        payload: Payload,
    ) -> Result<()> {
        let geometry = self.top().geometry();
        let Range { start, end } = target.written;
        // What is written from the payload alone.
        let mut direct = start..end;
        let ends = [0, target.count - 1];
        let ends = if target.count == 1 {
            &ends[..1]
        } else {
            &ends[..]
        };
        for (&nth, entry) in ends.iter().zip(entries) {
            let base = nth * geometry.cluster_size();
            let written = geometry.subclusters_touched(base, &target.written);
            let data = if target.own {
                written
            } else {
                entry.after_write(written)
            };
            let needed = data & !geometry.subclusters_inside(base, &target.written);
            for run in subcluster::runs(needed) {
                let bits = geometry.subcluster_bits();
                let bytes =
                    base + (u64::from(run.start) << bits)..base + (u64::from(run.end) << bits);
                let Some(mut copy) = self.shown(target, &bytes).await? else {
                    continue;
                };
                let from = bytes.start.max(start);
                let to = bytes.end.min(end);
                if from < to {
                    let within = (from - bytes.start) as usize..(to - bytes.start) as usize;
                    payload
                        .slice(from - start, to - from)
                        .copy_to(&mut copy[within])
                        .map_err(|e| self.payload_error(e))?;
                    if from <= direct.start {
                        direct.start = direct.start.max(to);
                    } else {
                        direct.end = direct.end.min(from);
                    }
                }
                let (guest, host) = (target.first + bytes.start, target.host + bytes.start);
                self.write_data(guest, host, &copy).await?;
            }
        }
        let mut flight = Flight::default();
        let mut at = direct.start;
        while at < direct.end {
            // Zeros are written from a buffer of limited length.
            let step = if payload.is_zeros() {
                1 << 20
            } else {
                direct.end - at
            };
            let part = payload.slice(at - start, step.min(direct.end - at));
            let (guest, host) = (target.first + at, target.host + at);
            flight.add(self.start_write_data(guest, host, &part));
            at += part.len();
        }
        flight.land().await
    }

    /// What the disk shows at `bytes` of the target now, or None when that is
    /// zeros and the host cluster has them already.
    async fn shown(&self, target: &Target, bytes: &Range<u64>) -> Result<Option<Buf>> {
        let guest = target.first + bytes.start;
        let len = bytes.end - bytes.start;
        // Past the virtual end a cluster holds zeros, whatever lies below.
        let inside = len.min(self.size().saturating_sub(guest.0));
        let zeros = self.reads_zero(0, guest.0, inside).await?;
        if zeros && target.zeroed {
            return Ok(None);
        }
        let mut copy = Buf::take(len as usize);
        if zeros {
            copy.fill(0);
        } else {
            let (shown, past) = copy.split_at_mut(inside as usize);
            past.fill(0);
            self.read_layers(0, guest.0, Payload::of_slice_mut(shown))
                .await?;
        }
        Ok(Some(copy))
    }
}

/// How many subclusters from `index` on have no data.
fn writable_run(subclusters: Subclusters, index: u32) -> u32 {
    let mut run = 0;
    while index + run < subcluster::SUBCLUSTERS && subclusters.get(index + run) != Subcluster::Data
    {
        run += subclusters.run(index + run);
    }
    run
}

/// Adjacent host clusters that get data of adjacent guest clusters.
struct Target {
    first: GuestOffset,
    /// What the payload covers, in bytes from `first`.
    written: Range<u64>,
    host: HostOffset,
    count: u64,
    /// The guest cluster has it already.
    own: bool,
    /// The host clusters hold zeros.
    zeroed: bool,
}
