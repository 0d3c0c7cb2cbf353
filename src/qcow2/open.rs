//! Opening an image, and making its header ready for the first change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::alloc::{Allocator, Frees, Run};
use super::barrier::Barrier;
use super::compressed::Inflated;
use super::grace::Grace;
use super::marks::refuse_corrupt;
use super::meta::{L1Table, SliceCache, read_pieces};
use super::metadata::{Metadata, OverlapCheck};
use super::refcount::Refcounts;
use super::snapshot;
use super::spec::header::{Autoclear, Incompatible, PROBE_LEN, Prefix};
use super::{Header, HostOffset, Image, Selector};
use crate::crypto::Keyring;
use crate::error::{Error, ErrorKind, Result};
use crate::rule::Rule;
use crate::runtime::{Buf, sync};
use crate::storage::Storage;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Number of queues that will use it; each reserves clusters of its own.
    pub queues: usize,
    /// Bytes of L2 tables kept in memory at most.
    pub l2_cache: u64,
    /// Freed clusters are punched out of the file, or only reused.
    pub punch: bool,
    /// A snapshot is opened in place of the active disk; read-only.
    pub snapshot: Option<Selector>,
    /// Read the dirty bitmaps that record changes when the image is opened
    /// for writing, not when it is first written to: for who only manages
    /// them, false spares reading them.
    pub record: bool,
    /// Who knows the passphrases of encrypted images.
    pub keys: Option<Arc<dyn Keyring>>,
    /// No guest data will be read or written: encrypted images are opened
    /// without their key.
    pub metadata_only: bool,
    /// Which metadata is never written over by other data.
    pub overlap_check: OverlapCheck,
    /// What is durable when.
    pub barrier: Barrier,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            l2_cache: 32 << 20,
            punch: true,
            snapshot: None,
            record: true,
            keys: None,
            metadata_only: false,
            overlap_check: OverlapCheck::default(),
            barrier: Barrier::default(),
        }
    }
}

/// Bytes of refcount blocks kept in memory at most.
const REFBLOCK_CACHE: u64 = 4 << 20;

/// Reads the header of an image and checks it; not whether we support what it
/// asks for.
pub(crate) async fn read_header(storage: &Storage) -> Result<Header> {
    let cluster0 = read_cluster0(storage).await?;
    Header::parse(&cluster0, storage.len()).map_err(|e| e.path(storage.path()))
}

/// As [`read_header`], for reports about damaged images: whatever can be read
/// at all is accepted.
pub(crate) async fn read_damaged_header(storage: &Storage) -> Result<Header> {
    let cluster0 = read_cluster0(storage).await?;
    Header::parse_damaged(&cluster0).map_err(|e| e.path(storage.path()))
}

async fn read_cluster0(storage: &Storage) -> Result<Buf> {
    let file_len = storage.len();
    let mut start = Buf::take(PROBE_LEN.min(file_len as usize));
    storage.read(0, &mut start).await?;
    let prefix = Prefix::parse(&start).map_err(|e| e.path(storage.path()))?;
    let mut cluster0 = Buf::take(prefix.cluster_size());
    storage.read(0, &mut cluster0).await?;
    Ok(cluster0)
}

impl Image {
    /// Opens the image in `storage`; for writing, if the storage is writable.
    pub async fn open(storage: Storage, options: &ImageOptions) -> Result<Self> {
        Self::open_with_data(storage, None, options).await
    }

    /// Opens the image in `storage` with its external data file, if it has
    /// one: which one that is, the image does not decide.
    pub async fn open_with_data(
        storage: Storage,
        data_file: Option<Storage>,
        options: &ImageOptions,
    ) -> Result<Self> {
        let header = read_header(&storage).await?;
        if header.has_data_file() != data_file.is_some() {
            return Err(Error::new(
                ErrorKind::Usage,
                "the image's data is in another file, which is needed to open it",
            )
            .path(storage.path()));
        }
        if storage.writable() {
            refuse_corrupt(&header).map_err(|e| e.path(storage.path()))?;
        }
        let encryption = super::crypt::unlock(&storage, &header, options).await?;
        let geometry = header.geometry();
        let disk = match &options.snapshot {
            None => ShownDisk {
                l1_offset: header.l1_table_offset,
                l1_bytes: header.l1_bytes(),
                size: header.virtual_size(),
            },
            Some(which) => ShownDisk::of_snapshot(&storage, &header, which)
                .await
                .map_err(|e| e.path(storage.path()))?,
        };
        let l1 = L1Table::new(disk.l1_offset, (disk.l1_bytes / 8) as usize);
        read_pieces(&storage, disk.l1_offset, disk.l1_bytes, |at, bytes| {
            l1.load((at / 8) as usize, bytes);
        })
        .await
        .map_err(|e| e.context("cannot read the L1 table"))?;
        let refcounts = if storage.writable() {
            Refcounts::read(&storage, &header).await?
        } else {
            Refcounts::unread(&header)
        };
        // Twice what maps the whole disk is enough: with half of the cache
        // dirty, writers are made to wait for a write-back.
        let enough = geometry
            .clusters_for(disk.size)
            .saturating_mul(2 * geometry.l2_entry_bytes())
            .max(256 << 10);
        let queues = options.queues.max(1);
        let nothing = Run {
            first: 0,
            count: 0,
            zeroed: false,
        };
        let image = Self {
            geometry,
            compression: header.compression_type,
            encryption,
            size: AtomicU64::new(disk.size),
            l1,
            l2: SliceCache::new(
                "L2 table",
                geometry.l2_table_bytes(),
                options.l2_cache.min(enough),
            )
            .of_pairs(geometry.extended_l2),
            refblocks: SliceCache::new("refcount block", geometry.cluster_size(), REFBLOCK_CACHE),
            inflated: Inflated::new(geometry.cluster_size()),
            alloc: sync::Mutex::new(Allocator::new(refcounts)),
            runs: (0..queues).map(|_| Mutex::new(nothing)).collect(),
            given_back: Mutex::default(),
            packer: sync::Mutex::default(),
            frees: Frees::default(),
            grace: Grace::new(queues),
            reshaping: sync::Mutex::default(),
            held: Mutex::default(),
            flushes: super::Flushes::default(),
            new_tables: sync::Mutex::default(),
            metadata: Metadata::new(geometry.cluster_bits, options.overlap_check),
            barrier: options.barrier,
            changes: AtomicU64::new(0),
            lazy: AtomicBool::new(false),
            corrupt: AtomicBool::new(false),
            needs_repair: storage.writable() && header.incompatible.contains(Incompatible::DIRTY),
            punch_frees: options.punch,
            prepared: AtomicBool::new(false),
            bitmaps: super::Bitmaps::default(),
            suspect_field: sync::Mutex::default(),
            raw_data_file: header.data_file_is_raw(),
            header: Mutex::new(header),
            storage: match options.barrier {
                Barrier::None => storage.short_lived(),
                _ => storage,
            },
            data_file: match options.barrier {
                Barrier::None => data_file.map(Storage::short_lived),
                _ => data_file,
            },
        };
        if image.writable() && !image.needs_repair {
            image.note_metadata().await;
            image.load_for_recording(options.record).await?;
        }
        Ok(image)
    }

    /// Makes the image ready for changes of the disk, before the first: the
    /// autoclear bits that stand for data which we do not keep up to date are
    /// cleared, and bitmaps that record are marked in use, all durably.
    #[inline]
    pub(crate) async fn prepare_for_writing(&self) -> Result<()> {
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        self.prepare().await
    }

    async fn prepare(&self) -> Result<()> {
        let mut bitmaps = self.bitmaps.state.lock().await;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        self.clear_unknown_autoclear().await?;
        if self.mark_bitmaps(&mut bitmaps).await? && !Rule::MarkBeforeWrite.is_broken() {
            self.storage.sync().await?;
        }
        self.begin_lazy().await?;
        self.prepared.store(true, Ordering::Release);
        Ok(())
    }

    /// Clears the autoclear bits of what is unknown here, durably.
    pub(super) async fn clear_unknown_autoclear(&self) -> Result<()> {
        let bits = self.header().autoclear;
        // A raw data file is kept one.
        let kept = bits & (Autoclear::BITMAPS | Autoclear::DATA_FILE_RAW);
        if bits != kept {
            self.write_autoclear(kept).await?;
        }
        Ok(())
    }

    /// Writes a field of the header. Fields are written alone, inside one
    /// sector, so that a power cut leaves the old value or the new.
    ///
    /// A failure too leaves either. The old one holds, and is written again
    /// before any other metadata: until then, both are right.
    pub(super) async fn write_header(&self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        debug_assert!(at.0 / 512 == (at.0 + bytes.len() as u64 - 1) / 512);
        self.restore_header().await?;
        // One at a time: with direct I/O a field is written with its block.
        let mut suspect = self.suspect_field.lock().await;
        let failed = |e: Error| e.context("cannot write the image header");
        let mut old = vec![0; bytes.len()];
        self.storage.read(at.0, &mut old).await.map_err(failed)?;
        let written = self.storage.write(at.0, bytes).await;
        if written.is_err() {
            *suspect = Some((at, old));
        }
        written.map_err(failed)
    }

    /// Puts the old value of a field back, durably, whose writing failed.
    pub(super) async fn restore_header(&self) -> Result<()> {
        let mut suspect = self.suspect_field.lock().await;
        if let Some((at, old)) = &*suspect {
            self.storage
                .write(at.0, old)
                .await
                .map_err(|e| e.context("cannot restore the image header"))?;
            self.storage.sync().await?;
            *suspect = None;
        }
        Ok(())
    }

    /// True when [`Self::restore_header`] has something to do.
    pub(super) fn header_is_suspect(&self) -> bool {
        self.suspect_field
            .try_lock()
            .is_none_or(|suspect| suspect.is_some())
    }
}

/// The disk that an open image shows.
struct ShownDisk {
    l1_offset: HostOffset,
    l1_bytes: u64,
    /// Virtual size in bytes.
    size: u64,
}

impl ShownDisk {
    async fn of_snapshot(storage: &Storage, header: &Header, which: &Selector) -> Result<Self> {
        if storage.writable() {
            return Err(
                Error::new(ErrorKind::Usage, "a snapshot cannot be opened for writing")
                    .cure("open it read-only, or put an overlay over it"),
            );
        }
        let (snapshots, _) = snapshot::read_table(storage, header).await?;
        let found = &snapshots[which.require(&snapshots)?];
        let size = found.disk_size.unwrap_or(header.size) & !511;
        if size > header.geometry().max_size() {
            return Err(Error::corrupt(
                format!("the snapshot's disk of {size} bytes is larger than any"),
                header.snapshots_offset.0,
            ));
        }
        Ok(Self {
            l1_offset: found.l1_table_offset,
            l1_bytes: found.l1_bytes(),
            size,
        })
    }
}
