//! The anti-forensic splitter of LUKS: a key spread over stripes, all of which
//! are needed to get it back, so that wiping any part of them wipes it.

use zeroize::Zeroizing;

use super::hash::Hash;

/// Stripes that LUKS uses, always.
pub(super) const STRIPES: u32 = 4000;

/// Spreads `key` over `stripes`. `random` has as many bytes as all stripes
/// and becomes the result.
pub(super) fn split(key: &[u8], hash: Hash, mut random: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    let len = key.len();
    let last = random.len() - len;
    let mut block = Zeroizing::new(vec![0; len]);
    for stripe in random[..last].chunks_exact(len) {
        xor(&mut block, stripe);
        diffuse(&mut block, hash);
    }
    for (byte, (key, block)) in random[last..].iter_mut().zip(key.iter().zip(block.iter())) {
        *byte = key ^ block;
    }
    random
}

/// The key of `len` bytes that was spread over `material`.
pub(super) fn merge(material: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let last = material.len() - len;
    let mut block = Zeroizing::new(vec![0; len]);
    for stripe in material[..last].chunks_exact(len) {
        xor(&mut block, stripe);
        diffuse(&mut block, hash);
    }
    xor(&mut block, &material[last..]);
    block
}

fn xor(block: &mut [u8], other: &[u8]) {
    for (byte, other) in block.iter_mut().zip(other) {
        *byte ^= other;
    }
}

/// Makes every bit of a piece as long as a digest depend on all of that piece.
fn diffuse(block: &mut [u8], hash: Hash) {
    for (index, piece) in block.chunks_mut(hash.digest_len()).enumerate() {
        let digest = hash.digest(&[&(index as u32).to_be_bytes(), piece]);
        let len = piece.len();
        piece.copy_from_slice(&digest[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_merges_again() {
        for hash in Hash::ALL {
            for len in [16, 24, 32, 48, 64] {
                let key: Vec<u8> = (0..len as u8).map(|i| i.wrapping_mul(37)).collect();
                let random = (0..len * 50).map(|i| (i * i % 251) as u8).collect();
                let mut material = split(&key, hash, Zeroizing::new(random));
                assert_eq!(*merge(&material, len, hash), key);
                material[3] ^= 1;
                assert_ne!(*merge(&material, len, hash), key);
            }
        }
    }
}
