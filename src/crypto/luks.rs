//! A LUKS header of either version, and what is done with it.

use std::ops::Range;

use zeroize::Zeroizing;

use super::kdf::Effort;
use super::luks1;
use super::luks2;
use super::secret::Limits;
use super::sector::SectorCipher;
use super::volume_key::VolumeKey;
use crate::error::{Error, ErrorKind, Result};

/// Bytes to be written, and where: counted from the header's first byte.
pub type Chunk = (u64, Zeroizing<Vec<u8>>);

/// A change of a header: steps, each to be durable before the next begins.
pub type Change = Vec<Vec<Chunk>>;

/// Bytes that tell which version a header has, and where its parts are.
pub const PROBE_LEN: usize = 4096;

/// A LUKS header.
#[derive(Clone, Debug)]
pub enum Header {
    /// Version 1, the only one that QEMU opens.
    V1(Box<luks1::Header>),
    /// Version 2.
    V2(Box<luks2::Header>),
}

/// A place for a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Its number.
    pub number: usize,
    /// It holds the volume key.
    pub active: bool,
    /// How the key is derived: "pbkdf2-sha256, 100000 iterations".
    pub kdf: String,
}

/// The version that the first bytes of a header say.
///
/// # Errors
///
/// `Corrupt` if they are no LUKS header.
pub fn version(start: &[u8]) -> Result<u16> {
    if start.len() < luks1::HEADER_LEN || !start.starts_with(b"LUKS\xba\xbe") {
        return Err(
            Error::corrupt("the LUKS header is damaged: it does not begin as one", 0)
                .cure("restore the header from a backup, if there is one"),
        );
    }
    Ok(u16::from_be_bytes([start[6], start[7]]))
}

impl Header {
    /// The places for passphrases.
    pub fn slots(&self) -> Vec<SlotInfo> {
        match self {
            Self::V1(header) => header
                .slots
                .iter()
                .enumerate()
                .map(|(number, slot)| SlotInfo {
                    number,
                    active: slot.active,
                    kdf: if slot.active {
                        format!(
                            "pbkdf2-{}, {} iterations",
                            header.hash.name(),
                            slot.iterations
                        )
                    } else {
                        String::new()
                    },
                })
                .collect(),
            Self::V2(header) => header.slots(),
        }
    }

    /// The active slots: number, and where the key material is.
    pub fn active(&self) -> Vec<(usize, Range<u64>)> {
        match self {
            Self::V1(header) => header.active().collect(),
            Self::V2(header) => header.active(),
        }
    }

    /// The volume key, if `passphrase` belongs to `slot`, whose area holds
    /// `material`.
    pub fn unlock(
        &self,
        slot: usize,
        material: &[u8],
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<Option<VolumeKey>> {
        match self {
            Self::V1(header) => header.unlock(slot, material, passphrase, limits),
            Self::V2(header) => header.unlock(slot, material, passphrase, limits),
        }
    }

    /// Iterations that trying a slot takes, as [`Limits`] count them.
    pub fn cost(&self, slot: usize) -> u64 {
        match self {
            Self::V1(header) => header.cost(slot),
            Self::V2(header) => header.cost(slot),
        }
    }

    /// The disk's cipher, and by how many bytes its sectors are counted
    /// higher than they lie.
    pub fn disk_cipher(&self, key: &VolumeKey) -> Result<(SectorCipher, u64)> {
        match self {
            Self::V1(header) => header.disk_cipher(key).map(|cipher| (cipher, 0)),
            Self::V2(header) => header.disk_cipher(key),
        }
    }

    /// Puts another passphrase into a free slot; which one, and what to write.
    pub fn add(
        &mut self,
        key: &VolumeKey,
        passphrase: &[u8],
        wanted: Option<usize>,
        effort: Effort,
    ) -> Result<(usize, Change)> {
        match self {
            Self::V1(header) => header.add(key, passphrase, wanted, effort),
            Self::V2(header) => header.add(key, passphrase, wanted, effort),
        }
    }

    /// Wipes an active slot: what to write.
    pub fn remove(&mut self, slot: usize) -> Result<Change> {
        if !self.active().iter().any(|(number, _)| *number == slot) {
            let what = format!("key slot {slot} holds no key");
            return Err(Error::new(ErrorKind::NotFound, what)
                .cure("see `qcow2-ublk key list` for those that do"));
        }
        match self {
            Self::V1(header) => header.remove(slot),
            Self::V2(header) => header.remove(slot),
        }
    }
}
