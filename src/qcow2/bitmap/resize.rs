//! Bitmaps of a disk that changes its size. What is new is clean: it is not a
//! change of anything.

use super::State;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Image;
use crate::qcow2::spec::bitmap::Bitmap;
use crate::rule::Rule;

impl Image {
    /// Prepares the bitmaps for a disk of `size` bytes, before the header says
    /// so: those whose tables will not fit it are marked in use.
    ///
    /// # Errors
    ///
    /// When a bitmap cannot follow, and nothing has been done.
    pub(in crate::qcow2) async fn begin_bitmap_resize(&self, size: u64) -> Result<()> {
        let mut state = self.bitmaps.state.lock().await;
        self.load_directory(&mut state).await?;
        for entry in &state.entries {
            super::find_usable(std::slice::from_ref(entry), &entry.disk.name)
                .map_err(|e| e.path(self.path()))?;
            if size == 0 {
                return Err(super::store::no_bytes(&entry.disk).path(self.path()));
            }
            if !self.fits(entry.disk.granularity_bits, size) {
                let name = String::from_utf8_lossy(&entry.disk.name);
                let text = format!(
                    "bitmap '{name}' would take too much space: {size} bytes of disk are too many for its granularity"
                );
                return Err(Error::new(ErrorKind::Unsupported, text)
                    .path(self.path())
                    .cure("remove the bitmap, or merge it into one of a larger granularity"));
            }
        }
        let mut any = false;
        for index in 0..state.entries.len() {
            let entry = &mut state.entries[index];
            let bits = entry.disk.granularity_bits;
            let needed = Bitmap::table_entries_for(bits, size, &self.geometry);
            if needed != u64::from(entry.disk.table_size) || size < self.size() {
                // Only what is in memory can be written in another length.
                self.load_bits(entry).await?;
                entry.resized = true;
                any = true;
            }
        }
        if any {
            state.resizing = true;
            self.write_marks(&state).await?;
            if !Rule::MarkBeforeSize.is_broken() {
                self.storage.sync().await?;
            }
        }
        Ok(())
    }

    /// Stores the bitmaps for the size that the disk has now, whether or not
    /// it was changed.
    pub(crate) async fn end_bitmap_resize(&self) -> Result<()> {
        let mut state = self.bitmaps.state.lock().await;
        if !std::mem::replace(&mut state.resizing, false) {
            return Ok(());
        }
        let stored = self.fit_bitmaps(&mut state).await;
        if stored.is_err() {
            // The marks stay; a clean close tries again.
            state.resizing = true;
        }
        stored
    }

    async fn fit_bitmaps(&self, state: &mut State) -> Result<()> {
        for entry in &state.entries {
            if let Some(live) = &entry.live {
                let end = self.size().div_ceil(1 << entry.disk.granularity_bits);
                live.bits.clear_from(end);
            }
        }
        self.store_bitmaps(state, true).await
    }
}
