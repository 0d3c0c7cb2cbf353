//! Recording another backing file, or none. Knows nothing of what either holds.
//!
//! # What is on disk at each moment
//!
//! The name goes to a part of cluster 0 that nothing uses `|` the first
//! sector, with its place and the backing format `|`. A power cut leaves the
//! old name or the new one: one sector decides. Only where the header's
//! extensions fill more than that sector and differ behind it, or where the
//! cluster has no room for both names, all of it is written at once, as QEMU
//! does.

use std::ops::Range;

use super::create::Backing;
use super::spec::addr::HostOffset;
use super::spec::header::{Autoclear, Extension};
use super::{Header, Image, lock};
use crate::error::Result;
use crate::runtime::Buf;

/// What reaches the disk wholly or not at all.
const SECTOR: usize = 512;
/// Bytes that an extension may have beyond what we make of it.
const SLACK: usize = 64;

/// Where things are in an encoded header.
struct Layout {
    /// Behind the last extension.
    extensions_end: usize,
    name: Range<usize>,
}

impl Layout {
    fn of(bytes: &[u8]) -> Self {
        let offset = u64::from_be_bytes(bytes[8..16].try_into().expect("8 bytes")) as usize;
        let len = u32::from_be_bytes(bytes[16..20].try_into().expect("4 bytes")) as usize;
        if offset == 0 {
            return Self {
                extensions_end: bytes.len(),
                name: 0..0,
            };
        }
        Self {
            extensions_end: offset,
            name: offset..offset + len,
        }
    }
}

impl Image {
    /// Records `backing` as the image's backing file, durably. Everything else
    /// the header says stays.
    ///
    /// # Errors
    ///
    /// `Usage` if the name is too long, for the format or for this header.
    pub(crate) async fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.check_writable()?;
        let old = self.header();
        let new = with_backing(&old, backing);
        let bytes = new.encode().map_err(|e| {
            let name = backing.map_or_else(Default::default, |b| b.file.to_string_lossy());
            e.context(format_args!(
                "Could not change the backing file to '{name}'"
            ))
            .path(self.path())
        })?;
        self.write_backing(bytes, &old).await?;
        let mut header = lock(&self.header);
        header.backing_file = new.backing_file;
        header.extensions = new.extensions;
        header.autoclear = new.autoclear;
        Ok(())
    }

    async fn write_backing(&self, mut bytes: Vec<u8>, old: &Header) -> Result<()> {
        let mut cluster0 = Buf::take(self.cluster_size() as usize);
        self.storage.read(0, &mut cluster0).await?;
        let layout = Layout::of(&bytes);
        if bytes.len() > SECTOR {
            let same_behind = cluster0[SECTOR..]
                .starts_with(&bytes[SECTOR.min(layout.extensions_end)..layout.extensions_end]);
            let place = self.place_for_name(&layout, &cluster0, old)?;
            let Some(place) = place.filter(|_| same_behind) else {
                self.storage.write(0, &bytes).await?;
                return self.storage.sync().await;
            };
            if !layout.name.is_empty() {
                let name = &bytes[layout.name.clone()];
                self.storage.write(place as u64, name).await?;
                self.storage.sync().await?;
                bytes[8..16].copy_from_slice(&(place as u64).to_be_bytes());
                // A part of the name must not follow the extensions' end mark.
                let start = layout.name.start.min(SECTOR);
                bytes[start..SECTOR].fill(0);
            }
        }
        bytes.resize(SECTOR, 0);
        self.write_header(HostOffset(0), &bytes).await?;
        self.storage.sync().await
    }

    /// A part of cluster 0, behind the first sector, that is neither
    /// extensions nor the old name.
    fn place_for_name(&self, new: &Layout, cluster0: &[u8], old: &Header) -> Result<Option<usize>> {
        let used = Layout::of(cluster0);
        let old_extensions = Layout::of(&old.encode()?).extensions_end + SLACK;
        let start = SECTOR
            .max(new.extensions_end)
            .max(old_extensions)
            .next_multiple_of(8);
        let len = new.name.len();
        let behind = used.name.end.next_multiple_of(8).max(start);
        Ok([start, behind].into_iter().find(|&place| {
            let apart = place + len <= used.name.start || used.name.end <= place;
            place + len <= cluster0.len() && apart
        }))
    }
}

/// The header with another backing file.
fn with_backing(old: &Header, backing: Option<&Backing>) -> Header {
    let mut header = old.clone();
    // What an unknown bit stands for may not fit what is shown now.
    header.autoclear &= Autoclear::BITMAPS | Autoclear::DATA_FILE_RAW;
    header.backing_file = backing.map(|backing| backing.file.clone());
    let format = backing
        .and_then(|backing| backing.format.clone())
        .map(Extension::BackingFormat);
    let place = header
        .extensions
        .iter()
        .position(|extension| matches!(extension, Extension::BackingFormat(_)));
    match (place, format) {
        (Some(place), Some(format)) => header.extensions[place] = format,
        (Some(place), None) => {
            header.extensions.remove(place);
        }
        (None, Some(format)) => header.extensions.insert(0, format),
        (None, None) => {}
    }
    header
}
