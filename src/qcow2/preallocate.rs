//! Giving every cluster of a new image its place, and the place its space.
//!
//! The clusters are mapped like written ones: their refcounts `|` their L2
//! entries, by an ordinary flush. They hold zeros because the file has never
//! been written there; where that is not known they are zeroed first.

use super::create::Preallocation;
use super::lookup::Mapping;
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
        self.map_all().await?;
        self.flush().await?;
        match mode {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => {
                // Everything between the tables is data.
                self.storage.reserve_space(0, self.storage.len()).await
            }
            Preallocation::Full => self.write_all().await,
        }
    }

    async fn map_all(&self) -> Result<()> {
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
            let run = reserved.run();
            if !run.zeroed {
                let len = run.count << bits;
                self.storage
                    .write_zeroes(reserved.offset().0, len, true)
                    .await?;
            }
            self.change(0, at, run.count, Change::Data(reserved))
                .await?;
            cluster += run.count;
        }
        Ok(())
    }

    /// Writes zeros into every cluster.
    async fn write_all(&self) -> Result<()> {
        let mut at = 0;
        let end = self.geometry.clusters_for(self.size()) << self.geometry.cluster_bits;
        while at < end {
            let extent = self.lookup(GuestOffset(at), end - at).await?;
            if let Mapping::Data { host, .. } = extent.mapping {
                self.write_zeros(host, extent.len).await?;
            }
            at += extent.len;
        }
        Ok(())
    }

    async fn write_zeros(&self, host: HostOffset, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let step = STEP.min(len - done);
            self.storage
                .start_write(host.0 + done, &Payload::zeros(step))
                .await?;
            done += step;
        }
        Ok(())
    }
}
