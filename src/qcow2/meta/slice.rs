//! A piece of a metadata table in memory: the unit of caching and of writing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;

/// Some words of an L2 table or refcount block, at a fixed place in the file.
///
/// Words are kept in native order of the big-endian file, each atomic: readers
/// need no lock. Who may store to an entry is decided above: L2 entries by the
/// guest cluster's range lock, refcounts by the allocator's lock.
#[derive(Debug)]
pub(crate) struct Slice {
    offset: HostOffset,
    words: Box<[AtomicU64]>,
    dirty: AtomicBool,
}

impl Slice {
    pub(super) fn decode(offset: HostOffset, bytes: &[u8]) -> Self {
        Self {
            offset,
            words: bytes
                .chunks_exact(8)
                .map(|word| AtomicU64::new(u64::from_be_bytes(word.try_into().expect("8 bytes"))))
                .collect(),
            dirty: AtomicBool::new(false),
        }
    }

    /// Where it is in the file.
    pub(crate) fn offset(&self) -> HostOffset {
        self.offset
    }

    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// Stores a word; the caller marks the slice dirty afterwards.
    pub(super) fn store(&self, index: usize, word: u64) {
        self.words[index].store(word, Ordering::Release);
    }

    /// True when this call made it dirty.
    pub(super) fn set_dirty(&self) -> bool {
        !self.dirty.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::SeqCst)
    }

    /// A copy to write. The mark goes first: a word stored during the copy
    /// marks it again and is written again.
    pub(crate) fn clean_copy(&self) -> Buf {
        self.dirty.store(false, Ordering::SeqCst);
        let mut copy = Buf::take(self.words.len() * 8);
        for (bytes, word) in copy.chunks_exact_mut(8).zip(&*self.words) {
            bytes.copy_from_slice(&word.load(Ordering::SeqCst).to_be_bytes());
        }
        copy
    }
}
