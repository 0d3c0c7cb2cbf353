//! The active L1 table: wholly in memory but for long runs of zeros, readable
//! without a lock, grown in place.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;

/// Entries per chunk; chunks are made for entries that are not 0.
const CHUNK: usize = 4096;
/// 32 MiB of entries, the largest L1 table there is.
const CHUNKS: usize = (32 << 20) / 8 / CHUNK;
/// Unit of writing, in entries: one block of 4 KiB, so that one direct write
/// on any host suffices.
const BLOCK: usize = 512;

/// The L1 table and which of its blocks are not yet in the file.
pub(crate) struct L1Table {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    len: AtomicUsize,
    place: Mutex<Place>,
}

struct Place {
    offset: HostOffset,
    dirty: BTreeSet<usize>,
}

impl std::fmt::Debug for L1Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("L1Table").field("len", &self.len).finish()
    }
}

impl L1Table {
    /// A table of `len` entries at `offset` of the file, all of them 0 yet.
    pub(crate) fn new(offset: HostOffset, len: usize) -> Self {
        assert!(len <= CHUNKS * CHUNK);
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            len: AtomicUsize::new(len),
            place: Mutex::new(Place {
                offset,
                dirty: BTreeSet::new(),
            }),
        }
    }

    /// Takes the big-endian entries from number `first` on from the file.
    pub(crate) fn load(&self, first: usize, bytes: &[u8]) {
        for (index, raw) in (first..self.len()).zip(bytes.as_chunks::<8>().0) {
            self.store(index, u64::from_be_bytes(*raw));
        }
    }

    fn chunk(&self, index: usize) -> Option<&[AtomicU64]> {
        self.chunks[index / CHUNK].get().map(|chunk| &**chunk)
    }

    fn store(&self, index: usize, entry: u64) {
        let chunk = &self.chunks[index / CHUNK];
        if entry == 0 && chunk.get().is_none() {
            return;
        }
        let zeros = || (0..CHUNK).map(|_| AtomicU64::new(0)).collect();
        chunk.get_or_init(zeros)[index % CHUNK].store(entry, Ordering::Release);
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// The raw entry; 0 (unallocated) past the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> u64 {
        if index >= self.len() as u64 {
            return 0;
        }
        let chunk = self.chunk(index as usize);
        chunk.map_or(0, |chunk| {
            chunk[index as usize % CHUNK].load(Ordering::Acquire)
        })
    }

    /// How many entries from `index` on are 0, of `most`. Past the end, all
    /// are.
    pub(crate) fn zeros(&self, index: u64, most: u64) -> u64 {
        let mut count = 0;
        while count < most && index + count < self.len() as u64 {
            let at = (index + count) as usize;
            match self.chunk(at) {
                None => count += (CHUNK - at % CHUNK) as u64,
                Some(chunk) if chunk[at % CHUNK].load(Ordering::Acquire) != 0 => return count,
                Some(_) => count += 1,
            }
        }
        most
    }

    /// Stores an entry below [`Self::len`], to be written with the next
    /// write-back.
    pub(crate) fn set(&self, index: u64, entry: u64) {
        let index = index as usize;
        assert!(index < self.len());
        self.store(index, entry);
        self.place().dirty.insert(index / BLOCK);
    }

    fn place(&self) -> std::sync::MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the table is in the file.
    pub(crate) fn offset(&self) -> HostOffset {
        self.place().offset
    }

    pub(crate) fn has_dirty(&self) -> bool {
        !self.place().dirty.is_empty()
    }

    /// Takes the dirty blocks: number, place in the file, content.
    pub(crate) fn take_dirty(&self) -> Vec<(usize, HostOffset, Buf)> {
        let (offset, dirty) = {
            let mut place = self.place();
            (place.offset, std::mem::take(&mut place.dirty))
        };
        let len = self.len();
        dirty
            .into_iter()
            .map(|block| {
                let first = block * BLOCK;
                let bytes = self.encode(first, len.min(first + BLOCK));
                (block, offset + first as u64 * 8, bytes)
            })
            .collect()
    }

    fn encode(&self, first: usize, end: usize) -> Buf {
        let mut bytes = Buf::take((end - first) * 8);
        for (entry, index) in bytes.chunks_exact_mut(8).zip(first..) {
            entry.copy_from_slice(&self.get(index as u64).to_be_bytes());
        }
        bytes
    }

    /// Marks a block whose writing failed.
    pub(crate) fn mark_dirty(&self, block: usize) {
        self.place().dirty.insert(block);
    }

    /// The whole table as it would be with `len` entries.
    pub(crate) fn encode_grown(&self, len: usize) -> Buf {
        let old = self.encode(0, self.len());
        let mut bytes = Buf::zeroed(len * 8);
        bytes[..old.len()].copy_from_slice(&old);
        bytes
    }

    /// Another table takes the place of this one: these entries, which are
    /// in the file at `offset`. Nobody looks entries up meanwhile.
    pub(crate) fn replace(&self, offset: HostOffset, entries: &[u64]) {
        let mut place = self.place();
        for (index, &entry) in entries.iter().enumerate() {
            self.store(index, entry);
        }
        // Past a shorter table, nothing may show when it grows again.
        for index in entries.len()..self.len() {
            self.store(index, 0);
        }
        self.len.store(entries.len(), Ordering::Release);
        place.offset = offset;
        place.dirty.clear();
    }

    /// The table now is at `offset`, has `len` entries, and is in the file as
    /// it is in memory.
    pub(crate) fn moved(&self, offset: HostOffset, len: usize) {
        self.len.store(len, Ordering::Release);
        let mut place = self.place();
        place.offset = offset;
        place.dirty.clear();
    }
}
