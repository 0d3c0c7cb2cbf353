//! [`Header`] to bytes.

use std::os::unix::ffi::OsStrExt;

use zerocopy::IntoBytes;

use super::extension::Extension;
use super::fields::{MAGIC, RawHeader, V2_LEN};
use super::{CryptMethod, Header, MAX_BACKING_NAME};
use crate::codec::CompressionType;
use crate::error::{Error, ErrorKind, Result};

impl Header {
    /// The header area: fields, extensions, backing file name. It goes to the
    /// beginning of the file; what follows it in cluster 0 means nothing.
    ///
    /// # Errors
    ///
    /// `Usage` if it does not fit into a cluster, or the backing file's name
    /// is too long; `InvalidFormat` if the header breaks a rule.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check(None)?;
        if self.version < 3 {
            self.check_v2()?;
        }
        let length = self.header_length();
        let name = self
            .backing_file
            .as_ref()
            .map(|name| name.as_bytes())
            .unwrap_or_default();
        if name.len() > MAX_BACKING_NAME || name.contains(&0) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "the backing file's name must be at most {MAX_BACKING_NAME} bytes without a NUL"
                ),
            ));
        }

        // Everything behind the fixed part, to learn where the name goes.
        let mut tail = Vec::new();
        for extension in &self.extensions {
            extension.encode(&mut tail);
        }
        Extension::encode_end(&mut tail);
        let name_at = length + tail.len();
        tail.extend_from_slice(name);
        let total = length + tail.len();
        if total as u64 > self.cluster_size() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "the header would take {total} bytes, more than a cluster of {}",
                    self.cluster_size()
                ),
            )
            .cure("Use a shorter backing file name or larger clusters"));
        }

        let name_at = if name.is_empty() { 0 } else { name_at };
        let raw = self.raw(name_at as u64, name.len(), length);
        let mut out = raw.as_bytes().to_vec();
        if length > out.len() {
            out.push(self.compression_type.raw());
            out.extend_from_slice(&self.unknown_fields);
        }
        // Cuts for version 2, pads otherwise.
        out.resize(length, 0);
        out.append(&mut tail);
        Ok(out)
    }

    /// The fields that every version of the format has, and those of version
    /// 3.
    fn raw(&self, name_at: u64, name_len: usize, length: usize) -> RawHeader {
        RawHeader {
            magic: MAGIC.into(),
            version: u32::from(self.version).into(),
            backing_file_offset: name_at.into(),
            // At most 1023, as checked above.
            backing_file_size: (name_len as u32).into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: match self.crypt_method {
                CryptMethod::None => 0,
                CryptMethod::Aes => 1,
                CryptMethod::Luks => 2,
            }
            .into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.0.into(),
            refcount_table_offset: self.refcount_table_offset.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.0.into(),
            incompatible: self.incompatible.bits().into(),
            compatible: self.compatible.bits().into(),
            autoclear: self.autoclear.bits().into(),
            refcount_order: self.refcount_order.into(),
            // Within a cluster, as checked above.
            header_length: (length as u32).into(),
        }
    }

    /// Version 2 has no place for most features.
    fn check_v2(&self) -> Result<()> {
        let plain = self.incompatible.is_empty()
            && self.compatible.is_empty()
            && self.autoclear.is_empty()
            && self.refcount_order == 4
            && self.compression_type == CompressionType::Deflate;
        if plain {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Usage,
            format!(
                "the image's features do not exist in version 2, whose header has {V2_LEN} bytes"
            ),
        )
        .cure("Use compatibility level 1.1 or greater"))
    }

    /// The 12 bytes at [`L1_AT`](super::L1_AT) that make another L1 table the
    /// active one.
    pub fn l1_update(&self) -> [u8; 12] {
        beside(
            self.l1_size.to_be_bytes(),
            self.l1_table_offset.0.to_be_bytes(),
        )
    }

    /// The 12 bytes at [`REFTABLE_AT`](super::REFTABLE_AT) that make another
    /// refcount table the valid one.
    pub fn reftable_update(&self) -> [u8; 12] {
        beside(
            self.refcount_table_offset.0.to_be_bytes(),
            self.refcount_table_clusters.to_be_bytes(),
        )
    }

    /// The bytes at [`SIZE_AT`](super::SIZE_AT) that change size, tables, feature
    /// bits and the width of refcounts at once: they are neighbours, inside one sector.
    pub fn switch_update(&self) -> Vec<u8> {
        let raw = self.raw(0, 0, self.header_length());
        let end = if self.version < 3 {
            V2_LEN
        } else {
            // Up to the autoclear bits and the width of refcounts.
            super::AUTOCLEAR_AT.0 as usize + 8 + 4
        };
        raw.as_bytes()[super::SIZE_AT.0 as usize..end].to_vec()
    }

    /// The 12 bytes at [`SNAPSHOTS_AT`](super::SNAPSHOTS_AT) that make another
    /// snapshot table the valid one.
    pub fn snapshots_update(&self) -> [u8; 12] {
        beside(
            self.nb_snapshots.to_be_bytes(),
            self.snapshots_offset.0.to_be_bytes(),
        )
    }
}

/// Two fields, one behind the other.
fn beside<const A: usize, const B: usize>(a: [u8; A], b: [u8; B]) -> [u8; 12] {
    let mut out = [0; 12];
    out[..A].copy_from_slice(&a);
    out[A..].copy_from_slice(&b);
    out
}
