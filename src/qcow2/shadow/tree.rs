//! Everything that an L1 table refers to: counted up or down, and the COPIED
//! flags brought in line with the counts. Knows nothing of snapshots.

use std::collections::HashSet;

use super::Shadow;
use crate::error::{Error, Result};
use crate::qcow2::meta::read_words;
use crate::qcow2::spec::l2::ZERO;
use crate::qcow2::spec::{BadEntry, HostOffset, L1Entry, L2Entry, RawL2Entry};
use crate::runtime::Buf;

/// An L1 table in memory, as big as the file says.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    pub(crate) l1: Vec<u64>,
    /// Where it came from, for messages.
    offset: HostOffset,
}

impl Tree {
    /// Reads the L1 table with `entries` entries at `offset`.
    pub(crate) async fn read(sh: &Shadow<'_>, offset: HostOffset, entries: u32) -> Result<Self> {
        let len = u64::from(entries) * 8;
        let file_len = sh.storage().len();
        let file_end = file_len.next_multiple_of(sh.geometry().cluster_size());
        if len > file_end.saturating_sub(offset.0) {
            let what = format!(
                "an L1 table of {entries} entries goes on behind the end of the file \
                 ({file_len} bytes)"
            );
            return Err(damaged(Error::corrupt(what, offset.0), sh));
        }
        let mut l1 = read_words(sh.storage(), offset, len)
            .await
            .map_err(|e| e.context("cannot read an L1 table"))?;
        l1.resize(entries as usize, 0);
        Ok(Self { l1, offset })
    }

    /// The L2 tables: index in the L1 table and place. Each occurs once: a
    /// table that occurs twice would map two parts of a disk to the same
    /// clusters.
    pub(crate) fn tables(&self, sh: &Shadow<'_>) -> Result<Vec<(usize, HostOffset)>> {
        let mut tables = Vec::new();
        let mut seen = HashSet::new();
        for (index, &raw) in self.l1.iter().enumerate() {
            let at = self.offset + index as u64 * 8;
            let entry = L1Entry::decode(raw, &sh.geometry());
            let entry = entry.map_err(|bad| bad.into_error("L1 table", at));
            let L1Entry::Table { offset, .. } = entry.map_err(|e| damaged(e, sh))? else {
                continue;
            };
            if offset.0 >= sh.storage().len() {
                let what = format!("the L2 table at {offset} is past the end of the file");
                return Err(damaged(Error::corrupt(what, at.0), sh));
            }
            if !seen.insert(offset) {
                let what = format!("the L2 table at {offset} is in an L1 table twice");
                return Err(damaged(Error::corrupt(what, at.0), sh));
            }
            tables.push((index, offset));
        }
        Ok(tables)
    }

    /// Adds `delta` to the count of everything the table refers to: L2 tables
    /// and what they map. Not of the L1 table itself.
    pub(crate) async fn adjust(&self, sh: &mut Shadow<'_>, delta: i64) -> Result<()> {
        let geometry = sh.geometry();
        for (_, table) in self.tables(sh)? {
            let bytes = read_l2(sh, table).await?;
            for (index, raw) in (0u64..).zip(RawL2Entry::all(&bytes, &geometry)) {
                let at = table + (index << geometry.l2_entry_bits());
                let entry = L2Entry::decode(raw, &geometry)
                    .map_err(|bad| damaged(bad.into_error("L2 table", at), sh))?;
                for cluster in entry.references(&geometry).into_iter().flatten() {
                    sh.adjust(cluster, delta).await?;
                }
            }
            sh.adjust(table.cluster(geometry.cluster_bits), delta)
                .await?;
        }
        Ok(())
    }

    /// Brings the COPIED flags in line with the counts. An L2 table whose
    /// flags change is replaced by a copy. `shared` L1 tables are to be the
    /// same as this one, counting it.
    pub(crate) async fn set_copied(&mut self, sh: &mut Shadow<'_>, shared: i64) -> Result<()> {
        let geometry = sh.geometry();
        for (index, mut table) in self.tables(sh)? {
            let mut bytes = read_l2(sh, table).await?;
            if correct_flags(sh, &mut bytes).await? {
                let old = table.cluster(geometry.cluster_bits);
                table = sh.write_table(&bytes).await?;
                if shared > 1 {
                    let new = table.cluster(geometry.cluster_bits);
                    sh.adjust(new, shared - 1).await?;
                }
                sh.adjust(old, -shared).await?;
            }
            let copied = sh.count(table).await? == 1;
            let entry = L1Entry::Table {
                offset: table,
                copied,
            };
            self.l1[index] = entry.encode(&geometry);
        }
        Ok(())
    }

    /// The table as it is in the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let bytes = self.l1.iter().flat_map(|entry| entry.to_be_bytes());
        bytes.collect()
    }
}

/// Corrects the flags of an L2 table; whether there was anything to correct.
async fn correct_flags(sh: &mut Shadow<'_>, bytes: &mut [u8]) -> Result<bool> {
    let geometry = sh.geometry();
    let mut changed = false;
    for bytes in bytes.chunks_exact_mut(geometry.l2_entry_bytes() as usize) {
        let raw = RawL2Entry::read(bytes, &geometry);
        // What is damaged has been found when it was counted, or is left as
        // it is; but a zero flag in version 2 does not make it no reference.
        let (entry, zero) = match L2Entry::decode(raw, &geometry) {
            Err(BadEntry::ZeroFlagInV2) => {
                let descriptor = raw.descriptor & !ZERO;
                (L2Entry::decode(descriptor, &geometry), ZERO)
            }
            entry => (entry, 0),
        };
        let Ok(entry) = entry else { continue };
        let Some((host, _)) = entry.host() else {
            continue;
        };
        let copied = sh.count(host).await? == 1;
        let mut corrected = entry.with_copied(copied).encode(&geometry);
        corrected.descriptor |= zero;
        if corrected != raw {
            corrected.write(bytes, &geometry);
            changed = true;
        }
    }
    Ok(changed)
}

pub(crate) async fn read_l2(sh: &Shadow<'_>, table: HostOffset) -> Result<Buf> {
    let mut bytes = Buf::take(sh.geometry().l2_table_bytes() as usize);
    sh.storage()
        .read(table.0, &mut bytes)
        .await
        .map_err(|e| e.context("cannot read an L2 table"))?;
    Ok(bytes)
}

pub(crate) fn damaged(error: Error, sh: &Shadow<'_>) -> Error {
    error
        .path(sh.storage().path())
        .cure("run `qcow2-ublk check -r all`")
}
