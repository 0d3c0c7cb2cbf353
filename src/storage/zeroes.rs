//! Zeroing ranges and giving their space back.

use super::Storage;
use super::backend::{Allocation, Retries};
use crate::error::{Error, Result};
use crate::runtime::Payload;

/// How an allocation request ended that did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Nothing was changed; bytes have to be written instead.
    Refused,
}

impl Storage {
    /// Makes the range read as zeros; the file grows as needed. With
    /// `may_unmap` the space may be given back. For the neighbours of a range
    /// that is not aligned, see [`Self::alignment`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        let end = offset + len;
        let (start, stop) = self.allocation_units(offset, end);
        if start >= stop {
            return self.store_zeros(offset, len).await;
        }
        self.store_zeros(offset, start - offset).await?;
        if !may_unmap || !self.punch_and_grow(start, stop).await? {
            match self
                .allocate(Allocation::ZeroRange, start, stop - start)
                .await?
            {
                Outcome::Done => self.grown_to(stop),
                Outcome::Refused => self.store_zeros(start, stop - start).await?,
            }
        }
        self.store_zeros(stop, end - stop).await
    }

    /// Gives the range's space back to the host. `true`: done, and it reads
    /// as zeros now. `false`: the host cannot, and nothing was changed.
    pub async fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(true);
        }
        if self.allocation_units(offset, offset + len) != (offset, offset + len) {
            return Ok(false);
        }
        let outcome = self.allocate(Allocation::PunchHole, offset, len).await?;
        Ok(outcome == Outcome::Done)
    }

    /// Takes the space of a range from the host now, so that writing there
    /// later cannot fail for want of it. What the range holds stays; the file
    /// grows as needed.
    pub async fn reserve_space(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if len == 0 || self.is_block_device() {
            return Ok(());
        }
        let mut retries = Retries::default();
        while let Err(e) = self.backend.reserve(offset, len).await {
            let unable = matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS));
            if !retries.allow(&e) {
                let error = Error::io("take the space of a range", e)
                    .path(&self.path)
                    .at(offset);
                return Err(if unable {
                    error.cure("this file system cannot; write zeros instead (preallocation=full)")
                } else {
                    error
                });
            }
        }
        self.grown_to(offset + len);
        Ok(())
    }

    /// Asks the file system not to copy this file's blocks when they are
    /// written to. Only an empty file on btrfs heeds it, and it is advice: a
    /// file system that knows nothing of it changes nothing.
    pub(crate) fn advise_no_cow(&self) {
        if let Err(e) = self.backend.set_no_cow() {
            tracing::debug!("{}: nocow has no effect: {e}", self.path.display());
        }
    }

    /// The part of a range that an allocation request can cover: all of it in
    /// a file, whose file system takes care of partial blocks in the page
    /// cache; the whole pages in it with direct I/O, the whole sectors on a
    /// block device.
    fn allocation_units(&self, offset: u64, end: u64) -> (u64, u64) {
        let unit = u64::from(self.alignment.allocation);
        (
            offset.div_ceil(unit).saturating_mul(unit),
            end / unit * unit,
        )
    }

    async fn punch_and_grow(&self, start: u64, stop: u64) -> Result<bool> {
        if self
            .allocate(Allocation::PunchHole, start, stop - start)
            .await?
            == Outcome::Refused
        {
            return Ok(false);
        }
        if stop > self.len() && !self.is_block_device() {
            // Punching does not lengthen the file, and ftruncate could
            // shorten it, when somebody writes further out meanwhile. Storing
            // the range's last bytes can only lengthen it.
            let last = (stop - start).min(u64::from(self.alignment.offset));
            self.store_zeros(stop - last, last).await?;
        }
        Ok(true)
    }

    async fn store_zeros(&self, offset: u64, len: u64) -> Result<()> {
        self.start_write(offset, &Payload::zeros(len)).await
    }

    async fn allocate(&self, what: Allocation, offset: u64, len: u64) -> Result<Outcome> {
        if self.unsupported.is(what) {
            return Ok(Outcome::Refused);
        }
        let mut retries = Retries::default();
        loop {
            let Err(e) = self.backend.allocate(what, offset, len).await else {
                return Ok(Outcome::Done);
            };
            match e.raw_os_error() {
                _ if retries.allow(&e) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY) => {
                    self.unsupported.remember(what);
                    return Ok(Outcome::Refused);
                }
                // This range, perhaps not the next: some file systems want
                // whole blocks, and a device that others use too may be busy.
                Some(libc::EINVAL | libc::EBUSY) => return Ok(Outcome::Refused),
                _ => {
                    let doing = match what {
                        Allocation::ZeroRange => "zero a range",
                        Allocation::PunchHole => "give the space of a range back",
                    };
                    return Err(Error::io(doing, e).path(&self.path).at(offset));
                }
            }
        }
    }
}
