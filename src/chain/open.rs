//! Opening a chain: the top image on the caller's word, the others on the
//! policy's. No format is ever guessed.

use std::path::{Path, PathBuf};

use super::name::{resolve, resolve_data};
use super::{Chain, Layer, Policy, temporary};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Header, Image, ImageOptions, Selector, read_header};
use crate::storage::{CacheMode, Locks, OpenOptions, Role, Storage};

/// Deepest chain that is opened.
pub(crate) const MAX_LAYERS: usize = 64;

/// How a chain is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The top image is opened for writing.
    pub writable: bool,
    /// Page cache or direct I/O, for every file of the chain.
    pub cache: CacheMode,
    /// Do not exclude others, as `qemu-img -U`; only for read-only chains.
    pub force_share: bool,
    /// What the images may make us open.
    pub policy: Policy,
    /// Format (`qcow2` or `raw`) of backing files whose image records none.
    pub backing_format: Option<String>,
    /// The image itself alone: what is unallocated reads as zeros.
    pub no_backing: bool,
    /// The external data file of the top image, on the caller's word, in
    /// place of the one that it names.
    pub data_file: Option<PathBuf>,
    /// A snapshot of the top image in place of its active disk; not for
    /// writing.
    pub snapshot: Option<Selector>,
    /// The chain is opened read-only, under an image that is written to and
    /// lost when it is closed: in a file without a name in this folder.
    pub temporary: Option<PathBuf>,
    /// For every qcow2 image of the chain.
    pub image: ImageOptions,
}

/// Opens the image at `path` and everything below it.
pub async fn open(path: &Path, options: &Options) -> Result<Chain> {
    if let Some(folder) = &options.temporary {
        let below = Options {
            writable: false,
            temporary: None,
            ..options.clone()
        };
        let below = Box::pin(open(path, &below)).await?;
        return temporary::cover(below, folder, &options.image).await;
    }
    if options.force_share && options.writable {
        return Err(Error::new(
            ErrorKind::Usage,
            "locks can be ignored only for images opened read-only",
        )
        .path(path));
    }
    let open_top = |cache| {
        let how = OpenOptions {
            writable: options.writable,
            cache,
            locks: locks(options, options.writable),
        };
        Storage::open(path, &how)
    };
    let top = ImageOptions {
        snapshot: options.snapshot.clone(),
        ..options.image.clone()
    };
    let top = open_image(open_top, options, &top, options.data_file.as_deref()).await?;

    let mut seen = vec![top.storage().identity()];
    let below = follow(&top.header(), path, options, &mut seen).await?;
    // Only now: an image whose chain is not whole stays as it is.
    let top = top.repaired(&options.image).await?;
    Ok(Chain::new(top, below))
}

/// Opens for reading everything below an image with this header, the file
/// `inside`. `seen` are the files above and itself.
pub(super) async fn follow(
    header: &Header,
    inside: &Path,
    options: &Options,
    seen: &mut Vec<Identity>,
) -> Result<Vec<Layer>> {
    let mut header = header.clone();
    let mut inside = inside.to_owned();
    let mut below = Vec::new();
    while let Some(reference) = backing_of(&header, &inside, options)? {
        let layer = open_backing(&reference, &inside, options, Access::Read).await?;
        reference.check_loop(seen, &layer, &inside)?;
        inside = reference.path;
        let next = match &layer {
            Layer::Qcow2(image) => Some(image.header()),
            Layer::Raw(_) => None,
        };
        below.push(layer);
        match next {
            Some(next) => header = next,
            None => break,
        }
    }
    Ok(below)
}

fn locks(options: &Options, writable: bool) -> Locks {
    if options.force_share {
        Locks::ForceShare
    } else if writable {
        Locks::Normal(Role::ReadWrite)
    } else {
        Locks::Normal(Role::ReadOnly)
    }
}

/// Least cluster size for direct I/O, in bytes: a page. Below, lengthening and
/// punching the file touch the pages of neighbouring clusters in the page
/// cache, and direct I/O on those fails.
const MIN_DIRECT: u64 = 4096;

/// Opens a qcow2 image, with its external data file if it has one. Where its
/// clusters are smaller than what direct I/O can address safely, it goes
/// through the page cache.
async fn open_image(
    open: impl Fn(CacheMode) -> Result<Storage>,
    options: &Options,
    image: &ImageOptions,
    data_file: Option<&Path>,
) -> Result<Image> {
    let open = async |cache| {
        let storage = open(cache)?;
        let header = read_header(&storage).await?;
        let data = open_data(&header, &storage, cache, options, data_file)?;
        Image::open_with_data(storage, data, image).await
    };
    let image = open(options.cache).await?;
    let unit = image.storage().alignment().max(image.data().alignment());
    if unit == 1 || u64::from(unit).max(MIN_DIRECT) <= image.cluster_size() {
        return Ok(image);
    }
    drop(image);
    open(CacheMode::Writeback).await
}

/// Opens the external data file of the image in `storage`, if it has one: the
/// given one, or the one that it names, if the policy allows that.
fn open_data(
    header: &Header,
    storage: &Storage,
    cache: CacheMode,
    options: &Options,
    given: Option<&Path>,
) -> Result<Option<Storage>> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let inside = storage.path();
    let writable = storage.writable();
    let how = OpenOptions {
        writable,
        cache,
        locks: locks(options, writable),
    };
    if let Some(path) = given {
        return Storage::open(path, &how).map(Some);
    }
    let Some(name) = header.data_file() else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the image has an external data file but does not say which",
        )
        .path(inside)
        .cure("record its name with `qemu-img amend -o data_file=FILE`"));
    };
    let path = resolve_data(name, inside)?;
    let fd = options.policy.open(&path, inside, writable)?;
    let about = |e: Error| e.context(format_args!("the data file of {}", inside.display()));
    let data = Storage::from_fd(fd, &path, &how).map_err(about)?;
    if data.identity() == storage.identity() {
        let what = "the image is recorded as its own external data file";
        return Err(Error::new(ErrorKind::Corrupt, what).path(inside));
    }
    Ok(Some(data))
}

/// A file below an image, opened for a report.
pub(crate) struct Below {
    pub(crate) storage: Storage,
    /// Not qcow2.
    pub(crate) raw: bool,
}

/// Opens the file below the image `inside` for reading, whatever features it
/// has, if there is one and the policy allows it.
pub(crate) fn open_below(
    header: &Header,
    inside: &Path,
    options: &Options,
) -> Result<Option<Below>> {
    let Some(reference) = backing_of(header, inside, options)? else {
        return Ok(None);
    };
    let fd = options.policy.open(&reference.path, inside, false)?;
    let how = OpenOptions::read_only().locks(locks(options, false));
    Ok(Some(Below {
        storage: Storage::from_fd(fd, &reference.path, &how)?,
        raw: reference.raw,
    }))
}

/// Tells files apart.
type Identity = (u64, u64);

/// A backing file as its image names it.
pub(super) struct Reference {
    pub(super) path: PathBuf,
    raw: bool,
}

impl Reference {
    /// The file at `path`, of this format, for the image `inside`.
    pub(super) fn named(path: PathBuf, format: &str, inside: &Path) -> Result<Self> {
        let raw = match format {
            "qcow2" => false,
            "raw" | "file" | "host_device" => true,
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("the backing file's format {other:?} is neither qcow2 nor raw"),
                )
                .path(inside)
                .cure("convert the backing file to qcow2 or raw"));
            }
        };
        Ok(Self { path, raw })
    }

    /// Refuses a file that was `seen` above, and chains without end.
    pub(super) fn check_loop(
        &self,
        seen: &mut Vec<Identity>,
        layer: &Layer,
        inside: &Path,
    ) -> Result<()> {
        let identity = layer.storage().identity();
        if seen.contains(&identity) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the backing chain is a loop: {} is above itself",
                    self.path.display()
                ),
            )
            .path(inside)
            .cure("record the right backing file with `qcow2-ublk rebase -u`"));
        }
        seen.push(identity);
        if seen.len() > MAX_LAYERS {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the backing chain has more than {MAX_LAYERS} layers"),
            )
            .path(inside)
            .cure("shorten it with `qcow2-ublk commit` or `qcow2-ublk convert`"));
        }
        Ok(())
    }
}

/// What is done with a file below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// It is read, on the image's word.
    Read,
    /// It is written to, on the image's word.
    Write,
    /// It is read, on the caller's word.
    Given,
}

pub(super) fn backing_of(
    header: &Header,
    inside: &Path,
    options: &Options,
) -> Result<Option<Reference>> {
    let Some(name) = header.backing_file.as_deref() else {
        return Ok(None);
    };
    if options.no_backing {
        return Ok(None);
    }
    let path = resolve(name, inside)?;
    let format = header
        .backing_format()
        .or(options.backing_format.as_deref());
    let Some(format) = format else {
        return Err(Error::new(
            ErrorKind::Policy,
            "the image does not record its backing file's format, and guessing it would let \
                 the content of a raw disk decide what is opened",
        )
        .path(inside)
        .cure(
            "give it with --backing-format qcow2|raw, or record it with \
                 `qcow2-ublk rebase -u -F FORMAT -b FILE`",
        ));
    };
    Reference::named(path, format, inside).map(Some)
}

pub(super) async fn open_backing(
    reference: &Reference,
    inside: &Path,
    options: &Options,
    access: Access,
) -> Result<Layer> {
    let open = |cache| {
        let writable = access == Access::Write;
        let how = OpenOptions {
            writable,
            cache,
            locks: locks(options, writable),
        };
        if access == Access::Given {
            return Storage::open(&reference.path, &how);
        }
        let fd = options.policy.open(&reference.path, inside, writable)?;
        Storage::from_fd(fd, &reference.path, &how)
    };
    if reference.raw {
        return Ok(Layer::Raw(open(options.cache)?));
    }
    let image = open_image(open, options, &options.image, None).await?;
    Ok(Layer::Qcow2(Box::new(image)))
}
