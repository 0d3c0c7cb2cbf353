//! The contents of a file: sparse, and cheap to copy and to compare.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

const PAGE: usize = 4096;
/// Pages that are copied, or not, together.
const GROUP: u64 = 64;

/// Bytes, and what they hash to once somebody has asked: copies of an image
/// share the work.
#[derive(Debug)]
struct Page {
    bytes: [u8; PAGE],
    hash: OnceLock<u64>,
}

impl Page {
    fn zero() -> Self {
        Self {
            bytes: [0; PAGE],
            hash: OnceLock::new(),
        }
    }

    /// 0 for a page of zeros, which is as good as none.
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| {
            if self.is_zero() {
                return 0;
            }
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.bytes);
            hasher.finish().max(1)
        })
    }

    fn is_zero(&self) -> bool {
        self.bytes == [0; PAGE]
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes,
            hash: OnceLock::new(),
        }
    }
}

/// Pages that follow each other; those that are absent are holes.
type Group = [Option<Arc<Page>>; GROUP as usize];

/// The contents of a simulated file. Copies share what they have in common.
#[derive(Clone, Default)]
pub struct Image {
    len: u64,
    /// By number. Bytes past the end are zeros.
    groups: BTreeMap<u64, Arc<Group>>,
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
                image.page_mut(number)[..n].copy_from_slice(&page[..n]);
            }
        }
        Ok(image)
    }

    /// Stores the contents in a host file, sparsely, replacing what it holds.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        for (number, page) in self.pages() {
            file.write_all_at(&page.bytes, number * PAGE as u64)?;
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
        (self.pages().count() * PAGE) as u64
    }

    /// The bytes of a range in pieces, each with its first byte in the range;
    /// zeros past the end.
    pub fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (usize, &[u8])> {
        parts(offset, len).map(|(number, inside, at, n)| {
            let page = self.page(number).map_or(&[0; PAGE], |page| &page.bytes);
            (at as usize, &page[inside..inside + n])
        })
    }

    /// Fills `buf` from `offset` on, with zeros past the end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for (at, piece) in self.pieces(offset, buf.len() as u64) {
            buf[at..at + piece.len()].copy_from_slice(piece);
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
            self.page_mut(number)[inside..inside + n]
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
            .pages_from(offset / PAGE as u64)
            .map(|(number, _)| number)
            .take_while(|number| number * (PAGE as u64) < offset + len)
            .collect();
        for number in pages {
            let start = offset.max(number * PAGE as u64);
            let end = (offset + len).min((number + 1) * PAGE as u64);
            if end - start == PAGE as u64 {
                self.remove_page(number);
            } else {
                let inside = (start % PAGE as u64) as usize;
                self.page_mut(number)[inside..inside + (end - start) as usize].fill(0);
            }
        }
    }

    /// Cuts the file, or lengthens it with a hole.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, self.len.next_multiple_of(PAGE as u64) - len);
        }
        self.len = len;
    }

    /// How many bytes of a write fit when the file may take `capacity` bytes
    /// of space.
    pub(super) fn room(&self, offset: u64, len: u64, capacity: u64) -> u64 {
        let mut free = capacity.saturating_sub(self.allocated()) / PAGE as u64;
        for (number, _, at, _) in parts(offset, len) {
            if self.page(number).is_none() {
                if free == 0 {
                    return at;
                }
                free -= 1;
            }
        }
        len
    }
}

impl Image {
    fn page(&self, number: u64) -> Option<&Arc<Page>> {
        let group = self.groups.get(&(number / GROUP))?;
        group[(number % GROUP) as usize].as_ref()
    }

    /// The bytes of a page, to be changed; it is there from now on.
    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE] {
        let group = self.groups.entry(number / GROUP);
        let group = group.or_insert_with(|| Arc::new([const { None }; GROUP as usize]));
        let page = &mut Arc::make_mut(group)[(number % GROUP) as usize];
        let page = Arc::make_mut(page.get_or_insert_with(|| Arc::new(Page::zero())));
        page.hash.take();
        &mut page.bytes
    }

    fn remove_page(&mut self, number: u64) {
        if let Some(group) = self.groups.get_mut(&(number / GROUP)) {
            Arc::make_mut(group)[(number % GROUP) as usize] = None;
            if group.iter().all(Option::is_none) {
                self.groups.remove(&(number / GROUP));
            }
        }
    }

    fn pages(&self) -> impl Iterator<Item = (u64, &Arc<Page>)> {
        self.pages_from(0)
    }

    fn pages_from(&self, first: u64) -> impl Iterator<Item = (u64, &Arc<Page>)> {
        let groups = self.groups.range(first / GROUP..);
        groups
            .flat_map(|(group, pages)| (group * GROUP..).zip(&**pages))
            .filter(move |&(number, _)| number >= first)
            .filter_map(|(number, page)| Some((number, page.as_ref()?)))
    }
}

/// Equal lengths and bytes; where the holes are does not matter.
impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        let covered = |a: &Self, b: &Self| {
            a.groups.iter().all(|(number, group)| {
                let theirs = b.groups.get(number);
                if theirs.is_some_and(|theirs| Arc::ptr_eq(group, theirs)) {
                    return true;
                }
                group.iter().enumerate().all(|(index, page)| {
                    let theirs = theirs.and_then(|theirs| theirs[index].as_ref());
                    match (page, theirs) {
                        (Some(page), Some(theirs)) => {
                            Arc::ptr_eq(page, theirs) || page.bytes == theirs.bytes
                        }
                        (Some(page), None) => page.is_zero(),
                        (None, _) => true,
                    }
                })
            })
        };
        self.len == other.len && covered(self, other) && covered(other, self)
    }
}

impl Hash for Image {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.len.hash(state);
        for (number, page) in self.pages() {
            let hash = page.hash();
            if hash != 0 {
                (number, hash).hash(state);
            }
        }
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

    fn hash_of(image: &Image) -> u64 {
        let mut hasher = DefaultHasher::new();
        image.hash(&mut hasher);
        hasher.finish()
    }

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
            if rng.chance(1, 20) {
                let same = Image::from_bytes(&model);
                assert_eq!(image, same);
                assert_eq!(hash_of(&image), hash_of(&same));
                let copy = image.clone();
                image.write(offset, b"changed");
                model.resize(model.len().max(offset as usize + 7), 0);
                model[offset as usize..][..7].copy_from_slice(b"changed");
                assert_ne!(image, copy);
                assert_ne!(hash_of(&image), hash_of(&copy));
                assert_eq!(copy, same, "a copy stays as it was");
            }
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
