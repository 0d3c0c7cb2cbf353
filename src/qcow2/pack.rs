//! Places for compressed clusters: one behind the other, to the byte, over as
//! many adjacent host clusters as there are. What is in them, and which guest
//! cluster it is, is not known here.
//!
//! # References
//!
//! A host cluster counts one reference for each compressed cluster that touches
//! it. The one that is being filled has one more, the packer's: so it is not
//! free when what it holds is unmapped again before it is full. Whoever fills
//! it up, or needs the last reference that the refcount's width allows, takes
//! the packer's over.
//!
//! # On disk
//!
//! | moment | a power cut leaves |
//! |---|---|
//! | room taken, refcounts raised | leaks |
//! | data written, behind the data of others in the same sector | leaks; the others' bytes are rewritten as they are, or not at all |
//! | mapping committed in memory | leaks: its L2 slice is written only after a sync of the data and of the refcounts |
//! | the packer leaves a cluster half filled | its reference leaks until the next write-back drops it |
//!
//! Nothing is ever written twice to the same place: room that was taken and
//! not used stays empty.

use super::alloc::{Freed, Run};
use super::spec::addr::HostOffset;
use super::spec::entry::CompressedRange;
use super::{Image, lock};
use crate::error::{Error, ErrorKind, Result};

/// Host clusters taken at once, from what the queue has: other clusters are
/// written between compressed ones, and adjacent ones waste no room. At most
/// this many and about this many bytes, because what is not used of them in the
/// end is a hole in the file.
const BATCH: u64 = 16;
const BATCH_BYTES: u64 = 256 << 10;

/// Where the next compressed cluster goes.
#[derive(Debug)]
pub(crate) struct Packer {
    /// The next free byte of the cluster being filled, on which the packer has
    /// a reference; None when there is no such cluster.
    at: Option<HostOffset>,
    /// Clusters to go on with.
    run: Run,
}

impl Default for Packer {
    fn default() -> Self {
        Self {
            at: None,
            run: Run::EMPTY,
        }
    }
}

/// Compressed data that is in the file and that no mapping names; given up
/// when dropped unless [used](Self::used).
#[derive(Debug)]
#[must_use = "dropping it gives the room up"]
pub(crate) struct Packed<'a> {
    image: &'a Image,
    range: CompressedRange,
    used: bool,
}

impl Packed<'_> {
    pub(crate) fn range(&self) -> CompressedRange {
        self.range
    }

    /// A mapping names it from now on.
    pub(crate) fn used(mut self) {
        self.used = true;
    }
}

impl Drop for Packed<'_> {
    fn drop(&mut self) {
        if !self.used {
            let touched = self.range.clusters_touched(&self.image.geometry);
            self.image.frees.push(Freed {
                first: *touched.start(),
                count: touched.end() - touched.start() + 1,
                table: false,
            });
        }
    }
}

impl Image {
    /// Refuses compressed writes where the format has none, or where they
    /// would break a promise.
    pub(crate) fn check_compressible(&self) -> Result<()> {
        let header = lock(&self.header);
        let why = if header.crypt_method != super::spec::header::CryptMethod::None {
            "the image is encrypted, and compressed clusters would be stored unencrypted"
        } else if header
            .incompatible
            .contains(super::spec::header::Incompatible::DATA_FILE)
        {
            "the image has an external data file, which holds no compressed clusters"
        } else {
            return Ok(());
        };
        Err(
            Error::new(ErrorKind::Unsupported, format!("cannot compress: {why}"))
                .path(self.path())
                .cure("write without compression"),
        )
    }

    /// Stores the compressed `stream` of one cluster, shorter than a cluster.
    pub(crate) async fn pack(&self, slot: usize, stream: &[u8]) -> Result<Packed<'_>> {
        let mut packer = self.packer.lock().await;
        let packed = self
            .take_room(&mut packer, slot, stream.len() as u64)
            .await?;
        let range = packed.range;
        self.check_overlap(range.offset, stream.len() as u64)?;
        // With direct I/O neighbours share the blocks they are written with:
        // one after the other.
        let turn = (self.storage.alignment() > 1).then_some(packer);
        self.storage.write(range.offset.0, stream).await?;
        drop(turn);
        Ok(packed)
    }

    async fn take_room(&self, packer: &mut Packer, slot: usize, len: u64) -> Result<Packed<'_>> {
        let bits = self.geometry.cluster_bits;
        let cluster_size = self.geometry.cluster_size();
        debug_assert!(0 < len && len < cluster_size);
        let room = packer.at.map_or(0, |at| cluster_size - at.offset_in(bits));
        let mut next = None;
        if room < len {
            if packer.run.count == 0 {
                let reserved = self
                    .reserve(slot, (BATCH_BYTES >> bits).clamp(1, BATCH))
                    .await?;
                packer.run = reserved.run();
                reserved.used(packer.run.count);
            }
            next = Some(packer.run.first);
        }
        let offset = match (packer.at, next) {
            (Some(at), None) => at,
            (Some(at), Some(next)) if at.cluster(bits) + 1 == next => at,
            (_, Some(next)) => HostOffset::of_cluster(next, bits),
            (None, None) => unreachable!("without a cluster there is no room"),
        };
        let range = CompressedRange::new(offset, len, &self.geometry).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "the file is too long for compressed clusters of this size",
            )
            .path(self.path())
            .at(offset.0)
            .cure("write without compression")
        })?;
        let end = offset + len;
        let last = HostOffset(end.0 - 1).cluster(bits);
        // The last cluster has the packer's reference; more room in it is of
        // use only if it can have another one.
        let open = end.offset_in(bits) != 0 && self.add_reference(last).await?;

        // Nothing fails from here on.
        if next.is_some() {
            packer.run.take(1);
            if let Some(at) = packer.at.filter(|&at| at != offset) {
                // Too little room, and what follows is somebody else's.
                self.frees.push(Freed {
                    first: at.cluster(bits),
                    count: 1,
                    table: false,
                });
            }
        }
        packer.at = open.then_some(end);
        Ok(Packed {
            image: self,
            range,
            used: false,
        })
    }

    /// Raises a cluster's refcount; false where it is as high as it can be.
    async fn add_reference(&self, cluster: u64) -> Result<bool> {
        let mut alloc = self.alloc.lock().await;
        let refcounts = &mut alloc.refcounts;
        let count = refcounts
            .get(&self.refblocks, &self.storage, cluster)
            .await?;
        if count >= refcounts.max() {
            return Ok(false);
        }
        refcounts
            .adjust(&self.refblocks, &self.storage, cluster, 1)
            .await?;
        Ok(true)
    }

    /// What the packer holds, for a clean close: each cluster loses one
    /// reference.
    pub(in crate::qcow2) async fn empty_packer(&self) -> [Run; 2] {
        let packer = std::mem::take(&mut *self.packer.lock().await);
        let open = packer.at.map_or(Run::EMPTY, |at| Run {
            first: at.cluster(self.geometry.cluster_bits),
            count: 1,
            zeroed: false,
        });
        [open, packer.run]
    }
}
