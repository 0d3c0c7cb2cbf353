//! Entries of the snapshot table (qcow2 specification, "Snapshots").
//!
//! The table's length is not stored: each entry tells its own. Read
//! [`HEAD_LEN`] bytes, ask [`entry_len`], read that many, go on.

use super::addr::HostOffset;
use super::bytes::{be16, be32, be64, pad8};
use super::geometry::{Geometry, MAX_L1_BYTES};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of an entry before extra data, ID and name.
pub const HEAD_LEN: usize = 40;
/// Where the head has the length of the extra data; it ends with that.
pub(crate) const EXTRA_LEN_AT: usize = 36;
/// Longest snapshot table in bytes that QEMU reads.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Most extra data of an entry in bytes that QEMU accepts.
pub const MAX_EXTRA: usize = 1024;
/// Longest ID that QEMU handles whole, in bytes.
pub const MAX_ID: usize = 127;
/// Longest name that QEMU handles whole, in bytes.
pub const MAX_NAME: usize = 255;

/// Bytes of extra data with a 64-bit VM state size.
const EXTRA_VM_STATE: usize = 8;
/// Bytes of extra data with the disk size too; version 3 requires it.
const EXTRA_DISK_SIZE: usize = 16;
/// Bytes of extra data with the instruction count too.
const EXTRA_ICOUNT: usize = 24;

/// An entry of the snapshot table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The snapshot's L1 table, cluster-aligned.
    pub l1_table_offset: HostOffset,
    /// Entries of that table.
    pub l1_size: u32,
    /// The ID, unique in the image; usually a number in decimal.
    pub id: Vec<u8>,
    /// The name; may be empty, need not be unique.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds since `date_sec`.
    pub date_nsec: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state, which lies in the L1 space past the disk; 0 for
    /// none.
    pub vm_state_size: u64,
    /// The entry has the 64-bit VM state size; only such an entry can have
    /// what follows.
    pub has_vm_state_64: bool,
    /// Virtual size when it was taken, in bytes; without it, the present one.
    pub disk_size: Option<u64>,
    /// Instructions the guest had run; `u64::MAX` if not counted.
    pub icount: Option<u64>,
    /// Extra data behind what is known here, to be kept.
    pub unknown_extra: Vec<u8>,
}

/// Length in bytes of the entry that begins with `head`, which has
/// [`HEAD_LEN`] bytes and lies at `at`; a multiple of 8.
///
/// # Errors
///
/// `Corrupt` if `head` is shorter (the table is cut off), `Unsupported` if
/// the entry has more extra data than anybody handles.
pub fn entry_len(head: &[u8], at: HostOffset) -> Result<usize> {
    let parts = Parts::parse(head, at)?;
    parts.check(at)?;
    Ok(parts.padded())
}

/// Lengths of the parts of an entry, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    /// May be more than [`MAX_EXTRA`].
    pub(crate) extra: usize,
    pub(crate) id: usize,
    pub(crate) name: usize,
}

impl Parts {
    /// Of the entry that begins with `head` and lies at `at`.
    pub(crate) fn parse(head: &[u8], at: HostOffset) -> Result<Self> {
        let (Some(id), Some(name), Some(extra)) =
            (be16(head, 12), be16(head, 14), be32(head, EXTRA_LEN_AT))
        else {
            return Err(cut_off(at));
        };
        Ok(Self {
            extra: extra as usize,
            id: usize::from(id),
            name: usize::from(name),
        })
    }

    /// Refuses more extra data than anybody handles.
    fn check(self, at: HostOffset) -> Result<()> {
        let extra = self.extra;
        if extra <= MAX_EXTRA {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("Too much extra metadata in snapshot table entry: {extra} bytes"),
        )
        .at(at.0)
        .cure("cut it off with `qcow2-ublk check -r all`"))
    }

    /// Length of the whole entry.
    pub(crate) fn end(self) -> usize {
        HEAD_LEN + self.extra + self.id + self.name
    }

    /// From the entry's begin to the next one's.
    pub(crate) fn padded(self) -> usize {
        pad8(self.end())
    }
}

impl Snapshot {
    /// Reads the entry at the beginning of `bytes`, which lies at `at`, and
    /// tells its length in bytes.
    ///
    /// # Errors
    ///
    /// `Corrupt` if the entry is cut off or its L1 table impossible,
    /// `Unsupported` as [`entry_len`].
    pub fn parse(bytes: &[u8], at: HostOffset, geometry: &Geometry) -> Result<(Self, usize)> {
        let parts = Parts::parse(bytes, at)?;
        parts.check(at)?;
        let len = parts.padded();
        // Padding behind the table's last entry may lie behind the file's end.
        let Some(entry) = bytes.get(..parts.end()) else {
            return Err(cut_off(at));
        };
        let field32 = |offset| be32(entry, offset).unwrap_or_default();
        let field64 = |offset| be64(entry, offset).unwrap_or_default();

        let l1_table_offset = HostOffset(field64(0));
        let l1_size = field32(8);
        if u64::from(l1_size) * 8 > MAX_L1_BYTES {
            return Err(Error::corrupt(
                format!("Snapshot L1 table too large: {l1_size} entries"),
                at.0,
            ));
        }
        if !l1_table_offset.is_aligned(geometry.cluster_bits)
            || l1_table_offset.0 >> 56 != 0
            || (l1_size > 0 && l1_table_offset.0 == 0)
        {
            return Err(Error::corrupt(
                format!("Snapshot L1 table offset {l1_table_offset} is not that of a cluster"),
                at.0,
            ));
        }

        let (extra, rest) = entry[HEAD_LEN..].split_at(parts.extra);
        let (id, name) = rest.split_at(parts.id);
        let vm_state_64 = be64(extra, 0);
        let disk_size = be64(extra, EXTRA_VM_STATE);
        let icount = be64(extra, EXTRA_DISK_SIZE);
        let known = match extra.len() {
            EXTRA_ICOUNT.. => EXTRA_ICOUNT,
            len => len / 8 * 8,
        };
        let snapshot = Self {
            l1_table_offset,
            l1_size,
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: field32(16),
            date_nsec: field32(20),
            vm_clock_nsec: field64(24),
            vm_state_size: vm_state_64.unwrap_or_else(|| u64::from(field32(32))),
            has_vm_state_64: vm_state_64.is_some(),
            disk_size,
            icount,
            unknown_extra: extra[known..].to_vec(),
        };
        Ok((snapshot, len))
    }

    /// Whether the entry lacks the extra data that version 3 requires; it is
    /// written with it the next time.
    pub fn lacks_required_extra(&self, geometry: &Geometry) -> bool {
        geometry.version >= 3 && self.disk_size.is_none()
    }

    /// Bytes of the L1 table that are in use.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_size) * 8
    }

    /// Appends the entry, padded to 8 bytes, to a table under construction.
    ///
    /// # Errors
    ///
    /// `Usage` if ID, name or extra data are too long, or the VM state is and
    /// the entry has no 64-bit field for it.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let usage = |message: &str| Error::new(ErrorKind::Usage, message);
        let too_long = |_| usage("the snapshot's ID or name is too long");
        let id_len = u16::try_from(self.id.len()).map_err(too_long)?;
        let name_len = u16::try_from(self.name.len()).map_err(too_long)?;
        // The 32-bit field is written as QEMU does it: 0 where the 64-bit one
        // is there and the number does not fit.
        let vm_state_32 = match u32::try_from(self.vm_state_size) {
            Ok(size) => size,
            Err(_) if self.has_vm_state_64 => 0,
            Err(_) => return Err(usage("the snapshot's VM state is larger than 4 GiB")),
        };
        let mut extra = Vec::with_capacity(EXTRA_ICOUNT);
        if self.has_vm_state_64 {
            extra.extend_from_slice(&self.vm_state_size.to_be_bytes());
            for field in [self.disk_size, self.disk_size.and(self.icount)]
                .into_iter()
                .flatten()
            {
                extra.extend_from_slice(&field.to_be_bytes());
            }
        }
        extra.extend_from_slice(&self.unknown_extra);
        let extra_len = u32::try_from(extra.len())
            .ok()
            .filter(|&len| len as usize <= MAX_EXTRA)
            .ok_or_else(|| usage("the snapshot has too much extra data"))?;

        let start = out.len();
        out.extend_from_slice(&self.l1_table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&id_len.to_be_bytes());
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&vm_state_32.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(start + pad8(out.len() - start), 0);
        Ok(())
    }
}

fn cut_off(at: HostOffset) -> Error {
    Error::corrupt("the snapshot table ends inside an entry", at.0)
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
