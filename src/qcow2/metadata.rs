//! Which host clusters hold metadata: guest data must never be written there,
//! whatever a damaged L2 table says (item 85).

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use super::spec::addr::HostOffset;

/// Which metadata writes are checked against, in QEMU's templates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OverlapCheck {
    /// None.
    None,
    /// What there is one of: header, active L1 table, refcount table, snapshot
    /// table, bitmap directory.
    Constant,
    /// Besides, what is known without reading more: active L2 tables, refcount
    /// blocks, the snapshots' L1 tables.
    #[default]
    Cached,
    /// Besides, the snapshots' L2 tables, for which their L1 tables are read.
    All,
}

/// Kinds of metadata that differ in what it takes to know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structure {
    /// There is one of it.
    Single,
    /// An active L2 table, a refcount block, or a snapshot's L1 table.
    Table,
    /// A snapshot's L2 table.
    InactiveL2,
}

impl OverlapCheck {
    /// Whether writes are checked against such metadata.
    pub(crate) fn covers(self, what: Structure) -> bool {
        match what {
            Structure::Single => self >= Self::Constant,
            Structure::Table => self >= Self::Cached,
            Structure::InactiveL2 => self >= Self::All,
        }
    }
}

/// The clusters of header, tables and refcount blocks.
#[derive(Debug)]
pub(crate) struct Metadata {
    cluster_bits: u32,
    template: OverlapCheck,
    clusters: RwLock<HashSet<u64>>,
    /// L2 tables of a damaged image that are something else as well.
    doubles: RwLock<HashSet<u64>>,
    /// There are any.
    has_doubles: AtomicBool,
}

impl Metadata {
    pub(crate) fn new(cluster_bits: u32, template: OverlapCheck) -> Self {
        Self {
            cluster_bits,
            template,
            clusters: RwLock::default(),
            doubles: RwLock::default(),
            has_doubles: AtomicBool::new(false),
        }
    }

    /// Which metadata is known here.
    pub(crate) fn template(&self) -> OverlapCheck {
        self.template
    }

    /// Adds the table or refcount block at `offset`.
    pub(crate) fn add(&self, offset: HostOffset) {
        self.add_as(Structure::Table, offset, 1);
    }

    /// Adds the clusters that `len` bytes from `offset` touch, of something
    /// there is one of.
    pub(crate) fn add_range(&self, offset: HostOffset, len: u64) {
        self.add_as(Structure::Single, offset, len);
    }

    /// Adds the clusters that `len` bytes from `offset` touch.
    pub(crate) fn add_as(&self, what: Structure, offset: HostOffset, len: u64) {
        if !self.template.covers(what) {
            return;
        }
        let mut clusters = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let last = (offset.0 + len.max(1) - 1) >> self.cluster_bits;
        clusters.extend(offset.cluster(self.cluster_bits)..=last);
    }

    /// The L2 table at `offset` is other metadata as well, or two L2 tables.
    pub(crate) fn add_double(&self, offset: HostOffset) {
        self.doubles
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(offset.0);
        self.has_doubles.store(true, Ordering::Release);
    }

    /// True when the L2 table at `offset` must not be written to: see
    /// [`Self::add_double`].
    pub(crate) fn is_double(&self, offset: HostOffset) -> bool {
        self.has_doubles.load(Ordering::Acquire)
            && self
                .doubles
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&offset.0)
    }

    /// Forgets all of them, but not what was found wrong.
    pub(crate) fn clear(&self) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The cluster holds metadata no more.
    pub(crate) fn remove(&self, cluster: u64) {
        self.remove_range(cluster, 1);
    }

    /// These clusters hold metadata no more.
    pub(crate) fn remove_range(&self, first: u64, count: u64) {
        let mut clusters = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if !clusters.is_empty() {
            for cluster in first..first + count {
                clusters.remove(&cluster);
            }
        }
    }

    /// The first metadata cluster that `len` bytes from `offset` touch.
    #[inline]
    pub(crate) fn overlap(&self, offset: HostOffset, len: u64) -> Option<u64> {
        if self.template == OverlapCheck::None {
            return None;
        }
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        let last = (offset.0 + len.max(1) - 1) >> self.cluster_bits;
        (offset.cluster(self.cluster_bits)..=last).find(|cluster| clusters.contains(cluster))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_cover_what_qemus_do() {
        use OverlapCheck::{All, Cached, Constant, None};
        let kinds = [Structure::Single, Structure::Table, Structure::InactiveL2];
        let covered = |template: OverlapCheck| kinds.map(|kind| template.covers(kind));
        assert_eq!(covered(None), [false; 3]);
        assert_eq!(covered(Constant), [true, false, false]);
        assert_eq!(covered(Cached), [true, true, false]);
        assert_eq!(covered(All), [true; 3]);
        assert_eq!(OverlapCheck::default(), Cached);
    }

    #[test]
    fn clusters_are_found_by_any_byte() {
        let metadata = Metadata::new(16, Cached);
        metadata.add(HostOffset(3 << 16));
        metadata.add_range(HostOffset(8 << 16), 65537);
        metadata.add_as(Structure::InactiveL2, HostOffset(20 << 16), 1);
        let at = |cluster: u64| metadata.overlap(HostOffset((cluster << 16) + 5), 1);
        assert_eq!(
            [2, 3, 4, 8, 9, 10, 20].map(|c| at(c).is_some()),
            [false, true, false, true, true, false, false]
        );
        assert_eq!(metadata.overlap(HostOffset(0), 10 << 16), Some(3));
        metadata.remove_range(0, 9);
        assert_eq!(metadata.overlap(HostOffset(0), 10 << 16), Some(9));
        let unchecked = Metadata::new(16, None);
        unchecked.add_range(HostOffset(0), 1);
        assert_eq!(unchecked.overlap(HostOffset(0), 1), Option::None);
    }

    use OverlapCheck::{Cached, None};
}
