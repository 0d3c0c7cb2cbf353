//! Reports about images, for ordinary programs: they block, and change
//! nothing.

use std::path::Path;

use crate::chain::{self, MapEntry};
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

/// Tells which file of the chain has which part of the disk: of `range.1`
/// bytes from byte `range.0` on, or of all to the end. `emit` is told each part
/// and the file that decides about it.
pub fn map(
    path: &Path,
    options: &chain::Options,
    range: (u64, Option<u64>),
    mut emit: impl FnMut(&MapEntry, &Path) -> Result<()>,
) -> Result<()> {
    blocking(async {
        let chain = chain::open(path, options).await?;
        let (start, len) = range;
        let size = chain.top().size();
        let end = len.map_or(size, |len| size.min(start.saturating_add(len)));
        let file = |depth: usize| chain.layers()[depth].storage().path();
        chain
            .map(start, end, |entry| emit(entry, file(entry.depth)))
            .await
    })
}

fn open_one(path: &Path, force_share: bool) -> Result<Storage> {
    let locks = if force_share {
        Locks::ForceShare
    } else {
        Locks::Normal(Role::ReadOnly)
    };
    Storage::open(path, &OpenOptions::read_only().locks(locks))
}
