//! LUKS version 2: unlocking, making, adding and removing passphrases. Works
//! on bytes that others read and write; offsets count from the header's first
//! byte. QEMU does not open it.
//!
//! # What is on disk at each moment
//!
//! The header is there twice, with checksums; the copy with the higher number
//! counts. A change is a list of steps, each durable before the next begins:
//!
//! | change | steps (`|` is an fdatasync) |
//! |---|---|
//! | add a passphrase | key material `|` second copy `|` first copy `|` |
//! | remove one | key material overwritten `|` second copy `|` first copy `|` |
//!
//! A power cut in a copy leaves the other one: the header is old or new.

mod binary;
mod json;
mod kdf;
mod make;

use std::ops::Range;

use zeroize::Zeroizing;

use super::hash::Hash;
use super::kdf::{Effort, check_iterations};
use super::luks::{Change, SlotInfo};
use super::luks1::free_slot;
use super::secret::{Limits, random, same};
use super::sector::{CipherSpec, SECTOR, SectorCipher};
use super::split::{self, STRIPES};
use super::volume_key::VolumeKey;
use crate::error::{Error, ErrorKind, Result};

use binary::Copy;
pub use binary::{is_good, places};
use json::{Json, Keyslot};
pub use make::make;

/// Places for passphrases at most.
const SLOTS: usize = 32;
/// Longest key, in bytes.
const MAX_KEY: usize = 64;
const SALT_LEN: usize = 64;

/// A header of which at least one copy is good.
#[derive(Clone, Debug)]
pub struct Header {
    copy: Copy,
    json: Json,
    /// Bytes for all of it.
    region: u64,
}

fn damaged(what: impl Into<String>) -> Error {
    let message = format!("the LUKS2 header is damaged: {}", what.into());
    Error::new(ErrorKind::Corrupt, message)
        .cure("restore the header from a backup, if there is one")
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

fn hash_named(name: &str) -> Result<Hash> {
    Hash::from_name(name).ok_or_else(|| unsupported(format!("the hash {name:?} is not supported")))
}

/// "aes-xts-plain64"
fn spec_named(name: &str) -> Result<CipherSpec> {
    let (cipher, mode) = name.split_once('-').unwrap_or((name, ""));
    CipherSpec::parse(cipher, mode)
}

/// Before anything else is looked at: it may have another form then.
fn check_requirements(requirements: &serde_json::Value) -> Result<()> {
    let mandatory = &requirements["mandatory"];
    if mandatory.is_null() || mandatory.as_array().is_some_and(Vec::is_empty) {
        return Ok(());
    }
    Err(unsupported(format!(
        "the LUKS2 requirements {mandatory} are not supported"
    ))
    .cure("finish what was begun, such as a re-encryption, with cryptsetup"))
}

impl Header {
    /// The newest good copy of those found at `places`; `region` is what there
    /// is for header and key material.
    pub fn parse(copies: &[(u64, Vec<u8>)], region: u64) -> Result<Self> {
        let mut best: Option<Copy> = None;
        let mut first_error = None;
        for (at, bytes) in copies {
            match Copy::parse(bytes, *at) {
                Ok(copy) if best.as_ref().is_none_or(|best| best.seqid() < copy.seqid()) => {
                    best = Some(copy);
                }
                Ok(_) => {}
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        let Some(copy) = best else {
            return Err(first_error.unwrap_or_else(|| damaged("it is too short")));
        };
        let unreadable = |error| damaged(format!("its JSON cannot be read: {error}"));
        let value: serde_json::Value = serde_json::from_slice(&copy.json).map_err(unreadable)?;
        check_requirements(&value["config"]["requirements"])?;
        let json = serde_json::from_value(value).map_err(unreadable)?;
        let header = Self { copy, json, region };
        header.check()?;
        Ok(header)
    }

    /// The one segment that is the disk.
    fn segment(&self) -> Result<(&str, &json::Segment)> {
        let mut segments = self.json.segments.iter();
        let (Some((name, segment)), None) = (segments.next(), segments.next()) else {
            let count = self.json.segments.len();
            return Err(unsupported(format!(
                "LUKS2 with {count} segments is not supported"
            )));
        };
        Ok((name, segment))
    }

    /// Features that are supported, and numbers that can be relied on.
    fn check(&self) -> Result<()> {
        let (_, segment) = self.segment()?;
        if segment.kind != "crypt" {
            return Err(unsupported(format!(
                "LUKS2 segments of the type {:?} are not supported",
                segment.kind
            )));
        }
        if segment.integrity.is_some() {
            return Err(unsupported("LUKS2 with integrity is not supported"));
        }
        if !matches!(segment.sector_size, 512 | 1024 | 2048 | 4096) {
            let size = segment.sector_size;
            return Err(damaged(format!("its sectors have {size} bytes")));
        }
        spec_named(&segment.encryption)?;
        let start = 2 * self.copy.size();
        let end = start.checked_add(self.json.config.keyslots_size);
        if end.is_none_or(|end| end > self.region) {
            return Err(damaged("its key slots are outside the encryption header"));
        }
        let mut areas: Vec<Range<u64>> = Vec::new();
        for (name, slot) in &self.json.keyslots {
            if name.parse().ok().filter(|n: &usize| *n < SLOTS).is_none() {
                return Err(damaged(format!("there is a key slot {name:?}")));
            }
            let area = &slot.area;
            let place = area.offset..area.offset.saturating_add(area.size);
            if place.start < start || end.is_none_or(|end| place.end > end) {
                return Err(damaged(format!("key slot {name} is outside")));
            }
            if areas
                .iter()
                .any(|a| place.start < a.end && a.start < place.end)
            {
                return Err(damaged(format!("key slot {name} overlaps another")));
            }
            areas.push(place);
            // Others, such as those of a re-encryption, hold no key.
            if slot.kind != "luks2" {
                continue;
            }
            for len in [slot.key_size, area.key_size] {
                if len == 0 || len > MAX_KEY {
                    return Err(damaged(format!("key slot {name} has a key of {len} bytes")));
                }
            }
            if slot.af.stripes != STRIPES {
                let stripes = slot.af.stripes;
                return Err(damaged(format!("key slot {name} has {stripes} stripes")));
            }
            if (slot.material_len() as u64).next_multiple_of(SECTOR) > area.size {
                return Err(damaged(format!("key slot {name} has no room for its key")));
            }
        }
        Ok(())
    }

    fn slot(&self, number: usize) -> &Keyslot {
        &self.json.keyslots[&number.to_string()]
    }

    fn numbers(&self) -> impl Iterator<Item = (usize, &Keyslot)> {
        let keys = self.json.keyslots.iter();
        keys.filter(|(_, slot)| slot.kind == "luks2")
            .map(|(name, slot)| (name.parse().expect("as checked"), slot))
    }

    /// The active slots: number, and where the key material is.
    pub fn active(&self) -> Vec<(usize, Range<u64>)> {
        let mut slots: Vec<_> = self
            .numbers()
            .map(|(number, slot)| {
                let len = (slot.material_len() as u64).next_multiple_of(SECTOR);
                (number, slot.area.offset..slot.area.offset + len)
            })
            .collect();
        slots.sort_by_key(|(number, _)| *number);
        slots
    }

    /// The places for passphrases that are taken.
    pub fn slots(&self) -> Vec<SlotInfo> {
        let mut slots: Vec<_> = self
            .numbers()
            .map(|(number, slot)| SlotInfo {
                number,
                active: true,
                kdf: kdf::describe(&slot.kdf),
            })
            .collect();
        slots.sort_by_key(|slot| slot.number);
        slots
    }

    /// The header's own name.
    pub fn uuid(&self) -> String {
        self.copy.uuid()
    }

    /// The volume key, if `passphrase` belongs to `slot`; see
    /// [`luks1::Header::unlock`](crate::crypto::luks1::Header::unlock).
    pub fn unlock(
        &self,
        slot: usize,
        material: &[u8],
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<Option<VolumeKey>> {
        let slot_json = self.slot(slot);
        let hash = hash_named(&slot_json.af.hash)?;
        let mut opened = Zeroizing::new(material.to_vec());
        slot_json
            .cipher(passphrase, limits)?
            .decrypt(0, &mut opened);
        let key = split::merge(
            &opened[..slot_json.material_len()],
            slot_json.key_size,
            hash,
        );
        Ok(self
            .is_key(slot, &key, limits)?
            .then(|| VolumeKey::new(&key)))
    }

    /// Iterations that trying a slot takes.
    pub(super) fn cost(&self, slot: usize) -> u64 {
        let name = slot.to_string();
        let digest = self.json.digests.values();
        let digest = digest.filter(|digest| digest.keyslots.contains(&name));
        let digest = digest.map(|digest| u64::from(digest.iterations)).max();
        kdf::cost(&self.slot(slot).kdf).saturating_add(digest.unwrap_or(0))
    }

    /// True when the slot's key is the disk's.
    fn is_key(&self, slot: usize, key: &[u8], limits: &Limits) -> Result<bool> {
        let (segment, _) = self.segment()?;
        let name = slot.to_string();
        for digest in self.json.digests.values() {
            if !digest.keyslots.contains(&name) || !digest.segments.iter().any(|s| s == segment) {
                continue;
            }
            if digest.kind != "pbkdf2" {
                let what = format!("the LUKS2 digest {:?} is not supported", digest.kind);
                return Err(unsupported(what));
            }
            check_iterations(digest.iterations.into(), limits)?;
            if digest.iterations == 0 || digest.digest.0.is_empty() || digest.digest.0.len() > 64 {
                return Err(damaged("its digest is none"));
            }
            let mut found = vec![0; digest.digest.0.len()];
            let salt = &digest.salt.0;
            hash_named(&digest.hash)?.pbkdf2(key, salt, digest.iterations, &mut found);
            return Ok(same(&found, &digest.digest.0));
        }
        Ok(false)
    }

    /// The disk's cipher, and by how much its sectors are counted higher than
    /// they lie.
    pub fn disk_cipher(&self, key: &VolumeKey) -> Result<(SectorCipher, u64)> {
        let (_, segment) = self.segment()?;
        let spec = spec_named(&segment.encryption)?;
        let cipher = SectorCipher::new(spec, key.expose(), segment.sector_size)?;
        Ok((cipher, segment.iv_tweak.wrapping_mul(SECTOR)))
    }

    /// Puts another passphrase into a free slot; which one, and what to write.
    pub fn add(
        &mut self,
        key: &VolumeKey,
        passphrase: &[u8],
        wanted: Option<usize>,
        effort: Effort,
    ) -> Result<(usize, Change)> {
        let mut taken = [false; SLOTS];
        for name in self.json.keyslots.keys() {
            taken[name.parse::<usize>().expect("as checked")] = true;
        }
        let number = free_slot(&taken, wanted)?;
        let (_, segment) = self.segment()?;
        let (segment, encryption) = (self.segment()?.0.to_owned(), segment.encryption.clone());
        let spec = spec_named(&encryption)?;
        // As the disk, where that is a cipher for key material too.
        let key_len = key.expose().len();
        SectorCipher::new(spec, key.expose(), SECTOR as u32)?;
        let len = (key_len * STRIPES as usize) as u64;
        let offset = self.free_area(len.next_multiple_of(4096))?;
        let (slot, material) = make::fill_slot(&encryption, offset, key, passphrase, effort)?;
        self.json.keyslots.insert(number.to_string(), slot);
        for digest in self.json.digests.values_mut() {
            if digest.segments.contains(&segment) {
                digest.keyslots.push(number.to_string());
            }
        }
        let mut change = vec![vec![(offset, material)]];
        change.extend(self.publish()?);
        Ok((number, change))
    }

    /// Where `len` bytes for key material are free.
    fn free_area(&self, len: u64) -> Result<u64> {
        let start = 2 * self.copy.size();
        let end = start + self.json.config.keyslots_size;
        let mut taken: Vec<_> = self
            .json
            .keyslots
            .values()
            .map(|slot| slot.area.offset..slot.area.offset + slot.area.size)
            .collect();
        taken.sort_by_key(|area| area.start);
        let mut at = start;
        for area in taken {
            if at + len <= area.start {
                break;
            }
            at = area.end.next_multiple_of(4096);
        }
        if at + len > end {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the LUKS2 header has no room for the material of another key",
            )
            .cure("remove a key first, with `qcow2-ublk key remove`"));
        }
        Ok(at)
    }

    /// Wipes a slot: what to write.
    pub fn remove(&mut self, slot: usize) -> Result<Change> {
        let name = slot.to_string();
        let area = self.slot(slot).area.clone();
        let wiped = random(area.size as usize)?;
        self.json.keyslots.remove(&name);
        for digest in self.json.digests.values_mut() {
            digest.keyslots.retain(|other| *other != name);
        }
        let mut change = vec![vec![(area.offset, wiped)]];
        change.extend(self.publish()?);
        Ok(change)
    }

    /// The header's copies, to be written one after the other.
    fn publish(&mut self) -> Result<Change> {
        let json = serde_json::to_vec(&self.json)
            .map_err(|error| damaged(format!("its JSON cannot be written: {error}")))?;
        let size = self.copy.size();
        let second = self.copy.next(&json, &random(SALT_LEN)?, size)?;
        let first = self.copy.next(&json, &random(SALT_LEN)?, 0)?;
        self.copy = Copy::parse(&first, 0)?;
        Ok(vec![
            vec![(size, Zeroizing::new(second))],
            vec![(0, Zeroizing::new(first))],
        ])
    }
}

impl Keyslot {
    fn material_len(&self) -> usize {
        self.key_size * STRIPES as usize
    }

    /// The cipher of the slot's key material.
    fn cipher(&self, passphrase: &[u8], limits: &Limits) -> Result<SectorCipher> {
        let spec = spec_named(&self.area.encryption)?;
        let key = kdf::derive(&self.kdf, passphrase, self.area.key_size, limits)?;
        SectorCipher::new(spec, &key, SECTOR as u32)
    }
}

#[cfg(test)]
mod tests;
