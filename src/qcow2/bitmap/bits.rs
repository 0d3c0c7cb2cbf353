//! The bits of one bitmap in memory: set by any number of threads without a
//! lock, in pages that are made when their first bit is set. Knows nothing of
//! disks or files.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::qcow2::spec::bitmap::MAX_BITMAP_BYTES;

/// Words of a page: 32 KiB.
const PAGE_WORDS: usize = 4096;
/// Pages of a group.
const GROUP_PAGES: usize = 128;
/// Bits of a page.
const PAGE_BITS: u64 = PAGE_WORDS as u64 * 64;
/// Groups of the longest bitmap there is.
const GROUPS: usize = (MAX_BITMAP_BYTES / (PAGE_BITS / 8)) as usize / GROUP_PAGES;

type Group = Box<[OnceLock<Page>]>;

/// A part of the bits.
#[derive(Default)]
struct Page {
    /// All bits are 1, whatever the words are: a file says so in 8 bytes.
    ones: AtomicBool,
    /// Without them, all bits are 0.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Page {
    fn words(&self) -> &[AtomicU64] {
        self.words
            .get_or_init(|| (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        if self.ones.load(Ordering::Relaxed) {
            return u64::MAX;
        }
        let words = self.words.get();
        words.map_or(0, |words| words[index].load(Ordering::Relaxed))
    }

    /// Sets the bits of `mask`; true if one of them was not.
    #[inline]
    fn set(&self, index: usize, mask: u64) -> bool {
        // Whoever uses the bits waits for the requests that set them, so that
        // no order is needed here.
        if self.word(index) & mask == mask {
            return false;
        }
        self.words()[index].fetch_or(mask, Ordering::Relaxed);
        true
    }

    /// Sets all bits; true if one of them was not.
    fn set_all(&self) -> bool {
        let any = (0..PAGE_WORDS).any(|index| self.word(index) != u64::MAX);
        self.ones.store(true, Ordering::Relaxed);
        any
    }

    /// Clears the bits that are not in the mask `kept` tells for each word.
    fn clear(&self, kept: impl Fn(usize) -> u64) {
        if self.words.get().is_none() && !self.ones.load(Ordering::Relaxed) {
            return;
        }
        for (index, word) in self.words().iter().enumerate() {
            word.store(self.word(index) & kept(index), Ordering::Relaxed);
        }
        self.ones.store(false, Ordering::Relaxed);
    }
}

/// Bits that are all 0 at first. There is room for the longest bitmap; what
/// is not set takes no memory.
pub(super) struct Bits {
    groups: Box<[OnceLock<Group>]>,
}

impl Default for Bits {
    fn default() -> Self {
        Self {
            groups: (0..GROUPS).map(|_| OnceLock::new()).collect(),
        }
    }
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bits").finish_non_exhaustive()
    }
}

impl Bits {
    /// The page that has the bit, if any of its bits has ever been set.
    #[inline]
    fn page(&self, number: usize) -> Option<&Page> {
        self.groups.get(number / GROUP_PAGES)?.get()?[number % GROUP_PAGES].get()
    }

    fn make_page(&self, number: usize) -> &Page {
        let none = || (0..GROUP_PAGES).map(|_| OnceLock::new()).collect();
        let group: &Group = self.groups[number / GROUP_PAGES].get_or_init(none);
        group[number % GROUP_PAGES].get_or_init(Page::default)
    }

    /// Pages that exist, with their first bit.
    fn pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        let groups = self.groups.iter().enumerate();
        groups.flat_map(|(g, group)| {
            let pages = group.get().map(|group| group.iter()).unwrap_or_default();
            pages.enumerate().filter_map(move |(p, page)| {
                let first = (g * GROUP_PAGES + p) as u64 * PAGE_BITS;
                Some((first, page.get()?))
            })
        })
    }

    /// Sets the bits `first..end`; true if one of them was not.
    #[inline]
    pub(super) fn set(&self, first: u64, end: u64) -> bool {
        let mut any = false;
        let mut at = first;
        while at < end {
            if at.is_multiple_of(PAGE_BITS) && end - at >= PAGE_BITS {
                any |= self.make_page((at / PAGE_BITS) as usize).set_all();
                at += PAGE_BITS;
                continue;
            }
            let word = at / 64;
            let stop = end.min((word + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            let (page, index) = (word as usize / PAGE_WORDS, word as usize % PAGE_WORDS);
            let page = match self.page(page) {
                Some(page) => page,
                None => self.make_page(page),
            };
            any |= page.set(index, mask);
            at = stop;
        }
        any
    }

    /// Clears all bits from `first` on.
    pub(super) fn clear_from(&self, first: u64) {
        for (start, page) in self.pages() {
            if start + PAGE_BITS <= first {
                continue;
            }
            page.clear(|index| match start + index as u64 * 64 {
                at if at >= first => 0,
                at if at + 64 > first => (1 << (first - at)) - 1,
                _ => u64::MAX,
            });
        }
    }

    /// Sets every bit that is set in `other`.
    pub(super) fn add(&self, other: &Self) {
        for (start, page) in other.pages() {
            let number = (start / PAGE_BITS) as usize;
            if page.ones.load(Ordering::Relaxed) {
                self.make_page(number).set_all();
                continue;
            }
            for index in 0..PAGE_WORDS {
                let word = page.word(index);
                if word != 0 {
                    self.make_page(number).set(index, word);
                }
            }
        }
    }

    /// Sets the bits of `bytes`, least significant first; the first is bit
    /// `first`, a multiple of 64. Bits from `end` on are left alone.
    pub(super) fn add_bytes(&self, first: u64, bytes: &[u8], end: u64) {
        for (chunk, at) in bytes.chunks(8).zip((first..).step_by(64)) {
            let mut raw = [0; 8];
            raw[..chunk.len()].copy_from_slice(chunk);
            let mut word = u64::from_le_bytes(raw);
            if at >= end || word == 0 {
                continue;
            }
            if end - at < 64 {
                word &= (1 << (end - at)) - 1;
            }
            let number = (at / 64) as usize;
            self.make_page(number / PAGE_WORDS)
                .set(number % PAGE_WORDS, word);
        }
    }

    /// Stores the bits from bit `first`, a multiple of 64, to `bytes`; false
    /// if all are 0.
    pub(super) fn copy_bytes(&self, first: u64, bytes: &mut [u8]) -> bool {
        let mut any = 0;
        for (chunk, word) in bytes.chunks_mut(8).zip(first as usize / 64..) {
            let page = self.page(word / PAGE_WORDS);
            let word = page.map_or(0, |page| page.word(word % PAGE_WORDS));
            any |= word;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
        any != 0
    }

    /// Number of bits that are set.
    pub(super) fn count(&self) -> u64 {
        let ones = |(_, page): (u64, &Page)| -> u64 {
            let words = (0..PAGE_WORDS).map(|index| page.word(index));
            words.map(|word| u64::from(word.count_ones())).sum()
        };
        self.pages().map(ones).sum()
    }

    /// Calls `found` with each run of set bits, as long as can be, in order.
    pub(super) fn runs<E>(
        &self,
        mut found: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut run: Option<(u64, u64)> = None;
        for (start, page) in self.pages() {
            for (index, at) in (0..PAGE_WORDS).zip((start..).step_by(64)) {
                let mut word = page.word(index);
                let mut base = 0;
                while word != 0 {
                    let zeros = word.trailing_zeros();
                    let ones = (word >> zeros).trailing_ones();
                    let (first, end) = (base + zeros, base + zeros + ones);
                    let (first, end) = (at + u64::from(first), at + u64::from(end));
                    match &mut run {
                        Some(run) if run.1 == first => run.1 = end,
                        _ => {
                            if let Some((first, end)) = run.replace((first, end)) {
                                found(first, end)?;
                            }
                        }
                    }
                    base += zeros + ones;
                    word = if zeros + ones == 64 {
                        0
                    } else {
                        word >> zeros >> ones
                    };
                }
            }
        }
        run.map_or(Ok(()), |(first, end)| found(first, end))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(bits: &Bits) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        bits.runs(|first, end| {
            runs.push((first, end));
            Ok::<_, ()>(())
        })
        .unwrap();
        runs
    }

    #[test]
    fn runs_join_across_words_and_pages() {
        let bits = Bits::default();
        assert!(runs(&bits).is_empty());
        assert!(bits.set(63, 65));
        assert!(!bits.set(63, 65), "nothing new");
        assert!(bits.set(PAGE_BITS - 1, PAGE_BITS + 1));
        let far = MAX_BITMAP_BYTES * 8;
        assert!(bits.set(far - 1, far), "the last bit there can be");
        let expected = [(63, 65), (PAGE_BITS - 1, PAGE_BITS + 1), (far - 1, far)];
        assert_eq!(runs(&bits), expected);
        assert_eq!(bits.count(), 5);
        bits.clear_from(64);
        assert_eq!(runs(&bits), [(63, 64)]);
    }

    /// A bitmap of nothing but ones takes no memory for them, until one is
    /// cleared.
    #[test]
    fn ones_take_no_memory() {
        let all = MAX_BITMAP_BYTES * 8;
        let bits = Bits::default();
        assert!(bits.set(0, all));
        assert!(!bits.set(0, all) && !bits.set(77, 78), "nothing new");
        assert!(bits.pages().all(|(_, page)| page.words.get().is_none()));
        assert_eq!(runs(&bits), [(0, all)]);
        let copy = Bits::default();
        copy.add(&bits);
        assert!(copy.pages().all(|(_, page)| page.words.get().is_none()));
        assert_eq!(copy.count(), all);
        let mut bytes = [0; 16];
        assert!(bits.copy_bytes(PAGE_BITS, &mut bytes));
        assert_eq!(bytes, [0xff; 16]);
        bits.clear_from(PAGE_BITS + 70);
        assert_eq!(runs(&bits), [(0, PAGE_BITS + 70)]);
        assert!(bits.set(PAGE_BITS + 70, 3 * PAGE_BITS));
        assert_eq!(runs(&bits), [(0, 3 * PAGE_BITS)]);
    }

    proptest! {
        #[test]
        fn as_a_vector_of_bools(
            ranges in prop::collection::vec((0_u64..700, 0_u64..300), 0..8),
            cut in 0_u64..1000,
        ) {
            let (bits, other) = (Bits::default(), Bits::default());
            let mut model = vec![false; 1024];
            for (first, len) in ranges {
                let end = first + len;
                let new = model[first as usize..end as usize].contains(&false);
                prop_assert_eq!(bits.set(first, end), new);
                model[first as usize..end as usize].fill(true);
            }
            let mut bytes = vec![0; 128];
            let any = bits.copy_bytes(0, &mut bytes);
            prop_assert_eq!(any, model.contains(&true));
            other.add_bytes(0, &bytes, cut);
            model[cut as usize..].fill(false);
            bits.clear_from(cut);
            prop_assert_eq!(runs(&bits), runs(&other));
            let ones = model.iter().filter(|&&bit| bit).count() as u64;
            prop_assert_eq!(bits.count(), ones);
            let mut again = vec![false; 1024];
            bits.runs(|first, end| {
                again[first as usize..end as usize].fill(true);
                Ok::<_, ()>(())
            }).unwrap();
            prop_assert_eq!(again, model);
            let sum = Bits::default();
            sum.add(&bits);
            prop_assert_eq!(runs(&sum), runs(&bits));
        }
    }
}
