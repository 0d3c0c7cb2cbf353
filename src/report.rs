//! Reports about images, for ordinary programs: they block, and change
//! nothing.

use std::path::Path;

use crate::disk::blocking;
use crate::error::Result;
use crate::qcow2::check::{self, CheckReport, Finding};
use crate::storage::{Locks, OpenOptions, Role, Storage};

/// Checks the qcow2 image at `path`, whatever its condition; files below it
/// are not opened. `observe` is told each finding. With `force_share` the
/// image may be in use, and the report be wrong because of it.
pub fn check(
    path: &Path,
    force_share: bool,
    mut observe: impl FnMut(&Finding),
) -> Result<CheckReport> {
    let storage = open_one(path, force_share)?;
    blocking(check::check(&storage, &mut observe))
}

fn open_one(path: &Path, force_share: bool) -> Result<Storage> {
    let locks = if force_share {
        Locks::ForceShare
    } else {
        Locks::Normal(Role::ReadOnly)
    };
    Storage::open(path, &OpenOptions::read_only().locks(locks))
}
