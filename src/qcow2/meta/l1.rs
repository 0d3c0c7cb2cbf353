//! The active L1 table: wholly in memory, readable without a lock, grown in
//! place.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;

/// Entries per chunk; chunks are made when the table reaches them.
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
    /// A table at `offset` of the file with these big-endian entries.
    pub(crate) fn decode(offset: HostOffset, bytes: &[u8]) -> Self {
        let table = Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            len: AtomicUsize::new(0),
            place: Mutex::new(Place {
                offset,
                dirty: BTreeSet::new(),
            }),
        };
        table.extend_to(bytes.len() / 8);
        for (index, entry) in bytes.chunks_exact(8).enumerate() {
            let entry = u64::from_be_bytes(entry.try_into().expect("8 bytes"));
            table.slot(index).store(entry, Ordering::Relaxed);
        }
        table
    }

    fn extend_to(&self, len: usize) {
        for chunk in &self.chunks[..len.div_ceil(CHUNK)] {
            chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        }
        self.len.store(len, Ordering::Release);
    }

    fn slot(&self, index: usize) -> &AtomicU64 {
        let chunk = self.chunks[index / CHUNK].get();
        &chunk.expect("an index below len")[index % CHUNK]
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// The raw entry; 0 (unallocated) past the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> u64 {
        if index < self.len() as u64 {
            self.slot(index as usize).load(Ordering::Acquire)
        } else {
            0
        }
    }

    /// Stores an entry below [`Self::len`], to be written with the next
    /// write-back.
    pub(crate) fn set(&self, index: u64, entry: u64) {
        let index = index as usize;
        assert!(index < self.len());
        self.slot(index).store(entry, Ordering::Release);
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
            entry.copy_from_slice(&self.slot(index).load(Ordering::SeqCst).to_be_bytes());
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
        self.extend_to(entries.len());
        for (index, &entry) in entries.iter().enumerate() {
            self.slot(index).store(entry, Ordering::Release);
        }
        // Past a shorter table, nothing may show when it grows again.
        let rest = self.chunks.iter().flat_map(|chunk| chunk.get());
        let rest = rest.flat_map(|chunk| chunk.iter());
        for slot in rest.skip(entries.len()) {
            slot.store(0, Ordering::Release);
        }
        place.offset = offset;
        place.dirty.clear();
    }

    /// The table now is at `offset`, has `len` entries, and is in the file as
    /// it is in memory.
    pub(crate) fn moved(&self, offset: HostOffset, len: usize) {
        self.extend_to(len);
        let mut place = self.place();
        place.offset = offset;
        place.dirty.clear();
    }
}
