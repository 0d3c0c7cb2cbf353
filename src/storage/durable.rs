//! Durability: shared syncs, and the failure that stays.
//!
//! When fdatasync fails, the kernel has dropped its note of what did not
//! reach the disk, and a second call would succeed without writing any of
//! it. So the first failure is final: what is on the disk is unknown until
//! the image is opened and examined again.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Storage;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::sync::Mutex;

#[derive(Debug, Default)]
pub(super) struct Durability {
    latched: AtomicBool,
    /// Held while a sync is under way. One at a time: of two at once the
    /// kernel tells only one of a failure, and the other would report
    /// success.
    running: Mutex<()>,
    /// How many syncs were begun. All but one under way succeeded: a failure
    /// latches.
    begun: AtomicU64,
    /// Nobody will read the file after a power cut.
    pointless: bool,
}

impl Durability {
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        if !self.latched.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Latched,
            "an earlier sync failed, so what the file holds is unknown",
        )
        .path(path)
        .cure("close the image, check it, and open it again"))
    }
}

/// Latches unless forgotten: when a sync fails, and when its future is dropped
/// half-way, for then nobody learns how it ended.
struct LatchOnDrop<'a>(&'a Durability);

impl Drop for LatchOnDrop<'_> {
    fn drop(&mut self) {
        self.0.latched.store(true, Ordering::Release);
    }
}

impl Storage {
    /// Makes everything completed before this call durable (`fdatasync`).
    ///
    /// A failure is final: every later sync and write fails with
    /// [`ErrorKind::Latched`]. Concurrent calls share the work. On a storage
    /// opened for reading there is nothing to do.
    pub async fn sync(&self) -> Result<()> {
        if !self.writable || self.durability.pointless {
            return Ok(());
        }
        let durability = &self.durability;
        // A sync that begins after this line covers all that is complete now.
        let wanted = durability.begun.load(Ordering::SeqCst) + 1;
        let _running = durability.running.lock().await;
        durability.check(&self.path)?;
        if durability.begun.load(Ordering::SeqCst) >= wanted {
            return Ok(());
        }
        durability.begun.fetch_add(1, Ordering::SeqCst);
        let latch = LatchOnDrop(durability);
        loop {
            match self.backend.sync().await {
                Ok(_) => {
                    std::mem::forget(latch);
                    return Ok(());
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => {
                    return Err(Error::io("make the written data durable", e)
                        .path(&self.path)
                        .cure("close the image, check it, and open it again"));
                }
            }
        }
    }

    /// Refuses every later sync and write, as after a failed sync: what the
    /// file holds is unknown.
    pub(crate) fn latch(&self) {
        self.durability.latched.store(true, Ordering::Release);
    }

    /// With syncs that do nothing: for a file whose content is lost with the
    /// process anyway.
    #[must_use]
    pub(crate) fn short_lived(mut self) -> Self {
        self.durability.pointless = true;
        self
    }

    /// True after a failed [`Self::sync`].
    pub fn is_latched(&self) -> bool {
        self.durability.latched.load(Ordering::Acquire)
    }
}
