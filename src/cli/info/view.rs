//! The report as qemu-img's JSON has it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

use crate::codec::CompressionType;
use crate::qcow2::info::ImageInfo;
use crate::qcow2::spec::bitmap::{Bitmap, BitmapFlags};
use crate::qcow2::spec::header::{Autoclear, Compatible, CryptMethod, Header, Incompatible};
use crate::qcow2::spec::luks::LuksInfo;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::report::LayerInfo;

/// One file of the chain.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Info {
    pub(super) children: Vec<Child>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) snapshots: Vec<SnapshotView>,
    pub(super) virtual_size: u64,
    pub(super) filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster_size: Option<u64>,
    pub(super) format: &'static str,
    pub(super) actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_filename: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) encrypted: bool,
    pub(super) dirty_flag: bool,
}

/// A file under a format.
#[derive(Serialize)]
pub(super) struct Child {
    pub(super) name: &'static str,
    pub(super) info: Info,
}

#[derive(Serialize)]
pub(super) struct Specific {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) data: SpecificData,
}

/// Empty for files.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct SpecificData {
    #[serde(skip_serializing_if = "Option::is_none")]
    compat: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refcount_bits: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypt: Option<Encrypt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
}

#[derive(Serialize)]
struct BitmapView {
    flags: Vec<&'static str>,
    name: String,
    granularity: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct SnapshotView {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) icount: Option<u64>,
    pub(super) vm_clock_nsec: u64,
    pub(super) name: String,
    pub(super) date_sec: u32,
    pub(super) date_nsec: u32,
    pub(super) vm_clock_sec: u64,
    pub(super) id: String,
    pub(super) vm_state_size: u64,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Encrypt {
    #[serde(skip_serializing_if = "Option::is_none")]
    ivgen_alg: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ivgen_hash_alg: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detached_header: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash_alg: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher_alg: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher_mode: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    slots: Vec<Slot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    master_key_iters: Option<u32>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Slot {
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    iters: Option<u32>,
    key_offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stripes: Option<u32>,
}

impl Info {
    /// What there is to say about a file of the chain.
    pub(super) fn new(layer: &LayerInfo) -> Self {
        let file_size = layer.file_len.next_multiple_of(512);
        let filename = layer.path.to_string_lossy().into_owned();
        let plain = |format| Self {
            children: Vec::new(),
            backing_filename_format: None,
            snapshots: Vec::new(),
            virtual_size: file_size,
            filename: filename.clone(),
            cluster_size: None,
            format,
            actual_size: layer.allocated,
            format_specific: None,
            full_backing_filename: None,
            backing_filename: None,
            encrypted: false,
            dirty_flag: false,
        };
        let file = Self {
            format_specific: Some(Specific {
                kind: "file",
                data: SpecificData::default(),
            }),
            ..plain(if layer.block_device {
                "host_device"
            } else {
                "file"
            })
        };
        let children = vec![Child {
            name: "file",
            info: file,
        }];
        let Some(image) = &layer.image else {
            return Self {
                children,
                ..plain("raw")
            };
        };
        let header = &image.header;
        let backing = header.backing_file.as_deref();
        Self {
            children,
            backing_filename_format: backing
                .and_then(|_| header.backing_format())
                .map(str::to_owned),
            snapshots: image.snapshots.iter().map(SnapshotView::new).collect(),
            virtual_size: header.virtual_size(),
            cluster_size: Some(header.cluster_size()),
            format_specific: Some(Specific {
                kind: "qcow2",
                data: SpecificData::new(image),
            }),
            full_backing_filename: backing.map(|name| full_name(name, &layer.path)),
            backing_filename: backing.map(|name| name.to_string_lossy().into_owned()),
            encrypted: header.crypt_method != CryptMethod::None,
            dirty_flag: header.incompatible.contains(Incompatible::DIRTY),
            ..plain("qcow2")
        }
    }
}

/// A backing file's name, with the folder of the image that names it. Only
/// for show: nothing is opened by it.
fn full_name(name: &OsStr, image: &Path) -> String {
    let bytes = name.as_bytes();
    let before_slash = bytes.split(|&b| b == b'/').next().unwrap_or_default();
    let folder = image
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !before_slash.contains(&b':') => folder.join(name),
        _ => name.into(),
    }
    .to_string_lossy()
    .into_owned()
}

impl SpecificData {
    fn new(image: &ImageInfo) -> Self {
        let header: &Header = &image.header;
        let v3 = header.version >= 3;
        let has = |bit| header.incompatible.contains(bit);
        let external = has(Incompatible::DATA_FILE);
        Self {
            compat: Some(if v3 { "1.1" } else { "0.10" }),
            compression_type: Some(match header.compression_type {
                CompressionType::Deflate => "zlib",
                CompressionType::Zstd => "zstd",
            }),
            lazy_refcounts: v3.then(|| header.compatible.contains(Compatible::LAZY_REFCOUNTS)),
            bitmaps: image.bitmaps.iter().map(BitmapView::new).collect(),
            refcount_bits: Some(header.geometry().refcount_bits()),
            encrypt: match header.crypt_method {
                CryptMethod::None => None,
                CryptMethod::Aes => Some(Encrypt {
                    format: "aes",
                    ..Encrypt::default()
                }),
                CryptMethod::Luks => Some(Encrypt::luks(image.luks.as_ref())),
            },
            data_file: header
                .data_file()
                .filter(|_| external)
                .map(|name| name.to_string_lossy().into_owned()),
            data_file_raw: (v3 && external)
                .then(|| header.autoclear.contains(Autoclear::DATA_FILE_RAW)),
            corrupt: v3.then(|| has(Incompatible::CORRUPT)),
            extended_l2: v3.then(|| has(Incompatible::EXTENDED_L2)),
        }
    }
}

impl Encrypt {
    fn luks(info: Option<&LuksInfo>) -> Self {
        let Some(info) = info.cloned() else {
            return Self {
                format: "luks",
                ..Self::default()
            };
        };
        Self {
            ivgen_alg: Some(info.ivgen),
            ivgen_hash_alg: info.ivgen_hash,
            detached_header: Some(false),
            hash_alg: Some(info.hash),
            cipher_alg: Some(info.cipher),
            uuid: Some(info.uuid),
            format: "luks",
            cipher_mode: Some(info.mode),
            slots: info
                .slots
                .iter()
                .map(|slot| Slot {
                    active: slot.active.is_some(),
                    iters: slot.active.map(|(iters, _)| iters),
                    key_offset: slot.key_offset,
                    stripes: slot.active.map(|(_, stripes)| stripes),
                })
                .collect(),
            payload_offset: Some(info.payload_offset),
            master_key_iters: Some(info.master_key_iters),
        }
    }
}

impl BitmapView {
    fn new(bitmap: &Bitmap) -> Self {
        let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
        Self {
            flags: flags
                .into_iter()
                .filter_map(|(flag, name)| bitmap.flags.contains(flag).then_some(name))
                .collect(),
            name: String::from_utf8_lossy(&bitmap.name).into_owned(),
            granularity: 1 << bitmap.granularity_bits,
        }
    }
}

impl SnapshotView {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            icount: snapshot.icount.filter(|&n| n != u64::MAX),
            vm_clock_nsec: snapshot.vm_clock_nsec % SECOND,
            name: String::from_utf8_lossy(&snapshot.name).into_owned(),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_sec: snapshot.vm_clock_nsec / SECOND,
            id: String::from_utf8_lossy(&snapshot.id).into_owned(),
            vm_state_size: snapshot.vm_state_size,
        }
    }
}
