//! Persistent dirty bitmaps: kept in the file, recorded in memory while the
//! image is written to. Knows nothing of guest data.
//!
//! # What is on disk at each moment
//!
//! A bitmap is *consistent* in the file when it is not marked in use and the
//! autoclear bit is set: it then has every change since it was enabled. Data
//! of a bitmap is never overwritten in place; `|` is an fdatasync.
//!
//! | change | order on disk |
//! |---|---|
//! | first write to the image | enabled bitmaps marked in use `|` the write |
//! | clean close | guest data and mapping, new bitmap data, tables and directory, their refcounts `|` the header names the new directory `|` old clusters freed |
//! | close, and no bit is new | guest data and mapping `|` marks taken off in place |
//! | add, remove, clear, merge, enable, disable | new data, tables and directory, refcounts `|` header `|` old clusters freed |
//! | resize | bitmaps whose tables change marked in use `|` new size `|` as at a clean close |
//!
//! A power cut therefore finds the old directory or the new one. The old one
//! has marks on all that may be out of date, and a mark that was still being
//! set belongs to a bitmap that nothing has been written past. A directory is
//! written in place only to set or take off marks: whichever of its sectors
//! arrive, each entry is as it was or as it shall be, and both are true.
//!
//! The header extension is published by one write inside a sector, see
//! [`publish`]. A bitmap found marked is of no use but to be removed, as in
//! QEMU.
//!
//! # Locks
//!
//! The state's lock is outside of the flush lock. Requests take none.

mod actions;
mod bits;
mod file;
mod publish;
mod recorder;
mod resize;
mod store;

use std::sync::Arc;

use super::Image;
use super::spec::bitmap::{Bitmap, BitmapFlags, BitmapsExtension};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::sync;

pub use actions::BitmapAction;
use recorder::{Live, Recorder};

/// Most bytes that the bitmaps of an image may take in memory.
const MAX_MEMORY: u64 = 1 << 30;

/// The bitmaps of an open image.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    recorder: Recorder,
    pub(super) state: sync::Mutex<State>,
}

/// What is known of the bitmaps.
#[derive(Debug, Default)]
pub(crate) struct State {
    entries: Vec<Entry>,
    /// The directory that the entries were read from or written to.
    directory: Option<BitmapsExtension>,
    /// The directory has been read.
    loaded: bool,
    /// The enabled bitmaps are in memory and record.
    recording: bool,
    /// The image is being written to: enabled bitmaps are marked in the file,
    /// or were about to be when something failed.
    marked: bool,
    /// The entries are not those in the file.
    edited: bool,
    /// Bitmaps that are in the file but not among the entries any more.
    removed: Vec<Bitmap>,
    /// The size in the header is about to change.
    resizing: bool,
}

/// A bitmap.
#[derive(Clone, Debug)]
struct Entry {
    /// As it shall be in the directory, but for the mark; the table is that
    /// in the file.
    disk: Bitmap,
    /// There is such a table.
    stored: bool,
    /// Changes are missing in it: it was found marked, or has extra data that
    /// forbids us to record in it.
    inconsistent: bool,
    /// Its table is not that of the disk's size to be.
    resized: bool,
    /// The bits, if they are in memory.
    live: Option<Arc<Live>>,
}

impl Entry {
    fn is_enabled(&self) -> bool {
        self.disk.flags.contains(BitmapFlags::AUTO)
    }

    /// It can be read and changed.
    fn is_usable(&self) -> bool {
        !self.inconsistent && !self.disk.has_foreign_data()
    }

    fn is_named(&self, name: &[u8]) -> bool {
        self.disk.name == name
    }
}

/// A bitmap of an image, as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// The name, 1 to 1023 bytes, usually UTF-8.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Changes of the disk are recorded.
    pub enabled: bool,
    /// Changes were lost: it is good only to be removed.
    pub inconsistent: bool,
    /// Its directory entry has data of unknown meaning.
    pub extra_data: bool,
}

/// The content of a bitmap at some moment.
#[derive(Clone, Debug)]
pub struct BitmapContent {
    live: Arc<Live>,
    size: u64,
}

impl BitmapContent {
    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.live.granularity_bits
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are dirty: whole granules, also at the disk's end, as QEMU
    /// counts them.
    pub fn count(&self) -> u64 {
        self.live.bits.count() << self.live.granularity_bits
    }

    /// Whether the granule that has byte `offset` is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        let mut raw = [0; 8];
        let bit = offset >> self.live.granularity_bits;
        self.live.bits.copy_bytes(bit / 64 * 64, &mut raw);
        u64::from_le_bytes(raw) >> (bit % 64) & 1 == 1
    }

    /// Calls `found` with start and length, in bytes, of each dirty range of
    /// the disk, in order.
    ///
    /// # Errors
    ///
    /// The first of `found`, which ends the walk.
    pub fn ranges(&self, mut found: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        self.live.bits.runs(|first, end| {
            let start = first << self.live.granularity_bits;
            let end = (end << self.live.granularity_bits).min(self.size);
            if start < end {
                found(start, end - start)
            } else {
                Ok(())
            }
        })
    }
}

impl Image {
    /// The bitmaps, in the order of their directory. None if the image has
    /// been written to by somebody who does not know them.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read or breaks a rule.
    pub async fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let mut state = self.bitmaps.state.lock().await;
        self.load_directory(&mut state).await?;
        let info = |entry: &Entry| BitmapInfo {
            name: entry.disk.name.clone(),
            granularity: 1 << entry.disk.granularity_bits,
            enabled: entry.is_enabled(),
            inconsistent: entry.inconsistent,
            extra_data: !entry.disk.extra.is_empty(),
        };
        Ok(state.entries.iter().map(info).collect())
    }

    /// The content of a bitmap. That of one which is recorded goes on
    /// changing: for the state of one moment, no request is under way.
    ///
    /// # Errors
    ///
    /// `NotFound`, `Corrupt` for an inconsistent one, and what reading gives.
    pub async fn bitmap(&self, name: &[u8]) -> Result<BitmapContent> {
        let mut state = self.bitmaps.state.lock().await;
        self.load_directory(&mut state).await?;
        let index = find_usable(&state.entries, name).map_err(|e| e.path(self.path()))?;
        let live = self.load_bits(&mut state.entries[index]).await?;
        let size = self.size();
        Ok(BitmapContent { live, size })
    }

    /// Records that `len` bytes from `offset` of the disk have changed, after
    /// [`Self::prepare_for_writing`] and before the change is acknowledged.
    #[inline]
    pub(crate) fn record(&self, offset: u64, len: u64) {
        self.bitmaps.recorder.record(offset, len);
    }

    /// Gets the bitmaps ready for the first change of the disk: they record,
    /// and are marked in the file, which the caller syncs. True if something
    /// was written.
    pub(super) async fn mark_bitmaps(&self, state: &mut State) -> Result<bool> {
        self.load_directory(state).await?;
        self.start_recording(state).await?;
        state.marked = true;
        let in_file = |entry: &&mut Entry| entry.stored && entry.is_enabled();
        let mut any = false;
        for entry in state.entries.iter_mut().filter(in_file) {
            any |= !entry.inconsistent;
            entry.inconsistent |= entry.disk.has_foreign_data();
        }
        if !any {
            return Ok(false);
        }
        // When that fails, some may be in the file all the same, or from an
        // earlier attempt: a close takes them off in any case.
        self.write_marks(state).await?;
        Ok(true)
    }
}

/// The index of a bitmap that is there and can be trusted.
fn find_usable(entries: &[Entry], name: &[u8]) -> Result<usize> {
    let index = find(entries, name)?;
    let entry = &entries[index];
    let name = String::from_utf8_lossy(name);
    if entry.inconsistent {
        let text = format!("Bitmap '{name}' is inconsistent and cannot be used");
        return Err(Error::new(ErrorKind::Corrupt, text)
            .cure("remove it: changes of the disk are missing in it"));
    }
    if entry.disk.has_foreign_data() {
        let text = format!("Bitmap '{name}' has extra data of unknown meaning and cannot be used");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(index)
}

fn find(entries: &[Entry], name: &[u8]) -> Result<usize> {
    let found = entries.iter().position(|entry| entry.is_named(name));
    found.ok_or_else(|| {
        let name = String::from_utf8_lossy(name);
        Error::new(
            ErrorKind::NotFound,
            format!("Dirty bitmap '{name}' not found"),
        )
    })
}
