//! Raw deflate streams.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::Damage;

/// log2 of the window of the streams that are written. Readers may have no
/// more: QEMU opens streams with 12 bits.
const WINDOW_BITS: u8 = 12;

thread_local! {
    // Read with the largest window (15 bits): other writers' streams need it.
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    // With the level it was made for; a run of compressions uses one level.
    static DEFLATE: RefCell<Option<(u32, Compress)>> = const { RefCell::new(None) };
}

pub(super) fn decompress(input: &[u8], output: &mut [u8]) -> Result<(), Damage> {
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(false);
        let status = inflate
            .decompress(input, output, FlushDecompress::Finish)
            .map_err(|_| Damage::Invalid)?;
        // A full output is all that is asked for, whether or not the stream's
        // end was seen.
        match status {
            _ if inflate.total_out() == output.len() as u64 => Ok(()),
            Status::StreamEnd | Status::Ok | Status::BufError => Err(Damage::Short),
        }
    })
}

pub(super) fn compress(level: i32, input: &[u8], output: &mut [u8]) -> Option<usize> {
    // In range after the clamp.
    let level = level.clamp(1, 9) as u32;
    DEFLATE.with_borrow_mut(|state| {
        let reusable = state.take().filter(|(of_level, _)| *of_level == level);
        let (_, deflate) = state.insert(reusable.unwrap_or_else(|| {
            let level_arg = Compression::new(level);
            (
                level,
                Compress::new_with_window_bits(level_arg, false, WINDOW_BITS),
            )
        }));
        deflate.reset();
        let done = deflate.compress(input, output, FlushCompress::Finish);
        if !matches!(done, Ok(Status::StreamEnd)) {
            // The output was too short. What is left over inside is not
            // forgotten by a reset (zlib-rs 0.6.8 keeps its place in the
            // buffer and panics when that is full): not to be used again.
            *state = None;
            return None;
        }
        usize::try_from(deflate.total_out()).ok()
    })
}
