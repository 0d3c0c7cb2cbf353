//! A cipher for the sectors of a disk: what LUKS calls "aes-xts-plain64".

use std::fmt;

use super::block_cipher::Algorithm;
use super::hash::Hash;
use super::iv::{Iv, IvGenerator};
use super::mode::{Direction, Keyed, Mode};
use crate::error::{Error, ErrorKind, Result};

/// The smallest sector that is encrypted as one, in bytes.
pub(super) const MIN_SECTOR: usize = 512;
/// The largest one.
pub(super) const MAX_SECTOR: usize = 4096;

/// The unit in which sectors are counted, whatever their size.
pub const SECTOR: u64 = 512;

/// Cipher, mode and initial vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// Its mode.
    pub mode: Mode,
    /// How initial vectors are made.
    pub iv: IvGenerator,
}

impl CipherSpec {
    /// What LUKS headers call `cipher` and `mode`: "aes" and "xts-plain64".
    pub fn parse(cipher: &str, mode: &str) -> Result<Self> {
        let unsupported = || {
            Error::new(
                ErrorKind::Unsupported,
                format!("the cipher {cipher:?} in mode {mode:?} is not supported"),
            )
        };
        let (name, iv) = mode.split_once('-').unwrap_or((mode, "plain64"));
        let (generator, hash) = match iv.split_once(':') {
            Some((generator, hash)) => (
                generator,
                Some(Hash::from_name(hash).ok_or_else(unsupported)?),
            ),
            None => (iv, None),
        };
        let mode = Mode::from_name(name).ok_or_else(unsupported)?;
        Ok(Self {
            algorithm: Algorithm::from_name(cipher).ok_or_else(unsupported)?,
            mode,
            iv: IvGenerator::from_names(generator, hash).ok_or_else(unsupported)?,
        })
    }

    /// The mode as LUKS headers spell it.
    pub fn mode_text(&self) -> String {
        format!("{}-{}", self.mode.name(), self.iv)
    }

    /// Lengths of its keys in bytes.
    pub fn key_sizes(&self) -> impl Iterator<Item = usize> {
        let keys = self.mode.keys();
        self.algorithm
            .key_sizes()
            .iter()
            .map(move |size| size * keys)
    }
}

impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.algorithm.name(), self.mode_text())
    }
}

/// A cipher with its key, for sectors of one size.
pub struct SectorCipher {
    mode: Keyed,
    iv: Iv,
    size: usize,
    spec: CipherSpec,
}

impl SectorCipher {
    /// A cipher for sectors of `size` bytes: a power of two from 512 to 4096.
    ///
    /// # Errors
    ///
    /// `Unsupported` if there is no such cipher with a key of that length.
    pub fn new(spec: CipherSpec, key: &[u8], size: u32) -> Result<Self> {
        assert!(
            size.is_power_of_two() && (MIN_SECTOR..=MAX_SECTOR).contains(&(size as usize)),
            "sectors of {size} bytes"
        );
        Ok(Self {
            mode: Keyed::new(spec.algorithm, spec.mode, key)?,
            iv: Iv::new(spec.iv, spec.algorithm, key)?,
            size: size as usize,
            spec,
        })
    }

    /// Bytes that are encrypted as one.
    pub fn sector_size(&self) -> u64 {
        self.size as u64
    }

    /// Encrypts sectors; `offset` is where the first one lies, in bytes, and
    /// is a multiple of 512.
    ///
    /// # Panics
    /// If the data is not whole sectors.
    pub fn encrypt(&self, offset: u64, data: &mut [u8]) {
        self.run(Direction::Encrypt, offset, data);
    }

    /// Decrypts sectors; see [`Self::encrypt`].
    ///
    /// # Panics
    /// If the data is not whole sectors.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) {
        self.run(Direction::Decrypt, offset, data);
    }

    fn run(&self, direction: Direction, offset: u64, data: &mut [u8]) {
        // Initial vectors count units of 512 bytes, also of larger sectors.
        assert!(data.len().is_multiple_of(self.size) && offset.is_multiple_of(SECTOR));
        let step = self.size as u64 / SECTOR;
        let numbers = (offset / SECTOR, step);
        self.mode.run(direction, &self.iv, numbers, self.size, data);
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        write!(f, "SectorCipher({}, {} bytes)", self.spec, self.size)
    }
}

#[cfg(test)]
#[path = "sector_tests.rs"]
mod tests;
