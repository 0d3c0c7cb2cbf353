use super::*;
use cipher::KeyInit;
use proptest::prelude::*;
use xts_mode::{Xts128, get_tweak_default};

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
        .collect()
}

fn spec(cipher: &str, mode: &str) -> CipherSpec {
    CipherSpec::parse(cipher, mode).unwrap()
}

fn oracle<C>(key: &[u8], first: u64, data: &mut [u8])
where
    C: KeyInit + cipher::BlockCipherEncrypt + cipher::BlockCipherDecrypt,
    C: cipher::BlockSizeUser<BlockSize = cipher::consts::U16>,
{
    let (a, b) = key.split_at(key.len() / 2);
    let xts = Xts128::new(C::new_from_slice(a).unwrap(), C::new_from_slice(b).unwrap());
    xts.encrypt_area(data, 512, first.into(), get_tweak_default);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Against an implementation that is not ours.
    #[test]
    fn xts_is_xts(sectors in 1..40_usize, first in any::<u64>(), seed in any::<u8>(), size in 0..3_usize) {
        let first = first >> 12;
        let key = bytes([32, 48, 64][size], seed);
        let plain = bytes(sectors * 512, seed ^ 0x55);
        let mut expected = plain.clone();
        match size {
            0 => oracle::<aes::Aes128>(&key, first, &mut expected),
            1 => oracle::<aes::Aes192>(&key, first, &mut expected),
            _ => oracle::<aes::Aes256>(&key, first, &mut expected),
        }
        let ours = SectorCipher::new(spec("aes", "xts-plain64"), &key, 512).unwrap();
        let mut data = plain.clone();
        ours.encrypt(first * 512, &mut data);
        prop_assert_eq!(&data, &expected);
        ours.decrypt(first * 512, &mut data);
        prop_assert_eq!(data, plain);
    }

    /// Sectors do not depend on those beside them, and every cipher has its
    /// inverse.
    #[test]
    fn sectors_stand_alone(first in 0..1_u64 << 40, seed in any::<u8>(), which in 0..12_usize) {
        let (cipher, mode, key) = [
            ("aes", "xts-plain64", 32), ("aes", "cbc-essiv:sha256", 32),
            ("aes", "cbc-plain", 24), ("aes", "ecb-plain64", 16),
            ("serpent", "xts-plain64", 64), ("serpent", "cbc-plain64", 24),
            ("twofish", "xts-plain", 48), ("twofish", "cbc-essiv:md5", 16),
            ("cast5", "cbc-plain64", 16), ("cast5", "ecb", 16),
            ("cast5", "cbc-essiv:md5", 16), ("aes", "xts-essiv:sha256", 64),
        ][which];
        for size in [512, 4096] {
            let key = bytes(key, seed);
            let ours = SectorCipher::new(spec(cipher, mode), &key, size).unwrap();
            let plain = bytes(size as usize * 11, seed);
            let mut whole = plain.clone();
            ours.encrypt(first * 512, &mut whole);
            prop_assert_ne!(&whole, &plain);
            let mut parts = plain.clone();
            for (nth, part) in parts.chunks_mut(size as usize).enumerate() {
                ours.encrypt(first * 512 + nth as u64 * u64::from(size), part);
            }
            prop_assert_eq!(&whole, &parts);
            ours.decrypt(first * 512, &mut whole);
            prop_assert_eq!(&whole, &plain);
        }
    }
}

#[test]
fn what_is_unknown_is_refused_by_name() {
    for (cipher, mode) in [
        ("camellia", "xts-plain64"),
        ("aes", "ctr-plain64"),
        ("aes", "xts-benbi"),
        ("aes", "cbc-essiv:whirlpool"),
        ("aes", "cbc-essiv"),
    ] {
        let error = CipherSpec::parse(cipher, mode).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(cipher), "{error}");
        assert!(error.to_string().contains(mode), "{error}");
    }
    let cast = SectorCipher::new(spec("cast5", "xts-plain64"), &[0; 32], 512);
    assert!(cast.unwrap_err().to_string().contains("cast5-xts"));
    let short = SectorCipher::new(spec("aes", "xts-plain64"), &[0; 40], 512);
    assert_eq!(short.unwrap_err().kind(), ErrorKind::Unsupported);
    let salt = SectorCipher::new(spec("aes", "cbc-essiv:sha1"), &[0; 32], 512);
    assert!(salt.unwrap_err().to_string().contains("160 bits"));
}
