//! Guest range -> where its bytes are, in this image alone. A mapping is data:
//! nobody here reads guest data.

use std::sync::Arc;

use super::Image;
use super::meta::Slice;
use super::spec::addr::{GuestOffset, HostOffset};
use super::spec::entry::{CompressedRange, L1Entry};
use super::spec::l2::L2Entry;
use super::spec::subcluster::{SUBCLUSTERS, Subcluster};
use crate::error::{Error, Result};

/// Where the bytes of a guest range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In the layer below, or zeros.
    Unallocated,
    /// Zeros; with a host cluster that is kept for them (item 48).
    Zero {
        host: Option<HostOffset>,
        copied: bool,
    },
    /// At `host` and on. `copied`: the cluster is ours alone, to overwrite.
    Data { host: HostOffset, copied: bool },
    /// In a compressed cluster; the extent never reaches beyond it.
    Compressed(CompressedRange),
}

/// A mapping and how many bytes of the range it holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) mapping: Mapping,
    pub(crate) len: u64,
}

/// Where the L2 entry of a guest offset is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryPlace {
    /// Offset of the slice in the file.
    pub(crate) slice: HostOffset,
    /// Index of the entry in the slice.
    pub(crate) index: usize,
}

impl Image {
    /// Whether the first bytes of a range inside the image are its own, zeros
    /// too, and not those of the layer below; and how many are alike.
    pub(crate) async fn holds(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let extent = self.lookup(GuestOffset(offset), len).await?;
        Ok((extent.mapping != Mapping::Unallocated, extent.len))
    }

    /// The first extent of the range, which is inside the image.
    #[inline]
    pub(crate) async fn lookup(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let Some(place) = self.entry_place(at)? else {
            // A whole L1 entry's span, or more of them, is not there.
            let span_bits = self.geometry.l1_entry_span_bits();
            let in_span = at.offset_in(span_bits);
            let spans = len.saturating_add(in_span).div_ceil(1 << span_bits);
            let zeros = self.l1.zeros(self.geometry.l1_index(at), spans).max(1);
            return Ok(Extent {
                mapping: Mapping::Unallocated,
                len: len.min((zeros << span_bits) - in_span),
            });
        };
        let slice = self.l2_slice(place).await?;
        self.extent(&slice, place.index, at, len)
    }

    /// The place that a range has in a host cluster without being data or
    /// zeros there, as subclusters may, and for how many of its bytes that
    /// holds: what [`Mapping::Unallocated`] does not tell.
    pub(crate) async fn idle_host(
        &self,
        at: GuestOffset,
        len: u64,
    ) -> Result<(Option<HostOffset>, u64)> {
        let place = self.entry_place(at)?;
        let Some(place) = place.filter(|_| self.geometry.extended_l2) else {
            return Ok((None, len));
        };
        let slice = self.l2_slice(place).await?;
        let in_cluster = at.offset_in(self.geometry.cluster_bits);
        let mut covered = self.geometry.cluster_size() - in_cluster;
        if let Some((host, _)) = self.decode(&slice, place.index, at)?.host() {
            return Ok((Some(host + in_cluster), len.min(covered)));
        }
        let mut index = place.index + 1;
        while covered < len && index < slice.entries() {
            let next = L2Entry::decode(slice.entry(index), &self.geometry);
            if next.is_ok_and(|next| next.host().is_some()) {
                break;
            }
            covered += self.geometry.cluster_size();
            index += 1;
        }
        Ok((None, len.min(covered)))
    }

    /// The slice that holds an L2 entry.
    #[inline]
    pub(super) async fn l2_slice(&self, place: EntryPlace) -> Result<Arc<Slice>> {
        match self.l2.get(place.slice) {
            Some(slice) => Ok(slice),
            None => self
                .l2
                .load(&self.storage, place.slice)
                .await
                .map_err(|e| e.path(self.storage.path())),
        }
    }

    /// Where the L2 entry is, if there is an L2 table.
    #[inline]
    pub(super) fn entry_place(&self, at: GuestOffset) -> Result<Option<EntryPlace>> {
        let index = self.geometry.l1_index(at);
        let raw = self.l1.get(index);
        match L1Entry::decode(raw, &self.geometry) {
            Ok(L1Entry::Table { offset, .. }) => Ok(Some(self.place_in(offset, at))),
            Ok(L1Entry::Unallocated) => Ok(None),
            Err(bad) => Err(bad
                .into_error("L1 table", self.l1.offset() + index * 8)
                .path(self.storage.path())),
        }
    }

    /// Where the entry of `at` is in the L2 table at `table`.
    pub(super) fn place_in(&self, table: HostOffset, at: GuestOffset) -> EntryPlace {
        let entry_bits = self.geometry.l2_entry_bits();
        let byte = self.geometry.l2_index(at) << entry_bits;
        let in_slice = byte % self.l2.slice_bytes();
        EntryPlace {
            slice: table + (byte - in_slice),
            index: (in_slice >> entry_bits) as usize,
        }
    }

    /// The L2 entry that maps `at`.
    pub(crate) async fn entry_at(&self, at: GuestOffset) -> Result<L2Entry> {
        let Some(place) = self.entry_place(at)? else {
            return Ok(L2Entry::Unallocated);
        };
        let slice = self.l2_slice(place).await?;
        self.decode(&slice, place.index, at)
    }

    /// Entry `index` of the slice, which maps `at`.
    #[inline]
    pub(super) fn decode(&self, slice: &Slice, index: usize, at: GuestOffset) -> Result<L2Entry> {
        let entry = L2Entry::decode(slice.entry(index), &self.geometry).map_err(|bad| {
            bad.into_error("L2 table", slice.entry_offset(index))
                .path(self.storage.path())
        })?;
        if self.geometry.external_data {
            self.check_place(slice, index, at, entry)?;
        }
        Ok(entry)
    }

    /// In an external data file, everything is where it is on the disk.
    fn check_place(
        &self,
        slice: &Slice,
        index: usize,
        at: GuestOffset,
        entry: L2Entry,
    ) -> Result<()> {
        let at = at.align_down(self.geometry.cluster_bits);
        match entry.host() {
            Some((host, _)) if host.0 != at.0 => Err(Error::corrupt(
                format!(
                    "bad entry in the L2 table: it maps the disk's cluster at {:#x} to {host} of the \
                     external data file, not to the same place",
                    at.0
                ),
                slice.entry_offset(index).0,
            )
            .path(self.storage.path())),
            _ => Ok(()),
        }
    }

    /// As many adjacent entries as make one extent.
    #[inline]
    fn extent(&self, slice: &Slice, index: usize, at: GuestOffset, len: u64) -> Result<Extent> {
        if self.geometry.extended_l2 {
            return self.extent_of_subclusters(slice, index, at, len);
        }
        let cluster_bits = self.geometry.cluster_bits;
        let in_cluster = at.offset_in(cluster_bits);
        let first = mapping_of(self.decode(slice, index, at)?, in_cluster);
        let mut covered = self.geometry.cluster_size() - in_cluster;
        if matches!(first, Mapping::Compressed(_)) {
            let len = len.min(covered);
            return Ok(Extent {
                mapping: first,
                len,
            });
        }
        let mut index = index + 1;
        while covered < len && index < slice.entries() {
            // An invalid entry ends the extent; it is reported when reached.
            let Ok(entry) = L2Entry::decode(slice.entry(index), &self.geometry) else {
                break;
            };
            if !continues(first, covered, mapping_of(entry, 0)) {
                break;
            }
            covered += self.geometry.cluster_size();
            index += 1;
        }
        Ok(Extent {
            mapping: first,
            len: len.min(covered),
        })
    }

    /// As many adjacent subclusters as make one extent.
    fn extent_of_subclusters(
        &self,
        slice: &Slice,
        mut index: usize,
        at: GuestOffset,
        len: u64,
    ) -> Result<Extent> {
        let subcluster_bits = self.geometry.subcluster_bits();
        let in_cluster = at.offset_in(self.geometry.cluster_bits);
        let entry = self.decode(slice, index, at)?;
        let (first, subclusters) = part_of(entry, in_cluster, subcluster_bits);
        let mut end = (in_cluster >> subcluster_bits) as u32 + subclusters;
        let mut covered = (u64::from(end) << subcluster_bits) - in_cluster;
        let alone = matches!(first, Mapping::Compressed(_));
        // Beyond the cluster only where the extent fills it to its end.
        while !alone && covered < len && end == SUBCLUSTERS && index + 1 < slice.entries() {
            index += 1;
            let Ok(entry) = L2Entry::decode(slice.entry(index), &self.geometry) else {
                break;
            };
            let (next, subclusters) = part_of(entry, 0, subcluster_bits);
            if !continues(first, covered, next) {
                break;
            }
            end = subclusters;
            covered += u64::from(subclusters) << subcluster_bits;
        }
        Ok(Extent {
            mapping: first,
            len: len.min(covered),
        })
    }
}

/// What is at `in_cluster`, and how many subclusters from there on are of the
/// same kind.
fn part_of(entry: L2Entry, in_cluster: u64, subcluster_bits: u32) -> (Mapping, u32) {
    let index = (in_cluster >> subcluster_bits) as u32;
    let L2Entry::Mixed { host, copied, .. } = entry else {
        return (mapping_of(entry, in_cluster), SUBCLUSTERS - index);
    };
    let (kind, run) = entry.run(index);
    let host = host.map(|host| host + in_cluster);
    let mapping = match (kind, host) {
        (Subcluster::Data, Some(host)) => Mapping::Data { host, copied },
        (Subcluster::Zero, host) => Mapping::Zero { host, copied },
        // The second is refused when an entry is decoded.
        (Subcluster::Unallocated, _) | (Subcluster::Data, None) => Mapping::Unallocated,
    };
    (mapping, run)
}

fn mapping_of(entry: L2Entry, in_cluster: u64) -> Mapping {
    match entry {
        L2Entry::Unallocated | L2Entry::Mixed { .. } => Mapping::Unallocated,
        L2Entry::Zero => Mapping::Zero {
            host: None,
            copied: false,
        },
        L2Entry::ZeroAllocated { host, copied } => Mapping::Zero {
            host: Some(host + in_cluster),
            copied,
        },
        L2Entry::Data { host, copied } => Mapping::Data {
            host: host + in_cluster,
            copied,
        },
        L2Entry::Compressed(range) => Mapping::Compressed(range),
    }
}

/// True when `next` goes on where the extent that began with `first` has
/// covered `covered` bytes.
fn continues(first: Mapping, covered: u64, next: Mapping) -> bool {
    match (first, next) {
        (Mapping::Unallocated, Mapping::Unallocated) => true,
        (
            Mapping::Zero {
                host: a,
                copied: ca,
            },
            Mapping::Zero {
                host: b,
                copied: cb,
            },
        ) => ca == cb && a.map(|a| a + covered) == b,
        (
            Mapping::Data {
                host: a,
                copied: ca,
            },
            Mapping::Data {
                host: b,
                copied: cb,
            },
        ) => ca == cb && a + covered == b,
        _ => false,
    }
}
