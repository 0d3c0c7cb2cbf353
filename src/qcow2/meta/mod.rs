//! Cached metadata tables and the order in which they reach the file.
//!
//! # What is on disk at each moment
//!
//! | change | order on disk (`|` is an fdatasync) |
//! |---|---|
//! | map a new cluster | data, refcount block `|` L2 entry `|` |
//! | new L2 table | its zeros or its copy, refcount `|` L1 entry, L2 entries `|` |
//! | map a compressed cluster | data, refcounts of the clusters it touches `|` L2 entry `|` |
//! | new refcount block | the block `|` reftable entry `|` (then as above) |
//! | snapshot, version, refcount width | all new tables beside the old ones `|` one sector of the header; see [`shadow`](super::shadow) |
//! | unmap a cluster | L2 entry `|` refcount decrement, punch; only then reusable |
//!
//! So whatever subset of the writes between two syncs survives a power cut, a
//! reference never precedes its count nor its data: at worst clusters leak.
//!
//! Three rules make that hold without ever ordering single writes:
//!
//! 1. **Increments early.** A refcount rises in the cache when a cluster is
//!    reserved, before anything refers to it. Refcount blocks may therefore be
//!    written at any time.
//! 2. **Mappings in the middle.** L2 slices and L1 blocks are written only by
//!    [`writeback`](super::flush), from copies taken before its first sync: an
//!    entry committed after that sync is not in the copy.
//! 3. **Decrements late.** What an unmapping frees is put on a list; after the
//!    sync that makes the unmapping durable, and after every request that
//!    might still use the old mapping is over ([`super::grace`]), the count
//!    drops, the space is punched out, and only then the allocator sees it.
//!
//! # Locks, outermost first
//!
//! guest cluster ranges (engine) > flush > packer > allocator > cache shard > leaf lists.
//! No std lock is held across an await.

pub(crate) mod cache;
pub(crate) mod l1;
pub(crate) mod slice;
mod table;

pub use cache::CacheStats;
pub(crate) use cache::SliceCache;
pub(crate) use l1::L1Table;
pub(crate) use slice::Slice;
pub(crate) use table::{read_pieces, read_words};
