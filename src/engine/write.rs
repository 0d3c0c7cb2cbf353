//! Writes: in place where the cluster is ours alone, else into a reserved
//! cluster that is mapped when its data is there.

use super::Engine;
use super::flight::Flight;
use crate::block::Payload;
use crate::error::Result;
use crate::qcow2::{Change, GuestOffset, HostOffset, Mapping};
use crate::runtime::Buf;

impl Engine {
    pub(super) async fn write_range(
        &self,
        slot: usize,
        offset: u64,
        payload: Payload,
    ) -> Result<()> {
        let image = self.top();
        // Where the storage writes whole blocks, neighbours in them must not
        // be written at the same time: not by others, whose requests may be
        // smaller, nor by this one, part of which may need a new mapping.
        let alignment = self.write_unit();
        let exclude = alignment > self.options.request_unit
            || u64::from(alignment) > 1 << image.geometry().subcluster_bits();
        let mut flight = Flight::default();
        let mut done = 0;
        let result = loop {
            if done == payload.len() {
                break Ok(());
            }
            let at = GuestOffset(offset + done);
            let extent = match image.lookup(at, payload.len() - done).await {
                Ok(extent) => extent,
                Err(error) => break Err(error),
            };
            let written = match extent.mapping {
                Mapping::Data { host, copied: true } => {
                    let part = payload.slice(done, extent.len);
                    if let Err(error) = image.check_overlap(host, extent.len) {
                        break Err(error);
                    }
                    if exclude {
                        self.write_excluding(at, host, part).await
                    } else {
                        flight.add(self.start_write_data(at, host, &part));
                        Ok(extent.len)
                    }
                }
                _ if image.has_subclusters() => {
                    let rest = payload.slice(done, payload.len() - done);
                    self.write_parts(slot, at, rest).await
                }
                _ => {
                    let rest = payload.slice(done, payload.len() - done);
                    self.write_new(slot, at, rest).await
                }
            };
            match written {
                Ok(len) => done += len,
                Err(error) => break Err(error),
            }
        };
        flight.land().await.and(result)
    }

    /// Writes in place where the storage writes more than the request has:
    /// nobody else may write to those blocks meanwhile.
    async fn write_excluding(
        &self,
        at: GuestOffset,
        host: HostOffset,
        part: Payload,
    ) -> Result<u64> {
        let image = self.top();
        let bits = image.cluster_bits();
        let last = (at + (part.len() - 1)).cluster(bits);
        let Some(_range) = self.ranges.take_or_wait(at.cluster(bits), last + 1).await else {
            return Ok(0);
        };
        // Under the lock, is it still there?
        let extent = image.lookup(at, part.len()).await?;
        if extent.mapping != (Mapping::Data { host, copied: true }) || extent.len != part.len() {
            return Ok(0);
        }
        self.start_write_data(at, host, &part).await?;
        Ok(part.len())
    }

    /// Writes the first bytes of `payload` where a mapping has to change; how
    /// many, or 0 when the mapping changed before it was our turn.
    ///
    /// On disk: the data with its head and tail `|` the mapping. Until then
    /// the old mapping shows the old data.
    async fn write_new(&self, slot: usize, at: GuestOffset, payload: Payload) -> Result<u64> {
        let image = self.top();
        let bits = image.cluster_bits();
        let cluster_size = image.cluster_size();
        let first = at.align_down(bits);
        let last = (at + (payload.len() - 1)).cluster(bits);
        let Some(_range) = self.ranges.take_or_wait(at.cluster(bits), last + 1).await else {
            return Ok(0);
        };

        let wanted = last + 1 - at.cluster(bits);
        let (kind, count) = self.classify(first, wanted).await?;
        let head = at - first;
        let kept = match kind {
            Kind::InPlace => return Ok(0),
            Kind::Kept(host) => Some(host),
            Kind::New => None,
        };
        if payload.is_zeros() {
            // Zeros over zeros need no cluster.
            let len = payload.len().min(cluster_size - head);
            if self.cluster_reads_zero(first).await? {
                return Ok(len);
            }
        }
        image.own_l2(slot, first).await?;
        if let Some(host) = kept {
            image.check_overlap(host, count << bits)?;
            let target = Target {
                first,
                head,
                host,
                count,
                zeroed: false,
            };
            let len = self.fill(&target, payload).await?;
            image.change(slot, first, count, Change::ZeroToData).await?;
            return Ok(len);
        }
        if image.data_file().is_some() {
            let target = Target {
                first,
                head,
                host: HostOffset(first.0),
                count,
                zeroed: false,
            };
            let len = self.fill(&target, payload).await?;
            image.change(slot, first, count, Change::DataFile).await?;
            return Ok(len);
        }
        let reserved = image.reserve(slot, count).await?;
        let target = Target {
            first,
            head,
            host: reserved.offset(),
            count: reserved.run().count,
            zeroed: reserved.run().zeroed,
        };
        image.check_overlap(target.host, target.count << bits)?;
        let len = self.fill(&target, payload).await?;
        let change = Change::Data(reserved);
        image.change(slot, first, target.count, change).await?;
        Ok(len)
    }

    /// What has to be done with the cluster at `first`, and with how many of
    /// the `wanted` clusters from there the same.
    async fn classify(&self, first: GuestOffset, wanted: u64) -> Result<(Kind, u64)> {
        let image = self.top();
        let bits = image.cluster_bits();
        let mut count = 0;
        while count < wanted {
            let at = first + (count << bits);
            let extent = image.lookup(at, (wanted - count) << bits).await?;
            let kind = match extent.mapping {
                Mapping::Data { copied: true, .. } => Kind::InPlace,
                Mapping::Zero {
                    host: Some(host),
                    copied: true,
                } => Kind::Kept(host),
                _ => Kind::New,
            };
            let clusters = extent.len.div_ceil(1 << bits);
            match kind {
                Kind::New => count += clusters,
                _ if count == 0 => return Ok((kind, clusters)),
                _ => break,
            }
        }
        Ok((Kind::New, count))
    }

    async fn cluster_reads_zero(&self, first: GuestOffset) -> Result<bool> {
        let len = self.top().cluster_size().min(self.size() - first.0);
        self.reads_zero(0, first.0, len).await
    }

    /// Writes the payload's first bytes, and around them what the clusters
    /// showed before; how many bytes of the payload.
    async fn fill(&self, target: &Target, payload: Payload) -> Result<u64> {
        let cluster_size = self.top().cluster_size();
        let len = payload.len().min(target.count * cluster_size - target.head);
        let payload = payload.slice(0, len);
        let tail = (target.head + len) % cluster_size;
        let mut flight = Flight::default();

        let partial_first = target.head > 0 || (target.count == 1 && tail > 0);
        let partial_last = target.count > 1 && tail > 0;
        let first_copy = if partial_first {
            self.around(target, 0).await?
        } else {
            None
        };
        let last_copy = if partial_last {
            self.around(target, target.count - 1).await?
        } else {
            None
        };

        // The middle, which is everything where nothing is to be copied.
        let mut from = 0;
        let mut to = len;
        if let Some(mut cluster) = first_copy {
            from = len.min(cluster_size - target.head);
            self.overlay(&mut cluster, target.head, &payload.slice(0, from))?;
            self.write_data(target.first, target.host, &cluster).await?;
        }
        if let Some(mut cluster) = last_copy {
            to = len - tail;
            self.overlay(&mut cluster, 0, &payload.slice(to, tail))?;
            let last = (target.count - 1) * cluster_size;
            let (guest, host) = (target.first + last, target.host + last);
            self.write_data(guest, host, &cluster).await?;
        }
        let mut at = from;
        while at < to {
            // Zeros are written from a buffer of limited length.
            let step = if payload.is_zeros() { 1 << 20 } else { to - at };
            let part = payload.slice(at, step.min(to - at));
            let into = target.head + at;
            let (guest, host) = (target.first + into, target.host + into);
            flight.add(self.start_write_data(guest, host, &part));
            at += part.len();
        }
        flight.land().await.map(|()| len)
    }

    fn overlay(&self, cluster: &mut Buf, at: u64, payload: &Payload) -> Result<()> {
        let range = at as usize..(at + payload.len()) as usize;
        payload
            .copy_to(&mut cluster[range])
            .map_err(|e| self.payload_error(e))
    }

    /// What the `nth` cluster of the target shows now, or None when that is
    /// zeros and the host cluster has them already.
    async fn around(&self, target: &Target, nth: u64) -> Result<Option<Buf>> {
        let cluster_size = self.top().cluster_size();
        let guest = target.first + nth * cluster_size;
        // Past the virtual end a cluster holds zeros, whatever lies below: a
        // later growth shows them.
        let inside = cluster_size.min(self.size() - guest.0);
        let zeros = self.reads_zero(0, guest.0, inside).await?;
        if zeros && target.zeroed {
            return Ok(None);
        }
        let mut cluster = Buf::take(cluster_size as usize);
        if zeros {
            cluster.fill(0);
        } else {
            let (shown, past) = cluster.split_at_mut(inside as usize);
            past.fill(0);
            self.read_layers(0, guest.0, Payload::of_slice_mut(shown))
                .await?;
        }
        Ok(Some(cluster))
    }
}

/// What a write finds.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Ours alone: no mapping changes.
    InPlace,
    /// A zero cluster that keeps a host cluster of its own.
    Kept(HostOffset),
    /// Everything else needs a new host cluster.
    New,
}

/// Adjacent host clusters that are to show adjacent guest clusters.
struct Target {
    first: GuestOffset,
    /// Where the payload begins in the first cluster.
    head: u64,
    host: HostOffset,
    count: u64,
    /// The host clusters hold zeros.
    zeroed: bool,
}
