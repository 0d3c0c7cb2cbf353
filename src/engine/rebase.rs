//! Rebasing: another backing file under an image, which goes on showing what
//! it shows.
//!
//! # What is on disk at each moment
//!
//! What the new backing file would show differently, copied into the image as
//! any writes (compressed ones too) `|` the header `|`. Under the old header the copies show what
//! was there before, so a power cut changes nothing of what the image shows.

use super::Engine;
use super::read::Found;
use crate::block::Payload;
use crate::chain::{Chain, Layer};
use crate::error::Result;
use crate::qcow2::create::Backing;
use crate::qcow2::{Change, GuestOffset, Mapping};
use crate::runtime::Buf;

/// Told how many bytes of how many are done.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Bytes compared at once.
const STEP: u64 = 2 << 20;

/// Layers that are only read; no layers are a disk of zeros.
struct Below {
    size: u64,
    engine: Engine,
}

impl Below {
    fn new(layers: Vec<Layer>) -> Self {
        Self {
            size: layers.first().map_or(0, Layer::size),
            engine: Engine::new(Chain::of_layers(layers), super::Options::default()),
        }
    }

    /// Who has the first bytes of a range.
    async fn resolve(&self, at: u64, len: u64) -> Result<(Found<'_>, u64)> {
        if at >= self.size {
            return Ok((Found::Zeros, len));
        }
        self.engine.resolve(0, at, len.min(self.size - at)).await
    }

    /// Fills `bytes`, with zeros behind the end.
    async fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let inside = self.size.saturating_sub(at).min(bytes.len() as u64);
        let (bytes, behind) = bytes.split_at_mut(inside as usize);
        behind.fill(0);
        if bytes.is_empty() {
            return Ok(());
        }
        self.engine
            .read_layers(0, at, Payload::of_slice_mut(bytes))
            .await
    }
}

impl Engine {
    /// Puts the image over other layers, which are those that `backing` names;
    /// what it shows stays. With `compress`, what has to be copied is. No
    /// request is under way, and the chain is to be closed and opened anew.
    pub async fn rebase(
        &self,
        layers: Vec<Layer>,
        backing: Option<&Backing>,
        compress: bool,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let image = self.top();
        if compress {
            image.check_compressible()?;
        }
        let new = Below::new(layers);
        let slot = 0;
        self.prepare().await?;
        let size = image.size();
        let mut bufs = (Buf::take(STEP as usize), Buf::take(STEP as usize));
        let mut at = 0;
        while at < size {
            let extent = image.lookup(GuestOffset(at), size - at).await?;
            let mut len = extent.len;
            if extent.mapping == Mapping::Unallocated {
                len = len.min(STEP - at % STEP);
                let before = image.changes();
                len = self.keep(slot, at, len, &new, compress, &mut bufs).await?;
                if image.changes() != before {
                    image.acknowledge(before).await?;
                }
            }
            at += len;
            progress(at, size);
            if image.is_crowded() {
                image.flush().await?;
            }
        }
        image.flush().await?;
        image.set_backing(backing).await
    }

    /// Records another backing file and looks at nothing: what the image shows
    /// may change.
    pub async fn record_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.top().set_backing(backing).await
    }

    /// Copies what of an unallocated range the new layers show differently;
    /// how many bytes from `at` are done.
    async fn keep(
        &self,
        slot: usize,
        at: u64,
        mut len: u64,
        new: &Below,
        compress: bool,
        bufs: &mut (Buf, Buf),
    ) -> Result<u64> {
        // Where both have it from the same place, nothing need be read.
        let (mine, mine_len) = self.resolve(1, at, len).await?;
        let (theirs, theirs_len) = new.resolve(at, len).await?;
        let same = mine_len.min(theirs_len);
        if mine.is_same(&theirs) {
            return Ok(same);
        }
        let cluster_size = self.top().cluster_size();
        if !at.is_multiple_of(cluster_size) {
            // The rest of a cluster whose beginning was alike: it is written
            // as a whole from where it differs.
            len = len.min(cluster_size - at % cluster_size);
        }
        let old = &mut bufs.0[..len as usize];
        self.read_layers(1, at, Payload::of_slice_mut(old)).await?;
        let other = &mut bufs.1[..len as usize];
        new.read(at, other).await?;

        let part = |start: u64| {
            let next = (at + start + 1).next_multiple_of(cluster_size) - at;
            start as usize..next.min(len) as usize
        };
        let mut start = 0;
        while start < len {
            let first = part(start);
            let mut end = first.end as u64;
            if old[first.clone()] == other[first.clone()] {
                start = end;
                continue;
            }
            let zero = is_zero(&old[first]);
            while end < len {
                let next = part(end);
                if old[next.clone()] == other[next.clone()] || is_zero(&old[next.clone()]) != zero {
                    break;
                }
                end = next.end as u64;
            }
            let bytes = &old[start as usize..end as usize];
            self.put(slot, at + start, bytes, zero, compress).await?;
            start = end;
        }
        Ok(len)
    }

    /// Gives an unallocated range this content, whatever is shown there now.
    async fn put(
        &self,
        slot: usize,
        at: u64,
        bytes: &[u8],
        zero: bool,
        compress: bool,
    ) -> Result<()> {
        let image = self.top();
        let cluster_size = image.cluster_size();
        let end = at + bytes.len() as u64;
        let whole = at.is_multiple_of(cluster_size)
            && (end.is_multiple_of(cluster_size) || end == image.size());
        if zero && whole && image.version() >= 3 {
            let count = (end - at).div_ceil(cluster_size);
            return image
                .change(slot, GuestOffset(at), count, Change::Zero)
                .await;
        }
        // Zeros would not be stored where the layer below shows some already,
        // which is not to be the layer below any more.
        if compress && !zero {
            return self.write_compressed(0, at, bytes, None).await;
        }
        self.write_range(slot, at, Payload::of_slice(bytes)).await
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

impl Found<'_> {
    /// True when both are the same bytes of the same file, or zeros.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Found::Zeros, Found::Zeros) => true,
            (
                Found::Host { layer, offset },
                Found::Host {
                    layer: other,
                    offset: other_offset,
                },
            ) => layer.storage().identity() == other.storage().identity() && offset == other_offset,
            _ => false,
        }
    }
}
