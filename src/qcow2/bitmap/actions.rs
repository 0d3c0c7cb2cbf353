//! What a bitmap's owner may do with it, whether or not the image is in use.
//!
//! Each action is durable when it returns, but for the bits of a bitmap that
//! is being recorded, which is marked until a clean close. An action that
//! fails has done nothing.

use super::{BitmapContent, Entry, State, find, find_usable};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Image;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::{
    Bitmap, BitmapFlags, GRANULARITY_BITS, MAX_BITMAP_BYTES, MAX_BITMAPS, MAX_DIRECTORY_BYTES,
    MAX_NAME, MAX_TABLE_ENTRIES,
};

/// An action on a bitmap.
#[derive(Clone, Debug)]
pub enum BitmapAction<'a> {
    /// Make it, empty and enabled.
    Add {
        /// Bytes of the disk per bit; None for that of the cluster size,
        /// between 4096 and 65536.
        granularity: Option<u64>,
    },
    /// Remove it; also one that is inconsistent.
    Remove,
    /// Make everything clean.
    Clear,
    /// Record changes of the disk from now on.
    Enable,
    /// Record no more.
    Disable,
    /// Make dirty what is dirty in another bitmap, of a disk of the same size.
    Merge(&'a BitmapContent),
}

impl Image {
    /// Does something with the bitmap called `name`. The image is open for
    /// writing.
    ///
    /// Requests may be under way; which of them an action that begins or ends
    /// recording, or clears, still counts is their and its luck. To know, let
    /// none be under way.
    ///
    /// # Errors
    ///
    /// In QEMU's words. What was there before still is.
    pub async fn change_bitmap(&self, name: &[u8], action: &BitmapAction<'_>) -> Result<()> {
        self.check_writable()?;
        let mut state = self.bitmaps.state.lock().await;
        self.load_directory(&mut state).await?;
        let changed = match action {
            BitmapAction::Add { granularity } => self.add(&mut state, name, *granularity).await,
            BitmapAction::Remove => self.remove(&mut state, name).await,
            BitmapAction::Clear => self.clear(&mut state, name).await,
            BitmapAction::Enable => self.enable(&mut state, name).await,
            BitmapAction::Disable => self.disable(&mut state, name).await,
            BitmapAction::Merge(source) => self.merge(&mut state, name, source).await,
        };
        changed.map_err(|e| e.path(self.path()))
    }

    /// Writes the edited entries; puts the old ones back when that fails.
    async fn store_edited(&self, state: &mut State, old: Vec<Entry>) -> Result<()> {
        state.edited = true;
        let removed = state.removed.len();
        self.clear_unknown_autoclear().await?;
        let stored = self.store_bitmaps(state, false).await;
        if stored.is_err() {
            state.entries = old;
            state.edited = false;
            state.removed.truncate(removed);
        }
        stored
    }

    async fn add(&self, state: &mut State, name: &[u8], granularity: Option<u64>) -> Result<()> {
        let usage = |text: String| Err(Error::new(ErrorKind::Usage, text));
        let shown = String::from_utf8_lossy(name);
        if name.is_empty() {
            return usage("Bitmap name cannot be empty".to_owned());
        }
        let granularity = granularity.unwrap_or_else(|| self.cluster_size().clamp(4096, 65536));
        let bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
            return usage("Granularity must be power of 2 and at least 512".to_owned());
        }
        if state.entries.iter().any(|entry| entry.is_named(name)) {
            return usage(format!("Bitmap already exists: {shown}"));
        }
        let cannot = format!("Can't make bitmap '{shown}' persistent");
        if self.version() < 3 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{cannot}: Cannot store dirty bitmaps in qcow2 v2 files"),
            )
            .cure("use `qcow2-ublk amend -o compat=1.1` first"));
        }
        if name.len() > MAX_NAME {
            return usage(format!(
                "{cannot}: Name length exceeds maximum ({MAX_NAME} characters)"
            ));
        }
        if state.entries.len() >= MAX_BITMAPS as usize {
            return usage(format!(
                "{cannot}: Maximum number of persistent bitmaps is already reached"
            ));
        }
        if self.size() == 0 {
            return usage(format!("{cannot}: the disk has no bytes"));
        }
        if !self.fits(bits, self.size()) {
            return usage(format!(
                "{cannot}: Too much space will be occupied by the bitmap. Use larger granularity"
            ));
        }
        let live = self.bitmaps.recorder.bits_for(bits);
        let entry = Entry {
            disk: Bitmap {
                table_offset: HostOffset(0),
                table_size: 0,
                flags: BitmapFlags::AUTO,
                granularity_bits: bits,
                extra: Vec::new(),
                name: name.to_vec(),
            },
            stored: false,
            inconsistent: false,
            resized: false,
            live: Some(std::sync::Arc::clone(&live)),
        };
        let mut directory = super::file::encode(state)?;
        entry.disk.encode(&mut directory)?;
        if directory.len() as u64 > MAX_DIRECTORY_BYTES {
            return usage(format!(
                "{cannot}: Not enough space in the bitmap directory"
            ));
        }
        let old = state.entries.clone();
        state.entries.push(entry);
        self.bitmaps.recorder.start(&live);
        let stored = self.store_edited(state, old).await;
        if stored.is_err() {
            live.stop();
        }
        stored
    }

    /// Whether the format has room for a bitmap of a disk of `size` bytes.
    pub(super) fn fits(&self, granularity_bits: u8, size: u64) -> bool {
        let bytes = size.div_ceil(1 << granularity_bits).div_ceil(8);
        let entries = self.geometry.clusters_for(bytes);
        bytes <= MAX_BITMAP_BYTES && entries <= u64::from(MAX_TABLE_ENTRIES)
    }

    async fn remove(&self, state: &mut State, name: &[u8]) -> Result<()> {
        let index = find(&state.entries, name)?;
        let old = state.entries.clone();
        let entry = state.entries.remove(index);
        if entry.stored {
            state.removed.push(entry.disk);
        }
        self.store_edited(state, old).await?;
        if let Some(live) = entry.live {
            live.stop();
        }
        Ok(())
    }

    async fn clear(&self, state: &mut State, name: &[u8]) -> Result<()> {
        let index = find_usable(&state.entries, name)?;
        let live = self.load_bits(&mut state.entries[index]).await?;
        let saved = super::bits::Bits::default();
        saved.add(&live.bits);
        live.bits.clear_from(0);
        self.store_changed(state, index).await.inspect_err(|_| {
            live.bits.add(&saved);
            live.set_changed();
        })
    }

    async fn merge(&self, state: &mut State, name: &[u8], source: &BitmapContent) -> Result<()> {
        let index = find_usable(&state.entries, name)?;
        let (size, theirs) = (self.size(), source.size());
        if size != theirs {
            let text = format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is \
                 {theirs}) and can't be merged"
            );
            return Err(Error::new(ErrorKind::Usage, text));
        }
        let live = self.load_bits(&mut state.entries[index]).await?;
        source.ranges(|start, len| {
            live.record(start, len);
            Ok(())
        })?;
        if live.is_changed() {
            self.store_changed(state, index).await?;
        }
        Ok(())
    }

    /// Writes a bitmap whose bits are other ones now.
    async fn store_changed(&self, state: &mut State, index: usize) -> Result<()> {
        if let Some(live) = &state.entries[index].live {
            live.set_changed();
        }
        self.clear_unknown_autoclear().await?;
        self.store_bitmaps(state, false).await
    }

    async fn enable(&self, state: &mut State, name: &[u8]) -> Result<()> {
        let index = find_usable(&state.entries, name)?;
        if state.entries[index].is_enabled() {
            return Ok(());
        }
        let live = self.load_bits(&mut state.entries[index]).await?;
        let old = state.entries.clone();
        state.entries[index].disk.flags.insert(BitmapFlags::AUTO);
        self.bitmaps.recorder.start(&live);
        let stored = self.store_edited(state, old).await;
        if stored.is_err() {
            live.stop();
        }
        stored
    }

    async fn disable(&self, state: &mut State, name: &[u8]) -> Result<()> {
        let index = find_usable(&state.entries, name)?;
        if !state.entries[index].is_enabled() {
            return Ok(());
        }
        let old = state.entries.clone();
        state.entries[index].disk.flags.remove(BitmapFlags::AUTO);
        self.store_edited(state, old).await?;
        if let Some(live) = &state.entries[index].live {
            live.stop();
        }
        Ok(())
    }
}
