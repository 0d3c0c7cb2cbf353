//! The key of a disk.

use std::fmt;

use zeroize::Zeroizing;

/// The key that the disk is encrypted with; wiped when dropped.
#[derive(Clone)]
pub struct VolumeKey(Zeroizing<Vec<u8>>);

impl VolumeKey {
    pub(super) fn new(key: Zeroizing<Vec<u8>>) -> Self {
        Self(key)
    }

    pub(super) fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bits)", self.0.len() * 8)
    }
}
