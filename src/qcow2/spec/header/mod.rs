//! The header: the first cluster of an image.
//!
//! Reading takes two steps, because the length of the second follows from
//! the first: [`Prefix::parse`] looks at the first [`PROBE_LEN`] bytes and
//! tells how long the header cluster is; [`Header::parse`] takes that
//! cluster.

mod encode;
mod extension;
mod features;
mod fields;
mod parse;
#[cfg(test)]
mod tests;
mod validate;

use std::ffi::OsString;

pub use extension::{Extension, MAX_BACKING_FORMAT};
pub use features::{
    AUTOCLEAR, Autoclear, COMPATIBLE, Compatible, FeatureName, INCOMPATIBLE, Incompatible,
};
pub use fields::{
    AUTOCLEAR_AT, BACKING_NAME_AT, COMPATIBLE_AT, COMPRESSION_TYPE_AT, INCOMPATIBLE_AT, L1_AT,
    MAGIC, REFTABLE_AT, SIZE_AT, SNAPSHOTS_AT, V2_LEN, V3_LEN, V3_MIN_LEN,
};
pub use parse::{PROBE_LEN, Prefix};

use super::addr::HostOffset;
use super::bitmap::BitmapsExtension;
use super::geometry::Geometry;
use crate::codec::CompressionType;
use crate::error::{Error, ErrorKind};

/// Most snapshots of an image.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CryptMethod {
    /// Not at all.
    #[default]
    None,
    /// AES-CBC with the password as key; obsolete and weak.
    Aes,
    /// LUKS; the header is where [`Extension::CryptoHeader`] says.
    Luks,
}

/// A header that obeys the format's rules, and asks for nothing that is not
/// known here.
///
/// A parsed header that is encoded again says the same: fields, extensions
/// and bits that are unknown here are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u8,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// Virtual size in bytes as stored; see [`Header::virtual_size`].
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table: at least those the size needs.
    pub l1_size: u32,
    /// The active L1 table.
    pub l1_table_offset: HostOffset,
    /// The refcount table.
    pub refcount_table_offset: HostOffset,
    /// Length of the refcount table in clusters, at least 1.
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table.
    pub nb_snapshots: u32,
    /// The snapshot table, if there are snapshots.
    pub snapshots_offset: HostOffset,
    /// Features that must be understood.
    pub incompatible: Incompatible,
    /// Features that may be ignored.
    pub compatible: Compatible,
    /// Features whose bit an unknowing writer clears.
    pub autoclear: Autoclear,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// The bytes of a version 3 header behind the compression type: 7 of
    /// padding, then fields that are unknown here. Empty if the header ends
    /// before the compression type.
    pub unknown_fields: Vec<u8>,
    /// The extensions, in their order.
    pub extensions: Vec<Extension>,
    /// The name of the backing file, as the image's author wrote it. Not to
    /// be trusted.
    pub backing_file: Option<OsString>,
}

impl Header {
    /// What is needed to read the image's tables.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            version: self.version,
            extended_l2: self.incompatible.contains(Incompatible::EXTENDED_L2),
            external_data: self.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of the disk in bytes: whole sectors of 512, as QEMU has it.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// Bytes of the active L1 table that are in use.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_size) * 8
    }

    /// Bytes of the refcount table.
    pub fn reftable_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.cluster_bits
    }

    /// Length of the fixed part in bytes: where the extensions begin.
    pub fn header_length(&self) -> usize {
        if self.version < 3 {
            V2_LEN
        } else if self.unknown_fields.is_empty()
            && self.compression_type == CompressionType::Deflate
        {
            V3_MIN_LEN
        } else {
            (V3_MIN_LEN + 1 + self.unknown_fields.len()).next_multiple_of(8)
        }
    }

    /// The backing file's format, if the image says.
    pub fn backing_format(&self) -> Option<&str> {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::BackingFormat(name) => Some(name.as_str()),
                _ => None,
            })
    }

    /// The bitmaps extension, whether or not the bitmaps can be believed; see
    /// [`Header::bitmaps_consistent`].
    pub fn bitmaps(&self) -> Option<&BitmapsExtension> {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::Bitmaps(bitmaps) => Some(bitmaps),
                _ => None,
            })
    }

    /// Nobody who does not know bitmaps has written to the image since they
    /// were stored.
    pub fn bitmaps_consistent(&self) -> bool {
        self.autoclear.contains(Autoclear::BITMAPS)
    }

    /// Where the LUKS header is: first byte and length in bytes.
    pub fn crypto_header(&self) -> Option<(HostOffset, u64)> {
        self.extensions
            .iter()
            .find_map(|extension| match *extension {
                Extension::CryptoHeader { offset, len } => Some((offset, len)),
                _ => None,
            })
    }

    /// The external data file's name, if the image has such a file and says.
    /// Not to be trusted.
    pub fn data_file(&self) -> Option<&OsString> {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::DataFile(name) => Some(name),
                _ => None,
            })
    }

    /// Guest data is in a file of its own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// The external data file is, by itself, the disk as it is.
    pub fn data_file_is_raw(&self) -> bool {
        self.has_data_file() && self.autoclear.contains(Autoclear::DATA_FILE_RAW)
    }

    /// The image's own feature names; empty if it has none.
    pub fn feature_names(&self) -> &[FeatureName] {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::FeatureNames(names) => Some(names.as_slice()),
                _ => None,
            })
            .unwrap_or_default()
    }
}

fn unsupported_features(names: &[String]) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("Unsupported qcow2 feature(s): {}", names.join(", ")),
    )
}

/// The header breaks a rule of the format, at byte `at`.
fn invalid(message: impl Into<String>, at: u64) -> Error {
    Error::new(ErrorKind::InvalidFormat, message).at(at)
}
