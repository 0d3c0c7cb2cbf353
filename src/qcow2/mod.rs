//! One qcow2 image: its metadata, and changes to it that survive power loss.
//! Knows neither the layers below it nor guest data: what a copied cluster
//! needs from elsewhere, the engine fetches.

mod alloc;
pub mod amend;
mod backing;
mod barrier;
mod bitmap;
pub mod check;
mod compressed;
pub mod create;
mod crypt;
mod flush;
mod grace;
mod grow;
pub mod info;
mod lookup;
mod map;
mod marks;
mod meta;
mod metadata;
mod note;
mod open;
mod pack;
mod preallocate;
mod preallocated;
mod refcount;
mod shadow;
mod shrink;
mod snapshot;
pub mod spec;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::race::Guard;
use crate::runtime::sync;
use crate::storage::Storage;

use alloc::{Allocator, Frees, Run};
use bitmap::Bitmaps;
use compressed::Inflated;
use crypt::Encryption;
use flush::Flushes;
use grace::Grace;
use meta::{L1Table, SliceCache};
use metadata::Metadata;
use pack::Packer;

pub use crate::codec::CompressionType;
pub use barrier::Barrier;
pub use bitmap::{BitmapAction, BitmapContent, BitmapInfo};
pub(crate) use crypt::DataCipher;
pub use crypt::KeySlots;
pub use meta::CacheStats;
pub use metadata::OverlapCheck;
pub use open::ImageOptions;
pub(crate) use open::read_header;
pub use snapshot::{NewSnapshot, Selector, SnapshotJob};
pub use spec::addr::{GuestOffset, HostOffset};
pub use spec::entry::CompressedRange;
pub use spec::geometry::Geometry;
pub use spec::header::Header;

pub(crate) use grace::{Presence, Quiet};
pub(crate) use lookup::Mapping;
pub(crate) use map::Change;
pub(crate) use snapshot::HeldSnapshot;

/// An open qcow2 image. Shared by all queues.
#[derive(Debug)]
pub struct Image {
    storage: Storage,
    /// The external data file, if the image has one.
    data_file: Option<Storage>,
    /// The data file is, by itself, the disk as it is.
    raw_data_file: bool,
    geometry: Geometry,
    compression: CompressionType,
    encryption: Encryption,
    /// As in the file.
    header: Mutex<Header>,
    /// Held while a field of the header is written. A field whose writing
    /// failed, and what it should hold: the file may have either.
    suspect_field: sync::Mutex<Option<(HostOffset, Vec<u8>)>>,
    /// Virtual size in bytes.
    size: AtomicU64,
    l1: L1Table,
    l2: SliceCache,
    refblocks: SliceCache,
    inflated: Inflated,
    alloc: sync::Mutex<Allocator>,
    /// Each queue's own reserved clusters.
    runs: Box<[Mutex<Run>]>,
    /// Reservations that were dropped.
    given_back: Mutex<Vec<Run>>,
    /// Where compressed clusters go.
    packer: sync::Mutex<Packer>,
    frees: Frees,
    grace: Grace,
    /// Held while the disk's size or the snapshots change; outside of the
    /// gate, and of all other locks.
    reshaping: sync::Mutex<()>,
    /// The IDs of snapshots that are being read, once for each reader.
    held: Mutex<Vec<Vec<u8>>>,
    flushes: Flushes,
    /// Held while an L1 entry gets a new table.
    new_tables: sync::Mutex<()>,
    metadata: Metadata,
    barrier: Barrier,
    /// How many changes of mappings there were.
    changes: AtomicU64,
    /// Refcounts are postponed: the image is marked dirty.
    lazy: AtomicBool,
    /// Metadata was found to be impossible: no writes any more.
    corrupt: AtomicBool,
    /// Marked dirty by somebody else, and not repaired yet.
    needs_repair: bool,
    /// Freed clusters are punched out of the file.
    punch_frees: bool,
    /// The header has been made ready for changes to the image.
    prepared: AtomicBool,
    bitmaps: Bitmaps,
}

impl Image {
    /// The file.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The file that guest data is in: the external data file, or the image.
    #[inline]
    pub fn data(&self) -> &Storage {
        self.data_file.as_ref().unwrap_or(&self.storage)
    }

    /// The external data file, if there is one.
    pub fn data_file(&self) -> Option<&Storage> {
        self.data_file.as_ref()
    }

    /// The external data file is, by itself, the disk as it is: what the disk
    /// shows as zeros has to be zeros there.
    pub(crate) fn has_raw_data_file(&self) -> bool {
        self.raw_data_file
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        self.storage.path()
    }

    /// A copy of the header, as it is in the file.
    pub fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// Sizes of things.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Virtual size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The image has extended L2 entries: parts of clusters are mapped apart.
    #[inline]
    pub(crate) fn has_subclusters(&self) -> bool {
        self.geometry.extended_l2
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// How its compressed clusters are compressed.
    pub fn compression(&self) -> CompressionType {
        self.compression
    }

    pub(crate) fn cluster_bits(&self) -> u32 {
        self.geometry.cluster_bits
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u8 {
        self.geometry.version
    }

    /// True when the image was opened for writing.
    pub fn writable(&self) -> bool {
        self.storage.writable()
    }

    /// What the cache of L2 tables has done.
    pub fn l2_cache_stats(&self) -> CacheStats {
        self.l2.stats()
    }

    /// What the cache of refcount blocks has done.
    pub fn refcount_cache_stats(&self) -> CacheStats {
        self.refblocks.stats()
    }

    /// Counts a request in, unless all mappings are being changed, which it
    /// waits for: those it looks up stay valid until the presence ends.
    #[inline]
    pub(crate) async fn enter(&self, slot: usize) -> Presence<'_> {
        self.grace.enter(slot).await
    }

    /// Waits for whoever changes the disk's size or the snapshots: one at a
    /// time does.
    pub(crate) async fn reshape(&self) -> sync::MutexGuard<'_, ()> {
        self.reshaping.lock().await
    }

    /// Waits until no request is under way and holds up those that come. The
    /// caller is [reshaping](Self::reshape) the image.
    pub(crate) async fn quiet(&self, _turn: &sync::MutexGuard<'_, ()>) -> Option<Quiet<'_>> {
        if Guard::Gate.is_away() {
            return None;
        }
        Some(self.grace.quiet().await)
    }

    /// For a request: holds up those that come, if no other is under way.
    pub(crate) fn alone(&self) -> Option<Quiet<'_>> {
        self.grace.alone()
    }

    /// True when so much metadata is dirty that a writer should flush first.
    pub(crate) fn is_crowded(&self) -> bool {
        self.l2.is_crowded() || self.refblocks.is_crowded()
    }

    /// Refuses to write guest data where metadata is: only a damaged image
    /// asks for that.
    #[inline]
    pub(crate) fn check_overlap(&self, host: HostOffset, len: u64) -> Result<()> {
        if self.data_file.is_some() {
            return Ok(()); // there is no metadata in that file
        }
        self.refuse_overlap(host, len, "the image maps guest data onto its own metadata")
    }

    /// Refuses new metadata where other metadata is: refcounts that lie give
    /// it out as free. All metadata is in the image's own file.
    #[inline]
    pub(crate) fn check_new_metadata(&self, offset: HostOffset, len: u64) -> Result<()> {
        self.refuse_overlap(offset, len, "the refcounts count metadata as free")
    }

    #[inline]
    fn refuse_overlap(&self, offset: HostOffset, len: u64, why: &str) -> Result<()> {
        match self.metadata.overlap(offset, len) {
            None => Ok(()),
            Some(cluster) => Err(Error::corrupt(
                format!("{why}; the write is refused"),
                cluster << self.geometry.cluster_bits,
            )
            .path(self.path())
            .cure("close the image and run `qcow2-ublk check -r all`")),
        }
    }

    /// Flushes, gives back what was reserved and cuts the file's unused end
    /// off. No request is under way.
    pub(crate) async fn close(&self) -> Result<()> {
        if !self.writable() {
            return Ok(());
        }
        // The image matters more than its bitmaps: it is closed in any case.
        // What failed first is why the rest did.
        let bitmaps = self.close_bitmaps().await;
        let closed = self.close_tables().await;
        bitmaps
            .map_err(|e| e.context("cannot store the dirty bitmaps"))
            .and(closed)
    }

    async fn close_tables(&self) -> Result<()> {
        // The first makes unmappings durable and frees clusters, which
        // changes refcounts again.
        self.flush().await?;
        self.give_back_runs().await?;
        self.flush().await?;
        if self.has_dirty_metadata() {
            self.flush().await?;
        }
        self.trim_file().await?;
        self.end_lazy().await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
