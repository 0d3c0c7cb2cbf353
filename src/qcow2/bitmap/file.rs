//! Reading the directory and the bits from the file, and setting marks in it.

use std::sync::Arc;

use super::{Entry, MAX_MEMORY, State};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Image;
use crate::qcow2::meta::read_words;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::{Bitmap, BitmapFlags, BitmapTableEntry, BitmapsExtension};
use crate::runtime::Buf;

use super::recorder::Live;

impl Image {
    /// Reads the directory, if that has not been done.
    pub(super) async fn load_directory(&self, state: &mut State) -> Result<()> {
        if state.loaded {
            return Ok(());
        }
        let header = self.header();
        let extension = header.bitmaps().filter(|_| header.bitmaps_consistent());
        if let Some(&extension) = extension {
            let read = self.read_directory(&extension).await;
            let bitmaps = read.map_err(|e| e.path(self.path()))?;
            state.entries = bitmaps.into_iter().map(entry).collect();
            state.directory = Some(extension);
        }
        state.loaded = true;
        Ok(())
    }

    async fn read_directory(&self, extension: &BitmapsExtension) -> Result<Vec<Bitmap>> {
        let (offset, len) = (extension.directory_offset.0, extension.directory_size);
        if offset + len > self.storage.len() {
            let text = "the bitmap directory lies behind the end of the file";
            return Err(Error::corrupt(text, offset));
        }
        let mut bytes = Buf::take(len as usize);
        self.storage.read(offset, &mut bytes).await?;
        let bitmaps = Bitmap::parse_directory(&bytes, extension, &self.geometry)?;
        for bitmap in &bitmaps {
            let needed =
                Bitmap::table_entries_for(bitmap.granularity_bits, self.size(), &self.geometry);
            let known = !bitmap.has_foreign_data() && !bitmap.flags.contains(BitmapFlags::IN_USE);
            if known && u64::from(bitmap.table_size) < needed {
                let name = String::from_utf8_lossy(&bitmap.name);
                let text = format!("the table of bitmap '{name}' is too short for the disk");
                return Err(Error::corrupt(text, bitmap.table_offset.0));
            }
        }
        Ok(bitmaps)
    }

    /// Reads everything that recording needs, when the image is opened for
    /// writing, and notes where it is.
    pub(in crate::qcow2) async fn load_for_recording(&self, record: bool) -> Result<()> {
        let mut state = self.bitmaps.state.lock().await;
        self.load_directory(&mut state).await?;
        self.note_places(&state)?;
        if record {
            self.start_recording(&mut state).await?;
        }
        Ok(())
    }

    /// Reads the enabled bitmaps and records changes in them from now on.
    pub(super) async fn start_recording(&self, state: &mut State) -> Result<()> {
        if state.recording {
            return Ok(());
        }
        let enabled = |entry: &&mut Entry| entry.is_enabled() && entry.is_usable();
        let bytes = |entry: &Entry| u64::from(entry.disk.table_size) << self.geometry.cluster_bits;
        let total: u64 = state
            .entries
            .iter_mut()
            .filter(enabled)
            .map(|entry| bytes(entry))
            .sum();
        if total > MAX_MEMORY {
            let text = format!("recording the image's bitmaps would take {total} bytes of memory");
            return Err(Error::new(ErrorKind::Unsupported, text)
                .path(self.path())
                .cure("disable or remove some with `qcow2-ublk bitmap`"));
        }
        for entry in state.entries.iter_mut().filter(enabled) {
            let live = self
                .load_bits(entry)
                .await
                .map_err(|e| e.cure("remove the bitmap with `qcow2-ublk bitmap --remove`"))?;
            self.bitmaps.recorder.start(&live);
        }
        state.recording = true;
        Ok(())
    }

    /// Refuses a directory or tables where other metadata is: marks are
    /// written into the one, and both are freed some day.
    fn note_places(&self, state: &State) -> Result<()> {
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        let file_end = self.storage.len().next_multiple_of(self.cluster_size());
        let mut places = vec![(directory.directory_offset.0, directory.directory_size)];
        let tables = state.entries.iter().map(|entry| {
            let len = u64::from(entry.disk.table_size) * 8;
            (entry.disk.table_offset.0, len)
        });
        places.extend(tables);
        places.sort_unstable();
        let mut free_from = 0;
        for (start, len) in places {
            let end = start.saturating_add(len).min(file_end);
            let place = HostOffset(start);
            if start >= end {
                return Err(
                    Error::corrupt("a bitmap lies behind the end of the file", start)
                        .path(self.path()),
                );
            }
            // Hostile tables may all be in one place: noted once.
            if start < free_from {
                return Err(
                    Error::corrupt("two bitmaps are in the same place", start).path(self.path())
                );
            }
            if let Some(cluster) = self.metadata.overlap(place, end - start) {
                let at = cluster << self.geometry.cluster_bits;
                return Err(Error::corrupt("a bitmap is where other metadata is", at)
                    .path(self.path())
                    .cure("run `qcow2-ublk check -r all`"));
            }
            free_from = end.next_multiple_of(self.cluster_size());
        }
        self.note_bitmaps(state);
        Ok(())
    }

    /// Notes where directory and tables are, so that guest data is never
    /// written there.
    pub(in crate::qcow2) fn note_bitmaps(&self, state: &State) {
        let Some(directory) = &state.directory else {
            return;
        };
        self.metadata
            .add_range(directory.directory_offset, directory.directory_size);
        for entry in state.entries.iter().filter(|entry| entry.stored) {
            let len = u64::from(entry.disk.table_size) * 8;
            self.metadata.add_range(entry.disk.table_offset, len);
        }
    }

    /// The bits of a bitmap, read from the file if they are not in memory.
    pub(super) async fn load_bits(&self, entry: &mut Entry) -> Result<Arc<Live>> {
        if let Some(live) = &entry.live {
            return Ok(Arc::clone(live));
        }
        let live = self.bitmaps.recorder.bits_for(entry.disk.granularity_bits);
        let read = self.read_bits(&entry.disk, &live).await;
        read.map_err(|e| {
            let name = String::from_utf8_lossy(&entry.disk.name);
            e.context(format_args!("cannot read bitmap '{name}'"))
                .path(self.path())
        })?;
        if self.writable() {
            entry.live = Some(Arc::clone(&live));
        }
        Ok(live)
    }

    async fn read_bits(&self, bitmap: &Bitmap, live: &Live) -> Result<()> {
        let cluster_size = self.cluster_size();
        let end = self.size().div_ceil(1 << bitmap.granularity_bits);
        let mut cluster = Buf::take(cluster_size as usize);
        let mut ones = 0..0;
        for (first, entry) in (0..)
            .step_by((cluster_size * 8) as usize)
            .zip(self.bitmap_table(bitmap).await?)
        {
            if first >= end {
                break;
            }
            match entry {
                BitmapTableEntry::Zeros => {}
                BitmapTableEntry::Ones => {
                    if ones.end != first {
                        live.bits.set(ones.start, ones.end);
                        ones.start = first;
                    }
                    ones.end = end.min(first + cluster_size * 8);
                }
                BitmapTableEntry::Cluster(host) => {
                    if host.0 >= self.storage.len() {
                        let text = "data lies behind the end of the file";
                        return Err(Error::corrupt(text, host.0));
                    }
                    self.storage.read(host.0, &mut cluster).await?;
                    live.bits.add_bytes(first, &cluster, end);
                }
            }
        }
        live.bits.set(ones.start, ones.end);
        Ok(())
    }

    /// A bitmap's table, up to the last entry that is not all zeros.
    pub(super) async fn bitmap_table(&self, bitmap: &Bitmap) -> Result<Vec<BitmapTableEntry>> {
        let start = bitmap.table_offset;
        let len = u64::from(bitmap.table_size) * 8;
        let words = read_words(&self.storage, start, len).await?;
        let entries = words.into_iter().zip((start.0..).step_by(8));
        entries
            .map(|(raw, at)| {
                BitmapTableEntry::decode(raw, &self.geometry)
                    .map_err(|bad| bad.into_error("bitmap table", HostOffset(at)))
            })
            .collect()
    }

    /// Writes the directory in place: nothing in it changes but marks.
    pub(super) async fn write_marks(&self, state: &State) -> Result<()> {
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        let bytes = encode(state)?;
        debug_assert_eq!(bytes.len() as u64, directory.directory_size);
        self.storage
            .write(directory.directory_offset.0, &bytes)
            .await
            .map_err(|e| e.context("cannot write the bitmap directory"))
    }
}

fn entry(bitmap: Bitmap) -> Entry {
    let inconsistent = bitmap.flags.contains(BitmapFlags::IN_USE);
    let disk = Bitmap {
        flags: bitmap.flags - BitmapFlags::IN_USE,
        ..bitmap
    };
    Entry {
        inconsistent,
        disk,
        stored: true,
        resized: false,
        live: None,
    }
}

/// The directory as it shall be in the file now.
pub(super) fn encode(state: &State) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for entry in &state.entries {
        let mut disk = entry.disk.clone();
        let mark = entry.inconsistent
            || state.marked && entry.is_enabled()
            || state.resizing && entry.resized;
        disk.flags.set(BitmapFlags::IN_USE, mark);
        disk.encode(&mut bytes)?;
    }
    Ok(bytes)
}
