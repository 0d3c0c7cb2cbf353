//! The log that the kernel's dm-log-writes makes: a sector with the head, then
//! for each entry a sector that describes it and the data. All numbers are
//! little-endian.
#![allow(unreachable_pub, reason = "a part of a program")]

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use qcow2_ublk::storage::sim::Image;

use crate::Outcome;

const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The unit of the entries' `sector`.
const SECTOR: u64 = 512;

/// How the texts of our marks begin.
pub const OURS: &[u8; 8] = b"powercut";

const FLUSH: u64 = 1;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

/// Something that was complete on the disk. A write that no flush followed is
/// not in the log, unless it had FUA.
pub struct Entry {
    offset: u64,
    len: u64,
    flags: u64,
    data: Vec<u8>,
}

pub struct Log {
    pub entries: Vec<Entry>,
}

impl Entry {
    /// All entries before it are durable.
    pub fn is_flush(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }

    pub fn is_mark(&self) -> bool {
        self.flags & MARK != 0
    }

    pub fn apply(&self, disk: &mut Image) {
        if self.is_mark() {
        } else if self.flags & DISCARD != 0 {
            disk.punch(self.offset, self.len);
        } else {
            disk.write(self.offset, &self.data);
        }
    }
}

impl Log {
    pub fn read(path: &Path) -> Outcome<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let head = words(&mut file, SECTOR)?;
        if head[..2] != [MAGIC, 1] {
            return Err(format!("{} is no log of dm-log-writes", path.display()).into());
        }
        let (count, unit) = (head[2], head[3] & 0xffff_ffff);
        file.seek(SeekFrom::Start(unit))?;
        let mut entries = Vec::new();
        for _ in 0..count {
            let entry = words(&mut file, unit)?;
            let (sector, sectors, mut flags) = (entry[0], entry[1], entry[2]);
            // The kernel sets one itself at the end.
            if flags & MARK != 0 && entry[4].to_le_bytes() != *OURS {
                flags = 0;
            }
            let len = sectors * SECTOR;
            // A mark's text fills up the sector of its description.
            let stored = if flags & DISCARD == 0 { len } else { 0 };
            let mut data = vec![0; stored as usize];
            file.read_exact(&mut data)?;
            entries.push(Entry {
                offset: sector * SECTOR,
                len,
                flags,
                data,
            });
        }
        Ok(Self { entries })
    }

    /// Marks among the first entries.
    pub fn marks(&self, entries: usize) -> usize {
        self.entries[..entries]
            .iter()
            .filter(|e| e.is_mark())
            .count()
    }
}

/// The numbers in the next `len` bytes.
fn words(file: &mut impl Read, len: u64) -> Outcome<Vec<u64>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact(&mut bytes)?;
    let words = bytes.as_chunks::<8>().0;
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}
