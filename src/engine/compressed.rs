//! Compressed writes: whole clusters, stored where they take least room.

use super::Engine;
use crate::block::Payload;
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Change, GuestOffset, Mapping};
use crate::race::Guard;
use crate::runtime::Buf;

impl Engine {
    /// Writes `data` at `offset`, compressed: each cluster of which a part is
    /// written is compressed as a whole. A cluster that does not become smaller
    /// is stored as it is, and one of zeros takes no space.
    ///
    /// `level` is the codec's own, by default its usual balance; see
    /// [`codec::compress`].
    ///
    /// # Errors
    ///
    /// `Unsupported` if the image is encrypted or has an external data file.
    pub async fn write_compressed(
        &self,
        queue: u16,
        offset: u64,
        data: &[u8],
        level: Option<i32>,
    ) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        self.top().check_compressible()?;
        let writing = self.begin_write(queue, offset, data.len() as u64).await?;
        let result = self.compress_all(writing.slot, offset, data, level).await;
        self.settle(writing, result).await
    }

    async fn compress_all(
        &self,
        slot: usize,
        offset: u64,
        data: &[u8],
        level: Option<i32>,
    ) -> Result<()> {
        let cluster_size = self.top().cluster_size();
        let mut cluster = Buf::take(cluster_size as usize);
        let mut stream = Buf::take(cluster_size as usize);
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let in_cluster = at % cluster_size;
            let room = (cluster_size - in_cluster) as usize;
            let part = &data[done..data.len().min(done + room)];
            self.compress_one(slot, at, part, level, &mut cluster, &mut stream)
                .await?;
            done += part.len();
        }
        Ok(())
    }

    /// Writes `part`, which is in one cluster.
    async fn compress_one(
        &self,
        slot: usize,
        at: u64,
        part: &[u8],
        level: Option<i32>,
        cluster: &mut Buf,
        stream: &mut Buf,
    ) -> Result<()> {
        let image = self.top();
        let bits = image.cluster_bits();
        let number = GuestOffset(at).cluster(bits);
        let first = GuestOffset(at).align_down(bits);
        let range = loop {
            if let Some(range) = self.ranges.take_or_wait(number, number + 1).await {
                break range;
            }
        };
        // What the cluster is to show, with zeros past the end of the disk.
        let inside = image.cluster_size().min(self.size() - first.0) as usize;
        if part.len() < inside
            && !Guard::InPlace.is_away()
            && self.is_in_place(first, inside as u64).await?
        {
            // Others may be writing to it in place, which takes no lock: what
            // they write beside this part would be lost in the copy.
            drop(range);
            return self.write_range(slot, at, Payload::of_slice(part)).await;
        }
        let (shown, past) = cluster.split_at_mut(inside);
        past.fill(0);
        if part.len() < inside {
            self.read_layers(0, first.0, Payload::of_slice_mut(shown))
                .await?;
        }
        let start = (at - first.0) as usize;
        shown[start..start + part.len()].copy_from_slice(part);

        if is_zero(cluster) {
            drop(range);
            return self.zero_range(slot, at, part.len() as u64, true).await;
        }
        let kind = image.compression();
        let level = level.unwrap_or_else(|| kind.default_level());
        match codec::compress(kind, level, cluster, stream) {
            Some(len) => self.store_stream(slot, first, &stream[..len]).await,
            None => {
                drop(range);
                self.write_range(slot, at, Payload::of_slice(part)).await
            }
        }
    }

    /// True when some of the `len` bytes of the cluster at `first` are
    /// overwritten where they are: subclusters may differ.
    async fn is_in_place(&self, first: GuestOffset, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let extent = self.top().lookup(first + done, len - done).await?;
            if matches!(extent.mapping, Mapping::Data { copied: true, .. }) {
                return Ok(true);
            }
            done += extent.len;
        }
        Ok(false)
    }

    /// Makes the whole cluster at `offset` show what `stream` decompresses to.
    /// For callers that compress on threads of their own.
    ///
    /// The caller vouches for the stream: shorter than a cluster, of the
    /// image's method, and of exactly a cluster.
    pub async fn write_stream(&self, queue: u16, offset: u64, stream: &[u8]) -> Result<()> {
        let image = self.top();
        let cluster_size = image.cluster_size();
        self.check_range(offset, 1)?;
        if !offset.is_multiple_of(cluster_size)
            || stream.is_empty()
            || stream.len() as u64 >= cluster_size
        {
            let what = format!(
                "{} bytes at {offset} are not a compressed cluster",
                stream.len()
            );
            return Err(Error::new(ErrorKind::Usage, what).path(image.path()));
        }
        image.check_compressible()?;
        let inside = cluster_size.min(self.size() - offset);
        let writing = self.begin_write(queue, offset, inside).await?;
        let at = GuestOffset(offset);
        let number = at.cluster(image.cluster_bits());
        let range = loop {
            if let Some(range) = self.ranges.take_or_wait(number, number + 1).await {
                break range;
            }
        };
        let result = self.store_stream(writing.slot, at, stream).await;
        drop(range);
        self.settle(writing, result).await
    }

    /// The caller holds the cluster's range.
    ///
    /// On disk: the stream and refcounts `|` the mapping.
    async fn store_stream(&self, slot: usize, first: GuestOffset, stream: &[u8]) -> Result<()> {
        let image = self.top();
        image.own_l2(slot, first).await?;
        let packed = image.pack(slot, stream).await?;
        image
            .change(slot, first, 1, Change::Compressed(packed))
            .await
    }
}

/// True when all bytes are zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In words as far as there are any, with as many of them at once as the
    // compiler likes.
    let (words, rest) = bytes.as_chunks::<64>();
    words
        .iter()
        .all(|block| block.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}
