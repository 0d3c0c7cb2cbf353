//! Reading tables: in large pieces, and not at all where the file has holes.

use crate::error::Result;
use crate::qcow2::meta::read_words;
use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;
use crate::storage::{FileExtent, Storage};

/// Reads from the image file.
pub(super) struct Reader<'a> {
    storage: &'a Storage,
    allocated: u64,
    /// The file has holes worth asking for.
    sparse: bool,
    /// The last answer about holes: from where on, and what.
    known: (u64, FileExtent),
}

impl<'a> Reader<'a> {
    pub(super) fn new(storage: &'a Storage) -> Result<Self> {
        let allocated = if storage.is_block_device() {
            storage.len()
        } else {
            storage.allocated_bytes()?
        };
        Ok(Self {
            storage,
            allocated,
            sparse: allocated < storage.len(),
            known: (0, FileExtent { data: true, end: 0 }),
        })
    }

    /// Bytes the file takes on its host.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.allocated
    }

    /// `len` bytes at `offset`, or `None` if all of them are zeros that need
    /// not be read: in a hole or behind the end of the file.
    pub(super) async fn read(&mut self, offset: u64, len: u64) -> Result<Option<Buf>> {
        if self.is_hole(offset, len) {
            return Ok(None);
        }
        let mut buf = Buf::take(len as usize);
        self.storage.read(offset, &mut buf).await?;
        Ok(Some(buf))
    }

    /// The words of a table, up to the last that is not 0.
    pub(super) async fn words(&self, offset: HostOffset, len: u64) -> Result<Vec<u64>> {
        read_words(self.storage, offset, len).await
    }

    /// True when `len` bytes from `offset` are in one hole.
    pub(super) fn is_hole(&mut self, offset: u64, len: u64) -> bool {
        if offset >= self.storage.len() {
            return true;
        }
        let end = offset.saturating_add(len);
        if !self.sparse {
            return false;
        }
        if !(self.known.0..self.known.1.end).contains(&offset) {
            self.known = (offset, self.storage.extent_at(offset));
        }
        let known = self.known.1;
        !known.data && known.end >= end
    }
}

/// The big-endian words of a table, as native numbers.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_be_bytes(*word))
}
