//! A piece of a metadata table in memory: the unit of caching and of writing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::qcow2::spec::RawL2Entry;
use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;

/// Tries without a lock before a reader of a pair waits for the writer.
const TRIES: u32 = 16;

/// Some words of an L2 table or refcount block, at a fixed place in the file.
///
/// Words are kept in native order of the big-endian file, each atomic: readers
/// need no lock. Who may store to an entry is decided above: L2 entries by the
/// guest cluster's range lock, refcounts by the allocator's lock.
///
/// An extended L2 entry is two words, of which nobody may see one old and one
/// new: neither a reader nor the copy that goes to the file. See [`Pairs`].
#[derive(Debug)]
pub(crate) struct Slice {
    offset: HostOffset,
    words: Box<[AtomicU64]>,
    dirty: AtomicBool,
    pairs: Option<Pairs>,
}

/// Keeps pairs of words together: a sequence lock.
///
/// A writer holds `turn`, makes `version` odd, stores both words and makes it
/// even again. A reader that finds the same even version before and after has
/// read a pair: its loads are acquiring, so that the second look at the
/// version cannot come before them, and a word of a writer that has not
/// finished brings the odd version with it, the stores being releasing. Copies
/// for the file are taken with `turn` held.
#[derive(Debug, Default)]
struct Pairs {
    version: AtomicU64,
    turn: Mutex<()>,
}

impl Pairs {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slice {
    /// With `pairs`, words belong together two by two.
    pub(super) fn decode(offset: HostOffset, bytes: &[u8], pairs: bool) -> Self {
        Self {
            offset,
            words: bytes
                .chunks_exact(8)
                .map(|word| AtomicU64::new(u64::from_be_bytes(word.try_into().expect("8 bytes"))))
                .collect(),
            dirty: AtomicBool::new(false),
            pairs: pairs.then(Pairs::default),
        }
    }

    /// Where it is in the file.
    pub(crate) fn offset(&self) -> HostOffset {
        self.offset
    }

    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// Number of words.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Number of L2 entries.
    #[inline]
    pub(crate) fn entries(&self) -> usize {
        self.words.len() >> u32::from(self.pairs.is_some())
    }

    /// Where L2 entry `index` is in the file.
    pub(crate) fn entry_offset(&self, index: usize) -> HostOffset {
        self.offset + ((index as u64 * 8) << u32::from(self.pairs.is_some()))
    }

    /// L2 entry number `index`.
    #[inline]
    pub(crate) fn entry(&self, index: usize) -> RawL2Entry {
        match &self.pairs {
            None => self.word(index).into(),
            Some(pairs) => self.pair(pairs, index),
        }
    }

    fn pair(&self, pairs: &Pairs, index: usize) -> RawL2Entry {
        let load = || RawL2Entry {
            descriptor: self.word(2 * index),
            bitmap: self.word(2 * index + 1),
        };
        for _ in 0..TRIES {
            let before = pairs.version.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                let entry = load();
                if pairs.version.load(Ordering::Acquire) == before {
                    return entry;
                }
            }
            std::hint::spin_loop();
        }
        // The writer may not be running: no use in spinning.
        let _turn = pairs.turn();
        load()
    }

    /// Stores a word; the caller marks the slice dirty afterwards.
    pub(super) fn store(&self, index: usize, word: u64) {
        self.words[index].store(word, Ordering::Release);
    }

    /// Stores an L2 entry; the caller marks the slice dirty afterwards.
    pub(super) fn store_entry(&self, index: usize, entry: RawL2Entry) {
        let Some(pairs) = &self.pairs else {
            self.store(index, entry.descriptor);
            return;
        };
        let _turn = pairs.turn();
        let version = pairs.version.load(Ordering::Relaxed);
        pairs.version.store(version + 1, Ordering::Relaxed);
        self.store(2 * index, entry.descriptor);
        self.store(2 * index + 1, entry.bitmap);
        pairs.version.store(version + 2, Ordering::Release);
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
        let _turn = self.pairs.as_ref().map(Pairs::turn);
        let mut copy = Buf::take(self.words.len() * 8);
        for (bytes, word) in copy.chunks_exact_mut(8).zip(&*self.words) {
            bytes.copy_from_slice(&word.load(Ordering::SeqCst).to_be_bytes());
        }
        copy
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Two writers of neighbouring entries, whose two words always agree;
    /// readers and copies never see words that do not.
    #[test]
    fn nobody_sees_half_an_entry() {
        let slice = Slice::decode(HostOffset(0), &[0; 64], true);
        let running = AtomicU32::new(2);
        std::thread::scope(|scope| {
            for index in 0..2 {
                let (slice, running) = (&slice, &running);
                scope.spawn(move || {
                    for n in 1..=200_000_u64 {
                        let entry = RawL2Entry {
                            descriptor: n,
                            bitmap: !n,
                        };
                        slice.store_entry(index, entry);
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            scope.spawn(|| {
                while running.load(Ordering::SeqCst) > 0 {
                    for pair in slice.clean_copy().chunks_exact(16).take(2) {
                        let word =
                            |at: usize| u64::from_be_bytes(pair[at..at + 8].try_into().unwrap());
                        assert!(word(0) == 0 || word(0) == !word(8), "in a copy");
                    }
                }
            });
            let mut last = [0; 2];
            while running.load(Ordering::SeqCst) > 0 {
                for (index, last) in last.iter_mut().enumerate() {
                    let RawL2Entry { descriptor, bitmap } = slice.entry(index);
                    assert!(descriptor == 0 || descriptor == !bitmap);
                    assert!(descriptor >= *last, "an entry went back");
                    *last = descriptor;
                }
            }
        });
        assert_eq!(slice.entries(), 4);
        assert_eq!(slice.entry(1).descriptor, 200_000);
        assert_eq!(slice.entry_offset(3), HostOffset(48));
    }
}
