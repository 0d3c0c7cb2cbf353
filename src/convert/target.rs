//! The file that is written. A new one is made under a name of its own beside
//! the wanted one, which it takes when it is whole and durable.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Format, Options, Output, Source};
use crate::block::Payload;
use crate::chain::{self, Layer};
use crate::crypto::{Keyring, Limits, Secret};
use crate::disk::blocking;
use crate::engine::{self, Engine};
use crate::error::{Error, ErrorKind, Result};
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
    Raw(Storage),
    Image(Box<Engine>),
}

/// A file under its first name.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    name: PathBuf,
    /// The file that has the name until then, with its locks.
    old: Option<Storage>,
    removed: bool,
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.removed {
            // What led here is the error that counts.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Target {
    pub(super) fn make(source: &Source, options: &Options<'_>) -> Result<Self> {
        match &options.output {
            Output::Raw(preallocation) => {
                let part = Part::new(&options.path, source)?;
                let storage = make_raw(&part.path, source.size(), *preallocation)
                    .map_err(|e| e.path(&options.path))?;
                Ok(Self {
                    disk: Disk::Raw(storage),
                    before: Before::Zeros,
                    parts: vec![part],
                })
            }
            Output::Qcow2(image) => Self::make_image(source, image, options),
            Output::ExistingRaw => {
                refuse_input(source, &options.path, identity(&options.path)?)?;
                let storage = Storage::open(&options.path, &OpenOptions::read_write())?;
                let target = Self::existing(Disk::Raw(storage), options);
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
            Disk::Raw(storage) => (storage, None),
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
            Disk::Raw(storage) => storage.len(),
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
            Disk::Raw(storage) => storage.write(at, bytes).await,
            Disk::Image(engine) => engine.write(0, at, Payload::of_slice(bytes)).await,
        }
    }

    pub(super) async fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        match &self.disk {
            Disk::Raw(storage) => storage.write_zeroes(at, len, true).await,
            Disk::Image(engine) => engine.write_zeroes(0, at, len, true).await,
        }
    }

    /// Makes everything durable, and lets a new file have its name.
    pub(super) fn finish(self) -> Result<()> {
        let Self { disk, parts, .. } = self;
        blocking(async {
            match &disk {
                Disk::Raw(storage) => storage.sync().await,
                Disk::Image(engine) => engine.close().await,
            }
        })?;
        // Its locks go with it: under its name the file is free.
        drop(disk);
        parts.into_iter().try_for_each(Part::name)
    }
}

impl Part {
    /// A first name for what is to be `path`.
    fn new(path: &Path, source: &Source) -> Result<Self> {
        let failed = |doing: &str, e| Error::io(doing, e).path(path);
        // Links are followed, as writing to the name would.
        let name = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => {
                fs::canonicalize(path).map_err(|e| failed("follow the link", e))?
            }
            _ => path.to_owned(),
        };
        let old = match fs::metadata(&name) {
            Ok(metadata) => {
                check_replaceable(&metadata, path)?;
                refuse_input(source, path, (metadata.dev(), metadata.ino()))?;
                // Nobody uses it now, nor until it is replaced.
                Some(Storage::open(&name, &OpenOptions::read_write())?)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed("examine the file", e)),
        };
        let Some(file_name) = name.file_name() else {
            return Err(Error::new(ErrorKind::Usage, "this is not a file name").path(path));
        };
        for attempt in 0..1000_u32 {
            let mut part = OsString::from(".");
            part.push(file_name);
            part.push(format!(".{}-{attempt}.part", std::process::id()));
            let part = name.with_file_name(part);
            match File::options().write(true).create_new(true).open(&part) {
                Ok(_) => {
                    return Ok(Self {
                        path: part,
                        name,
                        old,
                        removed: false,
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed("make the file", e)),
            }
        }
        Err(Error::new(
            ErrorKind::Busy,
            "there is no free name for a new file beside it",
        )
        .path(path))
    }

    /// Gives the file its name, durably.
    fn name(mut self) -> Result<()> {
        let failed = |doing: &str, e| Error::io(doing, e).path(&self.name);
        if let Some(old) = &self.old {
            let metadata =
                fs::metadata(old.path()).map_err(|e| failed("examine the old file", e))?;
            fs::set_permissions(&self.path, metadata.permissions())
                .map_err(|e| failed("keep the permissions of the old file", e))?;
            // Only root may give files away; others keep the new one.
            let _ =
                std::os::unix::fs::chown(&self.path, Some(metadata.uid()), Some(metadata.gid()));
        }
        fs::rename(&self.path, &self.name).map_err(|e| failed("give the file its name", e))?;
        self.removed = true;
        let folder = match self.name.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| failed("make the name durable", e))
    }
}

fn check_replaceable(metadata: &Metadata, path: &Path) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let error = if metadata.file_type().is_block_device() {
        Error::new(ErrorKind::Usage, "a block device exists already").cure("write over it with -n")
    } else {
        Error::new(ErrorKind::Usage, "only a regular file can be made anew")
    };
    Err(error.path(path))
}

fn identity(path: &Path) -> Result<(u64, u64)> {
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

fn refuse_input(source: &Source, path: &Path, identity: (u64, u64)) -> Result<()> {
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

/// A raw file of zeros, under its first name.
fn make_raw(path: &Path, size: u64, preallocation: Preallocation) -> Result<Storage> {
    let storage = Storage::open(path, &OpenOptions::read_write())?;
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
