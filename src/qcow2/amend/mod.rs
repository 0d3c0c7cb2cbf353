//! Changing features of an image: its version, the width of its refcounts,
//! whether refcounts may be postponed. Nothing the disk shows changes.
//!
//! # On disk
//!
//! Each change is a new state of the metadata beside the old one, and one
//! sector that switches; see [`shadow`](super::shadow). Several changes are
//! made one after the other, in an order in which each of them is allowed.

mod downgrade;

use super::marks::sound_header;
use super::open::read_header;
use super::shadow::{Shadow, one_sector};
use super::snapshot::{self, refuse_external};
use super::spec::Header;
use super::spec::header::{COMPATIBLE_AT, Compatible};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// What is to be changed. What is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amendment {
    /// Version of the format, 2 or 3.
    pub version: Option<u8>,
    /// Width of a refcount in bits: a power of two, 1 to 64.
    pub refcount_bits: Option<u64>,
    /// Refcount updates may be postponed.
    pub lazy_refcounts: Option<bool>,
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

impl Amendment {
    /// Makes the changes in the image in `storage`, which nobody else has
    /// open.
    ///
    /// # Errors
    ///
    /// `Usage` or `Unsupported`, mostly in qemu-img's words, if the changes do
    /// not go together or the image has what stands in their way. Of several
    /// changes the first may have been made.
    pub async fn run(&self, storage: &Storage) -> Result<()> {
        let header = sound_header(storage).await?;
        let named = |e: Error| e.path(storage.path());
        storage.check_writable()?;
        self.check(&header).map_err(named)?;
        if self.version == Some(3) && header.version < 3 {
            upgrade(storage).await.map_err(named)?;
        }
        if let Some(bits) = self.refcount_bits {
            widen(storage, bits.trailing_zeros()).await.map_err(named)?;
        }
        if let Some(lazy) = self.lazy_refcounts {
            set_lazy(storage, lazy).await.map_err(named)?;
        }
        if self.version == Some(2) && header.version > 2 {
            downgrade::downgrade(storage).await.map_err(named)?;
        }
        Ok(())
    }

    /// Whether the changes go together, and with the image.
    fn check(&self, header: &Header) -> Result<()> {
        let version = self.version.unwrap_or(header.version);
        if !matches!(version, 2 | 3) {
            return Err(usage(format!("there is no version {version}")));
        }
        let bits = self
            .refcount_bits
            .unwrap_or_else(|| header.geometry().refcount_bits().into());
        if !bits.is_power_of_two() || bits > 64 {
            return Err(usage(
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
        if version < 3 && self.lazy_refcounts == Some(true) {
            return Err(usage(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 compat=1.1 or greater)",
            ));
        }
        if version < 3 && bits != 16 {
            return Err(usage(if header.version < 3 {
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
                 compat=1.1 or greater)"
            } else {
                "compat=0.10 requires refcount_bits=16"
            }));
        }
        if version < 3 && header.version > 2 {
            downgrade::check(header)?;
        }
        Ok(())
    }
}

/// Makes a version 2 image one of version 3, which can say all that version 2
/// can; but its snapshots must tell their disk's size.
async fn upgrade(storage: &Storage) -> Result<()> {
    let header = read_header(storage).await?;
    let mut new = header.clone();
    new.version = 3;
    one_sector(&new)?;
    let mut sh = Shadow::begin(storage, header).await?;
    snapshot::complete_table(&mut sh).await?;
    sh.header.version = 3;
    let ready = sh.finish().await?;
    ready.publish_header(storage).await?;
    ready.punch_freed(storage).await;
    Ok(())
}

/// Makes refcounts 2^`order` bits wide.
async fn widen(storage: &Storage, order: u32) -> Result<()> {
    let header = read_header(storage).await?;
    if header.refcount_order == order {
        return Ok(());
    }
    let len_before = storage.len();
    let built = async {
        let mut sh = Shadow::begin(storage, header).await?;
        sh.widen(order).await?;
        sh.finish().await
    }
    .await;
    if built.is_err() {
        Shadow::give_up(storage, len_before).await;
    }
    let ready = built?;
    ready.publish(storage).await?;
    ready.punch_freed(storage).await;
    Ok(())
}

/// Lets refcounts be postponed, or not. They are in order: the image is not
/// dirty.
async fn set_lazy(storage: &Storage, lazy: bool) -> Result<()> {
    let header = read_header(storage).await?;
    let mut compatible = header.compatible;
    compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
    if compatible == header.compatible {
        return Ok(());
    }
    let bytes = compatible.bits().to_be_bytes();
    storage.write(COMPATIBLE_AT.0, &bytes).await?;
    storage.sync().await
}
