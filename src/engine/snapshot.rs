//! Reading a snapshot of a disk that is in use, as a backup does. Knows
//! nothing of how snapshots are made.

use std::ops::Deref;

use super::{Engine, Options};
use crate::chain;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{HeldSnapshot, Selector};

/// A snapshot open for reading beside the disk in use. What it shows does not
/// change, and as long as this lives the snapshot is not deleted.
#[derive(Debug)]
pub struct SnapshotReader<'a> {
    engine: Engine,
    _held: HeldSnapshot<'a>,
}

impl Deref for SnapshotReader<'_> {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl Engine {
    /// Opens a snapshot for reading, through a file of its own with the
    /// image's name; `options` say how, with keys and what may be below.
    ///
    /// # Errors
    ///
    /// What opening gives; and `Busy` if the name is another file's by now.
    pub async fn open_snapshot(
        &self,
        which: Selector,
        options: &chain::Options,
    ) -> Result<SnapshotReader<'_>> {
        let image = self.top();
        let turn = image.reshape().await;
        let held = image.hold_snapshot(&turn, &which).await?;
        let options = chain::Options {
            writable: false,
            // The lock in the way is ours.
            force_share: true,
            snapshot: Some(Selector::Id(held.id().to_vec())),
            temporary: None,
            ..options.clone()
        };
        let chain = chain::open(image.path(), &options).await?;
        if chain.top().storage().identity() != image.storage().identity() {
            let what = "the image's name is another file's since it was opened";
            return Err(Error::new(ErrorKind::Busy, what).path(image.path()));
        }
        Ok(SnapshotReader {
            engine: Self::new(chain, Options::default()),
            _held: held,
        })
    }
}
