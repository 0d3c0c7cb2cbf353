//! Changing the size of the disk. What is on disk when: [`grow`](Engine::grow)
//! below, and `qcow2::shrink`. An external data file is lengthened before the
//! image has the new size and shortened after: a power cut leaves it longer
//! than the disk, and growing clears what it finds there.

use std::path::Path;

use super::Engine;
use super::cipher::Moving;
use super::flight::Flight;
use crate::block::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::Preallocation;
use crate::qcow2::{Change, GuestOffset, Mapping};
use crate::rule::Rule;
use crate::storage::{OpenOptions, Storage};

/// Bytes that one write of zeros covers at most.
const ZEROS: u64 = 1 << 20;

impl Engine {
    /// Enlarges the disk to `size` bytes, a multiple of 512. The new part reads
    /// as zeros, also where a longer backing file has data and where the image
    /// has something left from a time when the disk was larger.
    ///
    /// No request may be under way on the disk's last cluster.
    ///
    /// On disk: whatever makes the new part read as zeros `|` the size.
    pub async fn grow(&self, size: u64) -> Result<()> {
        self.grow_preallocated(size, Preallocation::Off).await
    }

    /// As [`Self::grow`], and the clusters that are wholly new get space.
    pub async fn grow_preallocated(&self, size: u64, space: Preallocation) -> Result<()> {
        let image = self.top();
        let _turn = image.reshape().await;
        let old = image.size();
        if size < old {
            return Err(
                Error::new(ErrorKind::Usage, "growing cannot make a disk smaller")
                    .path(image.path()),
            );
        }
        let slot = 0;
        self.prepare().await?;
        image.grow_in_memory(size).await?;
        let stored = async {
            self.grow_data_file(slot, old, size, space).await?;
            if !self.reads_zero(0, old, size - old).await? {
                let _presence = image.enter(slot).await;
                self.zero_range(slot, old, size - old, true).await?;
            }
            if image.data_file().is_some() {
                if space != Preallocation::Off {
                    image.preallocate_data_file(old, size, space).await?;
                }
            } else if space != Preallocation::Off {
                self.preallocate(slot, old, size, space).await?;
            }
            // The zeros are durable before the size shows them.
            if !Rule::ZerosBeforeSize.is_broken() {
                image.flush().await?;
            }
            image.store_size().await
        }
        .await;
        if stored.is_err() {
            image.ungrow(old);
        }
        let bitmaps = image.end_bitmap_resize().await;
        stored.and(bitmaps)
    }

    /// Makes an external data file as long as the disk. A raw one is mapped
    /// there, as it is everywhere: others may write to it without us.
    async fn grow_data_file(
        &self,
        slot: usize,
        old: u64,
        size: u64,
        space: Preallocation,
    ) -> Result<()> {
        let image = self.top();
        let Some(data) = image.data_file() else {
            return Ok(());
        };
        // It may be longer than the disk was, and what is there was not shown:
        // in the last cluster, and in a raw or preallocated file everywhere.
        let shown = if image.has_raw_data_file() || space != Preallocation::Off {
            size
        } else {
            old.next_multiple_of(image.cluster_size())
        };
        let stale = data.len().min(shown);
        if stale > old {
            data.write_zeroes(old, stale - old, true).await?;
        }
        if data.len() < size && !data.is_block_device() {
            data.set_len(size).await?;
        }
        if image.has_raw_data_file() {
            image.map_data_file(slot, old, size, false).await?;
        }
        Ok(())
    }

    /// Makes the disk smaller: what is behind `size`, a multiple of 512, is
    /// lost, here and not in snapshots. The file gets shorter at the close.
    ///
    /// Requests under way come first; others wait, and are refused if they are
    /// not inside the disk any more.
    pub async fn shrink(&self, size: u64) -> Result<()> {
        let image = self.top();
        let turn = image.reshape().await;
        let _quiet = image.quiet(&turn).await;
        if size > image.size() {
            return Err(
                Error::new(ErrorKind::Usage, "shrinking cannot make a disk larger")
                    .path(image.path()),
            );
        }
        let slot = 0;
        self.prepare().await?;
        if Rule::SizeBeforeUnmapping.is_broken() {
            let end = size.next_multiple_of(image.cluster_size());
            image.drop_mappings(slot, GuestOffset(end)).await?;
        }
        let stored = image.store_smaller_size(size).await;
        // Those of the size that holds now.
        let bitmaps = image.end_bitmap_resize().await;
        stored.and(bitmaps)?;
        let end = size.next_multiple_of(image.cluster_size());
        self.clear_tail(size, end).await?;
        image.drop_mappings(slot, GuestOffset(end)).await?;
        match image.data_file() {
            Some(data) if !data.is_block_device() => data.set_len(size).await,
            _ => Ok(()),
        }
    }

    /// Zeros in the last cluster behind the disk's end, for those who enlarge
    /// the disk again and do not look. A cluster that is not ours alone stays.
    async fn clear_tail(&self, start: u64, end: u64) -> Result<()> {
        let image = self.top();
        let mut at = start;
        while at < end {
            let extent = image.lookup(GuestOffset(at), end - at).await?;
            if let Mapping::Data { host, copied: true } = extent.mapping {
                image.check_overlap(host, extent.len)?;
                self.zero_data(GuestOffset(at), host, extent.len, false)
                    .await?;
            }
            at += extent.len;
        }
        Ok(())
    }

    /// Gives the whole clusters from `start` to `end`, which read as zeros,
    /// host clusters that do too.
    async fn preallocate(
        &self,
        slot: usize,
        start: u64,
        end: u64,
        space: Preallocation,
    ) -> Result<()> {
        let image = self.top();
        let bits = image.cluster_bits();
        let mut at = start.next_multiple_of(image.cluster_size());
        while at < end {
            let extent = image.lookup(GuestOffset(at), end - at).await?;
            if let Mapping::Data { .. } | Mapping::Compressed(_) = extent.mapping {
                at = (at + extent.len).next_multiple_of(image.cluster_size());
                continue;
            }
            let wanted = extent.len.div_ceil(image.cluster_size());
            image.own_l2(slot, GuestOffset(at)).await?;
            let reserved = image.reserve(slot, wanted).await?;
            let (host, count) = (reserved.offset(), reserved.run().count);
            image.check_overlap(host, count << bits)?;
            match space {
                Preallocation::Off => {}
                // Only encrypted zeros read as zeros.
                _ if image.is_encrypted() && !image.only_space() => {
                    self.zero_data(GuestOffset(at), host, count << bits, false)
                        .await?;
                }
                Preallocation::Metadata if reserved.run().zeroed || image.only_space() => {}
                Preallocation::Metadata | Preallocation::Falloc => {
                    let may_unmap = space == Preallocation::Metadata;
                    image
                        .storage()
                        .write_zeroes(host.0, count << bits, may_unmap)
                        .await?;
                }
                Preallocation::Full => {
                    write_zeros(image.storage(), host.0, count << bits).await?;
                }
            }
            let change = if image.only_space() {
                Change::Space(Some(reserved))
            } else {
                Change::Data(reserved)
            };
            image.change(slot, GuestOffset(at), count, change).await?;
            if image.is_crowded() {
                image.flush().await?;
            }
            at += count << bits;
        }
        Ok(())
    }
}

/// Zeros as bytes, for a host that is to find the space for them.
async fn write_zeros(storage: &Storage, offset: u64, len: u64) -> Result<()> {
    let mut flight = Flight::default();
    let mut done = 0;
    while done < len {
        let part = Payload::zeros(ZEROS.min(len - done));
        flight.add(Moving::Plain(storage.start_write(offset + done, &part)));
        done += part.len();
    }
    flight.land().await
}

/// A raw image: a file whose bytes are the disk's.
#[derive(Debug)]
pub struct RawDisk(Storage);

impl RawDisk {
    /// Opens the file for writing.
    pub fn open(path: &Path) -> Result<Self> {
        Storage::open(path, &OpenOptions::read_write()).map(Self)
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.0.len()
    }

    /// Makes the file `size` bytes long, durably.
    pub async fn resize(&self, size: u64, space: Preallocation) -> Result<()> {
        let old = self.0.len();
        if space == Preallocation::Metadata {
            return Err(
                Error::new(ErrorKind::Usage, "Unsupported preallocation mode: metadata")
                    .path(self.0.path()),
            );
        }
        self.0.set_len(size).await?;
        if size > old {
            let given = match space {
                Preallocation::Full => write_zeros(&self.0, old, size - old).await,
                Preallocation::Falloc => self.0.write_zeroes(old, size - old, false).await,
                Preallocation::Off | Preallocation::Metadata => Ok(()),
            };
            if let Err(error) = given {
                // The first error tells more.
                let _ = self.0.set_len(old).await;
                return Err(error);
            }
        }
        self.0.sync().await
    }
}
