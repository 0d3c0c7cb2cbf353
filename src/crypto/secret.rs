//! Passphrases and volume keys in memory: not swapped out, not dumped, wiped
//! when dropped, never printed. Where they come from is for others to know.

use std::fmt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::runtime::locked::LockedBytes;

/// Bytes that nobody else should see.
#[derive(Clone, Default)]
pub struct Secret(LockedBytes);

impl Secret {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(LockedBytes::copy_of(&Zeroizing::new(bytes)))
    }

    /// A secret that nobody knows.
    pub fn random() -> Result<Self> {
        random(32).map(|bytes| Self(LockedBytes::copy_of(&bytes)))
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Who knows the passphrases of images.
pub trait Keyring: fmt::Debug + Send + Sync {
    /// The passphrase of the image at `path`; none if nobody has said
    /// anything about it. Asked only for images that are encrypted.
    fn passphrase(&self, path: &Path) -> Result<Option<Secret>>;

    /// What deriving a key may cost.
    fn limits(&self) -> Limits {
        Limits::default()
    }
}

/// One passphrase for whatever is encrypted.
impl Keyring for Secret {
    fn passphrase(&self, _path: &Path) -> Result<Option<Secret>> {
        Ok(Some(self.clone()))
    }
}

/// What deriving a key from a passphrase may cost: an image says how much it
/// wants, and it may be a stranger's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory (Argon2).
    pub memory: u64,
    /// Iterations (PBKDF2), or KiB of memory passed over (Argon2), for all the
    /// slots that are tried.
    pub iterations: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // What cryptsetup uses at most.
            memory: 1 << 30,
            // About a minute.
            iterations: 100_000_000,
        }
    }
}

/// Random bytes for keys and salts.
pub(super) fn random(len: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; len]);
    getrandom::fill(&mut bytes).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        Error::io(
            "get random bytes from the system",
            std::io::Error::from_raw_os_error(errno),
        )
    })?;
    Ok(bytes)
}

/// A random UUID (version 4) as text.
pub(super) fn random_uuid() -> Result<String> {
    let mut bytes = random(16)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    Ok(text)
}

/// True when both are the same; how long it takes does not tell where they
/// differ.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}
