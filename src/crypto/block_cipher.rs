//! Block ciphers by name, each behind one interface for many blocks at once.
//! Knows neither modes nor sectors.

use std::marker::PhantomData;

use cipher::array::{Array, ArraySize};
use cipher::{
    BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
    BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit,
};

use crate::error::{Error, ErrorKind, Result};

/// A block cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// AES, with keys of 128, 192 or 256 bits.
    Aes,
    /// Serpent, with keys of 128, 192 or 256 bits.
    Serpent,
    /// Twofish, with keys of 128, 192 or 256 bits.
    Twofish,
    /// CAST-128, with keys of 128 bits and blocks of 64.
    Cast5,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Aes, Self::Serpent, Self::Twofish, Self::Cast5];

    /// As LUKS headers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// The cipher of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.name() == name)
    }

    /// Lengths of its keys in bytes.
    pub fn key_sizes(self) -> &'static [usize] {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => &[16, 24, 32],
            Self::Cast5 => &[16],
        }
    }

    /// Bytes in a block.
    pub fn block_size(self) -> usize {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => 16,
            Self::Cast5 => 8,
        }
    }

    pub(super) fn keyed(self, key: &[u8]) -> Result<Box<dyn Blocks>> {
        if !self.key_sizes().contains(&key.len()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the cipher {} with a key of {} bits is not supported",
                    self.name(),
                    key.len() * 8
                ),
            ));
        }
        Ok(match (self, key.len()) {
            (Self::Aes, 16) => boxed::<aes::Aes128>(key),
            (Self::Aes, 24) => boxed::<aes::Aes192>(key),
            (Self::Aes, _) => boxed::<aes::Aes256>(key),
            (Self::Serpent, _) => boxed::<serpent::Serpent>(key),
            (Self::Twofish, _) => boxed::<twofish::Twofish>(key),
            (Self::Cast5, _) => boxed::<cast5::Cast5>(key),
        })
    }
}

fn boxed<C: KeyInit + Blocks + 'static>(key: &[u8]) -> Box<dyn Blocks> {
    Box::new(C::new_from_slice(key).expect("the length was checked"))
}

/// A cipher with its key. Many blocks in one call: the processor works on
/// several at the same time.
pub(super) trait Blocks: Send + Sync {
    /// Encrypts whole blocks, each on its own.
    fn encrypt(&self, blocks: &mut [u8]);
    /// Decrypts whole blocks, each on its own.
    fn decrypt(&self, blocks: &mut [u8]);
    /// As [`Self::encrypt`], with as many bytes of `masks` added, modulo 2,
    /// before and behind the cipher.
    fn encrypt_masked(&self, blocks: &mut [u8], masks: &[u8]);
    /// As [`Self::decrypt`], masked in the same way.
    fn decrypt_masked(&self, blocks: &mut [u8], masks: &[u8]);
}

impl<C> Blocks for C
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync,
{
    fn encrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty(), "whole blocks");
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty(), "whole blocks");
        self.decrypt_blocks(blocks);
    }

    fn encrypt_masked(&self, blocks: &mut [u8], masks: &[u8]) {
        self.encrypt_with_backend(Masked::new(blocks, masks));
    }

    fn decrypt_masked(&self, blocks: &mut [u8], masks: &[u8]) {
        self.decrypt_with_backend(Masked::new(blocks, masks));
    }
}

/// Masked blocks of `S` bytes on their way through a cipher. What is done here
/// becomes part of the cipher's own code for the processor at hand.
struct Masked<'a, S> {
    blocks: &'a mut [u8],
    masks: &'a [u8],
    size: PhantomData<S>,
}

impl<'a, S: ArraySize> Masked<'a, S> {
    fn new(blocks: &'a mut [u8], masks: &'a [u8]) -> Self {
        debug_assert!(blocks.len() == masks.len() && blocks.len().is_multiple_of(S::USIZE));
        Self {
            blocks,
            masks,
            size: PhantomData,
        }
    }

    /// Gives `many` as many blocks at a time as the cipher likes, and `few` the
    /// rest.
    #[inline(always)]
    fn pass<P: ArraySize>(
        self,
        mut many: impl FnMut(&mut Array<Array<u8, S>, P>),
        few: impl FnOnce(&mut [Array<u8, S>]),
    ) {
        let mut runs = self.blocks.chunks_exact_mut(P::USIZE * S::USIZE);
        let mut masks = self.masks.chunks_exact(P::USIZE * S::USIZE);
        for (run, masks) in runs.by_ref().zip(masks.by_ref()) {
            xor(run, masks);
            let (blocks, _) = Array::slice_as_chunks_mut(run);
            let (blocks, _) = Array::slice_as_chunks_mut(blocks);
            many(&mut blocks[0]);
            xor(run, masks);
        }
        let (rest, masks) = (runs.into_remainder(), masks.remainder());
        if !rest.is_empty() {
            xor(rest, masks);
            few(Array::slice_as_chunks_mut(rest).0);
            xor(rest, masks);
        }
    }
}

/// Adds `other` to as many bytes, modulo 2.
#[inline(always)]
pub(super) fn xor(target: &mut [u8], other: &[u8]) {
    for (byte, other) in target.iter_mut().zip(other) {
        *byte ^= other;
    }
}

impl<S: ArraySize> BlockSizeUser for Masked<'_, S> {
    type BlockSize = S;
}

impl<S: ArraySize> BlockCipherEncClosure for Masked<'_, S> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = S>>(self, cipher: &B) {
        self.pass(
            |blocks| cipher.encrypt_par_blocks_inplace(blocks),
            |blocks| cipher.encrypt_tail_blocks_inplace(blocks),
        );
    }
}

impl<S: ArraySize> BlockCipherDecClosure for Masked<'_, S> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = S>>(self, cipher: &B) {
        self.pass(
            |blocks| cipher.decrypt_par_blocks_inplace(blocks),
            |blocks| cipher.decrypt_tail_blocks_inplace(blocks),
        );
    }
}
