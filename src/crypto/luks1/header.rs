//! The header of LUKS version 1, bytes to types and back (LUKS1 on-disk format
//! specification 1.2.3, section 3).

use std::ops::Range;

use crate::crypto::hash::Hash;
use crate::crypto::sector::{CipherSpec, SECTOR};
use crate::crypto::split::STRIPES;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the header.
pub const HEADER_LEN: usize = 592;
/// Places for passphrases.
pub const SLOTS: usize = 8;

pub(crate) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
pub(super) const SALT_LEN: usize = 32;
pub(super) const DIGEST_LEN: usize = 20;
pub(crate) const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
pub(crate) const SLOTS_AT: usize = 208;
pub(crate) const SLOT_LEN: usize = 48;
/// Longest key, in bytes: two of 256 bits.
const MAX_KEY: usize = 64;

/// A header whose numbers can be relied on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cipher of the disk and of the key material.
    pub spec: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// Bytes of the volume key.
    pub key_len: usize,
    /// Where the payload would begin, in sectors. qcow2 does not use it.
    pub payload_sector: u32,
    /// What tells the right volume key from wrong ones.
    pub digest: [u8; DIGEST_LEN],
    /// The digest's salt.
    pub digest_salt: [u8; SALT_LEN],
    /// The digest's iterations.
    pub digest_iterations: u32,
    /// The header's own name.
    pub uuid: [u8; 40],
    /// The places for passphrases.
    pub slots: [Slot; SLOTS],
}

/// A place for a passphrase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// It holds the volume key.
    pub active: bool,
    /// Iterations of PBKDF2.
    pub iterations: u32,
    /// Salt of PBKDF2.
    pub salt: [u8; SALT_LEN],
    /// Where its key material is, in sectors from the header's first byte.
    pub sector: u32,
}

fn damaged(what: impl Into<String>, at: usize) -> Error {
    Error::corrupt(
        format!("the LUKS header is damaged: {}", what.into()),
        at as u64,
    )
    .cure("restore the header from a backup, if there is one")
}

impl Header {
    /// Reads a header that has `region` bytes for itself and its key
    /// material. Offsets in errors count from its first byte.
    pub fn parse(bytes: &[u8], region: u64) -> Result<Self> {
        if bytes.len() < HEADER_LEN || region < HEADER_LEN as u64 {
            return Err(damaged("it is too short", 0));
        }
        if !bytes.starts_with(MAGIC) {
            return Err(damaged("it does not begin as one", 0));
        }
        let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if be16(6) != 1 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("LUKS version {} is not supported", be16(6)),
            )
            .at(6));
        }
        let text = |at: usize, len: usize| {
            let field = &bytes[at..at + len];
            let end = field.iter().position(|&b| b == 0);
            end.and_then(|end| std::str::from_utf8(&field[..end]).ok())
                .filter(|text| text.chars().all(|c| c.is_ascii_graphic()))
                .ok_or_else(|| damaged("a name in it is not text", at))
        };
        let spec = CipherSpec::parse(text(8, 32)?, text(40, 32)?).map_err(|e| e.at(8))?;
        let hash = text(72, 32)?;
        let hash = Hash::from_name(hash).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("the hash {hash:?} is not supported"),
            )
            .at(72)
        })?;
        let key_len = be32(108) as usize;
        if key_len == 0 || key_len > MAX_KEY {
            return Err(damaged(format!("its key has {key_len} bytes"), 108));
        }
        if !spec.key_sizes().any(|len| len == key_len) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the cipher {spec} with a key of {key_len} bytes is not supported"),
            )
            .at(108));
        }
        let mut header = Self {
            spec,
            hash,
            key_len,
            payload_sector: be32(104),
            digest: bytes[112..132].try_into().expect("20 bytes"),
            digest_salt: bytes[132..164].try_into().expect("32 bytes"),
            digest_iterations: be32(164),
            uuid: bytes[168..208].try_into().expect("40 bytes"),
            slots: [Slot::default(); SLOTS],
        };
        if header.digest_iterations == 0 {
            return Err(damaged("its digest has no iterations", 164));
        }
        for index in 0..SLOTS {
            let at = slot_at(index);
            let slot = Slot {
                active: match be32(at) {
                    ACTIVE => true,
                    INACTIVE => false,
                    state => {
                        let what = format!("key slot {index} has the state {state:#x}");
                        return Err(damaged(what, at));
                    }
                },
                iterations: be32(at + 4),
                salt: bytes[at + 8..at + 40].try_into().expect("32 bytes"),
                sector: be32(at + 40),
            };
            if slot.active && slot.iterations == 0 {
                let what = format!("key slot {index} has no iterations");
                return Err(damaged(what, at + 4));
            }
            if be32(at + 44) != STRIPES {
                let what = format!("key slot {index} has {} stripes", be32(at + 44));
                return Err(damaged(what, at + 44));
            }
            header.slots[index] = slot;
        }
        header.check_places(region)?;
        Ok(header)
    }

    /// Key material is inside the region, behind the header, and its own.
    fn check_places(&self, region: u64) -> Result<()> {
        for (index, _) in self.slots.iter().enumerate() {
            let area = self.area(index);
            let at = slot_at(index) + 40;
            if area.start < HEADER_LEN as u64 || area.end > region {
                let what = format!("key slot {index} is outside the encryption header");
                return Err(damaged(what, at));
            }
            for other in 0..index {
                let other_area = self.area(other);
                if area.start < other_area.end && other_area.start < area.end {
                    let what = format!("key slots {other} and {index} overlap");
                    return Err(damaged(what, at));
                }
            }
        }
        Ok(())
    }

    /// Bytes of key material in a slot.
    pub(super) fn material_len(&self) -> usize {
        self.key_len * STRIPES as usize
    }

    /// Where a slot's key material is, in bytes from the header's first one:
    /// whole sectors.
    pub fn area(&self, slot: usize) -> Range<u64> {
        let start = u64::from(self.slots[slot].sector) * SECTOR;
        start..start + (self.material_len() as u64).next_multiple_of(SECTOR)
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(6, &1_u16.to_be_bytes());
        put(8, self.spec.algorithm.name().as_bytes());
        put(40, self.spec.mode_text().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &self.payload_sector.to_be_bytes());
        put(108, &(self.key_len as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &self.uuid);
        for (index, slot) in self.slots.iter().enumerate() {
            put(slot_at(index), &slot.encode());
        }
        bytes
    }

    /// The header's own name, as text.
    pub fn uuid_text(&self) -> String {
        let end = self.uuid.iter().position(|&b| b == 0).unwrap_or(40);
        String::from_utf8_lossy(&self.uuid[..end]).into_owned()
    }
}

impl Slot {
    pub(super) fn encode(&self) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        bytes[..4].copy_from_slice(&state(self.active));
        bytes[4..8].copy_from_slice(&self.iterations.to_be_bytes());
        bytes[8..40].copy_from_slice(&self.salt);
        bytes[40..44].copy_from_slice(&self.sector.to_be_bytes());
        bytes[44..].copy_from_slice(&STRIPES.to_be_bytes());
        bytes
    }
}

/// The bytes that say whether a slot is active.
pub(super) fn state(active: bool) -> [u8; 4] {
    (if active { ACTIVE } else { INACTIVE }).to_be_bytes()
}

/// Where a slot is in the header.
pub(super) fn slot_at(index: usize) -> usize {
    SLOTS_AT + index * SLOT_LEN
}
