//! zstd frames.

use std::cell::RefCell;

use zstd::zstd_safe::{self, CCtx, DCtx};

use super::Damage;

thread_local! {
    static DECOMPRESS: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    static COMPRESS: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
}

/// A cluster may be several frames. Each is decompressed in one call straight
/// into its place: the output is then its window too, so that a frame cannot
/// make us allocate the up to 2 GiB of window its header may ask for.
pub(super) fn decompress(mut input: &[u8], output: &mut [u8]) -> Result<(), Damage> {
    DECOMPRESS.with_borrow_mut(|context| {
        let mut filled = 0;
        while filled < output.len() {
            if input.is_empty() {
                return Err(Damage::Short);
            }
            // Where the frame ends, found from its block headers alone. What
            // follows it is the next frame or, once the output is full,
            // nothing of ours.
            let len = zstd_safe::find_frame_compressed_size(input).map_err(|_| Damage::Invalid)?;
            let (frame, rest) = input.split_at_checked(len).ok_or(Damage::Invalid)?;
            filled += context
                .decompress(&mut output[filled..], frame)
                .map_err(|code| {
                    if is_too_long(code) {
                        Damage::Long
                    } else {
                        Damage::Invalid
                    }
                })?;
            // A frame has a header at least, so that the input shrinks and the
            // loop ends even if frames are empty.
            input = rest;
        }
        Ok(())
    })
}

pub(super) fn compress(level: i32, input: &[u8], output: &mut [u8]) -> Option<usize> {
    let level = level.clamp(zstd_safe::min_c_level(), zstd_safe::max_c_level());
    // The one error there is: the output is too short.
    COMPRESS.with_borrow_mut(|context| context.compress(output, input, level).ok())
}

fn is_too_long(code: zstd_safe::ErrorCode) -> bool {
    use zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall;
    zstd_safe::is_error_kind(code, ZSTD_error_dstSize_tooSmall)
}
