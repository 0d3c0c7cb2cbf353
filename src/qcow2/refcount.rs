//! Refcounts: the table and its blocks, read and changed through the cache.
//! Knows nothing of what is being counted.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::meta::{Slice, SliceCache, read_words};
use super::spec::Header;
use super::spec::addr::HostOffset;
use super::spec::geometry::Geometry;
use super::spec::header::Incompatible;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Entries of the refcount table per block of writing (4 KiB).
pub(crate) const TABLE_BLOCK: usize = 512;

/// The refcount table and the cache of its blocks. Changed only under the
/// allocator's lock.
#[derive(Debug)]
pub(crate) struct Refcounts {
    pub(crate) geometry: Geometry,
    /// Raw table entries, up to the last that is not 0: offsets of refcount
    /// blocks, 0 for none.
    pub(crate) table: Vec<u64>,
    /// Entries that the table has room for.
    pub(crate) entries: u64,
    pub(crate) table_offset: HostOffset,
    /// Blocks of the table not yet in the file.
    pub(crate) table_dirty: BTreeSet<usize>,
}

/// A place in a refcount block.
struct Place {
    slice: Arc<Slice>,
    word: usize,
    shift: u32,
}

impl Refcounts {
    /// The refcounts of the image with this header, for writing.
    pub(crate) async fn read(storage: &Storage, header: &Header) -> Result<Self> {
        let (offset, len) = (header.refcount_table_offset, header.reftable_bytes());
        let table = read_words(storage, offset, len)
            .await
            .map_err(|e| e.context("cannot read the refcount table"))?;
        // One block for all entries would have to be searched as often.
        let mut seen = HashSet::new();
        let shared = |&(_, block): &(u64, &u64)| *block != 0 && !seen.insert(*block);
        if let Some((index, block)) = (0..).zip(&table).find(shared)
            && !header.incompatible.contains(Incompatible::DIRTY)
        {
            let what = format!("the refcount table names the block at {block:#x} twice");
            return Err(Error::corrupt(what, offset.0 + index * 8)
                .path(storage.path())
                .cure("run `qcow2-ublk check -r all`"));
        }
        Ok(Self {
            table,
            ..Self::unread(header)
        })
    }

    /// The same for an image that is only read: nothing is known.
    pub(crate) fn unread(header: &Header) -> Self {
        Self {
            geometry: header.geometry(),
            table: Vec::new(),
            entries: header.reftable_bytes() / 8,
            table_offset: header.refcount_table_offset,
            table_dirty: BTreeSet::new(),
        }
    }

    /// Raw entry number `index` of the table.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        entry.copied().unwrap_or(0)
    }

    /// Number of clusters one refcount block counts.
    pub(crate) fn per_block(&self) -> u64 {
        self.geometry.refcounts_per_block()
    }

    /// The highest count there can be.
    pub(crate) fn max(&self) -> u64 {
        match self.geometry.refcount_bits() {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }

    /// The block that counts `cluster`, if there is one.
    pub(crate) fn block_of(&self, cluster: u64) -> Result<Option<HostOffset>> {
        let index = cluster / self.per_block();
        let raw = self.entry(index);
        if raw == 0 {
            return Ok(None);
        }
        let offset = HostOffset(raw);
        // Bits 0-8 are reserved, 9 up are the offset (section "Refcounts").
        if !offset.is_aligned(self.geometry.cluster_bits) || raw >> 56 != 0 {
            return Err(Error::corrupt(
                format!("refcount table entry {index} ({raw:#x}) is no cluster offset"),
                self.table_offset.0 + index * 8,
            )
            .cure("run `qcow2-ublk check -r all`"));
        }
        Ok(Some(offset))
    }

    /// Number of refcounts in one cached slice of a block.
    pub(crate) fn per_slice(&self, cache: &SliceCache) -> u64 {
        cache.slice_bytes() * 8 / u64::from(self.geometry.refcount_bits())
    }

    async fn place(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
    ) -> Result<Option<Place>> {
        let Some(block) = self.block_of(cluster)? else {
            return Ok(None);
        };
        let bits = u64::from(self.geometry.refcount_bits());
        let bit = (cluster % self.per_block()) * bits;
        let byte = bit / 8;
        let slice_start = byte - byte % cache.slice_bytes();
        let slice = match cache.get(block + slice_start) {
            Some(slice) => slice,
            None => cache.load(storage, block + slice_start).await?,
        };
        let byte = byte - slice_start;
        let in_word = (byte % 8) as u32;
        // Wider entries are big-endian numbers; narrower ones are packed from
        // the least significant bit of their byte.
        let shift = if bits >= 8 {
            64 - 8 * in_word - bits as u32
        } else {
            56 - 8 * in_word + (bit % 8) as u32
        };
        Ok(Some(Place {
            slice,
            word: (byte / 8) as usize,
            shift,
        }))
    }

    /// The refcounts of the same image with another table, which is in the
    /// file at `offset` and has room for as many `entries`.
    pub(crate) fn moved(&self, offset: HostOffset, entries: u64, table: Vec<u64>) -> Self {
        Self {
            geometry: self.geometry,
            table,
            entries,
            table_offset: offset,
            table_dirty: BTreeSet::new(),
        }
    }

    /// The refcount of a cluster; 0 where there is no block.
    pub(crate) async fn get(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
    ) -> Result<u64> {
        let place = self.place(cache, storage, cluster).await?;
        Ok(place.map_or(0, |p| (p.slice.word(p.word) >> p.shift) & self.max()))
    }

    /// The last cluster in use of those that block number `index` counts. Most
    /// of a block is zeros: they are passed in words.
    pub(crate) async fn last_used(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        index: u64,
    ) -> Result<Option<u64>> {
        let per_word = u64::from(u64::BITS / self.geometry.refcount_bits());
        let per_slice = self.per_slice(cache);
        let first = index * self.per_block();
        for nth in (0..self.per_block() / per_slice).rev() {
            let start = first + nth * per_slice;
            let Some(Place { slice, .. }) = self.place(cache, storage, start).await? else {
                return Ok(None);
            };
            let words = (per_slice / per_word) as usize;
            let Some(word) = (0..words).rev().find(|&word| slice.word(word) != 0) else {
                continue;
            };
            let counted = start + word as u64 * per_word;
            for cluster in (counted..counted + per_word).rev() {
                if self.get(cache, storage, cluster).await? != 0 {
                    return Ok(Some(cluster));
                }
            }
        }
        Ok(None)
    }

    /// Adds `delta` to a cluster's refcount; the new one. The block exists.
    ///
    /// A count that would leave its range is refused and nothing is changed.
    pub(crate) async fn adjust(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
        delta: i64,
    ) -> Result<u64> {
        let at = cluster << self.geometry.cluster_bits;
        let Some(place) = self.place(cache, storage, cluster).await? else {
            return Err(Error::corrupt("a used cluster has no refcount block", at)
                .cure("run `qcow2-ublk check -r all`"));
        };
        let word = place.slice.word(place.word);
        let old = (word >> place.shift) & self.max();
        let new = old
            .checked_add_signed(delta)
            .filter(|&new| new <= self.max())
            .ok_or_else(|| {
                if delta < 0 {
                    Error::corrupt("the refcount of a used cluster is 0 already", at)
                        .cure("run `qcow2-ublk check -r all`")
                } else {
                    Error::new(
                        ErrorKind::Unsupported,
                        format!(
                            "a refcount does not fit in {} bits",
                            self.geometry.refcount_bits()
                        ),
                    )
                    .at(at)
                    .cure("convert the image to one with wider refcounts (refcount_bits=16)")
                }
            })?;
        let word = (word & !(self.max() << place.shift)) | (new << place.shift);
        cache.store(&place.slice, place.word, word);
        Ok(new)
    }

    /// Sets a table entry, to be written with the next write-back.
    pub(crate) fn set_block(&mut self, index: u64, offset: HostOffset) {
        let index = index as usize;
        debug_assert!((index as u64) < self.entries);
        if index >= self.table.len() {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = offset.0;
        self.table_dirty.insert(index / TABLE_BLOCK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::spec::refcount;
    use crate::runtime::Runtime;
    use crate::storage::sim::{Image, SimDisk};

    /// Every width: a count at its highest or lowest is refused and stays, and
    /// so do its neighbours.
    #[test]
    fn counts_never_leave_their_range() {
        for order in 0..=6 {
            let geometry = Geometry {
                cluster_bits: 12,
                refcount_order: order,
                version: 3,
                extended_l2: false,
                external_data: false,
            };
            let highest = refcount::max(order);
            let mut block = vec![0; 4096];
            refcount::set(&mut block, order, 5, highest);
            refcount::set(&mut block, order, 6, highest - 1);
            let mut image = Image::from_bytes(&[0; 8192]);
            image.write(4096, &block);
            let storage = Storage::simulated(&SimDisk::with_image(image), 1);
            let cache = SliceCache::new("refcount block", 4096, 1 << 20);
            let refcounts = Refcounts {
                geometry,
                table: vec![4096],
                entries: 512,
                table_offset: HostOffset(0),
                table_dirty: BTreeSet::new(),
            };
            Runtime::inline().unwrap().block_on(async {
                let get = |cluster| refcounts.get(&cache, &storage, cluster);
                let adjust = |cluster, by| refcounts.adjust(&cache, &storage, cluster, by);
                let error = adjust(5, 1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unsupported, "order {order}");
                let error = adjust(4, -1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "order {order}");
                assert!(!cache.has_dirty(), "nothing was changed");
                assert_eq!(adjust(6, 1).await.unwrap(), highest);
                assert!(adjust(6, 1).await.is_err());
                assert_eq!(adjust(7, 1).await.unwrap(), 1);
                assert_eq!(adjust(5, -1).await.unwrap(), highest - 1);
                assert_eq!(get(4).await.unwrap(), 0);
                assert_eq!(get(5).await.unwrap(), highest - 1);
                assert_eq!(get(6).await.unwrap(), highest);
                assert_eq!(get(7).await.unwrap(), 1);
                assert_eq!(get(8).await.unwrap(), 0);
                let last = refcounts.last_used(&cache, &storage, 0).await;
                assert_eq!(last.unwrap(), Some(7));
                let per_block = geometry.refcounts_per_block();
                assert_eq!(adjust(per_block - 1, 1).await.unwrap(), 1);
                let last = refcounts.last_used(&cache, &storage, 0).await;
                assert_eq!(last.unwrap(), Some(per_block - 1));
                let none = refcounts.last_used(&cache, &storage, 1).await;
                assert_eq!(none.unwrap(), None, "no block");
            });
        }
    }
}
