//! Making images: learning what the backing file is like, and writing the new
//! file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Layer;
use super::name::{resolve, resolve_data};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::{CreateOptions, NewImage, Preallocation};
use crate::qcow2::{Image, ImageOptions, read_header};
use crate::storage::{OpenOptions, Storage};

/// The size in bytes of the disk in the file that the image `inside` is to
/// have as its backing file, under the name that will be recorded.
///
/// The name is its author's own word and needs no permission; the file's own
/// backing files are not looked at.
pub async fn backing_size(name: &OsStr, format: &str, inside: &Path) -> Result<u64> {
    let path = resolve(name, inside)?;
    let storage = Storage::open(&path, &OpenOptions::read_only())?;
    let layer = match format {
        "raw" => Layer::Raw(storage),
        "qcow2" => {
            // Its own data file, if it has one, does not matter.
            let header = read_header(&storage).await?;
            return Ok(header.virtual_size());
        }
        _ => {
            let what = format!("the backing file's format is qcow2 or raw, not {format:?}");
            return Err(Error::new(ErrorKind::Usage, what).path(inside));
        }
    };
    Ok(layer.size())
}

/// Where the file is that the image `inside` is to have as its backing file,
/// under the name that will be recorded.
pub fn backing_path(name: &OsStr, inside: &Path) -> Result<PathBuf> {
    resolve(name, inside)
}

/// Makes an image. A file of that name loses its content, but is not touched
/// while somebody else has it open as an image, or when it is the new image's
/// own backing file.
pub async fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    create_at(path, data_path(path, options)?, options).await
}

/// Where the external data file of an image is that is made at `path`, if it
/// is to have one.
pub fn data_path(path: &Path, options: &CreateOptions) -> Result<Option<PathBuf>> {
    let name = options.data_file.as_deref();
    name.map(|name| resolve_data(name, path)).transpose()
}

/// As [`create`], with the data file at another place than the recorded one.
pub async fn create_at(
    path: &Path,
    data_path: Option<PathBuf>,
    options: &CreateOptions,
) -> Result<()> {
    let image = options.build().map_err(|e| e.path(path))?;
    if let Some(backing) = &options.backing {
        refuse_same(&resolve(&backing.file, path)?, path, "backing file")?;
    }
    if let Some(data_path) = &data_path {
        refuse_same(data_path, path, "data file")?;
        if let Some(backing) = &options.backing {
            let backing = resolve(&backing.file, path)?;
            refuse_same(data_path, &backing, "data file")?;
        }
    }
    let paths = [Some(path), data_path.as_deref()];
    let new = paths.map(|path| path.filter(|path| fs::symlink_metadata(path).is_err()));
    let made = async {
        let storage = Storage::create(path)?;
        let data = match &data_path {
            None => None,
            Some(data_path) => Some(make_data_file(data_path, options).await?),
        };
        make(storage, data, &image, options).await
    }
    .await;
    if made.is_err() {
        // Nothing of a failed attempt stays. The first error tells more.
        for path in new.into_iter().flatten() {
            let _ = fs::remove_file(path);
        }
    }
    made.map_err(|e| e.path(path))
}

/// The image, and the space it is to have at once. An interruption of the
/// latter leaves a whole image with less space, or with leaks.
async fn make(
    storage: Storage,
    data: Option<Storage>,
    image: &NewImage,
    options: &CreateOptions,
) -> Result<()> {
    if options.nocow && !storage.is_block_device() {
        storage.set_len(0).await?;
        storage.advise_no_cow();
    }
    write(&storage, image).await?;
    // All of a raw data file is mapped, as QEMU does it: then others who write
    // to that file change what the disk shows, everywhere.
    let mode = match options.preallocation {
        Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
        mode => mode,
    };
    if mode == Preallocation::Off {
        return Ok(());
    }
    // No guest data is written, so that no key is needed.
    let how = ImageOptions {
        metadata_only: true,
        ..ImageOptions::default()
    };
    let image = Image::open_with_data(storage, data, &how).await?;
    image.preallocate(mode).await?;
    image.close().await
}

/// Makes an external data file, as long as the disk. A file of that name
/// loses its content.
async fn make_data_file(path: &Path, options: &CreateOptions) -> Result<Storage> {
    let named = |e: Error| e.path(path);
    let data = Storage::create(path)?;
    let size = options.size.next_multiple_of(512);
    if !data.is_block_device() {
        data.set_len(0).await.map_err(named)?;
        data.set_len(size).await.map_err(named)?;
    } else if data.len() < size {
        let what = format!("the device is smaller than the disk of {size} bytes");
        return Err(Error::new(ErrorKind::NoSpace, what).path(path));
    } else if options.data_file_raw {
        data.write_zeroes(0, size, true).await.map_err(named)?;
    }
    data.sync().await.map_err(named)?;
    Ok(data)
}

/// A file that took the place of another one it needs would destroy it.
fn refuse_same(other: &Path, path: &Path, what: &str) -> Result<()> {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let same = match (identity(other), identity(path)) {
        (None, None) => other == path,
        (other, this) => other == this,
    };
    if !same {
        return Ok(());
    }
    let what = format!("an image cannot be its own {what}");
    Err(Error::new(ErrorKind::Usage, what).path(path))
}

/// Everything but the header is durable before the header is there: what is
/// interrupted is no image.
pub(super) async fn write(storage: &Storage, image: &NewImage) -> Result<()> {
    let len = image.file_len.next_multiple_of(image.header.cluster_size());
    if storage.is_block_device() {
        if storage.len() < len {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("the device is smaller than the {len} bytes an empty image takes"),
            ));
        }
        // Nothing of the old content may pass for a table.
        storage.write_zeroes(0, len, false).await?;
    } else {
        storage.set_len(0).await?;
        storage.set_len(len).await?;
    }
    let (header, tables) = image.chunks.split_last().expect("there is a header");
    for (offset, bytes) in tables {
        storage.write(offset.0, bytes).await?;
    }
    storage.sync().await?;
    storage.write(header.0.0, &header.1).await?;
    storage.sync().await
}
