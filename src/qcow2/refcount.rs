//! Refcounts: the table and its blocks, read and changed through the cache.
//! Knows nothing of what is being counted.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
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

/// How far refcount number `index` of those in one word is above its lowest
/// bit: wider ones are big-endian numbers, narrower ones are packed from the
/// least significant bit of their byte.
fn shift(bits: u32, index: u32) -> u32 {
    let bit = index * bits;
    if bits >= 8 {
        64 - bit - bits
    } else {
        56 - bit / 8 * 8 + bit % 8
    }
}

/// The counts in one cached slice of a block, to be searched.
#[derive(Debug)]
pub(crate) struct Counts {
    slice: Arc<Slice>,
    /// The first cluster that it counts.
    first: u64,
    bits: u32,
}

impl Counts {
    fn per_word(&self) -> u64 {
        u64::from(64 / self.bits)
    }

    fn is_used(&self, cluster: u64) -> bool {
        let index = cluster - self.first;
        let word = self.slice.word((index / self.per_word()) as usize);
        let shift = shift(self.bits, (index % self.per_word()) as u32);
        word >> shift & (u64::MAX >> (64 - self.bits)) != 0
    }

    /// The last cluster whose count is not 0.
    pub(crate) fn last_used(&self) -> Option<u64> {
        let word = (0..self.slice.words()).rfind(|&word| self.slice.word(word) != 0)?;
        let first = self.first + word as u64 * self.per_word();
        (first..first + self.per_word()).rfind(|&cluster| self.is_used(cluster))
    }

    /// The first of `clusters` whose count is not 0, or is; their end if there
    /// is none.
    pub(crate) fn first(&self, clusters: Range<u64>, used: bool) -> u64 {
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            let index = cluster - self.first;
            let word = (index / self.per_word()) as usize;
            // Most words of most blocks have nothing in them.
            if used && self.slice.word(word) == 0 {
                cluster = self.first + (word as u64 + 1) * self.per_word();
            } else if self.is_used(cluster) == used {
                return cluster;
            } else {
                cluster += 1;
            }
        }
        clusters.end
    }
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

    /// The slice of a block that counts `cluster`, and the first cluster that
    /// it counts.
    async fn slice(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
    ) -> Result<Option<(Arc<Slice>, u64)>> {
        let Some(block) = self.block_of(cluster)? else {
            return Ok(None);
        };
        let per_slice = self.per_slice(cache);
        let first = cluster - cluster % per_slice;
        let offset = block + first % self.per_block() / per_slice * cache.slice_bytes();
        let slice = match cache.get(offset) {
            Some(slice) => slice,
            None => cache.load(storage, offset).await?,
        };
        Ok(Some((slice, first)))
    }

    async fn place(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
    ) -> Result<Option<Place>> {
        let bits = self.geometry.refcount_bits();
        let per_word = u64::from(64 / bits);
        let found = self.slice(cache, storage, cluster).await?;
        Ok(found.map(|(slice, first)| Place {
            slice,
            word: ((cluster - first) / per_word) as usize,
            shift: shift(bits, (cluster % per_word) as u32),
        }))
    }

    /// The counts around `cluster`: those of [`Self::per_slice`] clusters from
    /// a multiple of it on. None where there is no block.
    pub(crate) async fn counts(
        &self,
        cache: &SliceCache,
        storage: &Storage,
        cluster: u64,
    ) -> Result<Option<Counts>> {
        let found = self.slice(cache, storage, cluster).await?;
        Ok(found.map(|(slice, first)| Counts {
            slice,
            first,
            bits: self.geometry.refcount_bits(),
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
            });
        }
    }

    /// Every width: searching finds what looking at each count does.
    #[test]
    fn searches_see_every_count() {
        for order in 0..=6 {
            let geometry = Geometry {
                cluster_bits: 9,
                refcount_order: order,
                version: 3,
                extended_l2: false,
                external_data: false,
            };
            let per_block = geometry.refcounts_per_block();
            let mut block = vec![0; 512];
            let used = |cluster: u64| [1, 2, 3, 9, per_block - 3].contains(&cluster);
            for cluster in (0..per_block).filter(|&cluster| used(cluster)) {
                refcount::set(&mut block, order, cluster as usize, 1);
            }
            let mut image = Image::from_bytes(&[0; 1024]);
            image.write(512, &block);
            let storage = Storage::simulated(&SimDisk::with_image(image), 1);
            let cache = SliceCache::new("refcount block", 512, 1 << 20);
            let refcounts = Refcounts {
                geometry,
                // The second block's clusters, by the same numbers.
                table: vec![0, 512],
                entries: 64,
                table_offset: HostOffset(0),
                table_dirty: BTreeSet::new(),
            };
            Runtime::inline().unwrap().block_on(async {
                let counts = |cluster| refcounts.counts(&cache, &storage, cluster);
                assert!(counts(0).await.unwrap().is_none());
                let all = per_block..2 * per_block;
                let counts = counts(per_block + 5).await.unwrap().unwrap();
                assert_eq!(counts.last_used(), Some(2 * per_block - 3));
                for from in all.clone() {
                    for wanted in [true, false] {
                        let mut rest = from..all.end;
                        let first = rest.find(|cluster| used(cluster - per_block) == wanted);
                        let found = counts.first(from..all.end, wanted);
                        assert_eq!(found, first.unwrap_or(all.end), "order {order}");
                    }
                    let count = refcounts.get(&cache, &storage, from).await.unwrap();
                    assert_eq!(count == 1, used(from - per_block), "order {order}");
                }
            });
        }
    }
}
