//! What a LUKS header says about itself: enough for a report, nothing about
//! keys. (LUKS on-disk format, version 1, which is the one qcow2 holds.)

use super::bytes::{be16, be32};
use crate::crypto::SECTOR;
use crate::crypto::luks1::{ACTIVE, MAGIC, SLOT_LEN, SLOTS, SLOTS_AT};

/// How an image is encrypted with LUKS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksInfo {
    /// Cipher and length of its key in bits ("aes-256").
    pub cipher: String,
    /// Mode of the cipher ("xts").
    pub mode: String,
    /// How initial vectors are made ("plain64").
    pub ivgen: String,
    /// The hash that makes them, if there is one.
    pub ivgen_hash: Option<String>,
    /// The hash that makes keys from passwords.
    pub hash: String,
    /// The header's own name.
    pub uuid: String,
    /// Where the encrypted data would begin, in bytes.
    pub payload_offset: u64,
    /// Iterations for the digest of the master key.
    pub master_key_iters: u32,
    /// The places for passwords.
    pub slots: Vec<LuksSlot>,
}

/// A place for a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksSlot {
    /// Where its key material is, in bytes from the LUKS header on.
    pub key_offset: u64,
    /// Iterations and stripes, if the place is taken.
    pub active: Option<(u32, u32)>,
}

impl LuksInfo {
    /// Reads the header; `None` if it is not one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if !bytes.starts_with(MAGIC) || be16(bytes, 6)? != 1 {
            return None;
        }
        let text = |at: usize, len: usize| {
            let field = bytes.get(at..at + len)?;
            let end = field.iter().position(|&b| b == 0).unwrap_or(len);
            Some(String::from_utf8_lossy(&field[..end]).into_owned())
        };
        let cipher_mode = text(40, 32)?;
        let (mode, iv) = cipher_mode.split_once('-').unwrap_or((&cipher_mode, ""));
        let (ivgen, ivgen_hash) = match iv.split_once(':') {
            Some((ivgen, hash)) => (ivgen, Some(hash.to_owned())),
            None => (iv, None),
        };
        // The key of XTS is two.
        let keys = if mode == "xts" { 2 } else { 1 };
        let bits = u64::from(be32(bytes, 108)?) * 8 / keys;
        let mut slots = Vec::with_capacity(SLOTS);
        for slot in 0..SLOTS {
            let at = SLOTS_AT + slot * SLOT_LEN;
            let active = (be32(bytes, at)? == ACTIVE)
                .then_some((be32(bytes, at + 4)?, be32(bytes, at + 44)?));
            slots.push(LuksSlot {
                key_offset: u64::from(be32(bytes, at + 40)?) * SECTOR,
                active,
            });
        }
        Some(Self {
            cipher: format!("{}-{bits}", text(8, 32)?),
            mode: mode.to_owned(),
            ivgen: ivgen.to_owned(),
            ivgen_hash,
            hash: text(72, 32)?,
            uuid: text(168, 40)?,
            payload_offset: u64::from(be32(bytes, 104)?) * SECTOR,
            master_key_iters: be32(bytes, 164)?,
            slots,
        })
    }
}
