//! The binary header of LUKS version 2: where the JSON is, and which of both
//! copies is good (LUKS2 on-disk format specification 1.1.3, section 2.1).

use std::ops::Range;

use crate::crypto::hash::Hash;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a binary header.
pub(super) const BINARY_LEN: usize = 4096;
/// Lengths that a header with its JSON may have.
const SIZES: [u64; 9] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];

const MAGIC_PRIMARY: &[u8; 6] = b"LUKS\xba\xbe";
const MAGIC_SECONDARY: &[u8; 6] = b"SKUL\xba\xbe";
const SIZE_AT: usize = 8;
const SEQID_AT: usize = 16;
const HASH_AT: Range<usize> = 72..104;
const SALT_AT: Range<usize> = 104..168;
const UUID_AT: Range<usize> = 168..208;
const OFFSET_AT: usize = 256;
const CHECKSUM_AT: Range<usize> = 448..512;

/// A copy of the header whose checksum is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    /// The binary header, as it is.
    binary: Vec<u8>,
    /// The JSON, without what fills its area.
    pub(super) json: Vec<u8>,
}

fn damaged(what: impl Into<String>, at: u64) -> Error {
    let message = format!("the LUKS2 header is damaged: {}", what.into());
    Error::corrupt(message, at).cure("restore the header from a backup, if there is one")
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// True for a copy whose checksum is right.
pub fn is_good(bytes: &[u8], at: u64) -> bool {
    Copy::parse(bytes, at).is_ok()
}

/// Where copies of the header may be, given its first [`BINARY_LEN`] bytes:
/// where they should be, or, if those are damaged, where a second one could be.
/// `region` is what there is for all of it.
pub fn places(start: &[u8], region: u64) -> Vec<Range<u64>> {
    let said = (start.len() >= BINARY_LEN && start.starts_with(MAGIC_PRIMARY))
        .then(|| be64(start, SIZE_AT))
        .filter(|size| SIZES.contains(size));
    let mut places = Vec::new();
    if let Some(size) = said {
        places.extend([0..size, size..2 * size]);
    }
    for size in SIZES.into_iter().filter(|&size| Some(size) != said) {
        places.push(size..2 * size);
    }
    places.retain(|place| place.end <= region);
    places
}

impl Copy {
    /// The copy in `bytes`, which begin `at` bytes behind the region's first.
    pub(super) fn parse(bytes: &[u8], at: u64) -> Result<Self> {
        let magic = if at == 0 {
            MAGIC_PRIMARY
        } else {
            MAGIC_SECONDARY
        };
        if bytes.len() < BINARY_LEN || !bytes.starts_with(magic) {
            return Err(damaged("it does not begin as one", at));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("LUKS version {version} is not supported"),
            )
            .at(at + 6));
        }
        let size = be64(bytes, SIZE_AT);
        if !SIZES.contains(&size) || size != bytes.len() as u64 {
            let what = format!("it has a length of {size} bytes");
            return Err(damaged(what, at + SIZE_AT as u64));
        }
        if be64(bytes, OFFSET_AT) != at {
            return Err(damaged("it is not where it says", at + OFFSET_AT as u64));
        }
        let field = &bytes[HASH_AT];
        let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
        let name = String::from_utf8_lossy(&field[..end]);
        let hash = Hash::from_name(&name).ok_or_else(|| {
            let what = format!("the hash {name:?} is not supported");
            Error::new(ErrorKind::Unsupported, what).at(at + HASH_AT.start as u64)
        })?;
        let checksum = &bytes[CHECKSUM_AT];
        if *checksum_of(hash, bytes) != checksum[..hash.digest_len()] {
            return Err(damaged(
                "its checksum is wrong",
                at + CHECKSUM_AT.start as u64,
            ));
        }
        let json = &bytes[BINARY_LEN..];
        let end = json.iter().position(|&b| b == 0).unwrap_or(json.len());
        Ok(Self {
            binary: bytes[..BINARY_LEN].to_vec(),
            json: json[..end].to_vec(),
        })
    }

    /// A header that has never been written.
    pub(super) fn new(size: u64, uuid: &str) -> Self {
        assert!(SIZES.contains(&size));
        let mut binary = vec![0; BINARY_LEN];
        binary[7] = 2;
        binary[SIZE_AT..SIZE_AT + 8].copy_from_slice(&size.to_be_bytes());
        binary[HASH_AT][..6].copy_from_slice(b"sha256");
        binary[UUID_AT][..uuid.len()].copy_from_slice(uuid.as_bytes());
        Self {
            binary,
            json: Vec::new(),
        }
    }

    /// Bytes of a copy, JSON included.
    pub(super) fn size(&self) -> u64 {
        be64(&self.binary, SIZE_AT)
    }

    /// The newer of two copies has the higher one.
    pub(super) fn seqid(&self) -> u64 {
        be64(&self.binary, SEQID_AT)
    }

    /// The header's own name.
    pub(super) fn uuid(&self) -> String {
        let field = &self.binary[UUID_AT];
        let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
        String::from_utf8_lossy(&field[..end]).into_owned()
    }

    /// The bytes of a copy with this JSON and the next higher number; `at` is
    /// 0 for the primary one, else its [size](Self::size).
    ///
    /// # Errors
    ///
    /// `NoSpace` if the JSON does not fit.
    pub(super) fn next(&self, json: &[u8], salt: &[u8], at: u64) -> Result<Vec<u8>> {
        let mut bytes = self.binary.clone();
        bytes.resize(self.size() as usize, 0);
        // One byte for the NUL at its end.
        let room = bytes.len() - BINARY_LEN - 1;
        if json.len() > room {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "the LUKS2 header has room for {room} bytes of JSON, not {}",
                    json.len()
                ),
            )
            .cure("remove a key first"));
        }
        let magic = if at == 0 {
            MAGIC_PRIMARY
        } else {
            MAGIC_SECONDARY
        };
        bytes[..6].copy_from_slice(magic);
        let seqid = self.seqid().saturating_add(1);
        bytes[SEQID_AT..SEQID_AT + 8].copy_from_slice(&seqid.to_be_bytes());
        bytes[SALT_AT].copy_from_slice(salt);
        bytes[OFFSET_AT..OFFSET_AT + 8].copy_from_slice(&at.to_be_bytes());
        bytes[BINARY_LEN..BINARY_LEN + json.len()].copy_from_slice(json);
        let name = &self.binary[HASH_AT];
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        let hash = Hash::from_name(&String::from_utf8_lossy(&name[..end])).expect("as parsed");
        let checksum = checksum_of(hash, &bytes);
        bytes[CHECKSUM_AT].fill(0);
        bytes[CHECKSUM_AT][..checksum.len()].copy_from_slice(&checksum);
        Ok(bytes)
    }
}

/// Over the whole copy, with zeros where the checksum is.
fn checksum_of(hash: Hash, bytes: &[u8]) -> zeroize::Zeroizing<Vec<u8>> {
    hash.digest(&[
        &bytes[..CHECKSUM_AT.start],
        &[0; CHECKSUM_AT.end - CHECKSUM_AT.start],
        &bytes[CHECKSUM_AT.end..],
    ])
}
