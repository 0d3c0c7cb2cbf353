//! Entries of L1 and L2 tables that break rules or refer to nothing: what can
//! be kept of them is kept, the others show what they showed when read.

use super::super::tables::{COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET, PIECE, ZERO};
use super::Checked;
use crate::error::Result;
use crate::runtime::Buf;

/// All 32 subclusters of an extended entry read as zeros.
const ALL_ZERO: u64 = 0xffff_ffff << 32;

impl Checked<'_> {
    /// Puts bad entries of all L1 and L2 tables right; how many.
    pub(super) async fn fix_entries(&mut self) -> Result<u64> {
        let active = (self.header.l1_table_offset.0, self.header.l1_bytes());
        let mut fixed = 0;
        for (offset, len) in [vec![active], self.snapshot_l1s.clone()].concat() {
            if self.is_shared(offset, len) {
                continue;
            }
            fixed += self
                .rewrite(offset, len, 1, |this, entry| {
                    entry[0] = this.sane_l1(entry[0]);
                })
                .await?;
        }
        let tables = std::mem::take(&mut self.l2_tables);
        let len = self.geometry.l2_table_bytes();
        let step = 1 << (self.geometry.l2_entry_bits() - 3);
        for table in &tables.list {
            // Those at odd places are not referred to any more.
            let odd = !table.offset.is_multiple_of(len) || table.offset == 0;
            if odd || self.is_shared(table.offset, len) {
                continue;
            }
            fixed += self
                .rewrite(table.offset, len, step, |this, entry| {
                    let second = entry.get(1).copied().unwrap_or_default();
                    let (first, second) = this.sane_l2(entry[0], second);
                    entry[0] = first;
                    if let Some(word) = entry.get_mut(1) {
                        *word = second;
                    }
                })
                .await?;
        }
        self.l2_tables = tables;
        Ok(fixed)
    }

    /// What is in the range may be something else too, which must not change.
    pub(super) fn is_shared(&self, offset: u64, len: u64) -> bool {
        let bits = self.geometry.cluster_bits;
        len > 0
            && (offset >> bits..=(offset + len - 1) >> bits)
                .any(|cluster| self.counts.overlaps(cluster))
    }

    /// Lets `change` see every entry, of `step` words, of a table that is not
    /// zero, and stores those that are changed; how many.
    pub(super) async fn rewrite(
        &mut self,
        offset: u64,
        len: u64,
        step: usize,
        change: impl Fn(&Self, &mut [u64]),
    ) -> Result<u64> {
        let end = (offset + len).min(self.file_len);
        let mut changed = 0;
        let mut at = offset;
        while at < end {
            let here = PIECE.min(end - at);
            if let Some(mut bytes) = self.reader.read(at, here).await? {
                let touched = self.rewrite_piece(&mut bytes, step, &change, &mut changed);
                if let Some((from, to)) = touched {
                    // Whole sectors, so that an entry is old or new.
                    let from = from / 512 * 512;
                    let to = to.next_multiple_of(512).min(bytes.len());
                    self.storage
                        .write(at + from as u64, &bytes[from..to])
                        .await?;
                }
            }
            at += here;
        }
        Ok(changed)
    }

    /// The range of bytes that was changed.
    fn rewrite_piece(
        &self,
        bytes: &mut Buf,
        step: usize,
        change: &impl Fn(&Self, &mut [u64]),
        changed: &mut u64,
    ) -> Option<(usize, usize)> {
        let mut touched: Option<(usize, usize)> = None;
        let size = step * 8;
        for (index, raw) in bytes.chunks_exact_mut(size).enumerate() {
            if raw.iter().all(|&byte| byte == 0) {
                continue;
            }
            let mut words = [0; 2];
            for (word, raw) in words.iter_mut().zip(raw.as_chunks::<8>().0) {
                *word = u64::from_be_bytes(*raw);
            }
            let before = words;
            change(self, &mut words[..step]);
            if words == before {
                continue;
            }
            *changed += 1;
            for (word, raw) in words.iter().zip(raw.chunks_exact_mut(8)) {
                raw.copy_from_slice(&word.to_be_bytes());
            }
            let from = touched.map_or(index * size, |(from, _)| from);
            touched = Some((from, (index + 1) * size));
        }
        touched
    }

    /// Bytes from `offset` end where nothing of the file was when the repair
    /// began, and nothing has been put for an entry since.
    fn is_outside(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        end >= self
            .before
            .file_len
            .saturating_add(self.geometry.cluster_size())
            && !(self.before.copies.iter()).any(|copy| copy.contains(&offset) && end <= copy.end)
    }

    fn sane_l1(&self, raw: u64) -> u64 {
        let offset = raw & OFFSET;
        let size = self.geometry.cluster_size();
        if offset == 0 || !offset.is_multiple_of(size) || self.is_outside(offset, size) {
            return 0;
        }
        raw & !L1_RESERVED
    }

    fn sane_l2(&self, raw: u64, subclusters: u64) -> (u64, u64) {
        if raw & COMPRESSED != 0 {
            return self.sane_compressed(raw);
        }
        let mut entry = raw & !L2_RESERVED;
        // Of a subcluster that is both, nothing can be read; so it is zeros.
        let zeros = subclusters >> 32;
        let mut subclusters = zeros << 32 | subclusters & 0xffff_ffff & !zeros;
        if self.geometry.extended_l2 {
            entry &= !ZERO;
        }
        let offset = entry & OFFSET;
        if offset == 0 {
            if self.external && entry & COPIED != 0 {
                return (entry, subclusters);
            }
            // Nor can anything be read of one that is nowhere.
            subclusters = (subclusters >> 32 | subclusters & 0xffff_ffff) << 32;
            return (entry, subclusters);
        }
        let size = self.geometry.cluster_size();
        let lost = !offset.is_multiple_of(size) || !self.external && self.is_outside(offset, size);
        if lost {
            return self.zeros().unwrap_or((entry, subclusters));
        }
        (entry, subclusters)
    }

    fn sane_compressed(&self, raw: u64) -> (u64, u64) {
        let entry = raw & !COPIED;
        let shift = 62 - (self.geometry.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = ((entry & !COMPRESSED) >> shift) + 1;
        let lost = self.external
            || offset < self.geometry.cluster_size()
            || self.is_outside(offset, sectors * 512 - offset % 512);
        if lost {
            return self.zeros().unwrap_or((entry, 0));
        }
        (entry, 0)
    }

    /// The entry of a cluster that reads as zeros. Version 2 has none that
    /// hides a backing file.
    fn zeros(&self) -> Option<(u64, u64)> {
        if self.geometry.extended_l2 {
            Some((0, ALL_ZERO))
        } else if self.geometry.version >= 3 {
            Some((ZERO, 0))
        } else if self.header.backing_file.is_none() {
            Some((0, 0))
        } else {
            None
        }
    }
}
