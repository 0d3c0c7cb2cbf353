//! Bitmaps whose bits cannot be told any more, because something else has a
//! part of them or an entry of their table is impossible: everything counts as
//! changed in them from then on. Who copies what such a bitmap says copies too
//! much, and never too little; keeping a copy of a shared cluster would keep
//! somebody else's bits, and a table with one wrong entry may have others that
//! only look right.
//!
//! # What is on disk at each moment
//!
//! marked in use, in the directory `|` the table: ones `|` the mark off `|`. A
//! power cut leaves the bitmap as it was, or marked, which nobody believes, or
//! of ones.

use super::super::tables::PIECE;
use super::Checked;
use crate::error::Result;
use crate::qcow2::spec::HostOffset;
use crate::qcow2::spec::bitmap::{Bitmap, BitmapFlags, BitmapTableEntry};

/// Bytes of tables that are written at most: an enemy's file may have any
/// number of large ones.
const MOST: u64 = 1 << 30;

/// A bitmap that says nothing any more.
struct Doubtful {
    bitmap: Bitmap,
    /// Where its entry is in the file.
    at: HostOffset,
    /// Its table is somebody else's too, and must not be written to.
    shared: bool,
}

impl Doubtful {
    fn table(&self) -> (u64, u64) {
        let len = u64::from(self.bitmap.table_size) * 8;
        (self.bitmap.table_offset.0, len)
    }
}

impl Checked<'_> {
    /// Lets doubtful bitmaps say that everything has changed, or marks them as
    /// in use for good where that cannot be written; how many. None if not
    /// even that can be: then no bitmap is to be believed.
    pub(super) async fn mend_bitmaps(&mut self) -> Result<Option<u64>> {
        let Some(extension) = self.header.bitmaps().copied() else {
            return Ok(Some(0));
        };
        if !self.header.bitmaps_consistent() {
            return Ok(Some(0));
        }
        let (offset, len) = (extension.directory_offset.0, extension.directory_size);
        if offset.saturating_add(len) > self.storage.len() {
            return Ok(None);
        }
        let Some(bytes) = self.reader.read(offset, len).await? else {
            return Ok(None);
        };
        let Ok(bitmaps) = Bitmap::parse_directory(&bytes, &extension, &self.geometry) else {
            return Ok(None);
        };
        drop(bytes);
        let mut doubtful = Vec::new();
        let mut at = extension.directory_offset;
        for bitmap in bitmaps {
            let next = at + bitmap.encoded_len() as u64;
            let table = (bitmap.table_offset.0, u64::from(bitmap.table_size) * 8);
            let shared = self.is_shared(table.0, table.1);
            if shared || self.is_doubtful(table).await? {
                doubtful.push(Doubtful { bitmap, at, shared });
            }
            at = next;
        }
        self.rewrite_doubtful(&doubtful, (offset, len)).await
    }

    /// Some entry of the table is impossible, or names a cluster that is not
    /// the bitmap's alone.
    async fn is_doubtful(&mut self, (start, len): (u64, u64)) -> Result<bool> {
        let end = start.saturating_add(len);
        if end > self.file_len {
            return Ok(true);
        }
        let mut at = start;
        while at < end {
            let here = PIECE.min(end - at);
            if let Some(bytes) = self.reader.read(at, here).await? {
                let bad =
                    bytes.as_chunks::<8>().0.iter().any(|raw| {
                        match BitmapTableEntry::decode(u64::from_be_bytes(*raw), &self.geometry) {
                            Ok(BitmapTableEntry::Cluster(host)) => {
                                let cluster = host.cluster(self.geometry.cluster_bits);
                                host.0 >= self.file_len || self.counts.overlaps(cluster)
                            }
                            Ok(BitmapTableEntry::Zeros | BitmapTableEntry::Ones) => false,
                            Err(_) => true,
                        }
                    });
                if bad {
                    return Ok(true);
                }
            }
            at += here;
        }
        Ok(false)
    }

    async fn rewrite_doubtful(
        &self,
        doubtful: &[Doubtful],
        directory: (u64, u64),
    ) -> Result<Option<u64>> {
        let marked = |one: &Doubtful| one.bitmap.flags.contains(BitmapFlags::IN_USE);
        // A shared table stays; its bitmap has the mark, once for all.
        let due: Vec<&Doubtful> = doubtful
            .iter()
            .filter(|one| !(one.shared && marked(one)))
            .collect();
        if due.is_empty() {
            return Ok(Some(0));
        }
        let tables = due.iter().filter(|one| !one.shared);
        let bytes: u64 = tables.clone().map(|one| one.table().1).sum();
        let outside = |one: &&Doubtful| one.table().0 + one.table().1 > self.file_len;
        let foreign = |one: &&Doubtful| one.bitmap.has_foreign_data();
        if self.is_shared(directory.0, directory.1)
            || bytes > MOST
            || due.iter().any(|one| outside(one) || foreign(one))
        {
            return Ok(None);
        }
        for one in due.iter().filter(|one| !marked(one)) {
            self.mark(one, true).await?;
        }
        self.storage.sync().await?;
        for one in tables.clone() {
            self.fill_with_ones(one).await?;
        }
        self.storage.sync().await?;
        for one in tables.filter(|one| !marked(one)) {
            self.mark(one, false).await?;
        }
        self.storage.sync().await?;
        Ok(Some(due.len() as u64))
    }

    /// Sets the flags of a bitmap, which are inside one sector.
    async fn mark(&self, one: &Doubtful, in_use: bool) -> Result<()> {
        let mut flags = one.bitmap.flags;
        flags.set(BitmapFlags::IN_USE, in_use);
        let at = one.at + Bitmap::FLAGS_AT;
        let field = flags.bits().to_be_bytes();
        self.storage.write(at.0, &field).await
    }

    async fn fill_with_ones(&self, one: &Doubtful) -> Result<()> {
        let (start, len) = one.table();
        let ones = BitmapTableEntry::Ones.encode().to_be_bytes();
        let piece = ones.repeat((PIECE.min(len) / 8) as usize);
        let mut at = start;
        while at < start + len {
            let here = piece.len().min((start + len - at) as usize);
            self.storage.write(at, &piece[..here]).await?;
            at += here as u64;
        }
        Ok(())
    }
}
