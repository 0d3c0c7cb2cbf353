//! Changes to images that nobody else has open, for ordinary programs: they
//! block.

use std::path::Path;

use crate::disk::blocking;
use crate::error::Result;
use crate::qcow2::SnapshotJob;
use crate::qcow2::amend::Amendment;
use crate::storage::{OpenOptions, Storage};

/// Makes, deletes, applies or renames a snapshot of the image at `path`.
/// Files below the image are not opened.
///
/// A power cut leaves the image as it was, or as it is to be.
pub fn snapshot(path: &Path, job: &SnapshotJob) -> Result<()> {
    let storage = Storage::open(path, &OpenOptions::read_write())?;
    blocking(job.run(&storage))
}

/// Changes features of the image at `path`. A power cut leaves the image as it
/// was, or some or all of the changes made.
pub fn amend(path: &Path, amendment: &Amendment) -> Result<()> {
    let storage = Storage::open(path, &OpenOptions::read_write())?;
    blocking(amendment.run(&storage))
}
