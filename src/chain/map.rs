//! Which layer has which part of the disk, and where.

use super::{Chain, Layer};
use crate::error::Result;
use crate::qcow2::{GuestOffset, Mapping};

/// A part of the disk whose bytes have one origin. Means what an entry of
/// `qemu-img map` means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapEntry {
    /// Where it begins on the disk, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The layer that decides about it: 0 is the top.
    pub depth: usize,
    /// That layer has it allocated, as data or as zeros.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It is stored as data. Data may be zeros too: in an image with
    /// preallocated metadata, where the file has a hole.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// Where it is in the layer's file.
    pub offset: Option<u64>,
}

impl MapEntry {
    /// True when `next` only continues this.
    fn continues(&self, next: &Self) -> bool {
        let kind = |entry: &Self| {
            (
                entry.depth,
                entry.present,
                entry.zero,
                entry.data,
                entry.compressed,
            )
        };
        self.len > 0
            && kind(self) == kind(next)
            && self.offset.map(|offset| offset + self.len) == next.offset
    }
}

impl Chain {
    /// Tells the parts of the disk from `start` to `end`, one after the other
    /// and as long as can be.
    pub async fn map(
        &self,
        start: u64,
        end: u64,
        mut emit: impl FnMut(&MapEntry) -> Result<()>,
    ) -> Result<()> {
        let mut sparse_files = vec![None; self.layers().len()];
        let mut whole = MapEntry {
            start,
            ..MapEntry::default()
        };
        let mut at = start;
        while at < end {
            let part = self.part(at, end - at, &mut sparse_files).await?;
            at += part.len;
            if whole.continues(&part) {
                whole.len += part.len;
            } else {
                if whole.len > 0 {
                    emit(&whole)?;
                }
                whole = part;
            }
        }
        // An empty range has an entry too: scripts expect one.
        emit(&whole)
    }

    /// The first part of a range, which is not empty. `sparse_files` is kept
    /// from call to call: None for each layer at first.
    pub(crate) async fn part(
        &self,
        at: u64,
        mut len: u64,
        sparse_files: &mut [Option<bool>],
    ) -> Result<MapEntry> {
        let layers = self.layers();
        let mut entry = MapEntry {
            start: at,
            ..MapEntry::default()
        };
        for (depth, layer) in layers.iter().enumerate() {
            entry.depth = depth;
            len = len.min(layer.size() - at);
            let image = match layer {
                Layer::Raw(file) => {
                    let extent = file.extent_at(at);
                    entry.present = true;
                    entry.data = extent.data;
                    entry.zero = !extent.data;
                    entry.offset = Some(at);
                    len = len.min(extent.end - at);
                    break;
                }
                Layer::Qcow2(image) => image,
            };
            let extent = image.lookup(GuestOffset(at), len).await?;
            len = extent.len;
            match extent.mapping {
                Mapping::Unallocated => {
                    if layers.get(depth + 1).is_none_or(|below| at >= below.size()) {
                        entry.zero = true;
                        let host;
                        (host, len) = image.idle_host(GuestOffset(at), len).await?;
                        entry.offset = host.map(|host| host.0);
                        break;
                    }
                }
                Mapping::Zero { host, .. } => {
                    entry.present = true;
                    entry.zero = true;
                    entry.offset = host.filter(|_| !image.is_encrypted()).map(|host| host.0);
                    break;
                }
                Mapping::Compressed(_) => {
                    entry.present = true;
                    entry.data = true;
                    entry.compressed = true;
                    break;
                }
                Mapping::Data { host, .. } => {
                    entry.present = true;
                    entry.data = true;
                    if image.is_encrypted() {
                        // What is there is not what the disk shows, and a
                        // hole does not read as zeros.
                        break;
                    }
                    entry.offset = Some(host.0);
                    let sparse = match sparse_files[depth] {
                        Some(sparse) => sparse,
                        None => image.has_preallocated_metadata().await?,
                    };
                    sparse_files[depth] = Some(sparse);
                    if sparse {
                        let extent = image.data().extent_at(host.0);
                        entry.zero = !extent.data;
                        len = len.min(extent.end - host.0);
                    }
                    break;
                }
            }
        }
        entry.len = len;
        Ok(entry)
    }
}
