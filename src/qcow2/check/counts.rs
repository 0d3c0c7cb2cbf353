//! How often each host cluster is used: a byte per cluster, in chunks that
//! exist only where something is used.

use std::collections::{BTreeSet, HashMap};

use crate::error::{Error, ErrorKind, Result};

/// Clusters per chunk.
const CHUNK: usize = 4096;
/// A count of 255 or more is in the map.
const FULL: u8 = u8::MAX;
/// As many clusters as QEMU checks: `INT_MAX`.
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// Chunks may take this many bytes, and as many as the file takes on its
/// host. No honest image needs more: where it uses one cluster of a chunk, it
/// keeps data in it or a table of entries about its neighbours.
const MEMORY: u64 = 256 << 20;

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Something that nothing else may share.
    Exclusive,
    /// An L2 table; snapshots may share it.
    Table,
    /// Guest data; snapshots, and compressed clusters, may share it.
    Data,
}

struct Chunk {
    counts: [u8; CHUNK],
    exclusive: [u64; CHUNK / 64],
    table: [u64; CHUNK / 64],
    data: [u64; CHUNK / 64],
    /// The stored refcount is 1.
    single: [u64; CHUNK / 64],
}

impl Chunk {
    fn new() -> Box<Self> {
        Box::new(Self {
            counts: [0; CHUNK],
            exclusive: [0; CHUNK / 64],
            table: [0; CHUNK / 64],
            data: [0; CHUNK / 64],
            single: [0; CHUNK / 64],
        })
    }
}

/// The counts.
pub(super) struct Counts {
    chunks: Vec<Option<Box<Chunk>>>,
    len: u64,
    large: HashMap<u64, u64>,
    /// Clusters with uses that exclude each other.
    overlaps: BTreeSet<u64>,
    /// Those of them with several uses that nothing else may share.
    knots: BTreeSet<u64>,
    /// Clusters with more uses than can be counted.
    overflows: BTreeSet<u64>,
    max: u64,
    /// Chunks that may still be made.
    budget: u64,
    exhausted: bool,
}

impl Counts {
    /// Counts up to `max` for `len` clusters of a file that takes `allocated`
    /// bytes on its host.
    pub(super) fn new(len: u64, max: u64, allocated: u64) -> Result<Self> {
        if len > MAX_CLUSTERS {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{len} clusters are too many to be checked"),
            )
            .cure("convert the image to one with larger clusters"));
        }
        let chunks = len.div_ceil(CHUNK as u64);
        Ok(Self {
            chunks: (0..chunks).map(|_| None).collect(),
            len,
            large: HashMap::new(),
            overlaps: BTreeSet::new(),
            knots: BTreeSet::new(),
            overflows: BTreeSet::new(),
            max,
            budget: MEMORY.saturating_add(allocated) / size_of::<Chunk>() as u64,
            exhausted: false,
        })
    }

    /// An error if the counts would have taken too much memory: they are not
    /// right then.
    pub(super) fn within_memory(&self) -> Result<()> {
        if self.exhausted {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the image refers to far more clusters than its file holds; there is not enough \
                 memory to count them",
            ));
        }
        Ok(())
    }

    /// True when the counts would have taken too much memory; see
    /// [`Self::within_memory`].
    #[inline]
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    #[inline]
    fn chunk(&mut self, cluster: u64) -> Option<(&mut Chunk, usize)> {
        let slot = self.chunks.get_mut((cluster / CHUNK as u64) as usize)?;
        if slot.is_none() {
            if self.budget == 0 {
                self.exhausted = true;
                return None;
            }
            self.budget -= 1;
            *slot = Some(Chunk::new());
        }
        Some((slot.as_mut()?, (cluster % CHUNK as u64) as usize))
    }

    /// Adds `times` uses; how many of them are more than can be counted.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, times: u64, usage: Use) -> u64 {
        let max = self.max;
        let Some((chunk, index)) = self.chunk(cluster) else {
            return 0;
        };
        let old = chunk.counts[index];
        let (word, bit) = (index / 64, 1u64 << (index % 64));
        let seen = match usage {
            Use::Exclusive => &mut chunk.exclusive,
            Use::Table => &mut chunk.table,
            Use::Data => &mut chunk.data,
        };
        let again = times > 1 || seen[word] & bit != 0;
        seen[word] |= bit;
        if old == 0 && times == 1 {
            chunk.counts[index] = 1;
            return 0;
        }
        let kinds = [&chunk.exclusive, &chunk.table, &chunk.data];
        let [exclusive, table, data] = kinds.map(|kind| kind[word] & bit != 0);
        let overlap = exclusive && (old > 0 || times > 1) || table && data;
        let current = match old {
            FULL => self.large.get(&cluster).copied().unwrap_or_default(),
            small => u64::from(small),
        };
        let new = current.saturating_add(times).min(max);
        self.set(cluster, new);
        if overlap {
            self.overlaps.insert(cluster);
        }
        if again && usage == Use::Exclusive {
            self.knots.insert(cluster);
        }
        if times > new - current {
            self.overflows.insert(cluster);
        }
        times - (new - current)
    }

    #[cold]
    fn set(&mut self, cluster: u64, count: u64) {
        let Some((chunk, index)) = self.chunk(cluster) else {
            return;
        };
        match u8::try_from(count) {
            Ok(small) if small < FULL => chunk.counts[index] = small,
            _ => {
                chunk.counts[index] = FULL;
                self.large.insert(cluster, count);
            }
        }
    }

    /// How often the cluster is used.
    #[inline]
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let Some(Some(chunk)) = self.chunks.get((cluster / CHUNK as u64) as usize) else {
            return 0;
        };
        match chunk.counts[(cluster % CHUNK as u64) as usize] {
            FULL => self.large.get(&cluster).copied().unwrap_or_default(),
            small => u64::from(small),
        }
    }

    /// True when the cluster has uses that exclude each other.
    pub(super) fn overlaps(&self, cluster: u64) -> bool {
        self.overlaps.contains(&cluster)
    }

    /// True when the cluster has several uses that nothing else may share: it
    /// does not become sound by other uses' leaving it.
    pub(super) fn is_knot(&self, cluster: u64) -> bool {
        self.knots.contains(&cluster)
    }

    /// True when some cluster's uses exclude each other or are too many.
    pub(super) fn has_clashes(&self) -> bool {
        self.clashes() > 0
    }

    /// How many clusters have uses that exclude each other, or too many.
    pub(super) fn clashes(&self) -> usize {
        self.overlaps.union(&self.overflows).count()
    }

    /// True when a use as data, or as an L2 table, has to end so that the
    /// cluster's uses agree.
    pub(super) fn must_leave(&self, cluster: u64, data: bool) -> bool {
        if self.overflows.contains(&cluster) {
            return true;
        }
        if !self.overlaps.contains(&cluster) {
            return false;
        }
        let Some(Some(chunk)) = self.chunks.get((cluster / CHUNK as u64) as usize) else {
            return false;
        };
        let index = (cluster % CHUNK as u64) as usize;
        let has = |kind: &[u64]| kind[index / 64] >> (index % 64) & 1 != 0;
        has(&chunk.exclusive) || data && has(&chunk.table)
    }

    /// The first cluster from `from` on that may be used, [`Self::len`] if
    /// there is none: whole chunks without uses are passed over.
    pub(super) fn next_used(&self, from: u64) -> u64 {
        let first = (from / CHUNK as u64) as usize;
        match self
            .chunks
            .get(first..)
            .and_then(|chunks| chunks.iter().position(Option::is_some))
        {
            Some(0) => from,
            Some(n) => (first + n) as u64 * CHUNK as u64,
            None => self.len.max(from),
        }
    }

    /// Number of clusters that can be counted.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Notes that the stored refcount of the cluster is 1.
    pub(super) fn set_single(&mut self, cluster: u64) {
        if let Some((chunk, index)) = self.chunk(cluster) {
            chunk.single[index / 64] |= 1 << (index % 64);
        }
    }

    /// Whether it was noted that the stored refcount is 1.
    #[inline]
    pub(super) fn is_single(&self, cluster: u64) -> bool {
        let Some(Some(chunk)) = self.chunks.get((cluster / CHUNK as u64) as usize) else {
            return false;
        };
        let index = (cluster % CHUNK as u64) as usize;
        chunk.single[index / 64] >> (index % 64) & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_saturate_and_large_ones_are_kept() {
        let mut counts = Counts::new(10_000, 300, 0).unwrap();
        for _ in 0..299 {
            assert_eq!(counts.add(7, 1, Use::Data), 0);
        }
        assert_eq!(counts.get(7), 299);
        assert_eq!(counts.add(7, 3, Use::Data), 2);
        assert_eq!((counts.get(7), counts.get(8)), (300, 0));
        assert_eq!(counts.add(8, 254, Use::Data), 0);
        assert_eq!(counts.add(8, 1, Use::Data), 0);
        assert_eq!(counts.get(8), 255);
        assert_eq!(counts.add(20_000, 1, Use::Data), 0);
        let mut narrow = Counts::new(10, 1, 0).unwrap();
        assert_eq!(narrow.add(1, 1, Use::Data), 0);
        assert_eq!(narrow.add(1, u64::MAX, Use::Data), u64::MAX);
    }

    #[test]
    fn uses_that_exclude_each_other_are_seen_in_any_order() {
        use Use::{Data, Exclusive, Table};
        for (a, b, overlap) in [
            (Exclusive, Data, true),
            (Data, Exclusive, true),
            (Exclusive, Exclusive, true),
            (Table, Data, true),
            (Data, Table, true),
            (Table, Table, false),
            (Data, Data, false),
        ] {
            let mut counts = Counts::new(10, 300, 0).unwrap();
            counts.add(3, 1, a);
            counts.add(3, 1, b);
            assert_eq!(counts.overlaps(3), overlap, "{a:?} {b:?}");
            let knot = a == Exclusive && b == Exclusive;
            assert_eq!(counts.is_knot(3), knot, "{a:?} {b:?}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        assert!(Counts::new(1 << 40, 1, 0).is_err());
        let mut counts = Counts::new(i32::MAX as u64, 65535, 0).unwrap();
        for cluster in (0..i32::MAX as u64).step_by(CHUNK) {
            counts.add(cluster, 1, Use::Data);
        }
        assert!(counts.within_memory().is_err());
    }
}
