//! The guards that keep requests of several threads apart, each with a switch
//! that takes it away: so that a test can show that the search for races
//! notices. Knows nothing of what the guards are about.
//!
//! Each guard is asked for at the one place that keeps it, on whatever thread:
//! a switch holds for the whole process. In a release build no guard can be
//! taken away, and nothing is left of the question.

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU8, Ordering};

/// What keeps requests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Guard {
    /// Snapshots wait for requests, and requests for snapshots.
    Gate,
    /// A request that waited is inside the disk that it finds.
    Inside,
    /// What a new snapshot shares is copied before it is written to.
    Copied,
    /// A snapshot that is being read is not deleted.
    Held,
    /// Nothing that was cached of the old mappings outlives a snapshot's
    /// change.
    CachesCleared,
    /// Who changes the mapping of a cluster holds it.
    Ranges,
    /// Freed clusters are not reused under requests that may use them.
    Grace,
    /// Data that is given up in its place is not under a request that may
    /// still use it.
    Alone,
    /// One at a time gives an L1 entry its table.
    NewTables,
    /// What is written in place is not compressed meanwhile.
    InPlace,
    /// What was inflated of a cluster goes when the cluster does.
    Inflated,
    /// What changes is recorded in the dirty bitmaps.
    Recorded,
}

/// The guard that is away, and 1; 0 for none.
#[cfg(debug_assertions)]
static AWAY: AtomicU8 = AtomicU8::new(0);

impl Guard {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Gate,
        Self::Inside,
        Self::Copied,
        Self::Held,
        Self::CachesCleared,
        Self::Ranges,
        Self::Grace,
        Self::Alone,
        Self::NewTables,
        Self::InPlace,
        Self::Inflated,
        Self::Recorded,
    ];

    /// True when this process's test has taken it away.
    #[inline(always)]
    pub(crate) fn is_away(self) -> bool {
        #[cfg(debug_assertions)]
        let away = AWAY.load(Ordering::Relaxed) == self as u8 + 1;
        #[cfg(not(debug_assertions))]
        let away = false;
        away
    }

    /// Takes it away, for good, in this process.
    #[cfg(debug_assertions)]
    pub fn take_away(self) {
        AWAY.store(self as u8 + 1, Ordering::Relaxed);
    }
}
