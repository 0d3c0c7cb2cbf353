//! Sectors and their tags.

use super::history::{Tag, ZEROS};

pub(crate) const SECTOR: u64 = 512;

/// A sector with a tag: each word tells which sector it is.
pub(crate) fn encode(sector: u64, tag: Tag) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if tag != ZEROS {
        for word in bytes.as_chunks_mut::<8>().0 {
            *word = (tag << 16 | sector).to_le_bytes();
        }
    }
    bytes
}

/// The tags of the sectors from `first` on: of one that was read while it was
/// written, perhaps several.
pub(crate) fn decode(first: u64, bytes: &[u8]) -> Result<Vec<(u64, Tag)>, String> {
    let mut tags = Vec::new();
    for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
        let own = tags.len();
        for word in bytes.as_chunks::<8>().0 {
            let word = u64::from_le_bytes(*word);
            let tag = word >> 16;
            if word != 0 && (word & 0xffff != sector || tag == ZEROS) {
                return Err(format!("sector {sector} has the word {word:#x}"));
            }
            if !tags[own..].contains(&(sector, tag)) {
                tags.push((sector, tag));
            }
        }
    }
    Ok(tags)
}
