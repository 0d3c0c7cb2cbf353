//! The key derivations of LUKS2: PBKDF2 and Argon2.

use std::time::Instant;

use argon2::{Algorithm, Params, Version};
use zeroize::Zeroizing;

use super::json::{Argon2, Base64, Kdf};
use super::{damaged, hash_named};
use crate::crypto::kdf::{Effort, check_iterations, check_memory};
use crate::crypto::secret::{Limits, random};
use crate::error::Result;

/// Passes over the memory, for new passphrases: the least that cryptsetup
/// takes. More work means more memory.
const PASSES: u32 = 4;
/// KiB of memory, for new passphrases.
const LEAST_MEMORY: u32 = 32;
const MOST_MEMORY: u32 = 256 << 10;

/// Derives a key of `len` bytes.
pub(super) fn derive(
    kdf: &Kdf,
    passphrase: &[u8],
    len: usize,
    limits: &Limits,
) -> Result<Zeroizing<Vec<u8>>> {
    let mut key = Zeroizing::new(vec![0; len]);
    match kdf {
        Kdf::Pbkdf2 {
            salt,
            hash,
            iterations,
        } => {
            check_iterations((*iterations).into(), limits)?;
            if *iterations == 0 {
                return Err(damaged("a key slot has no iterations"));
            }
            hash_named(hash)?.pbkdf2(passphrase, &salt.0, *iterations, &mut key);
        }
        Kdf::Argon2i(cost) => argon2(Algorithm::Argon2i, cost, passphrase, &mut key, limits)?,
        Kdf::Argon2id(cost) => argon2(Algorithm::Argon2id, cost, passphrase, &mut key, limits)?,
    }
    Ok(key)
}

/// What a derivation costs, as [`Limits`] count it.
pub(super) fn cost(kdf: &Kdf) -> u64 {
    match kdf {
        Kdf::Pbkdf2 { iterations, .. } => (*iterations).into(),
        Kdf::Argon2i(cost) | Kdf::Argon2id(cost) => u64::from(cost.time) * u64::from(cost.memory),
    }
}

fn argon2(
    algorithm: Algorithm,
    cost: &Argon2,
    passphrase: &[u8],
    key: &mut [u8],
    limits: &Limits,
) -> Result<()> {
    check_memory(u64::from(cost.memory) << 10, limits)?;
    check_iterations(u64::from(cost.time) * u64::from(cost.memory), limits)?;
    let wrong = |error| damaged(format!("a key slot has no sense: {error}"));
    let params = Params::new(cost.memory, cost.time, cost.cpus, Some(key.len())).map_err(wrong)?;
    argon2::Argon2::new(algorithm, Version::V0x13, params)
        .hash_password_into(passphrase, &cost.salt.0, key)
        .map_err(wrong)
}

/// Argon2id as hard as `effort` wants it, for a key of `len` bytes.
pub(super) fn calibrated(effort: Effort, len: usize) -> Result<Kdf> {
    let salt = Base64(random(32)?.to_vec());
    let mut cost = Argon2 {
        salt,
        time: PASSES,
        memory: LEAST_MEMORY,
        cpus: 1,
    };
    if effort.0.is_zero() {
        return Ok(Kdf::Argon2id(cost));
    }
    cost.memory = 1 << 10;
    let mut key = Zeroizing::new(vec![0; len]);
    let limits = Limits::default();
    let begun = Instant::now();
    argon2(Algorithm::Argon2id, &cost, b"passphrase", &mut key, &limits)?;
    let took = begun.elapsed().as_secs_f64().max(1e-6);
    let factor = effort.0.as_secs_f64() / took;
    // A float that is too large becomes the largest number.
    cost.memory = ((f64::from(cost.memory) * factor) as u32).clamp(LEAST_MEMORY, MOST_MEMORY);
    Ok(Kdf::Argon2id(cost))
}

/// For people.
pub(super) fn describe(kdf: &Kdf) -> String {
    let argon = |name: &str, cost: &Argon2| {
        format!("{name}, {} passes over {} KiB", cost.time, cost.memory)
    };
    match kdf {
        Kdf::Pbkdf2 {
            hash, iterations, ..
        } => format!("pbkdf2-{hash}, {iterations} iterations"),
        Kdf::Argon2i(cost) => argon("argon2i", cost),
        Kdf::Argon2id(cost) => argon("argon2id", cost),
    }
}
