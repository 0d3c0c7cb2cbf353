//! Reading tables of words as far as the file has them: how long a table is
//! said to be costs neither memory nor time. Knows nothing of what is in them.

use crate::error::Result;
use crate::qcow2::spec::addr::HostOffset;
use crate::runtime::Buf;
use crate::storage::Storage;

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;
/// Bytes of a word.
const WORD: u64 = 8;

/// Tells `found` the parts, with their first byte in the table, of a table of
/// `len` bytes at `offset`: whole words. What it is not told is zeros, in a
/// hole of the file or behind its end.
pub(crate) async fn read_pieces(
    storage: &Storage,
    offset: HostOffset,
    len: u64,
    mut found: impl FnMut(u64, &[u8]),
) -> Result<()> {
    let table_end = offset.0.saturating_add(len);
    let end = table_end.min(storage.len());
    let mut at = offset.0;
    while at < end {
        let extent = storage.extent_at(at);
        let stop = extent.end.min(end);
        if !extent.data {
            let next = if stop == end { end } else { stop - stop % WORD };
            // A hole shorter than a word is read like data.
            if next > at {
                at = next;
                continue;
            }
        }
        let stop = stop.next_multiple_of(WORD).min(table_end);
        let mut bytes = Buf::take(PIECE.min(stop - at) as usize);
        storage.read(at, &mut bytes).await?;
        found(at - offset.0, &bytes);
        at += bytes.len() as u64;
    }
    Ok(())
}

/// The words of a table of `len` bytes, up to the last that is not 0.
pub(crate) async fn read_words(
    storage: &Storage,
    offset: HostOffset,
    len: u64,
) -> Result<Vec<u64>> {
    let mut words: Vec<u64> = Vec::new();
    read_pieces(storage, offset, len, |at, bytes| {
        let first = (at / WORD) as usize;
        for (index, raw) in (first..).zip(bytes.as_chunks::<8>().0) {
            if *raw != [0; 8] {
                words.resize(index, 0);
                words.push(u64::from_be_bytes(*raw));
            }
        }
    })
    .await?;
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;
    use crate::storage::{OpenOptions, sim};

    /// A table with holes, and one that ends behind the file's end in the
    /// middle of a word.
    #[test]
    fn holes_and_ends_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut image = sim::Image::default();
        image.write(4096, &7_u64.to_be_bytes());
        image.write(4096 + (1 << 20), &9_u64.to_be_bytes()[..]);
        image.write(4096 + (3 << 20), &[0, 1]);
        image.save(&path).unwrap();
        let file = Storage::open(&path, &OpenOptions::read_only()).unwrap();
        let disk = sim::SimDisk::with_image(image);
        for storage in [file, Storage::simulated(&disk, 1)] {
            let words = |offset: u64, len: u64| {
                let words = read_words(&storage, HostOffset(offset), len);
                Runtime::inline().unwrap().block_on(words).unwrap()
            };
            let all = words(4096, 32 << 20);
            let set: Vec<_> = (0..).zip(&all).filter(|(_, word)| **word != 0).collect();
            let last = 3 << 17;
            assert_eq!(set, [(0, &7), (1 << 17, &9), (last, &(1 << 48))]);
            assert_eq!(all.len(), last + 1, "nothing behind the last");
            assert_eq!(words(4096, 16), [7]);
            assert!(words(4104, 512).is_empty());
            assert!(words(1 << 40, 32 << 20).is_empty());
        }
    }
}
