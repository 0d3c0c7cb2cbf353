//! A bounded cache of table slices: shared by all queues, one load per slice
//! however many wait for it, and no dirty or borrowed slice ever dropped.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::Slice;
use crate::error::Result;
use crate::qcow2::spec::RawL2Entry;
use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;
use crate::runtime::sync::WaitList;
use crate::storage::Storage;

const SHARDS: usize = 16;
/// Slices are at most this long: small enough that changing one entry writes
/// little, long enough to cover 32 MiB of guest at 64 KiB clusters.
const SLICE_BYTES: u64 = 4096;

enum Slot {
    Loading,
    Ready(Arc<Slice>),
}

/// A part of the cache, under a lock of its own; what is counted in it costs
/// no lock besides.
struct Shard {
    slices: LruCache<u64, Slot>,
    hits: u64,
    misses: u64,
    evictions: u64,
}

impl Default for Shard {
    fn default() -> Self {
        Self {
            // Unbounded: `make_room` decides what goes, an LruCache's own
            // limit would drop dirty slices.
            slices: LruCache::unbounded(),
            hits: 0,
            misses: 0,
            evictions: 0,
        }
    }
}

impl Shard {
    /// A slice that is here; this is a hit.
    #[inline]
    fn hit(&mut self, offset: HostOffset) -> Option<Arc<Slice>> {
        match self.slices.get(&offset.0) {
            Some(Slot::Ready(slice)) => {
                self.hits += 1;
                Some(Arc::clone(slice))
            }
            _ => None,
        }
    }
}

/// What a cache of tables has done since the image was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Look-ups of a slice that was in memory.
    pub hits: u64,
    /// Slices read from the file.
    pub misses: u64,
    /// Slices dropped to make room for others.
    pub evictions: u64,
    /// Bytes of slices in memory now.
    pub bytes: u64,
    /// Bytes that there may be, but for those that have to be written yet.
    pub capacity: u64,
}

/// A cache of slices of one kind of table.
pub(crate) struct SliceCache {
    /// What the tables are called in errors.
    what: &'static str,
    slice_bytes: u64,
    /// Words belong together two by two.
    pairs: bool,
    shards: [Mutex<Shard>; SHARDS],
    shard_capacity: usize,
    loaded: WaitList,
    dirty: Mutex<Vec<Arc<Slice>>>,
    dirty_count: AtomicUsize,
}

impl std::fmt::Debug for SliceCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SliceCache")
            .field("what", &self.what)
            .field("dirty", &self.dirty_count)
            .finish()
    }
}

impl SliceCache {
    /// A cache of about `bytes` for tables of `table_bytes` each.
    pub(crate) fn new(what: &'static str, table_bytes: u64, bytes: u64) -> Self {
        let slice_bytes = table_bytes.min(SLICE_BYTES);
        let shard_capacity = (bytes / slice_bytes / SHARDS as u64).max(4) as usize;
        Self {
            what,
            slice_bytes,
            pairs: false,
            shards: std::array::from_fn(|_| Mutex::default()),
            shard_capacity,
            loaded: WaitList::default(),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
        }
    }

    /// For tables whose entries are two words long.
    pub(crate) fn of_pairs(self, pairs: bool) -> Self {
        Self { pairs, ..self }
    }

    /// Length of a slice in the file, in bytes.
    pub(crate) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// What it has done.
    pub(crate) fn stats(&self) -> CacheStats {
        let capacity = self.shard_capacity as u64 * SHARDS as u64 * self.slice_bytes;
        let mut stats = CacheStats {
            capacity,
            ..CacheStats::default()
        };
        for shard in &self.shards {
            let shard = lock(shard);
            stats.hits += shard.hits;
            stats.misses += shard.misses;
            stats.evictions += shard.evictions;
            stats.bytes += shard.slices.len() as u64 * self.slice_bytes;
        }
        stats
    }

    fn shard(&self, offset: HostOffset) -> MutexGuard<'_, Shard> {
        let index = (offset.0 / self.slice_bytes) as usize % SHARDS;
        lock(&self.shards[index])
    }

    /// The slice at `offset` (a multiple of the slice length), if it is here.
    #[inline]
    pub(crate) fn get(&self, offset: HostOffset) -> Option<Arc<Slice>> {
        self.shard(offset).hit(offset)
    }

    /// The slice at `offset`, read from the file if it is not here.
    pub(crate) async fn load(&self, storage: &Storage, offset: HostOffset) -> Result<Arc<Slice>> {
        enum Found {
            Here(Arc<Slice>),
            OursToLoad,
        }
        let found = self
            .loaded
            .wait_until(|| {
                let mut shard = self.shard(offset);
                if let Some(slice) = shard.hit(offset) {
                    return Some(Found::Here(slice));
                }
                if shard.slices.contains(&offset.0) {
                    return None; // somebody is loading it
                }
                shard.misses += 1;
                shard.slices.put(offset.0, Slot::Loading);
                Some(Found::OursToLoad)
            })
            .await;
        if let Found::Here(slice) = found {
            return Ok(slice);
        }
        // Whatever happens, the Loading mark goes and the others try again.
        let mark = LoadMark {
            cache: self,
            offset,
        };
        let mut bytes = Buf::take(self.slice_bytes as usize);
        storage
            .read(offset.0, &mut bytes)
            .await
            .map_err(|e| e.context(format_args!("cannot read the {}", self.what)))?;
        let slice = Arc::new(Slice::decode(offset, &bytes, self.pairs));
        mark.fill(Arc::clone(&slice));
        Ok(slice)
    }

    fn make_room(shard: &mut Shard, capacity: usize) {
        // Dirty slices and those somebody holds move to the young end; a few
        // steps are enough on average, and the bound is soft.
        let mut steps = 8;
        while shard.slices.len() > capacity && steps > 0 {
            steps -= 1;
            match shard.slices.pop_lru() {
                Some((_, Slot::Ready(slice)))
                    if !slice.is_dirty() && Arc::strong_count(&slice) == 1 =>
                {
                    shard.evictions += 1;
                }
                Some((offset, slot)) => {
                    shard.slices.put(offset, slot);
                }
                None => {}
            }
        }
    }

    /// Stores one word of a slice and marks it dirty; the old word.
    pub(crate) fn store(&self, slice: &Arc<Slice>, index: usize, word: u64) -> u64 {
        let old = slice.word(index);
        slice.store(index, word);
        self.mark_dirty(slice);
        old
    }

    /// Stores an L2 entry and marks its slice dirty.
    pub(crate) fn store_entry(&self, slice: &Arc<Slice>, index: usize, entry: RawL2Entry) {
        slice.store_entry(index, entry);
        self.mark_dirty(slice);
    }

    /// Puts a slice on the list of those to be written.
    pub(crate) fn mark_dirty(&self, slice: &Arc<Slice>) {
        if slice.set_dirty() {
            lock(&self.dirty).push(Arc::clone(slice));
            self.dirty_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// True when so much is dirty that writers should write back first.
    pub(crate) fn is_crowded(&self) -> bool {
        self.dirty_count.load(Ordering::Relaxed) > self.shard_capacity * SHARDS / 2
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty_count.load(Ordering::SeqCst) > 0
    }

    /// Takes the dirty slices, in file order. The caller writes their copies
    /// and keeps the slices until that is done, so that none is dropped and
    /// read back old.
    pub(crate) fn take_dirty(&self) -> Vec<(Arc<Slice>, Buf)> {
        let mut slices = std::mem::take(&mut *lock(&self.dirty));
        self.dirty_count.fetch_sub(slices.len(), Ordering::Relaxed);
        slices.sort_unstable_by_key(|slice| slice.offset());
        slices
            .into_iter()
            .map(|slice| {
                let copy = slice.clean_copy();
                (slice, copy)
            })
            .collect()
    }

    /// Forgets everything. Nothing is dirty, and nobody uses a slice.
    pub(crate) fn clear(&self) {
        debug_assert!(!self.has_dirty());
        for shard in &self.shards {
            lock(shard).slices.clear();
        }
    }

    /// Forgets the slices of a table that is not one any more.
    pub(crate) fn forget(&self, offset: HostOffset, len: u64) {
        let mut at = offset;
        while at < offset + len {
            let mut shard = self.shard(at);
            if let Some(Slot::Ready(_)) = shard.slices.peek(&at.0) {
                shard.slices.pop(&at.0);
            }
            drop(shard);
            at += self.slice_bytes;
        }
    }
}

/// The Loading mark of a slice; removed when dropped, replaced when filled.
struct LoadMark<'a> {
    cache: &'a SliceCache,
    offset: HostOffset,
}

impl LoadMark<'_> {
    fn fill(self, slice: Arc<Slice>) {
        let mut shard = self.cache.shard(self.offset);
        shard.slices.put(self.offset.0, Slot::Ready(slice));
        SliceCache::make_room(&mut shard, self.cache.shard_capacity);
    }
}

impl Drop for LoadMark<'_> {
    fn drop(&mut self) {
        let mut shard = self.cache.shard(self.offset);
        if let Some(Slot::Loading) = shard.slices.peek(&self.offset.0) {
            shard.slices.pop(&self.offset.0);
        }
        drop(shard);
        self.cache.loaded.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;
    use crate::storage::sim::{Image, SimDisk};

    /// The figures of a known sequence, to the last one.
    #[test]
    fn what_is_counted_is_exact() {
        let disk = SimDisk::with_image(Image::from_bytes(&[0; 1 << 20]));
        let storage = Storage::simulated(&disk, 1);
        // Four slices in each of 16 shards.
        let cache = SliceCache::new("L2 table", 65536, 0);
        let figures = || {
            let stats = cache.stats();
            (stats.hits, stats.misses, stats.evictions, stats.bytes >> 12)
        };
        // Slice number `n` of those in one shard.
        let at = |n: u64| HostOffset(n * 65536);
        Runtime::inline().unwrap().block_on(async {
            assert_eq!(cache.stats().capacity, 64 * 4096);
            assert!(cache.get(at(0)).is_none());
            assert_eq!(figures(), (0, 0, 0, 0), "what is not here is read then");
            for n in 0..4 {
                cache.load(&storage, at(n)).await.unwrap();
            }
            assert_eq!(figures(), (0, 4, 0, 4));
            for n in [0, 1, 1, 3] {
                assert!(cache.get(at(n)).is_some());
            }
            cache.load(&storage, at(0)).await.unwrap();
            assert_eq!(figures(), (5, 4, 0, 4));
            // Slice 2 is the oldest, and then 1.
            cache.load(&storage, at(4)).await.unwrap();
            assert!(cache.get(at(2)).is_none() && cache.get(at(1)).is_some());
            assert_eq!(figures(), (6, 5, 1, 4));
            // A dirty slice and one that somebody holds stay.
            let held = cache.get(at(3)).unwrap();
            cache.mark_dirty(&cache.get(at(0)).unwrap());
            cache.load(&storage, at(5)).await.unwrap();
            cache.load(&storage, at(6)).await.unwrap();
            assert_eq!(figures(), (8, 7, 3, 4));
            assert!(cache.get(at(0)).is_some() && cache.get(at(3)).is_some());
            drop(held);
            cache.forget(at(3), 4096);
            assert_eq!(figures(), (10, 7, 3, 3), "not dropped for others");
            // A read that fails is one that was tried.
            disk.fail_nth(0, libc::EIO);
            assert!(cache.load(&storage, at(9)).await.is_err());
            assert_eq!(figures(), (10, 8, 3, 3));
        });
    }
}
