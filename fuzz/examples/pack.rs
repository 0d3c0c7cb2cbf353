//! Packs image files for the fuzzer: `pack IN OUT` makes the recipe for one;
//! `pack --compare IN RECIPE` says whether a recipe is for such an image. Of
//! the dates of snapshots, which are never the same, it takes no note.

use std::ffi::OsString;
use std::process::ExitCode;

use qcow2_ublk::qcow2::spec::Header;
use qcow2_ublk::qcow2::spec::header::Prefix;
use qcow2_ublk::qcow2::spec::snapshot::entry_len;
use qcow2_ublk_fuzz::input::Input;
use qcow2_ublk_fuzz::recipe;

/// Where seconds and nanoseconds are in a snapshot's entry.
const DATE: std::ops::Range<usize> = 16..24;

fn main() -> ExitCode {
    let mut names = std::env::args_os().skip(1).peekable();
    let compare = names.next_if(|name| name == "--compare").is_some();
    let mut differ = 0;
    while let (Some(image), Some(recipe)) = (names.next(), names.next()) {
        if compare {
            differ += u32::from(!is_for(&image, &recipe));
        } else {
            pack(&image, &recipe);
        }
    }
    ExitCode::from(u8::from(differ > 0))
}

fn pack(from: &OsString, to: &OsString) {
    let bytes = std::fs::read(from).expect("an image");
    let packed = recipe::pack(&bytes);
    // What it makes is what it was made from.
    assert_eq!(unpacked(&packed), bytes);
    std::fs::write(to, packed).expect("a place for the recipe");
}

fn unpacked(recipe: &[u8]) -> Vec<u8> {
    let image = recipe::image(&mut Input(recipe));
    image.bytes(0, image.len())
}

fn is_for(image: &OsString, recipe: &OsString) -> bool {
    let mut new = std::fs::read(image).expect("an image");
    let mut kept = unpacked(&std::fs::read(recipe).expect("a recipe"));
    forget_dates(&mut new);
    forget_dates(&mut kept);
    let at = new.iter().zip(&kept).take_while(|(a, b)| a == b).count();
    let same = at == new.len() && at == kept.len();
    if !same {
        eprintln!("{}: not the same from byte {at:#x} on", recipe.display());
    }
    same
}

fn forget_dates(file: &mut [u8]) {
    let prefix = Prefix::parse(file).expect("an image");
    let cluster0 = &file[..prefix.cluster_size().min(file.len())];
    let header = Header::parse(cluster0, file.len() as u64).expect("an image");
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots {
        let entry = &mut file[at.0 as usize..];
        entry[DATE].fill(0);
        at += entry_len(entry, at).expect("a snapshot") as u64;
    }
}
