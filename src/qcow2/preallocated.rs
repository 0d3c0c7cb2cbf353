//! Whether an image owns far more clusters than its file has space for:
//! `preallocation=metadata` makes such images. Their data clusters are partly
//! holes of the file, which a report may tell from data.

use std::collections::HashMap;

use super::Image;
use super::meta::read_words;
use super::spec::ReftableEntry;
use super::spec::refcount;
use crate::error::Result;
use crate::runtime::Buf;

impl Image {
    /// True when clearly more clusters of the file have a refcount than there
    /// is space on the host for: QEMU's test, so that the same images count
    /// as preallocated.
    pub(crate) async fn has_preallocated_metadata(&self) -> Result<bool> {
        let geometry = self.geometry();
        let header = self.header();
        let storage = self.storage();
        let on_host = storage.allocated_bytes()? / geometry.cluster_size();
        let enough = (on_host * 10 / 9).max(on_host + 2);
        let clusters = geometry.clusters_for(storage.len().next_multiple_of(512));
        let per_block = geometry.refcounts_per_block();

        let (offset, len) = (header.refcount_table_offset, header.reftable_bytes());
        let entries = read_words(storage, offset, len).await?;
        let mut block = Buf::take(geometry.cluster_size() as usize);
        // A damaged table may name one block many times.
        let mut known: HashMap<u64, u64> = HashMap::new();
        let mut used = 0;
        for (index, entry) in (0u64..).zip(entries) {
            let first = index * per_block;
            if first >= clusters || used >= enough {
                break;
            }
            let Ok(ReftableEntry::Block(offset)) = ReftableEntry::decode(entry, &geometry) else {
                continue;
            };
            let extent = storage.extent_at(offset.0);
            if !extent.data && extent.end >= offset.0 + geometry.cluster_size() {
                continue;
            }
            let counted = per_block.min(clusters - first);
            if counted == per_block
                && let Some(n) = known.get(&offset.0)
            {
                used += n;
                continue;
            }
            storage.read(offset.0, &mut block).await?;
            let order = geometry.refcount_order;
            let n = (0..counted as usize)
                .filter(|&i| refcount::get(&block, order, i) != 0)
                .count() as u64;
            known.insert(offset.0, n);
            used += n;
        }
        Ok(used >= enough)
    }
}
