//! Reports about images, for ordinary programs: they block, and change nothing
//! unless told to repair.

use std::path::{Path, PathBuf};

use crate::chain::{self, MapEntry};
use crate::disk::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::check::{self, CheckReport, Finding, Repair, Repaired};
use crate::qcow2::info::{self, ImageInfo};
use crate::qcow2::spec::snapshot::Snapshot;
use crate::storage::{Locks, OpenOptions, Role, Storage};

/// Checks the qcow2 image at `path`, whatever its condition; files below it
/// are not opened. `observe` is told each finding. With `force_share` the
/// image may be in use, and the report be wrong because of it.
pub fn check(
    path: &Path,
    force_share: bool,
    mut observe: impl FnMut(&Finding),
) -> Result<CheckReport> {
    check_and_tell(path, force_share, &mut observe, |_| {})
}

/// As [`check()`](self::check); `progress` is told which part of the work is
/// done, from 0 to 1.
pub fn check_and_tell(
    path: &Path,
    force_share: bool,
    mut observe: impl FnMut(&Finding),
    mut progress: impl FnMut(f64),
) -> Result<CheckReport> {
    let storage = open_one(path, force_share)?;
    blocking(check::check_and_tell(&storage, &mut observe, &mut progress))
}

/// Repairs the qcow2 image at `path`, which nobody else may have open; see
/// [`check()`](self::check) for `observe`.
pub fn repair(path: &Path, what: Repair, mut observe: impl FnMut(&Finding)) -> Result<Repaired> {
    let storage = Storage::open(path, &OpenOptions::read_write())?;
    blocking(check::repair(&storage, what, &mut observe))
}

/// Tells which file of the chain has which part of the disk: of `range.1`
/// bytes from byte `range.0` on, or of all to the end. `emit` is told each part
/// and the file that decides about it.
pub fn map(
    path: &Path,
    options: &chain::Options,
    range: (u64, Option<u64>),
    mut emit: impl FnMut(&MapEntry, &Path) -> Result<()>,
) -> Result<()> {
    blocking(async {
        let chain = chain::open(path, options).await?;
        let (start, len) = range;
        let size = chain.top().size();
        let end = len.map_or(size, |len| size.min(start.saturating_add(len)));
        let file = |depth: usize| chain.layers()[depth].data().path();
        chain
            .map(start, end, |entry| emit(entry, file(entry.depth)))
            .await
    })
}

/// The snapshots in the image at `path`, in the order of their table; whatever
/// else the image's condition is.
pub fn snapshots(path: &Path, force_share: bool) -> Result<Vec<Snapshot>> {
    let storage = open_one(path, force_share)?;
    blocking(info::snapshots(&storage))
}

/// What there is to know about one file of a chain.
#[derive(Debug)]
pub struct LayerInfo {
    /// Its name.
    pub path: PathBuf,
    /// Its length in bytes.
    pub file_len: u64,
    /// Bytes it takes on its host.
    pub allocated: u64,
    /// It is a block device.
    pub block_device: bool,
    /// What the image in it says; `None` for a raw disk.
    pub image: Option<ImageInfo>,
}

impl LayerInfo {
    /// What the open file says now.
    pub(crate) async fn of(storage: &Storage, raw: bool) -> Result<Self> {
        Ok(Self {
            path: storage.path().to_owned(),
            file_len: storage.len(),
            allocated: storage.allocated_bytes()?,
            block_device: storage.is_block_device(),
            image: if raw {
                None
            } else {
                Some(info::info(storage).await?)
            },
        })
    }
}

/// What the image at `path` says about itself, and with `options` that do not
/// leave them out ([`chain::Options::no_backing`]) the files below it.
pub fn info(path: &Path, options: &chain::Options) -> Result<Vec<LayerInfo>> {
    let mut storage = open_one(path, options.force_share)?;
    let mut raw = false;
    let mut seen = Vec::new();
    let mut layers: Vec<LayerInfo> = Vec::new();
    loop {
        if seen.contains(&storage.identity()) || seen.len() >= chain::MAX_LAYERS {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the backing chain is a loop, or too deep",
            )
            .path(storage.path())
            .cure("look at each image without --backing-chain"));
        }
        seen.push(storage.identity());
        let layer = blocking(LayerInfo::of(&storage, raw))?;
        let below = match &layer.image {
            Some(image) => chain::open_below(&image.header, &layer.path, options)?,
            None => None,
        };
        layers.push(layer);
        let Some(below) = below else {
            return Ok(layers);
        };
        (storage, raw) = (below.storage, below.raw);
    }
}

fn open_one(path: &Path, force_share: bool) -> Result<Storage> {
    let locks = if force_share {
        Locks::ForceShare
    } else {
        Locks::Normal(Role::ReadOnly)
    };
    Storage::open(path, &OpenOptions::read_only().locks(locks))
}
