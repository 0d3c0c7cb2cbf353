//! Writes whose data is nothing but zeros, where they are to be noticed.

use super::Engine;
use crate::block::Payload;
use crate::error::Result;
use crate::runtime::Buf;

/// What becomes of a write of zeros (QEMU's `detect-zeroes`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// It is written as it is: nobody looks.
    #[default]
    Off,
    /// The range is made to read as zeros, and keeps the space it has.
    On,
    /// Besides, its space is given up, where discards do that too.
    Unmap,
}

/// The first bytes looked at: most data differs from zeros there.
const FIRST: u64 = 4 << 10;
/// Those after them, at a time.
const STEP: u64 = 64 << 10;

impl Engine {
    /// Whether such a write is to be turned into zeros, and with unmapping.
    /// The data may be in pages of the kernel's, so that it is copied to be
    /// looked at.
    pub(super) fn zeros_found(&self, payload: &Payload) -> Result<Option<bool>> {
        let unmap = match self.options.detect_zeroes {
            DetectZeroes::Off => return Ok(None),
            DetectZeroes::On => false,
            DetectZeroes::Unmap => self.options.discard,
        };
        let len = payload.len();
        if payload.is_zeros() {
            return Ok(Some(unmap));
        }
        let mut bytes = Buf::take(len.min(STEP) as usize);
        let mut done = 0;
        while done < len {
            let step = if done == 0 { FIRST } else { STEP }.min(len - done);
            let bytes = &mut bytes[..step as usize];
            payload
                .slice(done, step)
                .copy_to(bytes)
                .map_err(|e| self.payload_error(e))?;
            if !super::is_zero(bytes) {
                return Ok(None);
            }
            done += step;
        }
        Ok(Some(unmap))
    }
}
