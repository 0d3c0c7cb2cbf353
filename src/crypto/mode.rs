//! XTS, CBC and ECB over runs of sectors. The initial vectors come from
//! [`iv`](super::iv).

use super::block_cipher::{Algorithm, Blocks};
use super::iv::{Iv, Vector};
use crate::error::{Error, ErrorKind, Result};

/// Mode of operation of a block cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// XTS (IEEE 1619): the one to use.
    Xts,
    /// Cipher block chaining.
    Cbc,
    /// Electronic code book: equal blocks stay equal. Only for images that
    /// have it already.
    Ecb,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Xts, Self::Cbc, Self::Ecb];

    /// As LUKS headers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ecb => "ecb",
        }
    }

    /// The mode of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// How many keys of the cipher it takes.
    pub(super) fn keys(self) -> usize {
        if self == Self::Xts { 2 } else { 1 }
    }
}

/// Blocks of XTS whose tweaks are kept at hand: those of 512 bytes.
const RUN: usize = 32;
const RUN_BYTES: usize = RUN * 16;
/// Sectors whose first tweaks are made together.
const BATCH: usize = 8;
/// Bytes of CBC decrypted together.
const CBC_RUN: usize = 512;

/// A mode with its keys.
pub(super) enum Keyed {
    Xts {
        data: Box<dyn Blocks>,
        tweak: Box<dyn Blocks>,
    },
    Cbc {
        cipher: Box<dyn Blocks>,
        block: usize,
    },
    Ecb(Box<dyn Blocks>),
}

#[derive(Clone, Copy)]
pub(super) enum Direction {
    Encrypt,
    Decrypt,
}

impl Keyed {
    pub(super) fn new(algorithm: Algorithm, mode: Mode, key: &[u8]) -> Result<Self> {
        Ok(match mode {
            Mode::Xts if algorithm.block_size() != 16 || !key.len().is_multiple_of(2) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "the cipher {}-xts with a key of {} bits is not supported",
                        algorithm.name(),
                        key.len() * 8
                    ),
                ));
            }
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Self::Xts {
                    data: algorithm.keyed(data)?,
                    tweak: algorithm.keyed(tweak)?,
                }
            }
            Mode::Cbc => Self::Cbc {
                cipher: algorithm.keyed(key)?,
                block: algorithm.block_size(),
            },
            Mode::Ecb => Self::Ecb(algorithm.keyed(key)?),
        })
    }

    /// Encrypts or decrypts sectors of `size` bytes, the first of which has
    /// the number `first`; the next has a number higher by `step`.
    pub(super) fn run(
        &self,
        direction: Direction,
        iv: &Iv,
        (first, step): (u64, u64),
        size: usize,
        data: &mut [u8],
    ) {
        let number = |nth: usize| first.wrapping_add(nth as u64 * step);
        match self {
            Self::Ecb(cipher) => blocks(cipher.as_ref(), direction, data),
            Self::Cbc { cipher, block } => {
                for (nth, sector) in data.chunks_exact_mut(size).enumerate() {
                    let vector = iv.vector(number(nth));
                    cbc(cipher.as_ref(), *block, direction, &vector, sector);
                }
            }
            Self::Xts {
                data: cipher,
                tweak,
            } => {
                for (nth, batch) in data.chunks_mut(size * BATCH).enumerate() {
                    let mut tweaks: [Vector; BATCH] = [[0; 16]; BATCH];
                    let sectors = batch.len() / size;
                    for (within, vector) in tweaks[..sectors].iter_mut().enumerate() {
                        *vector = iv.vector(number(nth * BATCH + within));
                    }
                    tweak.encrypt(tweaks[..sectors].as_flattened_mut());
                    for (sector, vector) in batch.chunks_exact_mut(size).zip(&tweaks) {
                        xts(cipher.as_ref(), direction, *vector, sector);
                    }
                }
            }
        }
    }
}

fn blocks(cipher: &dyn Blocks, direction: Direction, data: &mut [u8]) {
    match direction {
        Direction::Encrypt => cipher.encrypt(data),
        Direction::Decrypt => cipher.decrypt(data),
    }
}

/// One sector, whose length is a multiple of [`RUN_BYTES`]. The tweaks of a
/// run are computed first, so that its blocks go through the cipher together.
fn xts(cipher: &dyn Blocks, direction: Direction, tweak: Vector, sector: &mut [u8]) {
    let mut next = u128::from_le_bytes(tweak);
    let mut tweaks = [0_u128; RUN];
    for run in sector.chunks_exact_mut(RUN_BYTES) {
        for tweak in &mut tweaks {
            *tweak = next;
            // Times x in GF(2^128).
            next = (next << 1) ^ (0x87 & (next >> 127).wrapping_neg());
        }
        whiten(run, &tweaks);
        blocks(cipher, direction, run);
        whiten(run, &tweaks);
    }
}

#[inline]
fn whiten(run: &mut [u8], tweaks: &[u128; RUN]) {
    let (blocks, _) = run.as_chunks_mut::<16>();
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_ne_bytes(*block) ^ tweak.to_le()).to_ne_bytes();
    }
}

fn cbc(cipher: &dyn Blocks, size: usize, direction: Direction, iv: &Vector, sector: &mut [u8]) {
    let mut previous: Vector = *iv;
    match direction {
        Direction::Encrypt => {
            for block in sector.chunks_exact_mut(size) {
                xor(block, &previous[..size]);
                cipher.encrypt(block);
                previous[..size].copy_from_slice(block);
            }
        }
        Direction::Decrypt => {
            let mut sealed = [0; CBC_RUN];
            for run in sector.chunks_exact_mut(CBC_RUN) {
                sealed.copy_from_slice(run);
                cipher.decrypt(run);
                let (first, rest) = run.split_at_mut(size);
                xor(first, &previous[..size]);
                xor(rest, &sealed[..CBC_RUN - size]);
                previous[..size].copy_from_slice(&sealed[CBC_RUN - size..]);
            }
        }
    }
}

fn xor(target: &mut [u8], other: &[u8]) {
    for (byte, other) in target.iter_mut().zip(other) {
        *byte ^= other;
    }
}
