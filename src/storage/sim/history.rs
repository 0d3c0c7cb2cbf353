//! What was done to the disks, in order.

use std::fmt;
use std::sync::Arc;

use super::Image;

/// The unit a disk writes whole or not at all, in bytes.
pub(super) const SECTOR: u64 = 512;

/// A change to a disk, or a request to make earlier ones durable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Bytes were stored.
    Write {
        /// First byte.
        offset: u64,
        /// What was stored.
        bytes: Arc<[u8]>,
    },
    /// A range was zeroed; the file grew as needed.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// A range was zeroed and its space given back.
    Punch {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// The file was cut or lengthened to this many bytes.
    SetLen(u64),
    /// All before it, on the same disk, is durable.
    Sync,
    /// A sync failed: what was not durable before it may be lost for good,
    /// and no later sync helps.
    FailedSync,
}

/// One step of a history.
#[derive(Clone, Debug)]
pub struct Record {
    /// Which of the disks.
    pub disk: usize,
    /// What was done.
    pub change: Change,
    /// The sectors that the change covers in part, as they were after it:
    /// offset and bytes. With the change, they make whole sectors.
    pub(super) edges: Vec<(u64, Vec<u8>)>,
}

impl Record {
    /// A change that has just been made to `image`.
    pub(super) fn new(disk: usize, change: Change, image: &Image) -> Self {
        let (offset, len) = match &change {
            Change::Write { offset, bytes } => (*offset, bytes.len() as u64),
            Change::Zero { offset, len } | Change::Punch { offset, len } => (*offset, *len),
            _ => (0, 0),
        };
        let end = offset + len;
        let mut sectors = Vec::new();
        if offset % SECTOR != 0 {
            sectors.push(offset / SECTOR * SECTOR);
        }
        if end % SECTOR != 0 {
            sectors.push(end / SECTOR * SECTOR);
        }
        sectors.dedup();
        let edges = sectors
            .into_iter()
            .filter(|&at| at < image.len())
            .map(|at| (at, image.bytes(at, SECTOR.min(image.len() - at))))
            .collect();
        Self {
            disk,
            change,
            edges,
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}: ", self.disk)?;
        match &self.change {
            Change::Write { offset, bytes } => write!(f, "write {offset:#x}+{:#x}", bytes.len()),
            Change::Zero { offset, len } => write!(f, "zero {offset:#x}+{len:#x}"),
            Change::Punch { offset, len } => write!(f, "punch {offset:#x}+{len:#x}"),
            Change::SetLen(len) => write!(f, "set the length to {len:#x}"),
            Change::Sync => f.write_str("sync"),
            Change::FailedSync => f.write_str("sync, which failed"),
        }
    }
}

/// What was done to all disks of a machine since it was started, or since
/// [`SimDisk::forget`](super::SimDisk::forget).
#[derive(Clone, Debug)]
pub struct History {
    /// What the disks held, durably, before the first record.
    pub start: Vec<Image>,
    /// What was done, in the order in which it took effect.
    pub records: Vec<Record>,
}

/// One record a line, with its number.
impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, record) in self.records.iter().enumerate() {
            writeln!(f, "#{number} {record}")?;
        }
        Ok(())
    }
}
