//! The bitmaps: their directory, their tables, their clusters.

use super::reader::words;
use super::sweep::pieces;
use super::tables::PIECE;
use super::{Checker, Part, Problem, Severity, finding::Rule};
use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::{Bitmap, BitmapTableEntry};

impl Checker<'_> {
    /// Checks and counts the bitmaps. Where the autoclear bit says that they
    /// were abandoned, their clusters belong to nobody.
    pub(super) async fn check_bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.header.bitmaps().copied() else {
            return Ok(());
        };
        if !self.header.bitmaps_consistent() {
            return Ok(());
        }
        let (offset, len) = (extension.directory_offset.0, extension.directory_size);
        self.count(Part::BitmapDirectory, offset, len, 1);
        // What is behind the file's end ends the directory too early.
        let end = self.file_len.next_multiple_of(self.geometry.cluster_size());
        let in_file = len.min(end.saturating_sub(offset));
        let directory = match self.reader.read(offset, in_file).await? {
            Some(bytes) => bytes.to_vec(),
            None => Vec::new(),
        };
        let bitmaps = match Bitmap::parse_directory(&directory, &extension, &self.geometry) {
            Ok(bitmaps) => bitmaps,
            Err(e) => {
                let reason = e.to_string();
                let problem = Problem::BadBitmapDirectory { reason };
                self.found(Severity::Corruption, 1, problem);
                return Ok(());
            }
        };
        drop(directory);
        let places = |bitmap: &Bitmap| {
            let start = bitmap.table_offset.0;
            (start, start + u64::from(bitmap.table_size) * 8)
        };
        let mut clusters = Vec::new();
        for (start, end) in bitmaps.iter().map(places) {
            if end < self.file_len + self.geometry.cluster_size() {
                clusters.push((start, end.next_multiple_of(self.geometry.cluster_size())));
            } else {
                self.count(Part::BitmapTable, start, end - start, 1);
            }
        }
        for (start, end, times) in pieces(clusters) {
            let end = end.min(self.file_len.max(start + 1));
            self.count(Part::BitmapTable, start, end - start, times);
        }
        for (start, end, times) in pieces(bitmaps.iter().map(places)) {
            self.check_bitmap_tables(start, end.min(self.file_len), times)
                .await?;
        }
        Ok(())
    }

    /// The part `start..end` of a bitmap's table, or of `times` of them.
    async fn check_bitmap_tables(&mut self, start: u64, end: u64, times: u64) -> Result<()> {
        let mut at = start;
        while at < end {
            let len = PIECE.min(end - at);
            if let Some(bytes) = self.reader.read(at, len).await? {
                for (i, entry) in words(&bytes).enumerate().filter(|&(_, entry)| entry != 0) {
                    let at = HostOffset(at + i as u64 * 8);
                    self.check_bitmap_entry(at, entry, times);
                }
                self.counts.within_memory()?;
            }
            at += len;
        }
        Ok(())
    }

    fn check_bitmap_entry(&mut self, at: HostOffset, entry: u64, times: u64) {
        match BitmapTableEntry::decode(entry, &self.geometry) {
            Ok(BitmapTableEntry::Cluster(host)) => {
                let len = self.geometry.cluster_size();
                self.count(Part::BitmapData, host.0, len, times);
            }
            Ok(BitmapTableEntry::Zeros | BitmapTableEntry::Ones) => {}
            Err(_) => {
                let problem = Problem::BadEntry {
                    table: Part::BitmapTable,
                    at,
                    entry,
                    rule: Rule::ReservedBits,
                };
                self.found(Severity::Corruption, times, problem);
            }
        }
    }
}
