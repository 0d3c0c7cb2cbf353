//! The header extension that names the bitmap directory: written so that a
//! power cut leaves a header that can be read, naming the old directory, the
//! new one, or none.
//!
//! | change | order on disk |
//! |---|---|
//! | another directory, the changed bytes in one sector | the bytes `|` |
//! | another directory, across sectors | autoclear bit off `|` the bytes `|` bit on `|` |
//! | first directory | backing file name moved away `|` its offset `|`, if it is in the way (or all in one write, in one sector); data and new end mark behind the old end mark `|` type over the old end mark `|` bit on `|` |
//! | last bitmap removed | bit off `|` end mark over the type, if nothing follows |
//!
//! What lies behind the end mark means nothing, so it can be written in any
//! order; the mark is 8 bytes in one sector. Without the bit, the directory
//! is nobody's, and its clusters leak.

use std::ops::Range;

use super::State;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::BitmapsExtension;
use crate::qcow2::spec::bytes::{be32, pad8};
use crate::qcow2::spec::header::{AUTOCLEAR_AT, Autoclear, BACKING_NAME_AT, Extension};
use crate::qcow2::{Image, lock};
use crate::runtime::Buf;

const SECTOR: u64 = 512;
/// Bytes of an extension's type and length.
const HEAD: u64 = 8;
/// Bytes of the extension with its head.
const WHOLE: u64 = HEAD + BitmapsExtension::LEN as u64;

/// Where things are in the header cluster.
#[derive(Debug, Default)]
struct Places {
    /// The bitmaps extension's head.
    bitmaps: Option<u64>,
    /// The mark behind the last extension.
    end: Option<u64>,
    /// The backing file's name.
    name: Option<Range<u64>>,
}

/// Type and length of the extension.
fn head() -> [u8; HEAD as usize] {
    let [a, b, c, d] = Extension::BITMAPS.to_be_bytes();
    let [e, f, g, h] = (BitmapsExtension::LEN as u32).to_be_bytes();
    [a, b, c, d, e, f, g, h]
}

impl Image {
    /// Makes `directory`, which is durable, that of the image; or none.
    pub(super) async fn publish_directory(
        &self,
        state: &mut State,
        directory: Option<BitmapsExtension>,
    ) -> Result<()> {
        let mut cluster = Buf::take(self.cluster_size() as usize);
        self.storage.read(0, &mut cluster).await?;
        let places = self.places(&cluster);
        match (places.bitmaps, directory) {
            (Some(at), Some(new)) => self.replace(&cluster, at, new).await?,
            (None, Some(new)) => self.insert(&places, &cluster, new).await?,
            (Some(at), None) => self.withdraw(&places, at).await?,
            (None, None) => {}
        }
        state.directory = directory;
        Ok(())
    }

    fn places(&self, cluster: &[u8]) -> Places {
        let header = self.header();
        let mut places = Places::default();
        let mut limit = cluster.len() as u64;
        let name_at = u64::from_be_bytes(cluster[8..16].try_into().expect("8 bytes"));
        if name_at != 0 {
            let len = be32(cluster, 16).unwrap_or_default();
            places.name = Some(name_at..name_at + u64::from(len));
            limit = limit.min(name_at);
        }
        let mut at = header.header_length() as u64;
        if let Some(length) = be32(cluster, 100).filter(|_| header.version >= 3) {
            at = u64::from(length);
        }
        while at + HEAD <= limit {
            let kind = be32(cluster, at as usize).unwrap_or_default();
            let len = be32(cluster, at as usize + 4).unwrap_or_default();
            if kind == 0 {
                places.end = Some(at);
                break;
            }
            if kind == Extension::BITMAPS {
                places.bitmaps = Some(at);
            }
            at += HEAD + pad8(len as usize) as u64;
        }
        places
    }

    /// Writes the data of the extension at `at` anew.
    async fn replace(&self, cluster: &[u8], at: u64, new: BitmapsExtension) -> Result<()> {
        let data = new.encode();
        let start = (at + HEAD) as usize;
        let old = &cluster[start..start + data.len()];
        let differs = |i: &usize| old[*i] != data[*i];
        let first = (0..data.len()).find(differs);
        let last = (0..data.len()).rfind(differs);
        let consistent = self.header().bitmaps_consistent();
        if let (Some(first), Some(last)) = (first, last) {
            let place = (start + first) as u64..(start + last + 1) as u64;
            let torn = place.start / SECTOR != (place.end - 1) / SECTOR;
            if torn && consistent {
                self.set_bitmaps_bit(false).await?;
            }
            self.write_pieces(place.start, &data[first..=last]).await?;
            self.storage.sync().await?;
        }
        self.set_extension(Some(new));
        self.set_bitmaps_bit(true).await
    }

    /// Puts the extension behind the others.
    async fn insert(&self, places: &Places, cluster: &[u8], new: BitmapsExtension) -> Result<()> {
        let full = || {
            let text = "the header cluster has no room for the bitmaps extension";
            Error::new(ErrorKind::Unsupported, text)
                .path(self.path())
                .cure("convert the image to one with larger clusters")
        };
        let end = places.end.ok_or_else(full)?;
        let new_end = end + WHOLE + HEAD;
        let cluster_size = self.cluster_size();
        if let Some(name) = places.name.clone().filter(|name| name.start < new_end) {
            if new_end + (name.end - name.start) <= SECTOR {
                // All of it is one sector: one write.
                return self.insert_in_sector(end, name, cluster, new).await;
            }
            let to = name.end.max(new_end);
            if to + (name.end - name.start) > cluster_size {
                return Err(full());
            }
            let bytes = &cluster[name.start as usize..name.end as usize];
            self.write_pieces(to, bytes).await?;
            self.storage.sync().await?;
            self.write_header(BACKING_NAME_AT, &to.to_be_bytes())
                .await?;
            self.storage.sync().await?;
        }
        if new_end > cluster_size {
            return Err(full());
        }
        let mut tail = new.encode();
        tail.extend_from_slice(&[0; HEAD as usize]);
        self.write_pieces(end + HEAD, &tail).await?;
        self.storage.sync().await?;
        self.write_pieces(end, &head()).await?;
        self.storage.sync().await?;
        self.set_extension(Some(new));
        self.set_bitmaps_bit(true).await
    }

    /// As [`Self::insert`], with the backing file's name behind it, where
    /// everything is in the first sector.
    async fn insert_in_sector(
        &self,
        end: u64,
        name: Range<u64>,
        cluster: &[u8],
        new: BitmapsExtension,
    ) -> Result<()> {
        let mut sector = cluster[..SECTOR as usize].to_vec();
        let tail = [head().as_slice(), &new.encode(), &[0; HEAD as usize]].concat();
        let to = end + tail.len() as u64;
        let field = BACKING_NAME_AT.0 as usize;
        sector[field..field + 8].copy_from_slice(&to.to_be_bytes());
        sector.truncate(end as usize);
        sector.extend_from_slice(&tail);
        sector.extend_from_slice(&cluster[name.start as usize..name.end as usize]);
        self.write_header(HostOffset(0), &sector).await?;
        self.storage.sync().await?;
        self.set_extension(Some(new));
        self.set_bitmaps_bit(true).await
    }

    /// Takes the extension at `at` away.
    async fn withdraw(&self, places: &Places, at: u64) -> Result<()> {
        self.set_bitmaps_bit(false).await?;
        // One that others follow stays: without the bit it means nothing.
        if places.end == Some(at + WHOLE) {
            self.write_pieces(at, &[0; HEAD as usize]).await?;
            self.storage.sync().await?;
            self.set_extension(None);
        }
        Ok(())
    }

    fn set_extension(&self, new: Option<BitmapsExtension>) {
        let mut header = lock(&self.header);
        let extensions = &mut header.extensions;
        let ours = |extension: &Extension| matches!(extension, Extension::Bitmaps(_));
        match (extensions.iter().position(ours), new) {
            (Some(index), Some(new)) => extensions[index] = Extension::Bitmaps(new),
            (None, Some(new)) => extensions.push(Extension::Bitmaps(new)),
            (Some(index), None) => drop(extensions.remove(index)),
            (None, None) => {}
        }
    }

    async fn set_bitmaps_bit(&self, on: bool) -> Result<()> {
        let mut bits = self.header().autoclear;
        if bits.contains(Autoclear::BITMAPS) == on {
            return Ok(());
        }
        bits.set(Autoclear::BITMAPS, on);
        self.write_autoclear(bits).await
    }

    /// Writes the autoclear bits, durably.
    pub(in crate::qcow2) async fn write_autoclear(&self, bits: Autoclear) -> Result<()> {
        self.write_header(AUTOCLEAR_AT, &bits.bits().to_be_bytes())
            .await?;
        self.storage.sync().await?;
        lock(&self.header).autoclear = bits;
        Ok(())
    }

    /// Writes to the header, sector by sector.
    async fn write_pieces(&self, mut at: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = (SECTOR - at % SECTOR) as usize;
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            self.write_header(HostOffset(at), piece).await?;
            at += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }
}
