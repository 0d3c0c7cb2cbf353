//! The on-disk format: bytes to types and back.
//!
//! Everything is big-endian on disk and validated on conversion, so that a
//! value of a type of this module obeys the specification's rules for it.
//! Nothing here reads a file, waits, or panics on hostile input.
#![forbid(unsafe_code)]

pub mod addr;
pub mod bitmap;
pub(in crate::qcow2) mod bytes;
pub mod entry;
pub mod geometry;
pub mod header;
pub mod l2;
pub mod luks;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;

pub use crate::codec::CompressionType;
pub use addr::{GuestOffset, HostOffset};
pub use entry::{BadEntry, CompressedRange, L1Entry};
pub use geometry::Geometry;
pub use header::Header;
pub use l2::{L2Entry, RawL2Entry};
pub use refcount::ReftableEntry;
pub use subcluster::{Subcluster, Subclusters};
