//! What an image says about itself: its header, its snapshots, its bitmaps.
//! Whether it can be served, and whether its tables are in order, does not
//! matter here.

use super::open::read_damaged_header;
use super::snapshot;
use super::spec::bitmap::Bitmap;
use super::spec::header::{CryptMethod, Header};
use super::spec::luks::LuksInfo;
use super::spec::snapshot::Snapshot;
use crate::crypto::luks1;
use crate::error::{Error, Result};
use crate::runtime::Buf;
use crate::storage::Storage;

/// What an image says about itself.
#[derive(Debug)]
pub struct ImageInfo {
    /// The header.
    pub header: Header,
    /// The snapshots, in the order of their table.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps, if they can be believed.
    pub bitmaps: Vec<Bitmap>,
    /// How it is encrypted, if with LUKS.
    pub luks: Option<LuksInfo>,
    /// What could not be read, and is therefore missing above.
    pub problems: Vec<Error>,
}

/// Reads what the image in `storage` says about itself.
///
/// # Errors
///
/// When the header cannot be read; what else cannot be is among the problems.
pub async fn info(storage: &Storage) -> Result<ImageInfo> {
    let header = read_damaged_header(storage).await?;
    let mut problems = Vec::new();
    let snapshots = match snapshot::read_table(storage, &header).await {
        Ok((snapshots, _)) => snapshots,
        Err(e) => {
            problems.push(e.path(storage.path()));
            Vec::new()
        }
    };
    let bitmaps = match bitmaps(storage, &header).await {
        Ok(bitmaps) => bitmaps,
        Err(e) => {
            problems.push(e.path(storage.path()));
            Vec::new()
        }
    };
    let mut luks = None;
    if let (CryptMethod::Luks, Some((offset, _))) = (header.crypt_method, header.crypto_header()) {
        let mut bytes = vec![0; luks1::HEADER_LEN];
        storage.read(offset.0, &mut bytes).await?;
        luks = LuksInfo::parse(&bytes);
        // Version 2 is not what QEMU has names for.
        if luks.is_none() && crate::crypto::luks::version(&bytes).ok() != Some(2) {
            let error = Error::corrupt("the encryption header is none of LUKS", offset.0);
            problems.push(error.path(storage.path()));
        }
    }
    Ok(ImageInfo {
        header,
        snapshots,
        bitmaps,
        luks,
        problems,
    })
}

/// Reads the snapshot table of the image in `storage`.
pub async fn snapshots(storage: &Storage) -> Result<Vec<Snapshot>> {
    let header = read_damaged_header(storage).await?;
    let (snapshots, _) = snapshot::read_table(storage, &header)
        .await
        .map_err(|e| e.path(storage.path()))?;
    Ok(snapshots)
}

async fn bitmaps(storage: &Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.bitmaps().filter(|_| header.bitmaps_consistent()) else {
        return Ok(Vec::new());
    };
    let (offset, len) = (extension.directory_offset.0, extension.directory_size);
    if offset + len > storage.len() {
        let text = "the bitmap directory lies behind the end of the file";
        return Err(Error::corrupt(text, offset));
    }
    let mut directory = Buf::take(len as usize);
    storage.read(offset, &mut directory).await?;
    Bitmap::parse_directory(&directory, extension, &header.geometry())
}
