//! Changing an image's metadata as a whole: the new state is built beside the
//! old one, in clusters that are free, and one sector of the header makes it
//! the valid one. Knows nothing of guest data, nor what the change is for.
//!
//! # What is on disk at each moment
//!
//! new tables, refcount blocks and refcount table, all in free clusters `|`
//! the header's first sector `|` freed clusters are punched out.
//!
//! Size, L1 table, refcount table, snapshot table, autoclear bits and width of
//! refcounts are neighbours in the header, between bytes 24 and 100, and are
//! written at once.
//! A power cut leaves the old state wholly, whose refcounts know nothing of
//! the new tables, or the new state wholly: neither of them leaks, and no
//! COPIED flag ever contradicts a refcount.
//!
//! # What it needs
//!
//! Nobody else may change the image meanwhile: no request under way, nothing
//! of its metadata newer in memory than in the file, no cluster reserved.

mod counts;
mod tree;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::meta::read_words;
use crate::qcow2::spec::header::{Autoclear, SIZE_AT};
use crate::qcow2::spec::{Geometry, Header, HostOffset, ReftableEntry};
use crate::rule::Rule;
use crate::runtime::Buf;
use crate::storage::Storage;

use counts::Counts;
pub(crate) use tree::{Tree, damaged, read_l2};

/// A new state of an image under construction.
pub(crate) struct Shadow<'a> {
    storage: &'a Storage,
    /// As it will be. Where the tables are is up to [`Self::finish`]'s caller,
    /// but for the refcount table.
    pub(crate) header: Header,
    counts: Counts,
}

/// A new state, complete and durable, that nothing refers to yet.
#[derive(Debug)]
pub(crate) struct Ready {
    /// As it will be.
    pub(crate) header: Header,
    /// Entries of the refcount table.
    pub(crate) reftable: Vec<u64>,
    /// Clusters that will be free: first and how many.
    freed: Vec<(u64, u64)>,
}

impl std::fmt::Debug for Shadow<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shadow").finish_non_exhaustive()
    }
}

impl<'a> Shadow<'a> {
    /// Begins with the state that `header` describes, which is the file's.
    pub(crate) async fn begin(storage: &'a Storage, header: Header) -> Result<Self> {
        let (offset, len) = (header.refcount_table_offset, header.reftable_bytes());
        let table = read_words(storage, offset, len)
            .await
            .map_err(|e| e.context("cannot read the refcount table"))?;
        let counts = Counts::new(header.geometry(), table, offset);
        let mut shadow = Self {
            storage,
            header,
            counts,
        };
        // The table always moves, because blocks do.
        let (offset, len) = (
            shadow.header.refcount_table_offset,
            shadow.header.reftable_bytes(),
        );
        shadow.free(offset, len).await?;
        Ok(shadow)
    }

    pub(crate) fn storage(&self) -> &'a Storage {
        self.storage
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.counts.geometry
    }

    /// The refcount of the cluster at `offset`, as it will be.
    pub(crate) async fn count(&mut self, offset: HostOffset) -> Result<u64> {
        let cluster = offset.cluster(self.geometry().cluster_bits);
        self.counts.get(self.storage, cluster).await
    }

    /// Adds `delta` to the refcount of a cluster that is in use; the new one.
    pub(crate) async fn adjust(&mut self, cluster: u64, delta: i64) -> Result<u64> {
        self.counts
            .adjust(self.storage, cluster, delta)
            .await
            .map_err(|e| e.path(self.storage.path()))
    }

    /// Counts everything in refcounts of another width from here on. Counts
    /// that do not fit are refused.
    pub(crate) async fn widen(&mut self, order: u32) -> Result<()> {
        let storage = self.storage;
        let (wide, old) = self.counts.widened(storage, order).await?;
        self.counts = wide;
        self.header.refcount_order = order;
        let bits = self.geometry().cluster_bits;
        for block in old {
            self.adjust(block.cluster(bits), -1).await?;
        }
        Ok(())
    }

    /// Takes one reference from each cluster of a table of `len` bytes.
    pub(crate) async fn free(&mut self, offset: HostOffset, len: u64) -> Result<()> {
        let bits = self.geometry().cluster_bits;
        let first = offset.cluster(bits);
        for cluster in first..first + self.geometry().clusters_for(len) {
            self.adjust(cluster, -1).await?;
        }
        Ok(())
    }

    /// Writes a new table into clusters of its own; where it is. An empty
    /// one is nowhere.
    pub(crate) async fn write_table(&mut self, bytes: &[u8]) -> Result<HostOffset> {
        let clusters = self.geometry().clusters_for(bytes.len() as u64);
        if clusters == 0 {
            return Ok(HostOffset(0));
        }
        let offset = self.counts.alloc(self.storage, clusters).await?;
        self.write(offset, bytes).await?;
        Ok(offset)
    }

    /// Writes whole clusters, the last filled up with zeros.
    async fn write(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        let cluster_size = self.geometry().cluster_size();
        let len = (bytes.len() as u64).next_multiple_of(cluster_size);
        if self.storage.is_block_device() && offset.0 + len > self.storage.len() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the block device that holds the image is full",
            )
            .path(self.storage.path())
            .at(self.storage.len())
            .cure("enlarge the device"));
        }
        let failed = |e: Error| e.context("cannot write new metadata");
        if bytes.len() as u64 == len {
            return self.storage.write(offset.0, bytes).await.map_err(failed);
        }
        let mut whole = Buf::zeroed(len as usize);
        whole[..bytes.len()].copy_from_slice(bytes);
        self.storage.write(offset.0, &whole).await.map_err(failed)
    }

    /// Writes what is left of the new state, the refcounts, and makes all of
    /// it durable.
    pub(crate) async fn finish(mut self) -> Result<Ready> {
        let storage = self.storage;
        let geometry = self.geometry();
        let (offset, clusters) = self.place_refcounts().await?;

        let mut table = self.counts.table.clone();
        let entries = clusters * geometry.reftable_entries_per_cluster();
        table.resize(entries as usize, 0);
        for (&index, block) in &self.counts.blocks {
            if let Some(new) = block.new {
                table[index as usize] = ReftableEntry::Block(new).encode();
                self.write(new, &block.bytes).await?;
            }
        }
        let mut bytes = Buf::take(table.len() * 8);
        for (raw, entry) in bytes.chunks_exact_mut(8).zip(&table) {
            raw.copy_from_slice(&entry.to_be_bytes());
        }
        self.write(offset, &bytes).await?;
        if !Rule::StateBeforeSwitch.is_broken() {
            storage.sync().await?;
        }

        self.header.refcount_table_offset = offset;
        // At most 8 MiB.
        self.header.refcount_table_clusters = clusters as u32;
        self.header.autoclear &= Autoclear::KNOWN;
        Ok(Ready {
            header: self.header,
            reftable: table,
            freed: self.counts.freed_runs(),
        })
    }

    /// Finds places for every changed refcount block and for the table: where
    /// that is, and how many clusters long.
    async fn place_refcounts(&mut self) -> Result<(HostOffset, u64)> {
        let per_cluster = self.geometry().reftable_entries_per_cluster();
        let least = (self.counts.table.len() as u64).div_ceil(per_cluster);
        let mut table: Option<(HostOffset, u64)> = None;
        // Places are counted in blocks, which may change others, or be new.
        loop {
            let homeless = self.counts.blocks.iter();
            let homeless: Vec<_> = homeless
                .filter(|(_, block)| block.changed && block.new.is_none())
                .map(|(&index, block)| (index, block.old))
                .collect();
            for &(index, old) in &homeless {
                let new = self.counts.alloc(self.storage, 1).await?;
                if let Some(old) = old {
                    let cluster = old.cluster(self.geometry().cluster_bits);
                    self.adjust(cluster, -1).await?;
                }
                let block = self.counts.blocks.get_mut(&index).expect("it is listed");
                block.new = Some(new);
            }
            let blocks = self.counts.blocks.keys().next_back().map_or(0, |n| n + 1);
            let needed = blocks.div_ceil(per_cluster).max(least).max(1);
            match table {
                Some((_, clusters)) if clusters >= needed && homeless.is_empty() => break,
                Some((_, clusters)) if clusters >= needed => {}
                other => {
                    if let Some((offset, clusters)) = other {
                        self.counts.unalloc(self.storage, offset, clusters).await?;
                    }
                    table = Some((self.counts.alloc(self.storage, needed).await?, needed));
                }
            }
        }
        Ok(table.expect("the loop ends with one"))
    }

    /// Cuts off what an attempt that failed has added to the file. Nothing
    /// refers to it.
    pub(crate) async fn give_up(storage: &Storage, len_before: u64) {
        if !storage.is_block_device() && storage.len() > len_before {
            // The error of the attempt tells more.
            let _ = storage.set_len(len_before).await;
        }
    }
}

impl Ready {
    /// What makes this state the valid one, to be written in one piece at
    /// [`SIZE_AT`].
    pub(crate) fn switch(&self) -> Vec<u8> {
        self.header.switch_update()
    }

    /// As [`Self::publish`], where more than size and tables changes: the
    /// whole header, which has to fit into a sector.
    pub(crate) async fn publish_header(&self, storage: &Storage) -> Result<()> {
        let bytes = one_sector(&self.header).map_err(|e| e.path(storage.path()))?;
        storage
            .write(0, &bytes)
            .await
            .map_err(|e| e.context("cannot write the image header"))?;
        Self::settle(storage).await
    }

    /// Makes this state the valid one, durably, in a file that nobody else has
    /// open.
    pub(crate) async fn publish(&self, storage: &Storage) -> Result<()> {
        storage
            .write(SIZE_AT.0, &self.switch())
            .await
            .map_err(|e| e.context("cannot write the image header"))?;
        Self::settle(storage).await
    }

    /// Makes the switch durable, once it is written.
    pub(crate) async fn settle(storage: &Storage) -> Result<()> {
        if Rule::SwitchBeforePunch.is_broken() {
            return Ok(());
        }
        storage.sync().await
    }

    /// Gives the space of what is free now back to the host; the old state is
    /// durably gone.
    pub(crate) async fn punch_freed(&self, storage: &Storage) {
        let bits = self.header.cluster_bits;
        for &(first, count) in &self.freed {
            // Failing to give space back loses nothing.
            let _ = storage.punch(first << bits, count << bits).await;
        }
    }
}

/// The header as it can be written at once.
pub(crate) fn one_sector(header: &Header) -> Result<Vec<u8>> {
    const SECTOR: usize = 512;
    let mut bytes = header.encode()?;
    if bytes.len() > SECTOR {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the new header would take {} bytes, and only a sector of {SECTOR} can be \
                 replaced without risk",
                bytes.len()
            ),
        )
        .cure("give the backing file a shorter name, or convert the image"));
    }
    // What follows the header means nothing.
    bytes.resize(SECTOR, 0);
    Ok(bytes)
}

/// Big-endian words.
pub(crate) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().expect("8 bytes")))
        .collect()
}
