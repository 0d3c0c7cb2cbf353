//! The rules of order that keep an image whole through a power cut, each with
//! a switch that breaks it: so that a test can show that the search for power
//! cuts notices. Knows nothing of what the rules are about.
//!
//! Each rule is asked for at the one place that keeps it. In a release build
//! no rule can be broken, and nothing is left of the question.

#[cfg(debug_assertions)]
use std::cell::Cell;

/// A rule of order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Data and refcounts are durable before an L2 or L1 entry names them.
    DataBeforeMapping,
    /// Refcounts rise in the file before an entry names what they count.
    CountBeforeMapping,
    /// Refcounts fall when the unmapping is durable.
    UnmappingBeforeFree,
    /// Space is punched out when the unmapping is durable.
    UnmappingBeforePunch,
    /// A freed cluster is used again when the unmapping is durable.
    UnmappingBeforeReuse,
    /// An L2 table is durable before an L1 entry names it.
    TableBeforeL1,
    /// A refcount block is durable before the refcount table names it.
    BlockBeforeTable,
    /// A moved refcount table is durable before the header names it.
    TableBeforeHeader,
    /// A moved L1 table is durable before the header names it.
    L1BeforeHeader,
    /// All tables of a new state are durable before the header names them.
    StateBeforeSwitch,
    /// Space that a new state frees is punched out when the header names that
    /// state durably.
    SwitchBeforePunch,
    /// A refcount block is out of the table, durably, before the file is cut
    /// off in front of it.
    EntryBeforeCut,
    /// What a grown disk shows is durable before the header has its size.
    ZerosBeforeSize,
    /// A smaller size is in the header before mappings behind it go.
    SizeBeforeUnmapping,
    /// A new size is durable before resizing is over.
    SizeSyncs,
    /// Bitmaps that record are marked in use, durably, before the first write.
    MarkBeforeWrite,
    /// Bitmaps that will not fit a smaller disk are marked in use, durably,
    /// before the header has its size.
    MarkBeforeSize,
    /// Bits and tables are durable before a directory names them.
    BitmapBeforeDirectory,
    /// The dirty mark is durable before refcounts are postponed.
    DirtyBeforeLazy,
    /// Refcounts are durable before the dirty mark goes.
    CountsBeforeClean,
    /// A flush ends with a sync.
    FlushSyncs,
    /// A flush syncs the external data file too.
    FlushSyncsData,
    /// A write with FUA is flushed before it is acknowledged.
    FuaFlushes,
    /// A write is flushed before it is acknowledged, where a barrier promises
    /// that.
    BarrierFlushes,
    /// What was committed to the layer below is durable before the image loses
    /// it.
    BaseBeforeEmpty,
    /// Each step of a change of key slots is durable before the next: key
    /// material before the slot that it is for.
    KeyBeforeSlot,
}

#[cfg(debug_assertions)]
thread_local! {
    static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::DataBeforeMapping,
        Self::CountBeforeMapping,
        Self::UnmappingBeforeFree,
        Self::UnmappingBeforePunch,
        Self::UnmappingBeforeReuse,
        Self::TableBeforeL1,
        Self::BlockBeforeTable,
        Self::TableBeforeHeader,
        Self::L1BeforeHeader,
        Self::StateBeforeSwitch,
        Self::SwitchBeforePunch,
        Self::EntryBeforeCut,
        Self::ZerosBeforeSize,
        Self::SizeBeforeUnmapping,
        Self::SizeSyncs,
        Self::MarkBeforeWrite,
        Self::MarkBeforeSize,
        Self::BitmapBeforeDirectory,
        Self::DirtyBeforeLazy,
        Self::CountsBeforeClean,
        Self::FlushSyncs,
        Self::FlushSyncsData,
        Self::FuaFlushes,
        Self::BarrierFlushes,
        Self::BaseBeforeEmpty,
        Self::KeyBeforeSlot,
    ];

    /// True when this thread's test has broken it.
    #[inline(always)]
    pub(crate) fn is_broken(self) -> bool {
        #[cfg(debug_assertions)]
        let broken = BROKEN.get() == Some(self);
        #[cfg(not(debug_assertions))]
        let broken = false;
        broken
    }

    /// Breaks it, on this thread, until what is returned is dropped.
    #[cfg(debug_assertions)]
    pub fn break_here(self) -> Broken {
        Broken(BROKEN.replace(Some(self)))
    }
}

/// A rule is broken as long as this lives.
#[cfg(debug_assertions)]
#[derive(Debug)]
#[must_use = "dropped at once, it mends the rule again"]
pub struct Broken(Option<Rule>);

#[cfg(debug_assertions)]
impl Drop for Broken {
    fn drop(&mut self) {
        BROKEN.set(self.0);
    }
}
