//! The AES encryption of old qcow2 images: the passphrase itself is the key,
//! without salt or work. Only to get data out of such images.

use zeroize::Zeroizing;

use super::sector::{CipherSpec, SECTOR, SectorCipher};
use crate::error::Result;

/// AES with 128 bits in CBC mode; the key is the passphrase, cut or filled up
/// with zeros.
pub fn cipher(passphrase: &[u8]) -> Result<SectorCipher> {
    let mut key = Zeroizing::new([0; 16]);
    let len = passphrase.len().min(key.len());
    key[..len].copy_from_slice(&passphrase[..len]);
    SectorCipher::new(
        CipherSpec::parse("aes", "cbc-plain64")?,
        &key[..],
        SECTOR as u32,
    )
}
