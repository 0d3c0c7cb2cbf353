//! How much work a passphrase is made to cost.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::hash::Hash;
use super::secret::Limits;
use crate::error::{Error, ErrorKind, Result};

/// The least iterations of PBKDF2 that LUKS allows.
pub(super) const MIN_ITERATIONS: u32 = 1000;
/// How long is measured at least.
const MEASURED: Duration = Duration::from_millis(20);

/// How long deriving a key from a new passphrase should take; zero is for the
/// least work that the format allows, and measures nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort(pub Duration);

impl Default for Effort {
    /// Two seconds, as QEMU and cryptsetup have it.
    fn default() -> Self {
        Self(Duration::from_millis(2000))
    }
}

impl Effort {
    /// Iterations of PBKDF2 that take so long on this machine, for a key of
    /// `len` bytes.
    pub(super) fn iterations(self, hash: Hash, len: usize) -> u32 {
        if self.0.is_zero() {
            return MIN_ITERATIONS;
        }
        let mut key = vec![0; len];
        let mut measured = MIN_ITERATIONS;
        loop {
            let begun = Instant::now();
            hash.pbkdf2(b"passphrase", &[0x5a; 32], measured, black_box(&mut key));
            let took = begun.elapsed();
            if took >= MEASURED || took >= self.0 {
                let wanted = f64::from(measured) * (self.0.as_secs_f64() / took.as_secs_f64());
                // A float that is too large becomes the largest number.
                return (wanted as u32).clamp(MIN_ITERATIONS, Limits::default().iterations as u32);
            }
            measured = measured.saturating_mul(4);
        }
    }
}

/// Refuses what would take for ever.
pub(super) fn check_iterations(iterations: u64, limits: &Limits) -> Result<()> {
    if iterations <= limits.iterations {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Policy,
        format!(
            "deriving the key takes {iterations} iterations, and {} are allowed for all slots",
            limits.iterations
        ),
    )
    .cure("if the image is to be trusted, raise the limit with --key-iterations"))
}

/// Refuses what would take all memory.
pub(super) fn check_memory(bytes: u64, limits: &Limits) -> Result<()> {
    if bytes <= limits.memory {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Policy,
        format!(
            "deriving the key takes {bytes} bytes of memory, and the limit is {}",
            limits.memory
        ),
    )
    .cure("if the image is to be trusted, raise the limit with --key-memory"))
}
