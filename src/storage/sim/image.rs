//! The contents of a file: sparse, and cheap to copy.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const PAGE: usize = 4096;

/// The contents of a simulated file. Copies share what they have in common.
#[derive(Clone, Default)]
pub struct Image {
    len: u64,
    /// By number; absent pages are holes. Bytes past the end are zeros.
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
}

/// The parts of a range that lie in one page each: page number, first byte in
/// the page, first byte in the range, length.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, u64, usize)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let inside = (at % PAGE as u64) as usize;
            let n = (end - at).min((PAGE - inside) as u64) as usize;
            let part = (at / PAGE as u64, inside, at - offset, n);
            at += n as u64;
            part
        })
    })
}

impl Image {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut image = Self::new();
        image.write(0, bytes);
        image
    }

    /// The contents of a host file; runs of zeros become holes.
    pub fn load(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut image = Self::new();
        image.set_len(file.metadata()?.len());
        let mut page = [0; PAGE];
        for (number, _, at, n) in parts(0, image.len) {
            file.read_exact_at(&mut page[..n], at)?;
            if page[..n].iter().any(|&b| b != 0) {
                page[n..].fill(0);
                image.pages.insert(number, Arc::new(page));
            }
        }
        Ok(image)
    }

    /// Stores the contents in a host file, sparsely, replacing what it holds.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        for (number, page) in &self.pages {
            file.write_all_at(&page[..], number * PAGE as u64)?;
        }
        file.set_len(self.len)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Space taken, in bytes.
    pub fn allocated(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Fills `buf` from `offset` on, with zeros past the end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for (number, inside, at, n) in parts(offset, buf.len() as u64) {
            let target = &mut buf[at as usize..at as usize + n];
            match self.pages.get(&number) {
                Some(page) => target.copy_from_slice(&page[inside..inside + n]),
                None => target.fill(0),
            }
        }
    }

    /// The bytes of a range, with zeros past the end.
    pub fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Stores `bytes` at `offset`, lengthening the file as needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (number, inside, at, n) in parts(offset, bytes.len() as u64) {
            let page = self
                .pages
                .entry(number)
                .or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[inside..inside + n]
                .copy_from_slice(&bytes[at as usize..at as usize + n]);
        }
        if !bytes.is_empty() {
            self.len = self.len.max(offset + bytes.len() as u64);
        }
    }

    /// Makes a range read as zeros and gives its whole pages back. The length
    /// stays.
    pub fn punch(&mut self, offset: u64, len: u64) {
        let pages: Vec<u64> = self
            .pages
            .range(offset / PAGE as u64..(offset + len).div_ceil(PAGE as u64))
            .map(|(&number, _)| number)
            .collect();
        for number in pages {
            let start = offset.max(number * PAGE as u64);
            let end = (offset + len).min((number + 1) * PAGE as u64);
            if end - start == PAGE as u64 {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number) {
                let inside = (start % PAGE as u64) as usize;
                Arc::make_mut(page)[inside..inside + (end - start) as usize].fill(0);
            }
        }
    }

    /// Cuts the file, or lengthens it with a hole.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, self.len - len);
            self.pages.split_off(&len.div_ceil(PAGE as u64));
        }
        self.len = len;
    }

    /// How many bytes of a write fit when the file may take `capacity` bytes
    /// of space.
    pub(super) fn room(&self, offset: u64, len: u64, capacity: u64) -> u64 {
        let mut free = capacity.saturating_sub(self.allocated()) / PAGE as u64;
        for (number, _, at, _) in parts(offset, len) {
            if !self.pages.contains_key(&number) {
                if free == 0 {
                    return at;
                }
                free -= 1;
            }
        }
        len
    }
}

/// Equal lengths and bytes; where the holes are does not matter.
impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        let covered = |a: &Self, b: &Self| {
            a.pages
                .iter()
                .all(|(number, page)| match b.pages.get(number) {
                    Some(theirs) => Arc::ptr_eq(page, theirs) || page == theirs,
                    None => page.iter().all(|&b| b == 0),
                })
        };
        self.len == other.len && covered(self, other) && covered(other, self)
    }
}

impl Eq for Image {}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Image({} bytes, {} allocated)",
            self.len,
            self.allocated()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_vector_of_bytes() {
        let mut rng = super::super::Rng::new(1);
        let mut image = Image::new();
        let mut model: Vec<u8> = Vec::new();
        for _ in 0..3000 {
            let offset = rng.below(40_000);
            let len = rng.below(10_000);
            let end = (offset + len) as usize;
            match rng.below(4) {
                0 | 1 => {
                    let mut bytes = vec![0; len as usize];
                    rng.fill(&mut bytes);
                    image.write(offset, &bytes);
                    if len > 0 {
                        model.resize(model.len().max(end), 0);
                        model[offset as usize..end].copy_from_slice(&bytes);
                    }
                }
                2 => {
                    image.punch(offset, len);
                    let end = end.min(model.len());
                    if (offset as usize) < end {
                        model[offset as usize..end].fill(0);
                    }
                }
                _ => {
                    image.set_len(offset);
                    model.resize(offset as usize, 0);
                }
            }
            assert_eq!(image.len(), model.len() as u64);
        }
        assert_eq!(image.bytes(0, image.len()), model);
        assert_eq!(image, Image::from_bytes(&model));
    }

    #[test]
    fn goes_to_a_host_file_and_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = Image::from_bytes(b"head");
        image.write(1 << 30, b"tail");
        image.set_len((1 << 30) + 100);
        image.save(file.path()).unwrap();
        let again = Image::load(file.path()).unwrap();
        assert_eq!(image, again);
        assert_eq!(again.allocated(), 2 * PAGE as u64);
        image.write(5, b"x");
        assert_ne!(image, again);
    }
}
