//! The fixed part of the header, byte for byte (qcow2 specification,
//! "Header").

use std::mem::offset_of;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::addr::HostOffset;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header; extensions follow.
pub const V2_LEN: usize = 72;
/// Bytes of the shortest version 3 header.
pub const V3_MIN_LEN: usize = 104;
/// Bytes of the version 3 header with all fields known today.
pub const V3_LEN: usize = 112;

/// All fields that both QEMU and the specification had when version 3 began.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// [`MAGIC`].
    pub(super) magic: U32,
    /// 2 or 3.
    pub(super) version: U32,
    /// Where the backing file's name is; 0 for none.
    pub(super) backing_file_offset: U64,
    /// Length of the name in bytes, at most 1023.
    pub(super) backing_file_size: U32,
    /// log2 of the cluster size.
    pub(super) cluster_bits: U32,
    /// Virtual size in bytes.
    pub(super) size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    pub(super) crypt_method: U32,
    /// Entries of the active L1 table.
    pub(super) l1_size: U32,
    /// Where the active L1 table is.
    pub(super) l1_table_offset: U64,
    /// Where the refcount table is.
    pub(super) refcount_table_offset: U64,
    /// Length of the refcount table in clusters.
    pub(super) refcount_table_clusters: U32,
    /// Entries of the snapshot table.
    pub(super) nb_snapshots: U32,
    /// Where the snapshot table is.
    pub(super) snapshots_offset: U64,
    // Version 3 from here on.
    /// Features without which the image must not be opened.
    pub(super) incompatible: U64,
    /// Features that may be ignored.
    pub(super) compatible: U64,
    /// Features whose bit a writer that does not know them clears.
    pub(super) autoclear: U64,
    /// log2 of the refcount width in bits.
    pub(super) refcount_order: U32,
    /// Length of the fixed part in bytes.
    pub(super) header_length: U32,
}

const _: () = assert!(size_of::<RawHeader>() == V3_MIN_LEN);
const _: () = assert!(offset_of!(RawHeader, incompatible) == V2_LEN);

/// Byte offset in the file of [`Header::l1_update`](super::Header::l1_update):
/// `l1_size` and `l1_table_offset`, side by side.
pub const L1_AT: HostOffset = HostOffset(offset_of!(RawHeader, l1_size) as u64);
/// Byte offset in the file of
/// [`Header::reftable_update`](super::Header::reftable_update):
/// `refcount_table_offset` and `refcount_table_clusters`.
pub const REFTABLE_AT: HostOffset = HostOffset(offset_of!(RawHeader, refcount_table_offset) as u64);
/// Byte offset in the file of
/// [`Header::snapshots_update`](super::Header::snapshots_update):
/// `nb_snapshots` and `snapshots_offset`.
pub const SNAPSHOTS_AT: HostOffset = HostOffset(offset_of!(RawHeader, nb_snapshots) as u64);
/// Byte offset in the file of the backing file name's offset, 8 bytes.
pub const BACKING_NAME_AT: HostOffset =
    HostOffset(offset_of!(RawHeader, backing_file_offset) as u64);
/// Byte offset in the file of the virtual size, 8 bytes.
pub const SIZE_AT: HostOffset = HostOffset(offset_of!(RawHeader, size) as u64);
/// Byte offset in the file of the incompatible features, 8 bytes; not in
/// version 2.
pub const INCOMPATIBLE_AT: HostOffset = HostOffset(offset_of!(RawHeader, incompatible) as u64);
/// Byte offset in the file of the compatible features, 8 bytes; not in
/// version 2.
pub const COMPATIBLE_AT: HostOffset = HostOffset(offset_of!(RawHeader, compatible) as u64);
/// Byte offset in the file of the autoclear features, 8 bytes; not in version
/// 2.
pub const AUTOCLEAR_AT: HostOffset = HostOffset(offset_of!(RawHeader, autoclear) as u64);
/// Byte offset in the file of the compression type, 1 byte, where the header
/// is long enough.
pub const COMPRESSION_TYPE_AT: HostOffset = HostOffset(V3_MIN_LEN as u64);

// The offsets of the specification, said once more as numbers.
const _: () = assert!(L1_AT.0 == 36 && offset_of!(RawHeader, l1_table_offset) == 40);
const _: () = assert!(REFTABLE_AT.0 == 48 && offset_of!(RawHeader, refcount_table_clusters) == 56);
const _: () = assert!(SNAPSHOTS_AT.0 == 60 && offset_of!(RawHeader, snapshots_offset) == 64);
const _: () = assert!(SIZE_AT.0 == 24 && offset_of!(RawHeader, cluster_bits) == 20);
const _: () = assert!(AUTOCLEAR_AT.0 == 88 && offset_of!(RawHeader, refcount_order) == 96);

/// Byte offset of a field of [`RawHeader`], for errors.
macro_rules! at {
    ($field:ident) => {
        std::mem::offset_of!($crate::qcow2::spec::header::fields::RawHeader, $field) as u64
    };
}
pub(super) use at;
