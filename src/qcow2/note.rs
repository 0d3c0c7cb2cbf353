//! Finding out, when an image is opened for writing, where its metadata is.

use std::collections::HashSet;

use super::Image;
use super::metadata::Structure;
use super::snapshot;
use super::spec::addr::HostOffset;
use super::spec::entry::L1Entry;
use super::spec::geometry::MAX_L1_BYTES;
use crate::error::Result;
use crate::runtime::Buf;

impl Image {
    /// Notes where metadata is, so that nothing else is ever written there. The
    /// bitmaps' is noted when they are read.
    pub(super) async fn note_metadata(&self) {
        let header = self.header();
        self.metadata.add_range(HostOffset(0), 1);
        self.metadata
            .add_range(header.l1_table_offset, header.l1_bytes());
        self.metadata
            .add_range(header.refcount_table_offset, header.reftable_bytes());
        {
            let alloc = self.alloc.lock().await;
            for &block in alloc.refcounts.table.iter().filter(|&&block| block != 0) {
                self.metadata.add(HostOffset(block));
            }
        }
        self.note_l2_tables();
        if let Err(error) = self.note_snapshots().await {
            // Only those who want the snapshots need them to be in order.
            tracing::warn!("the snapshots' tables are not protected: {error}");
        }
    }

    /// Notes where the L2 tables are, after all that there is one of.
    fn note_l2_tables(&self) {
        let mut tables = HashSet::new();
        for index in 0..self.l1.len() as u64 {
            let entry = L1Entry::decode(self.l1.get(index), &self.geometry);
            let Ok(L1Entry::Table { offset, copied }) = entry else {
                continue;
            };
            // Several entries may share a table, but then none calls it its own.
            let is_new = tables.insert(offset.0);
            let is_other = is_new && self.metadata.overlap(offset, 1).is_some();
            if is_other || copied && !is_new {
                self.metadata.add_double(offset);
            }
            self.metadata.add(offset);
        }
    }

    /// Notes where the snapshots' tables are.
    async fn note_snapshots(&self) -> Result<()> {
        let header = self.header();
        if header.nb_snapshots == 0 {
            return Ok(());
        }
        let (snapshots, len) = snapshot::read_table(&self.storage, &header).await?;
        self.metadata.add_range(header.snapshots_offset, len);
        for snapshot in &snapshots {
            let (l1, len) = (snapshot.l1_table_offset, snapshot.l1_bytes());
            if len > 0 && len <= MAX_L1_BYTES {
                self.metadata.add_as(Structure::Table, l1, len);
                self.note_inactive(l1, len).await?;
            }
        }
        Ok(())
    }

    /// Notes where the L2 tables of a snapshot are, if somebody wants to know.
    async fn note_inactive(&self, l1: HostOffset, len: u64) -> Result<()> {
        if !self.metadata.template().covers(Structure::InactiveL2) {
            return Ok(());
        }
        let mut bytes = Buf::take(len as usize);
        self.storage.read(l1.0, &mut bytes).await?;
        for raw in bytes.as_chunks::<8>().0 {
            let raw = u64::from_be_bytes(*raw);
            if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &self.geometry) {
                self.metadata.add_as(Structure::InactiveL2, offset, 1);
            }
        }
        Ok(())
    }
}
