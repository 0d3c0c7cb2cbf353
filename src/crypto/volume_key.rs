//! The key of a disk.

use std::fmt;

use crate::runtime::locked::LockedBytes;

/// The key that the disk is encrypted with; wiped when dropped.
#[derive(Clone)]
pub struct VolumeKey(LockedBytes);

impl VolumeKey {
    pub(super) fn new(key: &[u8]) -> Self {
        Self(LockedBytes::copy_of(key))
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
