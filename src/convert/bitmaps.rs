//! Dirty bitmaps that go along with the disk.

use super::target::Target;
use super::{Options, Source};
use crate::disk::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{BitmapAction, Image};

/// Which bitmaps are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bitmaps {
    /// All of them; the copy fails where one is inconsistent.
    All,
    /// Those that are not inconsistent.
    Sound,
}

/// Refuses bitmaps that cannot be copied, before anything is.
pub(super) fn check(source: &Source, options: &Options<'_>) -> Result<()> {
    let Some(which) = options.bitmaps else {
        return Ok(());
    };
    let lacks = |what: &str| Err(Error::new(ErrorKind::Unsupported, what));
    if options.output.is_raw() {
        return lacks("Format driver 'raw' does not support bitmaps");
    }
    let Some(image) = image_of(source) else {
        return lacks("Source lacks bitmap support");
    };
    let found = blocking(image.bitmaps())?;
    match found.iter().find(|found| found.inconsistent) {
        Some(found) if which == Bitmaps::All => {
            let name = String::from_utf8_lossy(&found.name);
            let what = format!("Cannot copy inconsistent bitmap '{name}'");
            Err(Error::new(ErrorKind::Unsupported, what)
                .path(image.path())
                .cure("Try --skip-broken-bitmaps, or remove it with `qcow2-ublk bitmap --remove`"))
        }
        _ => Ok(()),
    }
}

fn image_of(source: &Source) -> Option<&Image> {
    source.engine().map(|engine| engine.chain().top())
}

/// Copies the bitmaps into a target that holds the disk.
pub(super) fn copy(source: &Source, target: &Target, options: &Options<'_>) -> Result<()> {
    let (Some(from), Some(to)) = (image_of(source), target.engine()) else {
        return Ok(());
    };
    if options.bitmaps.is_none() {
        return Ok(());
    }
    let to = to.chain().top();
    blocking(async {
        for found in from.bitmaps().await? {
            if found.inconsistent {
                let name = String::from_utf8_lossy(&found.name);
                tracing::warn!("Skipping inconsistent bitmap '{name}'");
                continue;
            }
            let content = from.bitmap(&found.name).await?;
            let granularity = Some(found.granularity);
            let actions = [
                BitmapAction::Add { granularity },
                BitmapAction::Merge(&content),
                BitmapAction::Disable,
            ];
            // A new one records; so does the copy of one that does.
            let wanted = if found.enabled { 2 } else { 3 };
            for action in &actions[..wanted] {
                to.change_bitmap(&found.name, action).await?;
            }
        }
        Ok(())
    })
}
