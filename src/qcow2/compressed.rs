//! Reading compressed clusters, each inflated once for as long as it is of
//! use: a sequential reader of small blocks must not inflate per block.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::Image;
use super::spec::addr::HostOffset;
use super::spec::entry::CompressedRange;
use crate::error::Result;
use crate::runtime::sync::WaitList;
use crate::runtime::{Buf, pool};

/// Bytes of inflated clusters an image keeps.
const KEPT_BYTES: u64 = 16 << 20;
/// Clusters from this size on are inflated by the worker pool.
const POOL_FROM: u64 = 256 << 10;

enum Slot {
    Inflating,
    Ready(Arc<Buf>),
}

/// The inflated clusters of an image, by where the compressed data is: all of
/// it, because an entry that lies about the length must fail each time.
pub(crate) struct Inflated {
    slots: Mutex<LruCache<CompressedRange, Slot>>,
    capacity: usize,
    done: WaitList,
}

impl std::fmt::Debug for Inflated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflated").finish_non_exhaustive()
    }
}

impl Inflated {
    pub(crate) fn new(cluster_size: u64) -> Self {
        Self {
            slots: Mutex::new(LruCache::unbounded()),
            capacity: (KEPT_BYTES / cluster_size).clamp(8, 4096) as usize,
            done: WaitList::default(),
        }
    }

    fn slots(&self) -> MutexGuard<'_, LruCache<CompressedRange, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.slots().clear();
    }

    /// Forgets what was inflated from these host bytes: they are free.
    pub(crate) fn forget(&self, offset: HostOffset, len: u64) {
        let mut slots = self.slots();
        if slots.is_empty() {
            return;
        }
        let gone: Vec<CompressedRange> = slots
            .iter()
            .map(|(&range, _)| range)
            .filter(|range| (offset.0..offset.0 + len).contains(&range.offset.0))
            .collect();
        for range in gone {
            slots.pop(&range);
        }
    }
}

/// Removes the Inflating mark unless it has been replaced.
struct Mark<'a> {
    inflated: &'a Inflated,
    range: CompressedRange,
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        let mut slots = self.inflated.slots();
        if let Some(Slot::Inflating) = slots.peek(&self.range) {
            slots.pop(&self.range);
        }
        drop(slots);
        self.inflated.done.notify_all();
    }
}

impl Image {
    /// The whole content of a compressed cluster.
    pub(crate) async fn inflate(&self, range: CompressedRange) -> Result<Arc<Buf>> {
        let found = self
            .inflated
            .done
            .wait_until(|| {
                let mut slots = self.inflated.slots();
                match slots.get(&range) {
                    Some(Slot::Ready(cluster)) => Some(Some(Arc::clone(cluster))),
                    Some(Slot::Inflating) => None,
                    None => {
                        slots.put(range, Slot::Inflating);
                        Some(None)
                    }
                }
            })
            .await;
        if let Some(cluster) = found {
            return Ok(cluster);
        }
        let mark = Mark {
            inflated: &self.inflated,
            range,
        };
        let cluster = Arc::new(self.inflate_now(range).await?);
        {
            let mut slots = self.inflated.slots();
            slots.put(range, Slot::Ready(Arc::clone(&cluster)));
            while slots.len() > self.inflated.capacity {
                // A mark stays; at most a queue depth of them exists.
                if let Some((range, Slot::Inflating)) = slots.pop_lru() {
                    slots.put(range, Slot::Inflating);
                    break;
                }
            }
        }
        drop(mark);
        Ok(cluster)
    }

    async fn inflate_now(&self, range: CompressedRange) -> Result<Buf> {
        let cluster_size = self.geometry.cluster_size();
        let kind = self.compression;
        let mut input = Buf::take(range.max_len as usize);
        self.storage.read(range.offset.0, &mut input).await?;
        let inflate = move || {
            let mut output = Buf::take(cluster_size as usize);
            crate::codec::decompress(kind, &input, &mut output).map(|()| output)
        };
        let output = if cluster_size >= POOL_FROM {
            pool::run(inflate).await
        } else {
            inflate()
        };
        output.map_err(|e| e.at(range.offset.0).path(self.storage.path()))
    }
}
