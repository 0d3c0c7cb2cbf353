//! Making images: learning what the backing file is like, and writing the new
//! file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Layer;
use super::name::resolve;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::{CreateOptions, NewImage, Preallocation};
use crate::qcow2::{Image, ImageOptions};
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
            // Its size alone: that needs no key.
            let options = ImageOptions {
                metadata_only: true,
                ..ImageOptions::default()
            };
            let image = Image::open(storage, &options).await?;
            Layer::Qcow2(Box::new(image))
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
    let image = options.build().map_err(|e| e.path(path))?;
    if let Some(backing) = &options.backing {
        refuse_itself(&backing.file, path)?;
    }
    let existed = fs::symlink_metadata(path).is_ok();
    let storage = Storage::create(path)?;
    let made = make(storage, &image, options).await;
    if made.is_err() && !existed {
        // Nothing of a failed attempt stays. The first error tells more.
        let _ = fs::remove_file(path);
    }
    made.map_err(|e| e.path(path))
}

/// The image, and the space it is to have at once. An interruption of the
/// latter leaves a whole image with less space, or with leaks.
async fn make(storage: Storage, image: &NewImage, options: &CreateOptions) -> Result<()> {
    if options.nocow && !storage.is_block_device() {
        storage.set_len(0).await?;
        storage.advise_no_cow();
    }
    write(&storage, image).await?;
    if options.preallocation == Preallocation::Off {
        return Ok(());
    }
    let image = Image::open(storage, &ImageOptions::default()).await?;
    image.preallocate(options.preallocation).await?;
    image.close().await
}

/// An image that took its backing file's place would destroy it.
fn refuse_itself(name: &OsStr, path: &Path) -> Result<()> {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let backing = resolve(name, path)?;
    if identity(&backing).is_none_or(|backing| Some(backing) != identity(path)) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, "an image cannot be its own backing file").path(path))
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
