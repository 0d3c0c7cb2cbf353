//! Which host clusters hold metadata: guest data must never be written there,
//! whatever a damaged L2 table says (item 85).

use std::collections::{BTreeMap, HashSet};
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
    clusters: RwLock<Clusters>,
    /// L2 tables of a damaged image that are something else as well.
    doubles: RwLock<HashSet<u64>>,
    /// There are any.
    has_doubles: AtomicBool,
}

/// A set of clusters.
#[derive(Debug, Default)]
struct Clusters {
    single: HashSet<u64>,
    /// Runs of several: first, and the first behind them. They do not touch,
    /// and take as much memory as there are tables, however long those say
    /// they are.
    runs: BTreeMap<u64, u64>,
}

impl Clusters {
    fn add(&mut self, first: u64, end: u64) {
        if end - first == 1 {
            self.single.insert(first);
            return;
        }
        let (mut first, mut end) = (first, end);
        while let Some((&start, &stop)) = self.runs.range(..=end).next_back() {
            if stop < first {
                break;
            }
            self.runs.remove(&start);
            (first, end) = (first.min(start), end.max(stop));
        }
        self.runs.insert(first, end);
    }

    fn remove(&mut self, first: u64, end: u64) {
        if !self.single.is_empty() {
            for cluster in first..end {
                self.single.remove(&cluster);
            }
        }
        while let Some((&start, &stop)) = self.runs.range(..end).next_back() {
            if stop <= first {
                break;
            }
            self.runs.remove(&start);
            if start < first {
                self.runs.insert(start, first);
            }
            if end < stop {
                self.runs.insert(end, stop);
            }
        }
    }

    /// The first cluster of these that is in the set.
    #[inline]
    fn first_in(&self, first: u64, end: u64) -> Option<u64> {
        let single = (first..end).find(|cluster| self.single.contains(cluster));
        let runs = self.runs.range(..end).rev();
        let run = runs.take_while(|&(_, &stop)| stop > first).last();
        match (single, run.map(|(&start, _)| start.max(first))) {
            (Some(single), Some(run)) => Some(single.min(run)),
            (single, run) => single.or(run),
        }
    }
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
        let last = offset.0.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        clusters.add(offset.cluster(self.cluster_bits), last + 1);
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
        *self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Clusters::default();
    }

    /// The cluster holds metadata no more.
    pub(crate) fn remove(&self, cluster: u64) {
        self.remove_range(cluster, 1);
    }

    /// These clusters hold metadata no more.
    pub(crate) fn remove_range(&self, first: u64, count: u64) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(first, first + count);
    }

    /// The first metadata cluster that `len` bytes from `offset` touch.
    #[inline]
    pub(crate) fn overlap(&self, offset: HostOffset, len: u64) -> Option<u64> {
        if self.template == OverlapCheck::None {
            return None;
        }
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        let last = offset.0.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        clusters.first_in(offset.cluster(self.cluster_bits), last + 1)
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

    proptest::proptest! {
        #[test]
        fn as_a_set_of_clusters(
            steps in proptest::collection::vec((0..3, 0_u64..60, 1_u64..9), 1..40),
        ) {
            let mut clusters = Clusters::default();
            let mut model = std::collections::BTreeSet::new();
            for (step, first, count) in steps {
                let range = first..first + count;
                match step {
                    0 => clusters.remove(range.start, range.end),
                    _ => clusters.add(range.start, range.end),
                }
                for cluster in range {
                    if step == 0 {
                        model.remove(&cluster);
                    } else {
                        model.insert(cluster);
                    }
                }
                for first in 0..70 {
                    for count in [1, 2, 30] {
                        let found = clusters.first_in(first, first + count);
                        let expected = model.range(first..first + count).next();
                        proptest::prop_assert_eq!(found.as_ref(), expected);
                    }
                }
            }
        }
    }
}
