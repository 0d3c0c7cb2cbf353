//! LUKS version 1: unlocking, making, adding and removing passphrases. Works
//! on bytes that others read and write; offsets count from the header's first
//! byte.
//!
//! # What is on disk at each moment
//!
//! A change is a list of [steps](Change), each durable before the next begins.
//!
//! | change | steps (`|` is an fdatasync) |
//! |---|---|
//! | add a passphrase | key material and the slot, still inactive `|` the word that makes it active `|` |
//! | remove one | key material overwritten `|` the word that makes it inactive `|` salt and iterations cleared `|` |
//!
//! The word is inside one sector, so that it is old or new after a power cut.
//! A cut while adding leaves an inactive slot; while removing, an active slot
//! that opens nothing, which is removed again. Nobody can come to have fewer
//! passphrases than before by adding one, nor more by removing one.

mod header;

use std::ops::Range;

use zeroize::Zeroizing;

use super::hash::Hash;
use super::kdf::{Effort, MIN_ITERATIONS, check_iterations};
use super::luks::Change;
use super::secret::{Limits, random, random_uuid, same};
use super::sector::{CipherSpec, SECTOR, SectorCipher};
use super::split;
use super::volume_key::VolumeKey;
use crate::error::{Error, ErrorKind, Result};

pub(crate) use header::{ACTIVE, MAGIC, SLOT_LEN, SLOTS_AT};
use header::{DIGEST_LEN, SALT_LEN, slot_at, state};
pub use header::{HEADER_LEN, Header, SLOTS, Slot};

/// Where the first key material is, and what its places are aligned to.
const MATERIAL_ALIGNMENT: u64 = 4096;

impl Header {
    /// The active slots: number, and where the key material is.
    pub fn active(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        (0..SLOTS)
            .filter(|&slot| self.slots[slot].active)
            .map(|slot| (slot, self.area(slot)))
    }

    /// The volume key, if `passphrase` belongs to `slot`. `material` is what
    /// is in the slot's [area](Self::area).
    ///
    /// # Errors
    ///
    /// `Policy` if it would take longer than `limits` allow.
    pub fn unlock(
        &self,
        slot: usize,
        material: &[u8],
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<Option<VolumeKey>> {
        let at = |e: Error, at| e.at(at as u64);
        let place = &self.slots[slot];
        check_iterations(place.iterations.into(), limits).map_err(|e| at(e, slot_at(slot) + 4))?;
        check_iterations(self.digest_iterations.into(), limits).map_err(|e| at(e, 164))?;
        let mut opened = Zeroizing::new(material.to_vec());
        self.slot_cipher(place, passphrase)?.decrypt(0, &mut opened);
        let key = split::merge(&opened[..self.material_len()], self.key_len, self.hash);
        Ok(self.is_key(&key).then(|| VolumeKey::new(&key)))
    }

    /// Iterations that trying a slot takes.
    pub(super) fn cost(&self, slot: usize) -> u64 {
        u64::from(self.slots[slot].iterations) + u64::from(self.digest_iterations)
    }

    /// The cipher of a slot's key material.
    fn slot_cipher(&self, slot: &Slot, passphrase: &[u8]) -> Result<SectorCipher> {
        let mut key = Zeroizing::new(vec![0; self.key_len]);
        self.hash
            .pbkdf2(passphrase, &slot.salt, slot.iterations, &mut key);
        SectorCipher::new(self.spec, &key, SECTOR as u32)
    }

    fn digest_of(&self, key: &[u8]) -> [u8; DIGEST_LEN] {
        let mut digest = [0; DIGEST_LEN];
        self.hash
            .pbkdf2(key, &self.digest_salt, self.digest_iterations, &mut digest);
        digest
    }

    fn is_key(&self, key: &[u8]) -> bool {
        same(&self.digest_of(key), &self.digest)
    }

    /// The disk's cipher.
    pub fn disk_cipher(&self, key: &VolumeKey) -> Result<SectorCipher> {
        SectorCipher::new(self.spec, key.expose(), SECTOR as u32)
    }

    /// Puts another passphrase into a free slot; which one, and what to write.
    ///
    /// # Errors
    ///
    /// `NoSpace` if every slot is taken; `Usage` if the wanted one is.
    pub fn add(
        &mut self,
        key: &VolumeKey,
        passphrase: &[u8],
        wanted: Option<usize>,
        effort: Effort,
    ) -> Result<(usize, Change)> {
        let slot = free_slot(&self.slots.map(|slot| slot.active), wanted)?;
        let (place, material) = self.fill_slot(slot, key, passphrase, effort)?;
        let inactive = Slot {
            active: false,
            ..place
        };
        self.slots[slot] = place;
        let at = slot_at(slot) as u64;
        let word = Zeroizing::new(state(true).to_vec());
        Ok((
            slot,
            vec![
                vec![
                    (self.area(slot).start, material),
                    (at, Zeroizing::new(inactive.encode().to_vec())),
                ],
                vec![(at, word)],
            ],
        ))
    }

    /// The slot as it is to be, and its key material.
    fn fill_slot(
        &self,
        slot: usize,
        key: &VolumeKey,
        passphrase: &[u8],
        effort: Effort,
    ) -> Result<(Slot, Zeroizing<Vec<u8>>)> {
        let place = Slot {
            active: true,
            iterations: effort.iterations(self.hash, self.key_len),
            salt: random(SALT_LEN)?[..].try_into().expect("as many"),
            sector: self.slots[slot].sector,
        };
        let fill = random(self.material_len())?;
        let mut material = split::split(key.expose(), self.hash, fill);
        let area = self.area(slot);
        material.resize((area.end - area.start) as usize, 0);
        self.slot_cipher(&place, passphrase)?
            .encrypt(0, &mut material);
        Ok((place, material))
    }

    /// Wipes a slot: what to write.
    pub fn remove(&mut self, slot: usize) -> Result<Change> {
        let area = self.area(slot);
        let wiped = random((area.end - area.start) as usize)?;
        self.slots[slot] = Slot {
            sector: self.slots[slot].sector,
            ..Slot::default()
        };
        let at = slot_at(slot) as u64;
        Ok(vec![
            vec![(area.start, wiped)],
            vec![(at, Zeroizing::new(state(false).to_vec()))],
            vec![(at, Zeroizing::new(self.slots[slot].encode().to_vec()))],
        ])
    }
}

/// The slot to fill.
pub(super) fn free_slot(taken: &[bool], wanted: Option<usize>) -> Result<usize> {
    match wanted {
        Some(slot) if slot >= taken.len() => Err(Error::new(
            ErrorKind::Usage,
            format!(
                "there is no key slot {slot}: they are 0 to {}",
                taken.len() - 1
            ),
        )),
        Some(slot) if taken[slot] => Err(Error::new(
            ErrorKind::Usage,
            format!("key slot {slot} is taken"),
        )
        .cure("name a free one, or none")),
        Some(slot) => Ok(slot),
        None => taken.iter().position(|taken| !taken).ok_or_else(|| {
            Error::new(ErrorKind::NoSpace, "every key slot is taken")
                .cure("remove a key first, with `qcow2-ublk key remove`")
        }),
    }
}

/// How a new disk is to be encrypted. The defaults are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// The cipher.
    pub spec: CipherSpec,
    /// Bytes of the volume key.
    pub key_len: usize,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// How long unlocking should take.
    pub effort: Effort,
}

impl Default for Format {
    fn default() -> Self {
        Self {
            spec: CipherSpec::parse("aes", "xts-plain64").expect("a known cipher"),
            key_len: 64,
            hash: Hash::Sha256,
            effort: Effort::default(),
        }
    }
}

impl Format {
    /// A new header with its key material: all bytes of the region. The
    /// passphrase is in slot 0.
    pub fn make(&self, passphrase: &[u8]) -> Result<Vec<u8>> {
        let key = VolumeKey::new(&random(self.key_len)?);
        // Both refuse what does not exist.
        SectorCipher::new(self.spec, key.expose(), SECTOR as u32)?;
        let material = (self.key_len * split::STRIPES as usize) as u64;
        let step = material.next_multiple_of(MATERIAL_ALIGNMENT);
        let place = |slot: u64| ((MATERIAL_ALIGNMENT + slot * step) / SECTOR) as u32;
        let mut slots = [Slot::default(); SLOTS];
        for (index, slot) in slots.iter_mut().enumerate() {
            slot.sector = place(index as u64);
        }
        let uuid = random_uuid()?;
        let mut header = Header {
            spec: self.spec,
            hash: self.hash,
            key_len: self.key_len,
            payload_sector: place(SLOTS as u64),
            digest: [0; DIGEST_LEN],
            digest_salt: random(SALT_LEN)?[..].try_into().expect("as many"),
            digest_iterations: (self.effort.iterations(self.hash, DIGEST_LEN) / 8)
                .max(MIN_ITERATIONS),
            uuid: [0; 40],
            slots,
        };
        header.uuid[..uuid.len()].copy_from_slice(uuid.as_bytes());
        header.digest = header.digest_of(key.expose());
        let (slot, material) = header.fill_slot(0, &key, passphrase, self.effort)?;
        header.slots[0] = slot;
        let mut region = vec![0; header.payload_sector as usize * SECTOR as usize];
        region[..HEADER_LEN].copy_from_slice(&header.encode());
        let area = header.area(0);
        region[area.start as usize..area.end as usize].copy_from_slice(&material);
        Ok(region)
    }
}

#[cfg(test)]
mod tests;
