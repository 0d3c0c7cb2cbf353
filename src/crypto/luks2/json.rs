//! The JSON of a LUKS2 header, as far as it is needed to get at the key.
//! Whatever else is in it stays as it is.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// The whole of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Json {
    pub(super) keyslots: BTreeMap<String, Keyslot>,
    #[serde(default)]
    pub(super) tokens: Map<String, Value>,
    pub(super) segments: BTreeMap<String, Segment>,
    pub(super) digests: BTreeMap<String, Digest>,
    pub(super) config: Config,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// A place for a passphrase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Keyslot {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) key_size: usize,
    pub(super) af: Splitter,
    pub(super) area: Area,
    pub(super) kdf: Kdf,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// How the key is spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Splitter {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) stripes: u32,
    pub(super) hash: String,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// Where the spread key is, and how it is encrypted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Area {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(with = "number")]
    pub(super) offset: u64,
    #[serde(with = "number")]
    pub(super) size: u64,
    pub(super) encryption: String,
    pub(super) key_size: usize,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// How a passphrase becomes the key of an area.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum Kdf {
    Pbkdf2 {
        salt: Base64,
        hash: String,
        iterations: u32,
    },
    Argon2i(Argon2),
    Argon2id(Argon2),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Argon2 {
    pub(super) salt: Base64,
    pub(super) time: u32,
    /// KiB.
    pub(super) memory: u32,
    pub(super) cpus: u32,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Segment {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default, with = "number")]
    pub(super) iv_tweak: u64,
    #[serde(default)]
    pub(super) encryption: String,
    #[serde(default)]
    pub(super) sector_size: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) integrity: Option<Value>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// What tells the right key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Digest {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) keyslots: Vec<String>,
    pub(super) segments: Vec<String>,
    pub(super) salt: Base64,
    pub(super) digest: Base64,
    #[serde(default)]
    pub(super) hash: String,
    #[serde(default)]
    pub(super) iterations: u32,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Config {
    #[serde(with = "number")]
    pub(super) json_size: u64,
    #[serde(with = "number")]
    pub(super) keyslots_size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) requirements: Option<Value>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// Numbers of 64 bits are text in this JSON.
mod number {
    use super::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(n: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&n.to_string())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
        let text = String::deserialize(input)?;
        text.parse()
            .map_err(|_| serde::de::Error::custom(format!("{text:?} is not a number")))
    }
}

/// Bytes as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base64(pub(super) Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let text = String::deserialize(input)?;
        STANDARD
            .decode(text)
            .map(Self)
            .map_err(|_| serde::de::Error::custom("a field is not base64"))
    }
}
