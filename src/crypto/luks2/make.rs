//! New LUKS2 headers and key slots.

use serde_json::{Map, json};
use zeroize::Zeroizing;

use super::binary::Copy;
use super::json::{Area, Base64, Config, Digest, Json, Keyslot, Segment, Splitter};
use super::{Header, kdf, spec_named};
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Effort;
use crate::crypto::luks1::Format;
use crate::crypto::secret::{Limits, random, random_uuid};
use crate::crypto::sector::{SECTOR, SectorCipher};
use crate::crypto::split::{self, STRIPES};
use crate::crypto::volume_key::VolumeKey;
use crate::error::Result;

/// Bytes of a copy of the header.
const COPY_LEN: u64 = 16 << 10;
/// Bytes for key material: three keys of 512 bits.
const MATERIAL_LEN: u64 = 1 << 20;

/// A new header with its key material: all bytes of the region. The
/// passphrase is in slot 0. Sectors have 512 bytes.
pub fn make(format: &Format, passphrase: &[u8]) -> Result<Vec<u8>> {
    let key = VolumeKey::new(&random(format.key_len)?);
    // Refuses what does not exist.
    SectorCipher::new(format.spec, key.expose(), SECTOR as u32)?;
    let encryption = format.spec.to_string();
    let offset = 2 * COPY_LEN;
    let (slot, material) = fill_slot(&encryption, offset, &key, passphrase, format.effort)?;
    let salt = random(32)?;
    let iterations = format
        .effort
        .iterations(format.hash, format.hash.digest_len())
        / 8;
    let iterations = iterations.max(1000);
    let mut digest = vec![0; format.hash.digest_len()];
    format
        .hash
        .pbkdf2(key.expose(), &salt, iterations, &mut digest);
    let other = |value: serde_json::Value| match value {
        serde_json::Value::Object(map) => map,
        _ => Map::new(),
    };
    let json = Json {
        keyslots: [("0".to_owned(), slot)].into(),
        tokens: Map::new(),
        segments: [(
            "0".to_owned(),
            Segment {
                kind: "crypt".to_owned(),
                iv_tweak: 0,
                encryption,
                sector_size: SECTOR as u32,
                integrity: None,
                other: other(json!({ "offset": "0", "size": "dynamic" })),
            },
        )]
        .into(),
        digests: [(
            "0".to_owned(),
            Digest {
                kind: "pbkdf2".to_owned(),
                keyslots: vec!["0".to_owned()],
                segments: vec!["0".to_owned()],
                salt: Base64(salt.to_vec()),
                digest: Base64(digest),
                hash: format.hash.name().to_owned(),
                iterations,
                other: Map::new(),
            },
        )]
        .into(),
        config: Config {
            json_size: COPY_LEN - 4096,
            keyslots_size: MATERIAL_LEN,
            requirements: None,
            other: Map::new(),
        },
        other: Map::new(),
    };
    let mut header = Header {
        copy: Copy::new(COPY_LEN, &random_uuid()?),
        json,
        region: offset + MATERIAL_LEN,
    };
    header.check()?;
    let mut region = vec![0; header.region as usize];
    let mut chunks = header.publish()?.concat();
    chunks.push((offset, material));
    for (at, bytes) in chunks {
        region[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    Ok(region)
}

/// A slot with its key material at `offset`, and that material.
pub(super) fn fill_slot(
    encryption: &str,
    offset: u64,
    key: &VolumeKey,
    passphrase: &[u8],
    effort: Effort,
) -> Result<(Keyslot, Zeroizing<Vec<u8>>)> {
    spec_named(encryption)?;
    let len = key.expose().len();
    let material_len = len * STRIPES as usize;
    let size = material_len.next_multiple_of(4096);
    let slot = Keyslot {
        kind: "luks2".to_owned(),
        key_size: len,
        af: Splitter {
            kind: "luks1".to_owned(),
            stripes: STRIPES,
            hash: Hash::Sha256.name().to_owned(),
            other: Map::new(),
        },
        area: Area {
            kind: "raw".to_owned(),
            offset,
            size: size as u64,
            encryption: encryption.to_owned(),
            key_size: len,
            other: Map::new(),
        },
        kdf: kdf::calibrated(effort, len)?,
        other: Map::new(),
    };
    let mut material = split::split(key.expose(), Hash::Sha256, random(material_len)?);
    material.resize(size, 0);
    slot.cipher(passphrase, &Limits::default())?
        .encrypt(0, &mut material);
    Ok((slot, material))
}
