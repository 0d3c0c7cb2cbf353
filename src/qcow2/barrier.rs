//! How much of what was acknowledged is durable, and when.

use std::sync::atomic::Ordering;

use super::Image;
use crate::error::Result;
use crate::rule::Rule;

/// What is durable when: each of these promises includes that of the one
/// before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Barrier {
    /// Nothing: a flush makes nothing durable, and after a power cut the image
    /// may be beyond repair. For work that is thrown away then. The death of
    /// the process alone loses nothing that was flushed.
    None,
    /// After a flush, all that was acknowledged before.
    #[default]
    Batched,
    /// After a request that changes where data is (the first write to a
    /// cluster, a discard), all that was acknowledged before, and itself.
    Metadata,
    /// After every write, zeroing and discard, itself and all before.
    Full,
}

impl Image {
    /// How many changes of mappings there have been.
    #[inline]
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Makes a change durable if that was promised before it is acknowledged.
    /// There were `before` changes of mappings when it began; where others
    /// were made meanwhile, a flush more does no harm.
    #[inline]
    pub(crate) async fn acknowledge(&self, before: u64) -> Result<()> {
        match self.barrier {
            Barrier::None | Barrier::Batched => Ok(()),
            _ if Rule::BarrierFlushes.is_broken() => Ok(()),
            Barrier::Metadata if self.changes() == before => Ok(()),
            Barrier::Metadata | Barrier::Full => self.flush().await,
        }
    }
}
