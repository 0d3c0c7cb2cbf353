//! The file that is written: what is there or made, and what it shows before
//! anything is written.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::part::{self, Part};
use super::{Format, Options, Output, Source};
use crate::block::Payload;
use crate::chain::{self, Layer};
use crate::crypto::{Keyring, Limits, Secret};
use crate::disk::blocking;
use crate::engine::{self, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Barrier;
use crate::qcow2::create::{Backing, CreateOptions, Preallocation};
use crate::storage::{OpenOptions, Storage};

/// Bytes zeroed at once.
const STEP: u64 = 1 << 20;

/// What a target shows where nothing has been written.
#[derive(Debug)]
pub(super) enum Before {
    /// Zeros.
    Zeros,
    /// What the source shows from this layer of its own on down.
    Layer(usize),
    /// What this disk shows.
    Disk(Box<Source>),
    /// Anything.
    Unknown,
}

/// An open target.
#[derive(Debug)]
pub(super) struct Target {
    disk: Disk,
    pub(super) before: Before,
    /// What is removed when dropped, unless it gets its name; in the order in
    /// which they get theirs.
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Disk {
    Raw(Raw),
    Image(Box<Engine>),
}

/// A raw file or device.
#[derive(Debug)]
struct Raw {
    storage: Storage,
    /// Each write is durable before the next.
    at_once: bool,
}

impl Raw {
    fn new(storage: Storage, barrier: Barrier) -> Self {
        Self {
            storage: match barrier {
                Barrier::None => storage.short_lived(),
                _ => storage,
            },
            at_once: barrier == Barrier::Full,
        }
    }

    async fn written(&self, done: Result<()>) -> Result<()> {
        done?;
        if self.at_once {
            self.storage.sync().await?;
        }
        Ok(())
    }
}

impl Target {
    pub(super) fn make(source: &Source, options: &Options<'_>) -> Result<Self> {
        match &options.output {
            Output::Raw(preallocation) => {
                let part = Part::new(&options.path, source)?;
                let storage = make_raw(&part.path, source.size(), *preallocation, options)
                    .map_err(|e| e.path(&options.path))?;
                Ok(Self {
                    disk: Disk::Raw(Raw::new(storage, options.chain.image.barrier)),
                    before: Before::Zeros,
                    parts: vec![part],
                })
            }
            Output::Qcow2(image) => Self::make_image(source, image, options),
            Output::ExistingRaw => {
                refuse_input(source, &options.path, identity(&options.path)?)?;
                let storage = Storage::open(&options.path, &raw_options(options))?;
                let raw = Raw::new(storage, options.chain.image.barrier);
                let target = Self::existing(Disk::Raw(raw), options);
                target.check_existing(source, &options.path)?;
                Ok(target)
            }
            Output::ExistingQcow2 => {
                // Before its locks stand in the way.
                refuse_input(source, &options.path, identity(&options.path)?)?;
                let how = chain::Options {
                    writable: true,
                    force_share: false,
                    ..options.chain.clone()
                };
                let chain = blocking(chain::open(&options.path, &how))?;
                let engine = Engine::new(chain, engine::Options::default());
                let target = Self::existing(Disk::Image(Box::new(engine)), options);
                target.check_existing(source, &options.path)?;
                Ok(target)
            }
        }
    }

    fn existing(disk: Disk, options: &Options<'_>) -> Self {
        let before = if options.target_is_zero {
            Before::Zeros
        } else {
            Before::Unknown
        };
        Self {
            disk,
            before,
            parts: Vec::new(),
        }
    }

    fn check_existing(&self, source: &Source, path: &Path) -> Result<()> {
        let (file, data) = match &self.disk {
            Disk::Raw(raw) => (&raw.storage, None),
            Disk::Image(engine) => {
                let image = engine.chain().top();
                (image.storage(), image.data_file())
            }
        };
        refuse_input(source, path, file.identity())?;
        if let Some(data) = data {
            refuse_input(source, data.path(), data.identity())?;
        }
        let size = match &self.disk {
            Disk::Raw(raw) => raw.storage.len(),
            Disk::Image(engine) => engine.size(),
        };
        if size < source.size() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "output file is smaller than input file: {size} bytes, not {}",
                    source.size()
                ),
            )
            .path(path)
            .cure("enlarge it first"));
        }
        Ok(())
    }

    fn make_image(source: &Source, image: &CreateOptions, options: &Options<'_>) -> Result<Self> {
        let part = Part::new(&options.path, source)?;
        let image = CreateOptions {
            size: source.size(),
            ..image.clone()
        };
        let mut how = chain::Options {
            writable: true,
            force_share: false,
            ..options.chain.clone()
        };
        let mut before = Before::Zeros;
        if let Some(backing) = &image.backing {
            let path = chain::backing_path(&backing.file, &part.path)?;
            refuse_output(&path, &part.name)?;
            // The caller has named it: that is permission for this one.
            let folder = path.parent().unwrap_or_else(|| Path::new("/"));
            how.policy.allow_paths.push(folder.to_owned());
            before = before_over(source, &path, backing, &how)?;
        }
        let mut parts = Vec::new();
        let data = match chain::data_path(&part.path, &image)? {
            None => None,
            Some(path) if is_device(&path) => {
                refuse_input(source, &path, identity(&path)?)?;
                Some(path)
            }
            Some(path) => {
                refuse_output_as_data(&path, &part.name)?;
                let data = Part::new(&path, source)?;
                let path = data.path.clone();
                parts.push(data);
                Some(path)
            }
        };
        how.data_file.clone_from(&data);
        if let Some(key) = &options.key {
            how.image.keys = Some(Arc::new(NewKey {
                path: part.path.clone(),
                key: key.clone(),
                others: how.image.keys,
            }));
        }
        let made = blocking(async {
            chain::create_at(&part.path, data, &image).await?;
            chain::open(&part.path, &how).await
        });
        let chain =
            made.map_err(|e| e.context(format!("cannot make {}", options.path.display())))?;
        let engine = Engine::new(chain, engine::Options::default());
        parts.push(part);
        Ok(Self {
            disk: Disk::Image(Box::new(engine)),
            before,
            parts,
        })
    }

    /// The unit in which it is written best, in bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        match &self.disk {
            Disk::Raw(_) => 4096,
            Disk::Image(engine) => engine.chain().top().cluster_size(),
        }
    }

    /// The image, if it is one.
    pub(super) fn engine(&self) -> Option<&Engine> {
        match &self.disk {
            Disk::Raw(_) => None,
            Disk::Image(engine) => Some(engine),
        }
    }

    pub(super) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        match &self.disk {
            Disk::Raw(raw) => raw.written(raw.storage.write(at, bytes).await).await,
            Disk::Image(engine) => engine.write(0, at, Payload::of_slice(bytes)).await,
        }
    }

    pub(super) async fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        match &self.disk {
            Disk::Raw(raw) => {
                let done = raw.storage.write_zeroes(at, len, true).await;
                raw.written(done).await
            }
            Disk::Image(engine) => engine.write_zeroes(0, at, len, true).await,
        }
    }

    /// Makes everything durable, and lets a new file have its name.
    pub(super) fn finish(self) -> Result<()> {
        let Self { disk, parts, .. } = self;
        blocking(async {
            match &disk {
                Disk::Raw(raw) => raw.storage.sync().await,
                Disk::Image(engine) => engine.close().await,
            }
        })?;
        // Its locks go with it: under its name the file is free.
        drop(disk);
        part::name_all(parts)
    }
}

pub(super) fn identity(path: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open the file", e).path(path))?;
    Ok(if metadata.file_type().is_block_device() {
        (0, metadata.rdev())
    } else {
        (metadata.dev(), metadata.ino())
    })
}

/// The keys of the chain, and that of a new image which has not got its name.
#[derive(Debug)]
struct NewKey {
    path: PathBuf,
    key: Secret,
    others: Option<Arc<dyn Keyring>>,
}

impl Keyring for NewKey {
    fn passphrase(&self, path: &Path) -> Result<Option<Secret>> {
        if path == self.path {
            return Ok(Some(self.key.clone()));
        }
        self.others
            .as_ref()
            .map_or(Ok(None), |keys| keys.passphrase(path))
    }

    fn limits(&self) -> Limits {
        // For the new image too: deriving its key was our own idea.
        let others = self.others.as_ref();
        others.map_or_else(Limits::default, |keys| keys.limits())
    }
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn refuse_output_as_data(data: &Path, name: &Path) -> Result<()> {
    let same = match (identity(data), identity(name)) {
        (Ok(a), Ok(b)) => a == b,
        _ => data == name,
    };
    if !same {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, "an image cannot be its own data file").path(name))
}

pub(super) fn refuse_input(source: &Source, path: &Path, identity: (u64, u64)) -> Result<()> {
    if !source.uses(identity) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        "this is a file of the input, and cannot be the output",
    )
    .path(path))
}

/// The backing file must not be what is replaced.
fn refuse_output(backing: &Path, name: &Path) -> Result<()> {
    match (identity(backing), identity(name)) {
        (Ok(a), Ok(b)) if a == b => {
            Err(Error::new(ErrorKind::Usage, "an image cannot be its own backing file").path(name))
        }
        _ => Ok(()),
    }
}

/// What an image over the file at `path` shows. If the source has the same
/// file in its chain nothing needs to be compared; otherwise the content
/// decides what the image has to hold, so that it shows what the source shows
/// whatever is below.
fn before_over(
    source: &Source,
    path: &Path,
    backing: &Backing,
    how: &chain::Options,
) -> Result<Before> {
    let same = identity(path)?;
    if let Some(depth) = source
        .files()
        .iter()
        .position(|file| file.identity() == same)
    {
        let raw = backing.format.as_deref() == Some("raw");
        let is_raw = source
            .engine()
            .is_none_or(|engine| matches!(engine.chain().layers()[depth], Layer::Raw(_)));
        if raw == is_raw && depth > 0 {
            return Ok(Before::Layer(depth));
        }
    }
    let format = match backing.format.as_deref() {
        Some("raw") => Format::Raw,
        _ => Format::Qcow2,
    };
    let read_only = chain::Options {
        writable: false,
        snapshot: None,
        ..how.clone()
    };
    let disk = Source::open(path, format, &read_only)?;
    Ok(Before::Disk(Box::new(disk)))
}

/// How a raw output is opened.
fn raw_options(options: &Options<'_>) -> OpenOptions {
    OpenOptions::read_write().cache(options.chain.cache)
}

/// A raw file of zeros, under its first name.
fn make_raw(
    path: &Path,
    size: u64,
    preallocation: Preallocation,
    options: &Options<'_>,
) -> Result<Storage> {
    let storage = Storage::open(path, &raw_options(options))?;
    blocking(async {
        storage.set_len(size).await?;
        match preallocation {
            Preallocation::Off => {}
            Preallocation::Metadata => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "Unsupported preallocation mode 'metadata'",
                )
                .cure("raw files have preallocation=off, falloc or full"));
            }
            Preallocation::Falloc => storage.reserve_space(0, size).await?,
            Preallocation::Full => {
                let mut at = 0;
                while at < size {
                    let step = STEP.min(size - at);
                    storage.start_write(at, &Payload::zeros(step)).await?;
                    at += step;
                }
            }
        }
        Ok(())
    })?;
    Ok(storage)
}
