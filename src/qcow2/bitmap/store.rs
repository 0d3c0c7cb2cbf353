//! Writing what has changed: data, tables and directory to new clusters, then
//! the header, then the old clusters are freed.

use super::{Entry, State, file};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Image;
use crate::qcow2::alloc::{Freed, Run};
use crate::qcow2::lock;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::{Bitmap, BitmapTableEntry, BitmapsExtension};
use crate::rule::Rule;
use crate::runtime::Buf;

/// Clusters taken for what is being stored; they go back when that fails.
struct Claims<'a> {
    image: &'a Image,
    runs: Vec<Run>,
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        lock(&self.image.given_back).append(&mut self.runs);
    }
}

impl Claims<'_> {
    /// Takes adjacent clusters for `len` bytes.
    async fn take(&mut self, len: u64) -> Result<HostOffset> {
        let image = self.image;
        let count = image.geometry.clusters_for(len);
        let mut first = None;
        let reserved = image.reserve(0, count).await?;
        if reserved.run().count == count {
            first = Some(reserved.run().first);
            reserved.used(count);
        } else {
            drop(reserved);
        }
        let first = match first {
            Some(first) => first,
            None => image.claim_at_end(count).await?,
        };
        self.runs.push(Run {
            first,
            count,
            zeroed: false,
        });
        let offset = HostOffset::of_cluster(first, image.geometry.cluster_bits);
        image.check_new_metadata(offset, count << image.geometry.cluster_bits)?;
        Ok(offset)
    }

    /// Takes clusters, writes `bytes` and zeros behind them.
    async fn write(&mut self, bytes: &[u8]) -> Result<HostOffset> {
        let offset = self.take(bytes.len() as u64).await?;
        let whole = self.image.geometry.clusters_for(bytes.len() as u64);
        let mut padded = Buf::zeroed((whole << self.image.geometry.cluster_bits) as usize);
        padded[..bytes.len()].copy_from_slice(bytes);
        self.image.storage.write(offset.0, &padded).await?;
        Ok(offset)
    }

    /// They are named in the file now.
    fn keep(mut self) {
        self.runs.clear();
    }
}

impl Image {
    /// Stores the bitmaps, for a clean close. No request is under way.
    pub(in crate::qcow2) async fn close_bitmaps(&self) -> Result<()> {
        let mut state = self.bitmaps.state.lock().await;
        if !state.loaded {
            return Ok(());
        }
        // A change that comes after all would have to mark them again.
        let prepared = self
            .prepared
            .swap(false, std::sync::atomic::Ordering::SeqCst);
        let marked = std::mem::replace(&mut state.marked, false);
        let stored = self.store_bitmaps(&mut state, marked).await;
        if stored.is_err() {
            state.marked = marked;
            self.prepared
                .store(prepared, std::sync::atomic::Ordering::SeqCst);
        }
        stored
    }

    /// Makes the file what the state says. With `marks`, marks that are in the
    /// file come off.
    pub(super) async fn store_bitmaps(&self, state: &mut State, marks: bool) -> Result<()> {
        let due: Vec<usize> = (0..state.entries.len())
            .filter(|&index| is_due(state, &state.entries[index]))
            .collect();
        if due.is_empty() && !state.edited {
            if marks {
                // What was recorded is in the file already: nothing is newer
                // than the bits, once it is all durable.
                self.flush().await?;
                self.write_marks(state).await?;
                self.storage.sync().await?;
            }
            return Ok(());
        }
        let before: Vec<(usize, bool)> = due
            .iter()
            .map(|&index| (index, self.take_changed(&state.entries[index])))
            .collect();
        let old = state.entries.clone();
        let stored = self.store_new(state, &due).await;
        if stored.is_err() {
            state.entries = old;
            for (index, changed) in before {
                if let Some(live) = state.entries[index].live.as_ref().filter(|_| changed) {
                    live.set_changed();
                }
            }
        }
        stored
    }

    fn take_changed(&self, entry: &Entry) -> bool {
        entry.live.as_ref().is_some_and(|live| live.take_changed())
    }

    async fn store_new(&self, state: &mut State, due: &[usize]) -> Result<()> {
        let mut claims = Claims {
            image: self,
            runs: Vec::new(),
        };
        let mut replaced = Vec::new();
        for &index in due {
            let entry = &mut state.entries[index];
            if entry.stored {
                replaced.push(entry.disk.clone());
            }
            self.write_bits(&mut claims, entry).await?;
        }
        let mut directory = None;
        if !state.entries.is_empty() {
            let bytes = file::encode(state)?;
            directory = Some(BitmapsExtension {
                nb_bitmaps: state.entries.len() as u32,
                directory_size: bytes.len() as u64,
                directory_offset: claims.write(&bytes).await?,
            });
        }
        // Everything the new directory names, with its refcounts.
        if !Rule::BitmapBeforeDirectory.is_broken() {
            self.flush().await?;
        }
        if !self.header().bitmaps_consistent() && directory.is_none() {
            // There is none in the file, and there shall be none.
            return Ok(());
        }
        let old_directory = state.directory;
        self.publish_directory(state, directory).await?;
        claims.keep();
        state.edited = false;
        for &index in due {
            let disk = &state.entries[index].disk;
            let len = u64::from(disk.table_size) * 8;
            self.metadata.add_range(disk.table_offset, len);
        }
        replaced.append(&mut state.removed);
        for bitmap in &replaced {
            self.free_bitmap(bitmap).await;
        }
        if let Some(old) = old_directory {
            self.free_range(old.directory_offset, old.directory_size);
        }
        if let Some(new) = directory {
            self.metadata
                .add_range(new.directory_offset, new.directory_size);
        }
        Ok(())
    }

    /// Writes the bits and a table for them.
    async fn write_bits(&self, claims: &mut Claims<'_>, entry: &mut Entry) -> Result<()> {
        let cluster_size = self.cluster_size();
        let granularity_bits = entry.disk.granularity_bits;
        let entries = Bitmap::table_entries_for(granularity_bits, self.size(), &self.geometry);
        if entries == 0 {
            return Err(no_bytes(&entry.disk));
        }
        let mut table = Vec::with_capacity(entries.max(1) as usize * 8);
        let mut cluster = Buf::zeroed(cluster_size as usize);
        for index in 0..entries {
            let first = index * cluster_size * 8;
            let any = match &entry.live {
                Some(live) => live.bits.copy_bytes(first, &mut cluster),
                None => false,
            };
            let place = if !any {
                BitmapTableEntry::Zeros
            } else if cluster.iter().all(|&byte| byte == 0xff) {
                BitmapTableEntry::Ones
            } else {
                BitmapTableEntry::Cluster(claims.write(&cluster).await?)
            };
            table.extend_from_slice(&place.encode().to_be_bytes());
        }
        entry.disk.table_offset = claims.write(&table).await?;
        entry.disk.table_size = entries as u32;
        entry.stored = true;
        entry.resized = false;
        Ok(())
    }

    /// Frees the clusters of a bitmap that the directory in the file does not
    /// name any more. What cannot be read leaks.
    async fn free_bitmap(&self, bitmap: &Bitmap) {
        match self.bitmap_table(bitmap).await {
            Ok(table) => {
                for entry in table {
                    if let BitmapTableEntry::Cluster(host) = entry {
                        self.free_range(host, 1);
                    }
                }
            }
            Err(error) => tracing::warn!("clusters of a bitmap leak: {error}"),
        }
        self.free_range(bitmap.table_offset, u64::from(bitmap.table_size) * 8);
    }

    /// Frees the clusters of `len` bytes from `offset`.
    fn free_range(&self, offset: HostOffset, len: u64) {
        let first = offset.cluster(self.geometry.cluster_bits);
        let count = self.geometry.clusters_for(len);
        for cluster in first..first + count {
            self.metadata.remove(cluster);
        }
        self.frees.push(Freed {
            first,
            count,
            table: false,
        });
    }
}

/// A table has entries, and that of an empty disk would have none.
pub(super) fn no_bytes(bitmap: &Bitmap) -> Error {
    let name = String::from_utf8_lossy(&bitmap.name);
    Error::new(
        ErrorKind::Unsupported,
        format!("bitmap '{name}' cannot be stored: the disk has no bytes"),
    )
    .cure("remove the bitmap with `qcow2-ublk bitmap --remove`")
}

/// Whether the bitmap in the file has to be replaced. Where it is marked its
/// content does not matter.
fn is_due(state: &State, entry: &Entry) -> bool {
    let changed = entry.live.as_ref().is_some_and(|live| live.is_changed());
    let marked = state.marked && entry.is_enabled();
    !entry.stored || (entry.is_usable() && !marked && (changed || entry.resized))
}
