//! Initial vectors of sectors.

use super::block_cipher::{Algorithm, Blocks};
use super::hash::Hash;
use crate::error::Result;

/// An initial vector; ciphers with shorter blocks use its beginning.
pub(super) type Vector = [u8; 16];

/// How a sector's number becomes its initial vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IvGenerator {
    /// The number's low 32 bits.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with the hash of the key.
    Essiv(Hash),
}

impl IvGenerator {
    /// As LUKS headers spell it, without the hash.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }

    /// The generator called `name`, with the hash it may have.
    pub fn from_names(name: &str, hash: Option<Hash>) -> Option<Self> {
        match (name, hash) {
            ("plain", _) => Some(Self::Plain),
            ("plain64", _) => Some(Self::Plain64),
            ("essiv", Some(hash)) => Some(Self::Essiv(hash)),
            _ => None,
        }
    }
}

impl std::fmt::Display for IvGenerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Essiv(hash) => write!(f, "essiv:{}", hash.name()),
            other => f.write_str(other.name()),
        }
    }
}

/// A generator with its key.
pub(super) enum Iv {
    Plain,
    Plain64,
    Essiv(Box<dyn Blocks>, usize),
}

impl Iv {
    pub(super) fn new(generator: IvGenerator, algorithm: Algorithm, key: &[u8]) -> Result<Self> {
        Ok(match generator {
            IvGenerator::Plain => Self::Plain,
            IvGenerator::Plain64 => Self::Plain64,
            IvGenerator::Essiv(hash) => {
                let salt = hash.digest(&[key]);
                Self::Essiv(algorithm.keyed(&salt)?, algorithm.block_size())
            }
        })
    }

    #[inline]
    pub(super) fn vector(&self, sector: u64) -> Vector {
        let mut vector = [0; 16];
        match self {
            Self::Plain => vector[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Self::Plain64 => vector[..8].copy_from_slice(&sector.to_le_bytes()),
            Self::Essiv(cipher, block) => {
                vector[..8].copy_from_slice(&sector.to_le_bytes());
                cipher.encrypt(&mut vector[..*block]);
            }
        }
        vector
    }
}
