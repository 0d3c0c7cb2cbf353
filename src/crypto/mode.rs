//! XTS, CBC and ECB over runs of sectors. The initial vectors come from
//! [`iv`](super::iv).

use zerocopy::IntoBytes;

use super::block_cipher::{Algorithm, Blocks, xor};
use super::iv::{Iv, Vector};
use super::sector::{MAX_SECTOR, MIN_SECTOR};
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

/// Bytes of XTS that go through the cipher together: the largest sector there
/// is, or several smaller ones. The `aes` crate takes 64 blocks at a time where
/// the processor has AVX-512, and fewer one by one.
const RUN_BYTES: usize = MAX_SECTOR;
const RUN: usize = RUN_BYTES / 16;
/// Tweaks that do not depend on each other.
const LANES: usize = 8;
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
                let mut tweaks = [0; RUN];
                for (nth, run) in data.chunks_mut(RUN_BYTES).enumerate() {
                    let sectors = run.len() / size;
                    let mut firsts: [Vector; RUN_BYTES / MIN_SECTOR] = Default::default();
                    let firsts = &mut firsts[..sectors];
                    for (within, vector) in firsts.iter_mut().enumerate() {
                        *vector = iv.vector(number(nth * (RUN_BYTES / size) + within));
                    }
                    tweak.encrypt(firsts.as_flattened_mut());
                    for (tweaks, first) in tweaks.chunks_exact_mut(size / 16).zip(firsts) {
                        fill_tweaks(tweaks, *first);
                    }
                    let masks = &tweaks[..run.len() / 16];
                    match direction {
                        Direction::Encrypt => cipher.encrypt_masked(run, masks.as_bytes()),
                        Direction::Decrypt => cipher.decrypt_masked(run, masks.as_bytes()),
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

/// The tweaks of a sector's blocks, in the order of bytes in which they are
/// added: each is the one before times x in GF(2^128).
fn fill_tweaks(tweaks: &mut [u128], first: Vector) {
    let mut lanes = [u128::from_le_bytes(first); LANES];
    for lane in 1..LANES {
        let before = lanes[lane - 1];
        lanes[lane] = (before << 1) ^ (0x87 & (before >> 127).wrapping_neg());
    }
    let (groups, _) = tweaks.as_chunks_mut();
    for group in groups {
        *group = lanes.map(u128::to_le);
        for lane in &mut lanes {
            // Times x^8, modulo x^128 + x^7 + x^2 + x + 1.
            let over = *lane >> 120;
            *lane = (*lane << 8) ^ over ^ (over << 1) ^ (over << 2) ^ (over << 7);
        }
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
