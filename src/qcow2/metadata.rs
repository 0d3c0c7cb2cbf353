//! Which host clusters hold metadata: guest data must never be written there,
//! whatever a damaged L2 table says (item 85).

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use super::spec::addr::HostOffset;

/// The clusters of header, tables and refcount blocks.
#[derive(Debug)]
pub(crate) struct Metadata {
    cluster_bits: u32,
    clusters: RwLock<HashSet<u64>>,
}

impl Metadata {
    pub(crate) fn new(cluster_bits: u32) -> Self {
        Self {
            cluster_bits,
            clusters: RwLock::default(),
        }
    }

    /// Adds the cluster at `offset`.
    pub(crate) fn add(&self, offset: HostOffset) {
        self.add_range(offset, 1);
    }

    /// Adds the clusters that `len` bytes from `offset` touch.
    pub(crate) fn add_range(&self, offset: HostOffset, len: u64) {
        let mut clusters = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let last = (offset.0 + len.max(1) - 1) >> self.cluster_bits;
        clusters.extend(offset.cluster(self.cluster_bits)..=last);
    }

    /// Forgets all of them.
    pub(crate) fn clear(&self) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The cluster holds metadata no more.
    pub(crate) fn remove(&self, cluster: u64) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&cluster);
    }

    /// The first metadata cluster that `len` bytes from `offset` touch.
    pub(crate) fn overlap(&self, offset: HostOffset, len: u64) -> Option<u64> {
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        let last = (offset.0 + len.max(1) - 1) >> self.cluster_bits;
        (offset.cluster(self.cluster_bits)..=last).find(|cluster| clusters.contains(cluster))
    }
}
