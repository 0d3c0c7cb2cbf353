//! The rules about a header's fields that concern more than one of them.

use super::features::{Autoclear, Incompatible};
use super::fields::{V3_MIN_LEN, at};
use super::{CryptMethod, Extension, Header, MAX_SNAPSHOTS, invalid};
use crate::codec::CompressionType;
use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::geometry::{
    MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS_EXTENDED_L2,
};

const COMPRESSION_AT: u64 = V3_MIN_LEN as u64;

impl Header {
    /// Checks every rule; `file_len` is the length of the file the header was
    /// read from, or `None` for a file yet to be written.
    pub(super) fn check(&self, file_len: Option<u64>) -> Result<()> {
        self.check_features()?;
        self.check_crypto()?;
        let tables = self.tables()?;
        self.check_sound(&tables, file_len)?;
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            tables[a].check_apart(&tables[b], self.cluster_bits)?;
        }
        Ok(())
    }

    /// Checks the rules without which nothing of the image can be read.
    pub(super) fn check_damaged(&self) -> Result<()> {
        self.check_features()?;
        self.check_crypto()?;
        self.tables().map(drop)
    }

    fn check_features(&self) -> Result<()> {
        if self.refcount_order > MAX_REFCOUNT_ORDER {
            return Err(invalid(
                format!(
                    "refcounts of 2^{} bits are wider than 64",
                    self.refcount_order
                ),
                at!(refcount_order),
            ));
        }
        let has = |bit| self.incompatible.contains(bit);
        let compressed_otherwise = self.compression_type != CompressionType::Deflate;
        if has(Incompatible::COMPRESSION) && !compressed_otherwise {
            return Err(invalid(
                "the compression type feature bit is set but the compression type is zlib",
                COMPRESSION_AT,
            ));
        }
        if compressed_otherwise && !has(Incompatible::COMPRESSION) {
            return Err(invalid(
                "the compression type is not zlib but the compression type feature bit is not set",
                COMPRESSION_AT,
            ));
        }
        if has(Incompatible::EXTENDED_L2) && self.cluster_bits < MIN_CLUSTER_BITS_EXTENDED_L2 {
            return Err(invalid(
                "extended L2 entries need clusters of 16 KiB or more",
                at!(cluster_bits),
            ));
        }
        if self.autoclear.contains(Autoclear::BITMAPS) && self.bitmaps().is_none() {
            return Err(invalid(
                "the bitmaps feature bit is set but there is no bitmaps extension",
                at!(autoclear),
            ));
        }
        if self.autoclear.contains(Autoclear::DATA_FILE_RAW) {
            if !has(Incompatible::DATA_FILE) {
                return Err(invalid(
                    "the data file is declared raw but there is no external data file",
                    at!(autoclear),
                ));
            }
            if self.backing_file.is_some() {
                return Err(invalid(
                    "an image with a raw external data file cannot have a backing file",
                    at!(backing_file_offset),
                ));
            }
        }
        Ok(())
    }

    fn check_crypto(&self) -> Result<()> {
        let has_header = self
            .extensions
            .iter()
            .any(|extension| matches!(extension, Extension::CryptoHeader { .. }));
        match (self.crypt_method, has_header) {
            (CryptMethod::Luks, false) => Err(invalid(
                "the image is encrypted with LUKS but the encryption header extension is missing",
                at!(crypt_method),
            )),
            (CryptMethod::None | CryptMethod::Aes, true) => Err(invalid(
                "there is an encryption header extension but the image is not encrypted with LUKS",
                at!(crypt_method),
            )),
            _ => Ok(()),
        }
    }

    /// The tables, if they can be read: of allowed size, at places that exist.
    fn tables(&self) -> Result<[Table; 3]> {
        if self.size >> 63 != 0 {
            return Err(invalid(
                format!("the virtual size of {} bytes is impossible", self.size),
                at!(size),
            ));
        }
        if self.l1_bytes() > MAX_L1_BYTES {
            return Err(invalid(
                format!("Active L1 table too large: {} entries", self.l1_size),
                at!(l1_size),
            ));
        }
        let needed = self.geometry().l1_entries_for(self.size);
        if u64::from(self.l1_size) < needed {
            return Err(invalid(
                format!(
                    "L1 table is too small: {} entries, but the virtual size needs {needed}",
                    self.l1_size
                ),
                at!(l1_size),
            ));
        }
        if self.reftable_bytes() > MAX_REFTABLE_BYTES {
            return Err(invalid(
                format!(
                    "Reference count table too large: {} clusters",
                    self.refcount_table_clusters
                ),
                at!(refcount_table_clusters),
            ));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(invalid(
                format!(
                    "{} snapshots are more than {MAX_SNAPSHOTS}",
                    self.nb_snapshots
                ),
                at!(nb_snapshots),
            ));
        }
        let l1 = Table {
            name: "L1 table",
            offset: self.l1_table_offset,
            len: self.l1_bytes(),
            field: at!(l1_table_offset),
        };
        let reftable = Table {
            name: "refcount table",
            offset: self.refcount_table_offset,
            len: self.reftable_bytes(),
            field: at!(refcount_table_offset),
        };
        let snapshots = Table {
            name: "snapshot table",
            offset: self.snapshots_offset,
            // The shortest its entries can be; they tell how long they are.
            len: u64::from(self.nb_snapshots) * 40,
            field: at!(snapshots_offset),
        };
        let tables = [l1, reftable, snapshots];
        for table in &tables {
            table.check_place(self.cluster_bits)?;
        }
        Ok(tables)
    }

    /// Checks that the tables are where they can be right.
    fn check_sound(&self, tables: &[Table; 3], file_len: Option<u64>) -> Result<()> {
        if self.refcount_table_clusters == 0 {
            return Err(invalid(
                "Image does not contain a reference count table",
                at!(refcount_table_clusters),
            ));
        }
        for table in tables {
            table.check_inside(file_len)?;
        }
        Ok(())
    }
}

/// One of the tables that the header points to.
struct Table {
    name: &'static str,
    offset: HostOffset,
    /// In bytes; 0 if there is none.
    len: u64,
    /// Where the header says `offset`.
    field: u64,
}

impl Table {
    fn check_place(&self, cluster_bits: u32) -> Result<()> {
        let Self {
            name,
            offset,
            field,
            ..
        } = *self;
        // QEMU too looks at the place of a table without entries.
        if !offset.is_aligned(cluster_bits) {
            return Err(invalid(
                format!("{name} offset {offset} is not a multiple of the cluster size"),
                field,
            ));
        }
        if self.len > 0 && offset.0 >> 56 != 0 {
            return Err(invalid(
                format!("{name} offset {offset} is beyond 2^56"),
                field,
            ));
        }
        Ok(())
    }

    fn check_inside(&self, file_len: Option<u64>) -> Result<()> {
        let Self {
            name,
            offset,
            len,
            field,
        } = *self;
        if len == 0 {
            return Ok(());
        }
        if offset.0 == 0 {
            return Err(invalid(
                format!("the {name} lies in the header cluster"),
                field,
            ));
        }
        // A table may end behind the file's end (the rest is zeros), but one
        // that begins there was cut off: it would read as an empty disk.
        if let Some(file_len) = file_len.filter(|&file_len| offset.0 >= file_len) {
            return Err(invalid(
                format!(
                    "the {name} at {offset} lies behind the end of the file ({file_len} bytes)"
                ),
                field,
            )
            .cure("The file was truncated: restore it from a copy"));
        }
        Ok(())
    }

    fn check_apart(&self, other: &Self, cluster_bits: u32) -> Result<()> {
        let end = |table: &Self| table.offset.0 + table.len.next_multiple_of(1 << cluster_bits);
        let meet = self.len > 0
            && other.len > 0
            && self.offset.0 < end(other)
            && other.offset.0 < end(self);
        if meet {
            return Err(invalid(
                format!("the {} and the {} overlap", self.name, other.name),
                other.field,
            ));
        }
        Ok(())
    }
}
