//! Clusters that have owners who exclude each other, or more owners than a
//! refcount can say: each owner but the metadata itself gets a copy of what
//! it shows now.

use std::collections::BTreeMap;

use super::super::tables::{COMPRESSED, COPIED, OFFSET, PIECE};
use super::Checked;
use crate::error::Result;
use crate::qcow2::spec::header::CryptMethod;
use crate::runtime::Buf;

/// Bytes that are copied at most: an enemy's image may refer to one cluster
/// any number of times.
const MOST: u64 = 1 << 30;

/// Entries that get clusters of their own, by their place in the file.
#[derive(Default)]
pub(super) struct Moves(BTreeMap<u64, Move>);

struct Move {
    entry: u64,
    /// The bytes it refers to.
    from: u64,
    len: u64,
    /// How many references the entry is.
    times: u64,
}

impl Moves {
    /// The counts of the new clusters, one after the other.
    pub(super) fn counts(&self, cluster_bits: u32) -> Vec<u64> {
        let mut counts = Vec::new();
        for one in self.0.values() {
            let clusters = one.clusters(cluster_bits);
            counts.resize(counts.len() + clusters as usize, one.times);
        }
        counts
    }

    fn add(&mut self, at: u64, one: Move) {
        self.0
            .entry(at)
            .and_modify(|known| known.times += one.times)
            .or_insert(one);
    }
}

impl Move {
    fn clusters(&self, bits: u32) -> u64 {
        ((self.from + self.len - 1) >> bits) - (self.from >> bits) + 1
    }
}

impl Checked<'_> {
    /// The entries that refer to such clusters. None if there are too many to
    /// be copied.
    ///
    /// An L1 table that shares its cluster with what cannot leave it is let
    /// alone: nobody knows what its entries are, and if they were moved, so they
    /// would be by every other repair.
    pub(super) async fn clashes(&mut self) -> Result<Option<Moves>> {
        let mut moves = Moves::default();
        if !self.counts.has_clashes() {
            return Ok(Some(moves));
        }
        let size = self.geometry.cluster_size();
        let active = (self.header.l1_table_offset.0, self.header.l1_bytes());
        for (offset, len) in [vec![active], self.snapshot_l1s.clone()].concat() {
            self.visit(offset, len, 1, |this, at, entry| {
                let from = entry & OFFSET;
                let ours = !this.counts.is_knot(at >> this.geometry.cluster_bits);
                if from != 0 && ours && this.clashes_at(from, size, false) {
                    moves.add(
                        at,
                        Move {
                            entry,
                            from,
                            len: size,
                            times: 1,
                        },
                    );
                }
            })
            .await?;
        }
        // Tables first: the copies are looked into the next time.
        if moves.0.is_empty() && !self.external {
            // What LUKS encrypts depends on its place in the file: elsewhere it
            // would be noise. So such data stays, and the clash with it. What is
            // compressed is not encrypted.
            let luks = self.header.crypt_method == CryptMethod::Luks;
            let tables = std::mem::take(&mut self.l2_tables);
            let step = 1 << (self.geometry.l2_entry_bits() - 3);
            for table in &tables.list {
                let cluster = table.offset >> self.geometry.cluster_bits;
                let misplaced = !table.offset.is_multiple_of(size) || table.offset == 0;
                if misplaced || self.counts.must_leave(cluster, false) {
                    continue;
                }
                self.visit(table.offset, size, step, |this, at, entry| {
                    let (from, len) = this.extent_of(entry);
                    let fixed = luks && entry & COMPRESSED == 0;
                    if from != 0 && !fixed && this.clashes_at(from, len, true) {
                        moves.add(
                            at,
                            Move {
                                entry,
                                from,
                                len,
                                times: table.total,
                            },
                        );
                    }
                })
                .await?;
                if moves.0.len() as u64 * size > MOST {
                    break;
                }
            }
            self.l2_tables = tables;
        }
        let max = self.geometry.max_refcount();
        let too_many = moves.0.len() as u64 * size > MOST;
        let too_often = moves.0.values().any(|one| one.times > max);
        Ok((!too_many && !too_often).then_some(moves))
    }

    /// What an L2 entry refers to: first byte and length.
    fn extent_of(&self, entry: u64) -> (u64, u64) {
        if entry & COMPRESSED == 0 {
            return (entry & OFFSET, self.geometry.cluster_size());
        }
        let shift = 62 - (self.geometry.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = ((entry & !(COMPRESSED | COPIED)) >> shift) + 1;
        (offset, sectors * 512 - offset % 512)
    }

    /// A cluster of the range has to be left by this owner, which is data or
    /// else a table. Data makes way for a table.
    fn clashes_at(&self, from: u64, len: u64, data: bool) -> bool {
        let bits = self.geometry.cluster_bits;
        (from >> bits..=(from + len - 1) >> bits)
            .any(|cluster| self.counts.must_leave(cluster, data))
    }

    async fn visit(
        &mut self,
        offset: u64,
        len: u64,
        step: usize,
        mut see: impl FnMut(&Self, u64, u64),
    ) -> Result<()> {
        let end = (offset + len).min(self.file_len);
        let mut at = offset;
        while at < end {
            let here = PIECE.min(end - at);
            if let Some(bytes) = self.reader.read(at, here).await? {
                let entries = bytes.as_chunks::<8>().0.iter().step_by(step);
                for (index, raw) in entries.enumerate() {
                    let entry = u64::from_be_bytes(*raw);
                    if entry != 0 {
                        see(self, at + (index * step * 8) as u64, entry);
                    }
                }
            }
            at += here;
        }
        Ok(())
    }

    /// Fills the new clusters, which begin at cluster `start` and are counted,
    /// and lets the entries refer to them; how many.
    ///
    /// On disk: the copies `|` the entries `|`. The old clusters' counts are
    /// too high then.
    pub(super) async fn separate(&self, moves: &Moves, start: u64) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let mut to = start;
        let mut entries = Vec::with_capacity(moves.0.len());
        for (&at, one) in &moves.0 {
            let first = one.from >> bits << bits;
            let clusters = one.clusters(bits);
            let mut copy = Buf::take((clusters << bits) as usize);
            self.storage.read(first, &mut copy).await?;
            self.storage.write(to << bits, &copy).await?;
            let entry = (one.entry & !COPIED) - one.from + (one.from - first) + (to << bits);
            entries.push((at, entry));
            to += clusters;
        }
        self.storage.sync().await?;
        for (at, entry) in entries {
            self.storage.write(at, &entry.to_be_bytes()).await?;
        }
        self.storage.sync().await?;
        Ok(moves.0.len() as u64)
    }
}
