//! Opening chains for what works on more than one of their layers: committing
//! into a lower layer, and putting an image over other files.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::name::resolve;
use super::open::{Access, Reference, backing_of, follow, open, open_backing};
use super::{Chain, Layer, Options};
use crate::error::{Error, ErrorKind, Result};

/// A chain taken apart at the layer that takes the data of those above it.
#[derive(Debug)]
pub struct Apart {
    /// The layers above it, top first. The top is open for writing if the
    /// options say so.
    pub upper: Chain,
    /// The layer itself, open for writing, and all that is below it.
    pub base: Vec<Layer>,
}

/// Opens the chain of the image at `path` so that the layers above `base` can
/// be committed to it: the file that the image names, or one further down.
///
/// That file is written to on the image's word, so the policy must allow it,
/// and nobody else may have it open.
pub async fn open_apart(path: &Path, options: &Options, base: Option<&OsStr>) -> Result<Apart> {
    let alone = Options {
        no_backing: true,
        ..options.clone()
    };
    let mut upper = open(path, &alone).await?;
    let top = upper.top();
    let mut seen = vec![top.storage().identity()];
    let mut header = top.header();
    let mut inside = path.to_owned();
    loop {
        let Some(reference) = backing_of(&header, &inside, options)? else {
            return Err(match base {
                Some(base) => Error::new(
                    ErrorKind::Usage,
                    format!(
                        "Did not find '{}' in the backing chain of '{}'",
                        base.display(),
                        path.display()
                    ),
                ),
                None => Error::new(ErrorKind::Usage, "Image does not have a backing file"),
            }
            .path(path));
        };
        let is_base = match base {
            None => true,
            Some(wanted) => is_named(&reference, header.backing_file.as_deref(), wanted),
        };
        let access = if is_base { Access::Write } else { Access::Read };
        let layer = open_backing(&reference, &inside, options, access).await?;
        reference.check_loop(&mut seen, &layer, &inside)?;
        inside = reference.path;
        let Layer::Qcow2(image) = &layer else {
            if is_base {
                let base = vec![layer];
                return Ok(Apart { upper, base });
            }
            let end = Error::new(
                ErrorKind::Usage,
                format!(
                    "Did not find '{}' in the backing chain of '{}'",
                    base.unwrap_or_default().display(),
                    path.display()
                ),
            );
            return Err(end.path(path));
        };
        header = image.header();
        if is_base {
            let below = follow(&header, &inside, options, &mut seen).await?;
            // Only now: an image whose chain is not whole stays as it is.
            let layer = match layer {
                Layer::Qcow2(image) => {
                    Layer::Qcow2(Box::new(image.repaired(&options.image).await?))
                }
                raw @ Layer::Raw(_) => raw,
            };
            let mut base = vec![layer];
            base.extend(below);
            return Ok(Apart { upper, base });
        }
        upper.layers.push(layer);
    }
}

/// True when `wanted` is the name that an image records, or leads to the same
/// file.
fn is_named(reference: &Reference, recorded: Option<&OsStr>, wanted: &OsStr) -> bool {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    recorded == Some(wanted)
        || identity(&reference.path).is_some_and(|found| identity(Path::new(wanted)) == Some(found))
}

/// Opens for reading the file that the image `over` is to have as its backing
/// file, under the name that will be recorded, and everything below it.
///
/// The name is its author's own word and needs no permission; those further
/// down do.
pub async fn open_new_backing(
    name: &OsStr,
    format: &str,
    over: &Chain,
    options: &Options,
) -> Result<Vec<Layer>> {
    let inside = over.top().path();
    let reference = Reference::named(resolve(name, inside)?, format, inside)?;
    let path: PathBuf = reference.path.clone();
    let layer = open_backing(&reference, inside, options, Access::Given)
        .await
        .map_err(|e| {
            e.context(format_args!(
                "Could not open new backing file '{}'",
                name.display()
            ))
        })?;
    let mut seen = vec![over.top().storage().identity()];
    reference.check_loop(&mut seen, &layer, inside)?;
    let mut layers = vec![layer];
    if let Layer::Qcow2(image) = &layers[0] {
        let header = image.header();
        layers.extend(follow(&header, &path, options, &mut seen).await?);
    }
    Ok(layers)
}
