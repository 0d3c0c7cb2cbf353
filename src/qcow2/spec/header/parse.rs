//! Bytes to [`Header`].

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use zerocopy::FromBytes;

use super::extension::Extension;
use super::features::{Autoclear, Compatible, Incompatible, incompatible_names};
use super::fields::{MAGIC, RawHeader, V2_LEN, V3_LEN, V3_MIN_LEN, at};
use super::{CryptMethod, Header, MAX_BACKING_NAME, invalid, unsupported_features};
use crate::codec::CompressionType;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::spec::addr::HostOffset;
use crate::qcow2::spec::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};

/// Bytes of an image that [`Prefix::parse`] wants to see.
pub const PROBE_LEN: usize = V3_LEN;

/// What the first bytes tell: enough to read the rest of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// 2 or 3.
    pub version: u8,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// Length in bytes of the fixed part.
    header_length: usize,
}

impl Prefix {
    /// Looks at the first bytes of a file: [`PROBE_LEN`], or all if it is
    /// shorter.
    ///
    /// # Errors
    ///
    /// `InvalidFormat` if it is not a qcow2 image, `Unsupported` if it is one
    /// of another version.
    pub fn parse(start: &[u8]) -> Result<Self> {
        Self::with_fields(start).map(|(prefix, _)| prefix)
    }

    /// Bytes of the header cluster, which [`Header::parse`] wants to see.
    pub fn cluster_size(&self) -> usize {
        1 << self.cluster_bits
    }

    fn with_fields(start: &[u8]) -> Result<(Self, RawHeader)> {
        if !start.starts_with(&MAGIC.to_be_bytes()) {
            return Err(invalid(
                "not a qcow2 image: the magic number is missing",
                at!(magic),
            ));
        }
        if start.len() < V2_LEN {
            return Err(invalid(
                format!(
                    "the file of {} bytes is too short for a qcow2 image",
                    start.len()
                ),
                0,
            ));
        }
        let mut bytes = [0; V3_MIN_LEN];
        let len = start.len().min(V3_MIN_LEN);
        bytes[..len].copy_from_slice(&start[..len]);
        let Ok(raw) = RawHeader::read_from_bytes(&bytes) else {
            unreachable!("the array is as long as the struct");
        };
        let version = match raw.version.get() {
            2 => 2,
            3 => 3,
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("qcow2 version {other} is not supported: only 2 and 3 are"),
                )
                .at(at!(version)));
            }
        };
        let cluster_bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(invalid(
                format!("cluster size 2^{cluster_bits} is not between 512 bytes and 2 MiB"),
                at!(cluster_bits),
            ));
        }
        let cluster_size = 1usize << cluster_bits;
        let header_length = if version == 2 {
            V2_LEN
        } else {
            usize::try_from(raw.header_length.get()).unwrap_or(usize::MAX)
        };
        if version == 3 {
            let problem = if header_length < V3_MIN_LEN || start.len() < V3_MIN_LEN {
                "too short: version 3 has 104 bytes or more"
            } else if header_length > cluster_size {
                "longer than a cluster"
            } else if header_length % 8 != 0 {
                "not a multiple of 8"
            } else {
                ""
            };
            if !problem.is_empty() {
                return Err(invalid(
                    format!("the header length of {header_length} bytes is {problem}"),
                    at!(header_length),
                ));
            }
        }
        let prefix = Self {
            version,
            cluster_bits,
            header_length,
        };
        Ok((prefix, raw))
    }
}

impl Header {
    /// Reads the header in `cluster0`, the file's first cluster, of a file of
    /// `file_len` bytes.
    ///
    /// `cluster0` may be shorter if the file is; it is taken to go on with
    /// zeros, as all of an image does behind the file's end.
    ///
    /// # Errors
    ///
    /// `InvalidFormat` if the header breaks the format's rules (with the
    /// offset of the field that does), `Unsupported` if it uses what the
    /// format did not have when this was written.
    pub fn parse(cluster0: &[u8], file_len: u64) -> Result<Self> {
        let header = Self::parse_fields(cluster0)?;
        header.check(Some(file_len))?;
        Ok(header)
    }

    /// As [`Header::parse`], for reports about damaged images: the tables may
    /// lie behind the end of the file and over each other.
    pub fn parse_damaged(cluster0: &[u8]) -> Result<Self> {
        let header = Self::parse_fields(cluster0)?;
        header.check_damaged()?;
        Ok(header)
    }

    fn parse_fields(cluster0: &[u8]) -> Result<Self> {
        let (prefix, raw) = Prefix::with_fields(cluster0)?;
        let cluster0 = whole(cluster0, prefix.cluster_size());
        let v3 = prefix.version == 3;
        let masks = |field: u64| if v3 { field } else { 0 };

        let (backing_file, extensions_end) = backing_file(&raw, &cluster0, prefix.header_length)?;
        let extensions = Extension::parse_all(
            &cluster0[prefix.header_length..extensions_end],
            prefix.header_length as u64,
            prefix.cluster_bits,
        );
        // An unknown feature may be why the extensions cannot be read; it is
        // the better explanation.
        let incompatible = Incompatible::from_bits_retain(masks(raw.incompatible.get()));
        let unknown = incompatible - Incompatible::KNOWN;
        if !unknown.is_empty() {
            let names = extensions
                .iter()
                .flatten()
                .find_map(|extension| match extension {
                    Extension::FeatureNames(names) => Some(names.as_slice()),
                    _ => None,
                });
            let names = incompatible_names(unknown, names.unwrap_or_default());
            return Err(unsupported_features(&names)
                .at(at!(incompatible))
                .cure("Use the program that made the image, or a newer version of this one"));
        }

        let compression = if prefix.header_length > V3_MIN_LEN {
            cluster0[V3_MIN_LEN]
        } else {
            0
        };
        Ok(Self {
            version: prefix.version,
            cluster_bits: prefix.cluster_bits,
            size: raw.size.get(),
            crypt_method: crypt_method(raw.crypt_method.get())?,
            l1_size: raw.l1_size.get(),
            l1_table_offset: HostOffset(raw.l1_table_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            incompatible,
            compatible: Compatible::from_bits_retain(masks(raw.compatible.get())),
            autoclear: Autoclear::from_bits_retain(masks(raw.autoclear.get())),
            refcount_order: if v3 { raw.refcount_order.get() } else { 4 },
            compression_type: CompressionType::from_raw(compression).ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "compression type {compression} is not supported: only zlib and zstd are"
                    ),
                )
                .at(V3_MIN_LEN as u64)
            })?,
            unknown_fields: cluster0
                .get(V3_MIN_LEN + 1..prefix.header_length)
                .unwrap_or_default()
                .to_vec(),
            extensions: extensions?,
            backing_file,
        })
    }
}

/// `bytes` cut or zero-extended to `len`.
fn whole(bytes: &[u8], len: usize) -> Cow<'_, [u8]> {
    bytes.get(..len).map_or_else(
        || {
            let mut owned = bytes.to_vec();
            owned.resize(len, 0);
            owned.into()
        },
        Cow::Borrowed,
    )
}

/// The backing file's name, and where it leaves the extensions to end.
fn backing_file(
    raw: &RawHeader,
    cluster0: &[u8],
    header_length: usize,
) -> Result<(Option<OsString>, usize)> {
    let offset = raw.backing_file_offset.get();
    if offset == 0 {
        return Ok((None, cluster0.len()));
    }
    let len = raw.backing_file_size.get() as usize;
    let Some(offset) = usize::try_from(offset)
        .ok()
        .filter(|offset| (header_length..=cluster0.len()).contains(offset))
    else {
        return Err(invalid(
            format!("the backing file's name at {offset:#x} is not in the header cluster"),
            at!(backing_file_offset),
        ));
    };
    if len > MAX_BACKING_NAME {
        return Err(invalid(
            format!("the backing file's name of {len} bytes is longer than {MAX_BACKING_NAME}"),
            at!(backing_file_size),
        ));
    }
    let Some(name) = cluster0[offset..].get(..len) else {
        return Err(invalid(
            format!(
                "the backing file's name of {len} bytes at {offset:#x} leaves the header cluster"
            ),
            at!(backing_file_size),
        ));
    };
    if name.contains(&0) {
        return Err(invalid(
            "the backing file's name contains a NUL byte",
            offset as u64,
        ));
    }
    // QEMU takes an empty name for none, though it ends the extensions.
    let name = (len > 0).then(|| OsString::from_vec(name.to_vec()));
    Ok((name, offset))
}

fn crypt_method(raw: u32) -> Result<CryptMethod> {
    match raw {
        0 => Ok(CryptMethod::None),
        1 => Ok(CryptMethod::Aes),
        2 => Ok(CryptMethod::Luks),
        _ => Err(Error::new(
            ErrorKind::Unsupported,
            format!("encryption method {raw} is not supported"),
        )
        .at(at!(crypt_method))),
    }
}
