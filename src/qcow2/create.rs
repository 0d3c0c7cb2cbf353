//! A new image, as bytes: what to write where. Writes nothing itself.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::spec::geometry::{
    MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS, MIN_CLUSTER_BITS_EXTENDED_L2,
};
use super::spec::header::{
    Autoclear, Compatible, CryptMethod, Extension, FeatureName, Incompatible, MAX_BACKING_FORMAT,
    MAX_BACKING_NAME, V3_LEN, V3_MIN_LEN,
};
use super::spec::{Geometry, Header, HostOffset, ReftableEntry, refcount};
use crate::codec::CompressionType;
use crate::error::{Error, ErrorKind, Result};

/// Unit of virtual sizes, in bytes; a size is rounded up to it.
const SECTOR: u64 = 512;
/// Up to this size a header cluster has no room to spare for the table of
/// feature names.
const MAX_CLUSTER_BITS_WITHOUT_NAMES: u32 = 12;

/// The file under a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, as the image is to say it.
    pub file: OsString,
    /// Its format ("raw", "qcow2"). There is no image without: guessing the
    /// format of a file that a guest has written is how hosts are robbed.
    pub format: Option<String>,
}

/// What of its space a new image takes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// None but that of the header and the first tables.
    #[default]
    Off,
    /// All tables are there and every cluster has its place in the file, which
    /// is sparse.
    Metadata,
    /// And the file has its space.
    Falloc,
    /// And the space is written, with zeros.
    Full,
}

impl Preallocation {
    /// The mode that a `preallocation=` means.
    ///
    /// # Errors
    ///
    /// `Usage` if there is no such mode.
    pub fn parse(mode: &str) -> Result<Self> {
        Ok(match mode {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => {
                return Err(usage(format!(
                    "Parameter 'preallocation' does not accept value '{mode}'"
                ))
                .cure("the modes are off, metadata, falloc and full"));
            }
        })
    }
}

/// What a new image is to be like. The defaults are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to whole sectors of 512.
    pub size: u64,
    /// Bytes in a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 or 3; see [`parse_compat`].
    pub version: u8,
    /// Width of a refcount in bits: a power of two, 1 to 64.
    pub refcount_bits: u64,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// L2 entries of 16 bytes: a 32nd of a cluster can be allocated alone.
    pub extended_l2: bool,
    /// Space taken at once.
    pub preallocation: Preallocation,
    /// The file's blocks are not copied when they are written to, where the
    /// file system (btrfs) would.
    pub nocow: bool,
    /// The LUKS header and its key material, as
    /// [`crypto::luks1::Format`](crate::crypto::luks1::Format) makes them: the
    /// image is encrypted.
    pub luks: Option<Arc<[u8]>>,
    /// The file under the image.
    pub backing: Option<Backing>,
    /// The name, as the image is to say it, of a file of its own for guest
    /// data.
    pub data_file: Option<OsString>,
    /// That file is to be, by itself, the disk as it is. The new image maps
    /// nothing yet: all of the disk has to be mapped to the file.
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// An image of `size` bytes, everything else as usual.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 65536,
            version: 3,
            refcount_bits: 16,
            compression_type: CompressionType::Deflate,
            lazy_refcounts: false,
            extended_l2: false,
            preallocation: Preallocation::Off,
            nocow: false,
            luks: None,
            backing: None,
            data_file: None,
            data_file_raw: false,
        }
    }

    /// The image's bytes.
    ///
    /// # Errors
    ///
    /// `Usage`, in qemu-img's words, if an option is wrong or two do not go
    /// together.
    pub fn build(&self) -> Result<NewImage> {
        let geometry = self.geometry()?;
        self.check_version()?;
        self.check_preallocation()?;
        let size = self.checked_size(&geometry)?;
        let mut extensions = self.extensions(&geometry)?;

        let l1_entries = geometry.l1_entries_for(size);
        let luks = self.luks.as_deref().unwrap_or_default();
        let layout = Layout::new(&geometry, l1_entries, luks.len() as u64);
        if !luks.is_empty() {
            let (offset, len) = (HostOffset(layout.luks), luks.len() as u64);
            extensions.push(Extension::CryptoHeader { offset, len });
        }
        let zstd = self.compression_type != CompressionType::Deflate;
        let header = Header {
            version: self.version,
            cluster_bits: geometry.cluster_bits,
            size,
            crypt_method: if luks.is_empty() {
                CryptMethod::None
            } else {
                CryptMethod::Luks
            },
            // At most 32 MiB / 8, as checked with the size.
            l1_size: l1_entries as u32,
            l1_table_offset: HostOffset(if l1_entries == 0 { 0 } else { layout.l1 }),
            refcount_table_offset: HostOffset(layout.reftable),
            // At most one for each 64 MiB that the L1 table could have.
            refcount_table_clusters: layout.reftable_clusters as u32,
            nb_snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible: bit(zstd, Incompatible::COMPRESSION)
                | bit(self.extended_l2, Incompatible::EXTENDED_L2)
                | bit(self.data_file.is_some(), Incompatible::DATA_FILE),
            compatible: bit(self.lazy_refcounts, Compatible::LAZY_REFCOUNTS),
            autoclear: bit(self.data_file_raw, Autoclear::DATA_FILE_RAW),
            refcount_order: geometry.refcount_order,
            compression_type: self.compression_type,
            unknown_fields: if self.version < 3 {
                Vec::new()
            } else {
                vec![0; V3_LEN - V3_MIN_LEN - 1]
            },
            extensions,
            backing_file: self.backing.as_ref().map(|backing| backing.file.clone()),
        };
        let mut chunks = vec![
            (HostOffset(layout.refblocks), layout.refcounts(&geometry)),
            (HostOffset(layout.reftable), layout.reftable(&geometry)),
        ];
        if !luks.is_empty() {
            chunks.push((HostOffset(layout.luks), luks.to_vec()));
        }
        chunks.push((HostOffset(0), header.encode()?));
        Ok(NewImage {
            header,
            file_len: if luks.is_empty() {
                layout.l1 + l1_entries * 8
            } else {
                layout.luks + luks.len() as u64
            },
            chunks,
        })
    }

    fn geometry(&self) -> Result<Geometry> {
        let cluster_bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two()
            || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits)
        {
            return Err(usage(
                "Cluster size must be a power of two between 512 and 2048k",
            ));
        }
        if self.extended_l2 && cluster_bits < MIN_CLUSTER_BITS_EXTENDED_L2 {
            return Err(usage(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(usage(
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
        Ok(Geometry {
            cluster_bits,
            refcount_order: self.refcount_bits.trailing_zeros(),
            version: self.version,
            extended_l2: self.extended_l2,
            external_data: self.data_file.is_some(),
        })
    }

    fn check_version(&self) -> Result<()> {
        let problem = match self.version {
            3.. => return Ok(()),
            2 if self.refcount_bits != 16 => "Different refcount widths than 16 bits require",
            2 if self.compression_type != CompressionType::Deflate => {
                "Non-zlib compression type is only supported with"
            }
            2 if self.data_file.is_some() => "External data files are only supported with",
            2 if self.extended_l2 => "Extended L2 entries are only supported with",
            2 if self.lazy_refcounts => "Lazy refcounts only supported with",
            2 => return Ok(()),
            other => {
                return Err(usage(format!(
                    "Parameter 'version' does not accept value '{other}'"
                )));
            }
        };
        Err(usage(format!("{problem} compatibility level 1.1 and above")).cure("Use compat=1.1"))
    }

    fn check_preallocation(&self) -> Result<()> {
        if self.preallocation == Preallocation::Off || self.extended_l2 {
            return Ok(());
        }
        if self.backing.is_some() {
            return Err(usage(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            ));
        }
        if self.luks.is_some() && self.version < 3 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Encryption and preallocation cannot be used at the same time in version 2: the \
                 space would show noise, which is what zeros decrypt to",
            )
            .cure("Use compat=1.1"));
        }
        Ok(())
    }

    fn checked_size(&self, geometry: &Geometry) -> Result<u64> {
        if self.size > i64::MAX as u64 {
            return Err(usage(
                "Invalid image size specified. Must be between 0 and 9223372036854775807",
            ));
        }
        let size = self.size.next_multiple_of(SECTOR);
        if geometry.l1_entries_for(size) * 8 > MAX_L1_BYTES {
            let error = usage("The image size is too large for file format 'qcow2'");
            return Err(if geometry.cluster_bits < MAX_CLUSTER_BITS {
                error.cure("Use a larger cluster size")
            } else {
                error.cure("An image can have at most 2 EiB")
            });
        }
        Ok(size)
    }

    fn extensions(&self, geometry: &Geometry) -> Result<Vec<Extension>> {
        let mut extensions = Vec::new();
        if let Some(backing) = &self.backing {
            let name = backing.file.as_bytes();
            if name.is_empty() {
                return Err(usage("Expected backing file name, got empty string"));
            }
            if name.len() > MAX_BACKING_NAME || name.contains(&0) {
                return Err(usage(format!(
                    "The backing file's name must be at most {MAX_BACKING_NAME} bytes without a NUL"
                )));
            }
            let Some(format) = &backing.format else {
                return Err(usage("Backing file specified without backing format")
                    .cure("Say which format it has, such as raw or qcow2"));
            };
            if format.is_empty() || format.len() > MAX_BACKING_FORMAT || format.contains('\0') {
                return Err(usage(format!(
                    "Parameter 'backing-fmt' does not accept value '{format}'"
                )));
            }
            extensions.push(Extension::BackingFormat(format.clone()));
        }
        if let Some(name) = &self.data_file {
            let bytes = name.as_bytes();
            if bytes.is_empty() || bytes.len() > MAX_BACKING_NAME || bytes.contains(&0) {
                return Err(usage(format!(
                    "The data file's name must be 1 to {MAX_BACKING_NAME} bytes without a NUL"
                )));
            }
            extensions.push(Extension::DataFile(name.clone()));
        }
        if self.data_file_raw {
            if self.luks.is_some() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "Encryption and data-file-raw cannot be used at the same time: a raw data \
                     file is the disk as it is, and what is new in it would show as noise",
                )
                .cure("leave one of them out"));
            }
            if self.data_file.is_none() {
                return Err(usage("data-file-raw requires data-file"));
            }
            if self.backing.is_some() {
                return Err(usage(
                    "Backing file and data-file-raw cannot be used at the same time",
                ));
            }
        }
        if self.version >= 3 && geometry.cluster_bits > MAX_CLUSTER_BITS_WITHOUT_NAMES {
            extensions.push(Extension::FeatureNames(FeatureName::all()));
        }
        Ok(extensions)
    }
}

/// The version that a compatibility level (`compat=`) means.
///
/// # Errors
///
/// `Usage` if there is no such level.
pub fn parse_compat(level: &str) -> Result<u8> {
    match level {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        _ => Err(usage(format!(
            "Parameter 'version' does not accept value '{level}'"
        ))
        .cure("The compatibility levels are 0.10 and 1.1")),
    }
}

/// The bytes of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// The header, as it will be read back.
    pub header: Header,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// What to write, in this order: the header comes last, so that a file
    /// that is not complete is not an image. All other bytes of the file must
    /// read as zeros.
    pub chunks: Vec<(HostOffset, Vec<u8>)>,
}

/// Where the parts lie: header, refcount table, refcount blocks, L1 table, LUKS
/// header, one behind the other, and nothing else. Offsets in bytes.
struct Layout {
    reftable: u64,
    reftable_clusters: u64,
    refblocks: u64,
    blocks: u64,
    l1: u64,
    luks: u64,
    /// Clusters of the file.
    total: u64,
}

impl Layout {
    fn new(geometry: &Geometry, l1_entries: u64, luks_len: u64) -> Self {
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        let luks_clusters = geometry.clusters_for(luks_len);
        // The refcounts count their own clusters too: take more of them until
        // they suffice.
        let (mut blocks, mut reftable_clusters) = (1, 1);
        let total = loop {
            let total = 1 + reftable_clusters + blocks + l1_clusters + luks_clusters;
            let blocks_needed = total.div_ceil(geometry.refcounts_per_block());
            let reftable_needed = blocks_needed.div_ceil(geometry.reftable_entries_per_cluster());
            if (blocks_needed, reftable_needed) == (blocks, reftable_clusters) {
                break total;
            }
            (blocks, reftable_clusters) = (blocks_needed, reftable_needed);
        };
        let cluster = |index: u64| index << geometry.cluster_bits;
        Self {
            reftable: cluster(1),
            reftable_clusters,
            refblocks: cluster(1 + reftable_clusters),
            blocks,
            l1: cluster(1 + reftable_clusters + blocks),
            luks: cluster(1 + reftable_clusters + blocks + l1_clusters),
            total,
        }
    }

    fn reftable(&self, geometry: &Geometry) -> Vec<u8> {
        (0..self.blocks)
            .map(|block| HostOffset(self.refblocks + (block << geometry.cluster_bits)))
            .flat_map(|block| ReftableEntry::Block(block).encode().to_be_bytes())
            .collect()
    }

    /// The refcount blocks as far as they are not zeros: they follow one
    /// another, so that their entries are one array.
    fn refcounts(&self, geometry: &Geometry) -> Vec<u8> {
        let bits = self.total * u64::from(geometry.refcount_bits());
        let mut array = vec![0; bits.div_ceil(8) as usize];
        for cluster in 0..self.total as usize {
            refcount::set(&mut array, geometry.refcount_order, cluster, 1);
        }
        array
    }
}

fn bit<F: bitflags::Flags>(set: bool, flag: F) -> F {
    if set { flag } else { F::empty() }
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
