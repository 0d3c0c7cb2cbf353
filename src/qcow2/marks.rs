//! The marks an image carries about itself: dirty (its refcounts may be wrong)
//! and corrupt (it must not be written to); and what follows from them.
//!
//! # On disk
//!
//! | moment | order |
//! |---|---|
//! | first change of an image with lazy refcounts | dirty mark `|` everything else |
//! | while it is dirty | data `|` L2 and L1; refcounts whenever that is convenient |
//! | clean close | everything, refcounts too `|` dirty mark off `|` |
//! | metadata found impossible, or about to be written over | corrupt mark `|` |
//!
//! A power cut while the mark is on leaves an image whose mapping is right and
//! whose refcounts are not to be believed: the next writer counts anew
//! ([`Image::repaired`]) before it writes anything.

use std::sync::atomic::Ordering;

use super::check::{self, Repair};
use super::open::read_header;
use super::spec::header::{Compatible, INCOMPATIBLE_AT, Incompatible};
use super::{Header, Image, ImageOptions, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::rule::Rule;
use crate::storage::Storage;

impl Image {
    /// Counts the references of an image that is marked dirty, and opens it
    /// again. Nothing happens to others, or to those opened for reading.
    ///
    /// Called when everything else that can refuse has not: an image that
    /// cannot be used stays as it is.
    pub async fn repaired(self, options: &ImageOptions) -> Result<Self> {
        if !self.needs_repair {
            return Ok(self);
        }
        let (storage, data_file) = (self.storage, self.data_file);
        repair_dirty(&storage).await?;
        Self::open_with_data(storage, data_file, options).await
    }

    /// Refcounts need not be in the file before what they count: the image
    /// says so itself.
    pub(super) fn postpones_refcounts(&self) -> bool {
        self.lazy.load(Ordering::Acquire)
    }

    /// Marks an image with lazy refcounts dirty, durably, before its first
    /// change.
    pub(super) async fn begin_lazy(&self) -> Result<()> {
        let header = self.header();
        let wanted = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        if header.version < 3 || !wanted || self.postpones_refcounts() {
            return Ok(());
        }
        self.store_marks(header.incompatible | Incompatible::DIRTY)
            .await?;
        self.lazy.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes the dirty mark off: everything is durable. After a failure the
    /// mark stays, and the next call takes it off.
    pub(super) async fn end_lazy(&self) -> Result<()> {
        let marks = self.header().incompatible;
        if !marks.contains(Incompatible::DIRTY) || self.needs_repair {
            return Ok(());
        }
        // From now on as always: what follows is written in order again.
        self.lazy.store(false, Ordering::Release);
        if !Rule::CountsBeforeClean.is_broken() {
            self.flush().await?;
        }
        self.store_marks(marks - Incompatible::DIRTY).await?;
        // The next change marks it again.
        self.prepared.store(false, Ordering::Release);
        Ok(())
    }

    async fn store_marks(&self, marks: Incompatible) -> Result<()> {
        if !marks.contains(Incompatible::DIRTY) || !Rule::DirtyBeforeLazy.is_broken() {
            self.write_header(INCOMPATIBLE_AT, &marks.bits().to_be_bytes())
                .await?;
            self.storage.sync().await?;
        }
        lock(&self.header).incompatible = marks;
        Ok(())
    }

    /// A write has met metadata of this image that cannot be right: nothing is
    /// written for guests any more, and the image says so to whoever opens it.
    /// Errors of other files and of other kinds do not count.
    pub(crate) async fn judge(&self, error: &Error) {
        let ours = error.file().is_none_or(|file| file == self.path());
        if !error.is_metadata() || !ours || !self.writable() {
            return;
        }
        if self.corrupt.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(
            "{error}; {} is marked corrupt and not written to any more",
            self.path().display()
        );
        let header = self.header();
        if header.version >= 3 {
            let marks = header.incompatible | Incompatible::CORRUPT;
            if let Err(error) = self.store_marks(marks).await {
                tracing::error!("cannot mark the image corrupt: {error}");
            }
        }
    }

    /// Refuses changes to an image that is known to be wrong.
    pub(super) fn check_marks(&self) -> Result<()> {
        let refusal = if self.corrupt.load(Ordering::Acquire) {
            "the image was found to be corrupt and is not written to any more"
        } else if self.needs_repair {
            "the image is marked dirty and has not been repaired"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Corrupt, refusal)
            .path(self.path())
            .cure("close it, and run `qcow2-ublk check -r all`"))
    }
}

async fn repair_dirty(storage: &Storage) -> Result<()> {
    tracing::warn!(
        "{}: the image was not closed cleanly; its refcounts are being repaired",
        storage.path().display()
    );
    let done = check::repair(storage, Repair::All, &mut |_| {}).await?;
    if done.report.corruptions + done.report.check_errors > 0 {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image was not closed cleanly and could not be repaired",
        )
        .path(storage.path())
        .cure("see `qcow2-ublk check`, or open the image read-only"));
    }
    Ok(())
}

/// The header of an image that is about to be changed, without being opened:
/// not one that is marked corrupt, and repaired if it is marked dirty.
pub(super) async fn sound_header(storage: &Storage) -> Result<Header> {
    let header = read_header(storage).await?;
    refuse_corrupt(&header).map_err(|e| e.path(storage.path()))?;
    if !header.incompatible.contains(Incompatible::DIRTY) {
        return Ok(header);
    }
    repair_dirty(storage).await?;
    read_header(storage).await
}

/// Images that are known to be corrupt are not written to.
pub(super) fn refuse_corrupt(header: &Header) -> Result<()> {
    if header.incompatible.contains(Incompatible::CORRUPT) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image is marked corrupt and is not opened for writing",
        )
        .cure("repair it with `qcow2-ublk check -r all`, or open it read-only"));
    }
    Ok(())
}
