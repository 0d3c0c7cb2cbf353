//! Giving every cluster of a new image its place, and the place its space.
//!
//! The clusters are mapped like written ones: their refcounts `|` their L2
//! entries, by an ordinary flush. They hold zeros because the file has never
//! been written there; where that is not known they are zeroed first. What
//! need not be zeros to show zeros, or is to show the layer below, is space
//! alone: see [`Image::only_space`].

use super::create::Preallocation;
use super::map::Change;
use super::spec::addr::GuestOffset;
use super::{HostOffset, Image};
use crate::error::Result;
use crate::runtime::Payload;

/// Bytes zeroed at once.
const STEP: u64 = 1 << 20;

impl Image {
    /// Maps every cluster, all of which are unallocated, to one that reads as
    /// zeros.
    pub(crate) async fn preallocate(&self, mode: Preallocation) -> Result<()> {
        if mode == Preallocation::Off {
            return Ok(());
        }
        if self.data_file().is_some() {
            return self.preallocate_data_file(0, self.size(), mode).await;
        }
        self.map_all(mode).await?;
        self.flush().await?;
        if mode == Preallocation::Falloc {
            // Everything between the tables is data.
            self.storage.reserve_space(0, self.storage.len()).await?;
        }
        Ok(())
    }

    /// The same for the clusters from `start` to `end` in the external data
    /// file, which has zeros there and is as long.
    pub(crate) async fn preallocate_data_file(
        &self,
        start: u64,
        end: u64,
        mode: Preallocation,
    ) -> Result<()> {
        match mode {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => self.data().reserve_space(start, end - start).await?,
            Preallocation::Full => self.write_zeros(HostOffset(start), end - start).await?,
        }
        let space = self.only_space() && !self.has_raw_data_file();
        let start = start.next_multiple_of(self.cluster_size());
        self.map_data_file(0, start, end, space).await
    }

    /// True when clusters can have space without showing what is in it: with
    /// subclusters, as QEMU does it, and where the space is to be encrypted,
    /// in which zeros would show as noise.
    pub(crate) fn only_space(&self) -> bool {
        self.geometry.extended_l2 || (self.is_encrypted() && self.version() >= 3)
    }

    async fn map_all(&self, mode: Preallocation) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let clusters = self.geometry.clusters_for(self.size());
        let mut cluster = 0;
        while cluster < clusters {
            if self.is_crowded() {
                self.flush().await?;
            }
            let at = GuestOffset(cluster << bits);
            self.own_l2(0, at).await?;
            let in_table = self.geometry.l2_entries() - cluster % self.geometry.l2_entries();
            let reserved = self.reserve(0, in_table.min(clusters - cluster)).await?;
            let (count, zeroed) = (reserved.run().count, reserved.run().zeroed);
            let (host, len) = (reserved.offset(), count << bits);
            if mode == Preallocation::Full {
                self.write_zeros(host, len).await?;
            } else if !zeroed && !self.only_space() {
                self.storage.write_zeroes(host.0, len, true).await?;
            }
            let change = if self.only_space() {
                Change::Space(Some(reserved))
            } else {
                Change::Data(reserved)
            };
            self.change(0, at, count, change).await?;
            cluster += count;
        }
        Ok(())
    }

    /// Zeros as bytes, for a host that is to find the space for them.
    async fn write_zeros(&self, host: HostOffset, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let step = STEP.min(len - done);
            self.data()
                .start_write(host.0 + done, &Payload::zeros(step))
                .await?;
            done += step;
        }
        Ok(())
    }
}
