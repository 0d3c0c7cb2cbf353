//! Images as the fuzzer writes them: a base and changes to it, so that a
//! change of one byte of the input is a change that means something.
//!
//! An input that begins as a qcow2 file does is the file. Otherwise its first
//! byte is the number of a base (0: an empty file), and steps follow.

use std::sync::OnceLock;

use qcow2_ublk::storage::sim::Image;

use super::bases::BASES;
use super::input::Input;
use super::places::{Place, places};

/// Longest file of a recipe, in bytes: with holes, that is. The format has 56
/// bits for offsets.
const MAX_LEN: u64 = 1 << 56;
/// Bytes of data that one recipe may make: more would only take longer.
const MAX_DATA: u64 = 2 << 20;

/// What a step does; the codes are for ever.
pub mod step {
    pub const END: u8 = 0;
    pub const PUT: u8 = 1;
    pub const PUT_LONG: u8 = 2;
    pub const FILL: u8 = 3;
    pub const LENGTH: u8 = 4;
    pub const WORD: u8 = 5;
    pub const COPY: u8 = 6;
    pub const PUT_IN_PLACE: u8 = 7;
    pub const COUNT: u8 = 8;
}

/// A base image and where its metadata is.
#[derive(Clone, Default)]
pub struct Base {
    pub image: Image,
    pub places: Vec<Place>,
}

/// Base number `n`, decoded once; an empty file if there is none.
pub fn base(n: usize) -> &'static Base {
    static DECODED: OnceLock<Vec<OnceLock<Base>>> = OnceLock::new();
    static EMPTY: OnceLock<Base> = OnceLock::new();
    let decoded = DECODED.get_or_init(|| BASES.iter().map(|_| OnceLock::new()).collect());
    let Some(slot) = n.checked_sub(1).and_then(|n| decoded.get(n)) else {
        return EMPTY.get_or_init(Base::default);
    };
    slot.get_or_init(|| {
        let mut input = Input(BASES[n - 1].1);
        let image = described(&mut input);
        let places = places(&image);
        assert!(!places.is_empty(), "{} is no image", BASES[n - 1].0);
        Base { image, places }
    })
}

/// The image that `input` describes. With `FUZZ_SAVE` in the environment it is
/// also stored in the file of that name, to be looked at.
pub fn image(input: &mut Input<'_>) -> Image {
    let image = described(input);
    if let Some(file) = std::env::var_os("FUZZ_SAVE") {
        image.save(file.as_ref()).expect("a file for the image");
    }
    image
}

fn described(input: &mut Input<'_>) -> Image {
    if input.0.starts_with(b"QFI\xfb") {
        let file = input.0;
        input.0 = &[];
        return Image::from_bytes(file);
    }
    let base = base(input.u8().into());
    let mut image = base.image.clone();
    let mut left = MAX_DATA;
    while !input.is_empty() {
        if !one_step(input, base, &mut image, &mut left) {
            break;
        }
    }
    image
}

fn one_step(input: &mut Input<'_>, base: &Base, image: &mut Image, left: &mut u64) -> bool {
    let mut write = |image: &mut Image, at: u64, bytes: &[u8]| {
        let len = bytes.len() as u64;
        if len <= *left && at < MAX_LEN {
            *left -= len;
            image.write(at, bytes);
        }
    };
    match input.u8() % step::COUNT {
        step::PUT => {
            let at = input.u32().into();
            let len = 1 + usize::from(input.u8());
            write(image, at, input.bytes(len));
        }
        step::PUT_LONG => {
            let at = input.u32().into();
            let len = 1 + usize::from(input.u16());
            write(image, at, input.bytes(len));
        }
        step::FILL => {
            let at = u64::from(input.u32());
            let len = u64::from(input.u32()).min(4 << 20);
            let byte = input.u8();
            let (piece, end) = ([byte; 4096], at + len);
            for at in (at..end).step_by(piece.len()) {
                let rest = (end - at).min(piece.len() as u64);
                write(image, at, &piece[..rest as usize]);
            }
        }
        step::LENGTH => {
            let shift = input.u8() % 32;
            image.set_len((u64::from(input.u32()) << shift).min(MAX_LEN));
        }
        step::WORD => {
            let at = word_place(input, base);
            let old = be64(image, at);
            let new = changed_word(input, image, base, old);
            write(image, at, &new.to_be_bytes());
        }
        step::COPY => {
            let from = word_place(input, base);
            let to = word_place(input, base);
            let word = be64(image, from);
            write(image, to, &word.to_be_bytes());
        }
        step::PUT_IN_PLACE => {
            let place = place(input, base);
            let at = place.offset + u64::from(input.u16()) % place.len.max(1);
            let len = 1 + usize::from(input.u8());
            write(image, at, input.bytes(len));
        }
        _ => return false,
    }
    true
}

fn place(input: &mut Input<'_>, base: &Base) -> Place {
    let n = usize::from(input.u8());
    let count = base.places.len().max(1);
    base.places.get(n % count).copied().unwrap_or_default()
}

/// Where a word of a table of the base is.
fn word_place(input: &mut Input<'_>, base: &Base) -> u64 {
    let place = place(input, base);
    place.offset + u64::from(input.u16()) % (place.len / 8).max(1) * 8
}

fn be64(image: &Image, at: u64) -> u64 {
    u64::from_be_bytes(image.bytes(at, 8).try_into().expect("8 bytes"))
}

/// An entry made out of another, in one of the ways that matter.
fn changed_word(input: &mut Input<'_>, image: &Image, base: &Base, old: u64) -> u64 {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let bits = image.bytes(20, 4)[3].clamp(9, 21);
    let cluster = 1 << bits;
    match input.u8() % 10 {
        0 => 0,
        1 => old ^ 1 << (input.u8() % 64),
        2 => old & !OFFSET | u64::from(input.u16()) << bits,
        3 => 1 << 63 | u64::from(input.u16()) << bits,
        4 => input.u64(),
        5 => old.wrapping_add(cluster),
        6 => old ^ u64::from(input.u8() & 7) << 61,
        // A compressed cluster: number of sectors, offset.
        7 => {
            let (sectors, at) = (u64::from(input.u8()), input.u32());
            1 << 62 | ((sectors << (70 - u32::from(bits))) & ((1 << 62) - 1)) | u64::from(at)
        }
        // The place of another piece of metadata.
        8 => old & !OFFSET | place(input, base).offset,
        _ => u64::from(input.u8()),
    }
}

/// A recipe, from nothing, for the file `bytes`: what is not zeros.
pub fn pack(bytes: &[u8]) -> Vec<u8> {
    let mut recipe = vec![0];
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|&b| b != 0) {
        let start = at + start;
        let same = bytes[start..]
            .iter()
            .take(4 << 20)
            .take_while(|&&b| b == bytes[start])
            .count();
        let end = if same >= 16 {
            recipe.push(step::FILL);
            recipe.extend((start as u32).to_le_bytes());
            recipe.extend((same as u32).to_le_bytes());
            recipe.push(bytes[start]);
            start + same
        } else {
            // Up to what is better said otherwise.
            let len = (1..65536.min(bytes.len() - start))
                .find(|&n| {
                    let rest = &bytes[start + n..];
                    rest.len() >= 16 && rest[..16].iter().all(|&b| b == rest[0])
                })
                .unwrap_or_else(|| 65536.min(bytes.len() - start));
            let end = start + len;
            if len <= 256 {
                recipe.push(step::PUT);
                recipe.extend((start as u32).to_le_bytes());
                recipe.push((len - 1) as u8);
            } else {
                recipe.push(step::PUT_LONG);
                recipe.extend((start as u32).to_le_bytes());
                recipe.extend(((len - 1) as u16).to_le_bytes());
            }
            recipe.extend(&bytes[start..end]);
            end
        };
        at = end;
    }
    recipe.extend([step::LENGTH, 0]);
    recipe.extend((bytes.len() as u32).to_le_bytes());
    recipe
}
