//! A disk that is read: a raw file, or an image with its chain.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::Format;
use crate::block::Payload;
use crate::chain::{self, Layer, MapEntry};
use crate::disk::blocking;
use crate::engine::{self, Engine};
use crate::error::Result;
use crate::storage::{Locks, OpenOptions, Role, Storage};

/// Unit of what can be read or not, in bytes.
const SECTOR: u64 = 512;

/// An open disk, for reading from several threads.
#[derive(Debug)]
pub struct Source {
    disk: Disk,
    /// Which layers' files are sparse in their data; found out once.
    sparse: Mutex<Vec<Option<bool>>>,
    /// What cannot be read is zeros.
    salvage: bool,
}

#[derive(Debug)]
enum Disk {
    Raw(Layer),
    Image(Box<Engine>),
}

impl Source {
    /// Opens the disk at `path`; `options` are for images and what is below
    /// them, their cache mode and sharing for raw files too.
    pub fn open(path: &Path, format: Format, options: &chain::Options) -> Result<Self> {
        let disk = match format {
            Format::Raw => {
                let locks = if options.force_share {
                    Locks::ForceShare
                } else {
                    Locks::Normal(Role::ReadOnly)
                };
                let how = OpenOptions::read_only().locks(locks).cache(options.cache);
                Disk::Raw(Layer::Raw(Storage::open(path, &how)?))
            }
            Format::Qcow2 => {
                let chain = blocking(chain::open(path, options))?;
                Disk::Image(Box::new(Engine::new(chain, engine::Options::default())))
            }
        };
        let layers = match &disk {
            Disk::Raw(_) => 1,
            Disk::Image(engine) => engine.chain().layers().len(),
        };
        Ok(Self {
            disk,
            sparse: Mutex::new(vec![None; layers]),
            salvage: false,
        })
    }

    /// What cannot be read is said to be zeros, with a warning each time.
    #[must_use]
    pub fn salvaging(self) -> Self {
        Self {
            salvage: true,
            ..self
        }
    }

    /// The disk's size in bytes: a multiple of 512.
    pub fn size(&self) -> u64 {
        match &self.disk {
            Disk::Raw(layer) => layer.size(),
            Disk::Image(engine) => engine.size(),
        }
    }

    /// True when this file is one of those that are read.
    pub(super) fn uses(&self, identity: (u64, u64)) -> bool {
        let data = match &self.disk {
            Disk::Raw(_) => Vec::new(),
            Disk::Image(engine) => engine.chain().layers().iter().collect(),
        };
        let data = data.into_iter().filter_map(|layer| match layer {
            Layer::Qcow2(image) => image.data_file(),
            Layer::Raw(_) => None,
        });
        let mut files = self.files().into_iter().chain(data);
        files.any(|file| file.identity() == identity)
    }

    /// The layers' own files, top first.
    pub(super) fn files(&self) -> Vec<&Storage> {
        match &self.disk {
            Disk::Raw(layer) => vec![layer.storage()],
            Disk::Image(engine) => engine.chain().layers().iter().map(Layer::storage).collect(),
        }
    }

    /// The image on top, if it is one.
    pub(super) fn engine(&self) -> Option<&Engine> {
        match &self.disk {
            Disk::Raw(_) => None,
            Disk::Image(engine) => Some(engine),
        }
    }

    /// The first part of a range whose bytes have one origin.
    pub(super) async fn extent(&self, at: u64, len: u64) -> Result<MapEntry> {
        match self.find_extent(at, len).await {
            Err(error) if self.salvage => {
                tracing::warn!(
                    "nobody knows where byte {at} of the disk is, zeros for it: {error}"
                );
                // What can be wrong is a cluster's.
                let unit = self
                    .engine()
                    .map_or(SECTOR, |engine| engine.chain().top().cluster_size());
                Ok(MapEntry {
                    start: at,
                    len: len.min(unit - at % unit),
                    present: true,
                    zero: true,
                    ..MapEntry::default()
                })
            }
            found => found,
        }
    }

    async fn find_extent(&self, at: u64, len: u64) -> Result<MapEntry> {
        match &self.disk {
            Disk::Raw(layer) => {
                let extent = layer.storage().extent_at(at);
                Ok(MapEntry {
                    start: at,
                    len: len.min(extent.end - at),
                    present: true,
                    zero: !extent.data,
                    data: extent.data,
                    offset: Some(at),
                    ..MapEntry::default()
                })
            }
            Disk::Image(engine) => {
                let mut sparse = self
                    .sparse
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                let known = sparse.clone();
                let entry = engine.chain().part(at, len, &mut sparse).await?;
                if sparse != known {
                    *self.sparse.lock().unwrap_or_else(PoisonError::into_inner) = sparse;
                }
                Ok(entry)
            }
        }
    }

    /// Fills `buf` from `at` on; past the disk's end there are zeros.
    pub(super) async fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let inside = self.size().saturating_sub(at).min(buf.len() as u64);
        let (buf, past) = buf.split_at_mut(inside as usize);
        past.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        match self.read_all(at, buf).await {
            Err(_) if self.salvage => self.read_some(at, buf).await,
            read => read,
        }
    }

    async fn read_all(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match &self.disk {
            Disk::Raw(layer) => layer.storage().read(at, buf).await,
            Disk::Image(engine) => engine.read(0, at, Payload::of_slice_mut(buf)).await,
        }
    }

    /// Reads each sector that can be read; the others are zeros.
    async fn read_some(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut lost_to = None;
        for (sector, start) in buf
            .chunks_mut(SECTOR as usize)
            .zip((at..).step_by(SECTOR as usize))
        {
            let Err(error) = self.read_all(start, sector).await else {
                continue;
            };
            sector.fill(0);
            if lost_to != Some(start) {
                tracing::warn!("byte {start} of the disk cannot be read, zeros for it: {error}");
            }
            lost_to = Some(start + SECTOR);
        }
        Ok(())
    }
}
