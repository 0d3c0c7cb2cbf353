//! The refcounts of an image, as they will be: the blocks of the file, read
//! when needed, with changes in memory only. Knows nothing of what is counted.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::spec::geometry::{Geometry, MAX_REFTABLE_BYTES};
use crate::qcow2::spec::refcount::{self, RefcountError};
use crate::qcow2::spec::{HostOffset, ReftableEntry};
use crate::runtime::Buf;
use crate::storage::Storage;

/// One refcount block.
pub(super) struct Block {
    /// Where it is in the file; none for a block that is new.
    pub(super) old: Option<HostOffset>,
    pub(super) bytes: Buf,
    pub(super) changed: bool,
    /// Where it will be, if it is changed.
    pub(super) new: Option<HostOffset>,
}

/// The refcounts.
pub(super) struct Counts {
    pub(super) geometry: Geometry,
    /// The refcount table of the file.
    pub(super) table: Vec<u64>,
    table_offset: HostOffset,
    /// Those that have been needed.
    pub(super) blocks: BTreeMap<u64, Block>,
    /// Where those are that have been read.
    seen: HashSet<HostOffset>,
    /// The clusters that the table names. Never free, whatever a damaged
    /// block says.
    named: HashSet<u64>,
    /// Clusters that are in use in the file and no more here: not to be used
    /// before the change is durable; 64 of them in a word, by its number.
    freed: BTreeMap<u64, u64>,
    /// No cluster below is free.
    cursor: u64,
}

impl Counts {
    pub(super) fn new(geometry: Geometry, table: Vec<u64>, table_offset: HostOffset) -> Self {
        let named = table.iter().map(|&raw| raw >> geometry.cluster_bits);
        Self {
            named: named.collect(),
            geometry,
            table,
            table_offset,
            blocks: BTreeMap::new(),
            seen: HashSet::new(),
            freed: BTreeMap::new(),
            // The first cluster is the header's.
            cursor: 1,
        }
    }

    fn per_block(&self) -> u64 {
        self.geometry.refcounts_per_block()
    }

    /// Entries of the largest refcount table.
    fn max_blocks(&self) -> u64 {
        MAX_REFTABLE_BYTES / 8
    }

    fn entry(&self, index: u64) -> Result<Option<HostOffset>> {
        let raw = self.table.get(index as usize).copied().unwrap_or(0);
        match ReftableEntry::decode(raw, &self.geometry) {
            Ok(ReftableEntry::Absent) => Ok(None),
            Ok(ReftableEntry::Block(offset)) => Ok(Some(offset)),
            Err(bad) => Err(bad.into_error("refcount table", self.table_offset + index * 8)),
        }
    }

    /// Block number `index`; zeros where the file has none.
    async fn block(&mut self, storage: &Storage, index: u64) -> Result<&mut Block> {
        if !self.blocks.contains_key(&index) {
            if index >= self.max_blocks() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "to count cluster {:#x} in {} bits, the refcount table would have to be \
                         longer than 8 MiB",
                        u128::from(index) * u128::from(self.per_block()),
                        self.geometry.refcount_bits()
                    ),
                )
                .cure("convert the image to one with larger clusters"));
            }
            let old = self.entry(index)?;
            let mut bytes = Buf::zeroed(self.geometry.cluster_size() as usize);
            if let Some(offset) = old {
                // What lies past the end of the file would be zeros, and take
                // memory for nothing.
                if !self.seen.insert(offset) || offset.0 >= storage.len() {
                    return Err(Error::corrupt(
                        format!("entry {index} of the refcount table names no block of its own"),
                        self.table_offset.0 + index * 8,
                    ));
                }
                storage
                    .read(offset.0, &mut bytes)
                    .await
                    .map_err(|e| e.context("cannot read a refcount block"))?;
            }
            let block = Block {
                old,
                bytes,
                changed: false,
                new: None,
            };
            self.blocks.insert(index, block);
        }
        Ok(self.blocks.get_mut(&index).expect("just put there"))
    }

    /// The refcount of a cluster.
    pub(super) async fn get(&mut self, storage: &Storage, cluster: u64) -> Result<u64> {
        let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
        let order = self.geometry.refcount_order;
        if index >= self.table.len() as u64 && !self.blocks.contains_key(&index) {
            return Ok(0);
        }
        let block = self.block(storage, index).await?;
        Ok(refcount::get(&block.bytes, order, within as usize))
    }

    /// Adds `delta` to the refcount of a cluster that is in use; the new one.
    pub(super) async fn adjust(
        &mut self,
        storage: &Storage,
        cluster: u64,
        delta: i64,
    ) -> Result<u64> {
        let at = cluster << self.geometry.cluster_bits;
        if self.get(storage, cluster).await? == 0 {
            return Err(
                Error::corrupt("a cluster that is in use has refcount 0", at)
                    .cure("run `qcow2-ublk check -r all`"),
            );
        }
        let count = self.change(storage, cluster, delta).await?;
        if count == 0 {
            *self.freed.entry(cluster / 64).or_default() |= 1 << (cluster % 64);
        }
        Ok(count)
    }

    async fn change(&mut self, storage: &Storage, cluster: u64, delta: i64) -> Result<u64> {
        let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
        let order = self.geometry.refcount_order;
        let at = cluster << self.geometry.cluster_bits;
        let block = self.block(storage, index).await?;
        let count = refcount::adjust(&mut block.bytes, order, within as usize, delta);
        let count = count.map_err(|e| match e {
            RefcountError::Overflow => Error::new(
                ErrorKind::Unsupported,
                format!("a refcount does not fit in {} bits", 1 << order),
            )
            .at(at)
            .cure("delete a snapshot, or convert the image to one with wider refcounts"),
            RefcountError::Underflow => {
                Error::corrupt("a cluster has more references than its refcount says", at)
                    .cure("run `qcow2-ublk check -r all`")
            }
        })?;
        block.changed = true;
        Ok(count)
    }

    /// Finds `count` adjacent clusters that are free, here and in the file,
    /// and gives them refcount 1.
    pub(super) async fn alloc(&mut self, storage: &Storage, count: u64) -> Result<HostOffset> {
        let end = self.max_blocks().saturating_mul(self.per_block());
        let end = end.min(1 << (56 - self.geometry.cluster_bits));
        let mut first = self.cursor;
        let mut at = first;
        // A single cluster is the first free one.
        while at - first < count {
            if at >= end {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "the refcount table cannot grow beyond 8 MiB",
                )
                .cure("convert the image to one with larger clusters"));
            }
            if self.is_free(storage, at).await? {
                at += 1;
                continue;
            }
            if at == self.cursor {
                self.cursor = at + 1;
            }
            at += 1;
            first = at;
        }
        for cluster in first..first + count {
            self.change(storage, cluster, 1).await?;
        }
        if first == self.cursor {
            self.cursor = first + count;
        }
        Ok(HostOffset::of_cluster(first, self.geometry.cluster_bits))
    }

    async fn is_free(&mut self, storage: &Storage, cluster: u64) -> Result<bool> {
        let known = self.is_freed(cluster) || self.named.contains(&cluster);
        Ok(!known && self.get(storage, cluster).await? == 0)
    }

    fn is_freed(&self, cluster: u64) -> bool {
        let word = self.freed.get(&(cluster / 64)).copied();
        word.unwrap_or(0) >> (cluster % 64) & 1 == 1
    }

    /// Takes back clusters that were allocated here and never written.
    pub(super) async fn unalloc(
        &mut self,
        storage: &Storage,
        offset: HostOffset,
        count: u64,
    ) -> Result<()> {
        let first = offset.cluster(self.geometry.cluster_bits);
        for cluster in first..first + count {
            self.change(storage, cluster, -1).await?;
        }
        self.cursor = self.cursor.min(first);
        Ok(())
    }

    /// The same counts in another width, none of it in the file; and the blocks
    /// in the file, which are still counted as in use.
    pub(super) async fn widened(
        &mut self,
        storage: &Storage,
        order: u32,
    ) -> Result<(Self, Vec<HostOffset>)> {
        let per_block = self.per_block();
        let geometry = Geometry {
            refcount_order: order,
            ..self.geometry
        };
        let mut wide = Self::new(geometry, Vec::new(), self.table_offset);
        wide.named = std::mem::take(&mut self.named);
        wide.freed = std::mem::take(&mut self.freed);
        let mut old = Vec::new();
        let indices: Vec<u64> = (0..self.table.len() as u64)
            .chain(self.blocks.keys().copied())
            .collect();
        for index in indices {
            if !self.blocks.contains_key(&index) && self.entry(index)?.is_none() {
                continue;
            }
            self.block(storage, index).await?;
            let block = self.blocks.remove(&index).expect("just loaded");
            old.extend(block.old);
            for within in 0..per_block {
                let narrow = self.geometry.refcount_order;
                let count = refcount::get(&block.bytes, narrow, within as usize);
                if count > 0 {
                    wide.put(storage, index * per_block + within, count).await?;
                }
            }
            // Its entry is not to be read again.
            if let Some(entry) = self.table.get_mut(index as usize) {
                *entry = 0;
            }
        }
        Ok((wide, old))
    }

    async fn put(&mut self, storage: &Storage, cluster: u64, count: u64) -> Result<()> {
        let order = self.geometry.refcount_order;
        if count > refcount::max(order) {
            let at = cluster << self.geometry.cluster_bits;
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a refcount of {count} does not fit in {} bits", 1 << order),
            )
            .at(at)
            .cure("choose wider refcounts, or delete snapshots"));
        }
        let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
        let block = self.block(storage, index).await?;
        refcount::set(&mut block.bytes, order, within as usize, count);
        block.changed = true;
        Ok(())
    }

    /// The clusters that will be free, as runs: first and how many.
    pub(super) fn freed_runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (&word, bits) in &self.freed {
            let mut bits = *bits;
            while bits != 0 {
                let cluster = word * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == cluster => *count += 1,
                    _ => runs.push((cluster, 1)),
                }
            }
        }
        runs
    }
}
