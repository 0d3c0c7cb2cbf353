//! Header extensions (qcow2 specification, "Header extensions").

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::features::{FEATURE_NAME_LEN, FeatureName};
use super::invalid;
use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::bitmap::BitmapsExtension;
use crate::qcow2::spec::bytes::{be32, be64, pad8};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of an extension's type and length.
const HEAD: usize = 8;
/// Longest name of a backing file's format, in bytes; longer ones QEMU
/// refuses.
pub const MAX_BACKING_FORMAT: usize = 15;
/// Longest name of a data file: that of any file.
const MAX_DATA_FILE: usize = 4095;

/// A header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file ("raw", "qcow2").
    BackingFormat(String),
    /// Names of feature bits.
    FeatureNames(Vec<FeatureName>),
    /// Where the bitmap directory is.
    Bitmaps(BitmapsExtension),
    /// Where the LUKS header is.
    CryptoHeader {
        /// First byte, cluster-aligned.
        offset: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// The name of the external data file.
    DataFile(OsString),
    /// An extension that the format did not have when this was written; kept
    /// as it is.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

impl Extension {
    /// The type of [`Self::Bitmaps`].
    pub const BITMAPS: u32 = BITMAPS;

    /// All extensions in `area`, the bytes of cluster 0 from `start` on: to
    /// the end mark, else to the end of `area`.
    pub(super) fn parse_all(area: &[u8], start: u64, cluster_bits: u32) -> Result<Vec<Self>> {
        let mut extensions: Vec<Self> = Vec::new();
        let mut at = 0;
        while let (Some(kind), Some(len)) = (be32(area, at), be32(area, at + 4)) {
            let here = start + at as u64;
            if kind == END {
                break;
            }
            at += HEAD;
            let data = usize::try_from(len)
                .ok()
                .and_then(|len| area.get(at..at.checked_add(len)?))
                .ok_or_else(|| {
                    invalid(
                        format!("header extension {kind:#010x} of {len} bytes does not fit into the header cluster"),
                        here,
                    )
                })?;
            at += pad8(data.len());
            let extension = Self::parse(kind, data, here, cluster_bits)?;
            let known = !matches!(extension, Self::Unknown { .. });
            if known && extensions.iter().any(|other| other.kind() == kind) {
                return Err(invalid(
                    format!("header extension {kind:#010x} is there twice"),
                    here,
                ));
            }
            extensions.push(extension);
        }
        Ok(extensions)
    }

    fn parse(kind: u32, data: &[u8], here: u64, cluster_bits: u32) -> Result<Self> {
        let exactly = |len: usize, what: &str| {
            if data.len() == len {
                return Ok(());
            }
            Err(invalid(
                format!(
                    "the {what} header extension has {} bytes, not {len}",
                    data.len()
                ),
                here,
            ))
        };
        Ok(match kind {
            BACKING_FORMAT => Self::BackingFormat(backing_format(data, here)?),
            FEATURE_NAMES => {
                // What is left behind the last whole entry means nothing.
                let (entries, _) = data.as_chunks::<FEATURE_NAME_LEN>();
                Self::FeatureNames(entries.iter().map(FeatureName::decode).collect())
            }
            BITMAPS => {
                exactly(BitmapsExtension::LEN, "bitmaps")?;
                Self::Bitmaps(BitmapsExtension::parse(data, here, cluster_bits)?)
            }
            CRYPTO_HEADER => {
                exactly(16, "encryption")?;
                let field = |at| be64(data, at).unwrap_or_default();
                let (offset, len) = (HostOffset(field(0)), field(8));
                if !offset.is_aligned(cluster_bits) || offset.0 == 0 {
                    return Err(invalid(
                        format!("the encryption header's offset {offset} is not that of a cluster"),
                        here,
                    ));
                }
                if len == 0 || offset.0.checked_add(len).is_none_or(|end| end >> 63 != 0) {
                    return Err(invalid(
                        format!("the encryption header's length of {len} bytes is impossible"),
                        here,
                    ));
                }
                Self::CryptoHeader { offset, len }
            }
            DATA_FILE => {
                if data.is_empty() || data.len() > MAX_DATA_FILE || data.contains(&0) {
                    return Err(invalid("the external data file's name is not one", here));
                }
                Self::DataFile(OsString::from_vec(data.to_vec()))
            }
            _ => Self::Unknown {
                kind,
                data: data.to_vec(),
            },
        })
    }

    /// The extension's type.
    pub fn kind(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => BACKING_FORMAT,
            Self::FeatureNames(_) => FEATURE_NAMES,
            Self::Bitmaps(_) => BITMAPS,
            Self::CryptoHeader { .. } => CRYPTO_HEADER,
            Self::DataFile(_) => DATA_FILE,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// Appends the extension, padded, to a header under construction.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let head = out.len();
        out.extend_from_slice(&self.kind().to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        match self {
            Self::BackingFormat(name) => out.extend_from_slice(name.as_bytes()),
            Self::FeatureNames(names) => names.iter().for_each(|name| name.encode(out)),
            Self::Bitmaps(bitmaps) => out.extend_from_slice(&bitmaps.encode()),
            Self::CryptoHeader { offset, len } => {
                out.extend_from_slice(&offset.0.to_be_bytes());
                out.extend_from_slice(&len.to_be_bytes());
            }
            Self::DataFile(name) => out.extend_from_slice(name.as_bytes()),
            Self::Unknown { data, .. } => out.extend_from_slice(data),
        }
        let len = out.len() - head - HEAD;
        // An extension longer than 4 GiB could not fit into a cluster, and
        // the caller refuses a header that does not.
        let field = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        out[head + 4..head + HEAD].copy_from_slice(&field);
        out.resize(head + HEAD + pad8(len), 0);
    }

    /// Appends the mark behind the last extension.
    pub(super) fn encode_end(out: &mut Vec<u8>) {
        out.extend_from_slice(&END.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
    }
}

fn backing_format(data: &[u8], here: u64) -> Result<String> {
    if data.len() > MAX_BACKING_FORMAT {
        return Err(invalid(
            format!(
                "the backing file's format has a name of {} bytes",
                data.len()
            ),
            here,
        ));
    }
    std::str::from_utf8(data)
        .ok()
        .filter(|name| !name.contains('\0'))
        .map(str::to_owned)
        .ok_or_else(|| {
            invalid(
                "the backing file's format has a name that is not text",
                here,
            )
        })
}
