//! `compare`, `commit` and `rebase` through layers of every kind.

use std::fs;

use super::{Lab, assert_same, disk};

const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=1";
/// Keys for every name that ends in `.a`, and for the others.
const KEYS: [&str; 8] = [
    "--key-file",
    "a",
    "--key-file",
    "base.b=b",
    "--key-file",
    "new.b=b",
    "--key-file",
    "one.b=b",
];

/// Makes an image of a raw file, as its name says, over another image.
fn make(lab: &Lab, name: &str, from: &str, over: Option<(&str, &str)>) {
    let mut options = String::new();
    if name.ends_with(".a") || name.ends_with(".b") {
        options = LUKS.to_owned();
    } else if name.starts_with("data") {
        options = format!("data_file={}", lab.file(&format!("{name}.file")));
        if name.ends_with("raw") {
            options += ",data_file_raw=on";
        }
    }
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", &options]);
    }
    if let Some((below, format)) = over {
        args.extend(["-B", below, "-F", format]);
    }
    lab.good(&[&args[..], &KEYS, &[from, name]].concat());
}

#[test]
fn comparisons_say_what_qemu_says() {
    let lab = Lab::new();
    let bytes = disk((2 << 20) + 512, 1);
    fs::write(lab.path("in.raw"), &bytes).unwrap();
    let names = ["plain", "one.a", "one.b", "data", "in.raw"];
    for name in &names[..4] {
        make(&lab, name, "in.raw", None);
    }
    let compare = |x: &str, y: &str, strict: &[&str]| {
        let format = |name: &str| match name.ends_with(".raw") {
            true => "raw",
            false => "qcow2",
        };
        let ours = ["compare", "-f", format(x), "-F", format(y)];
        let ours = lab.only_out(super::PROGRAM, &[&ours, strict, &KEYS, &[x, y]].concat());
        let (a, b) = (Lab::opts(&[x]), Lab::opts(&[y]));
        let theirs = [&["compare"], strict, &["--image-opts", &a, &b]].concat();
        let theirs = lab.only_out("qemu-img", &theirs);
        assert_eq!(ours, theirs, "{x} {y} {strict:?}");
        ours
    };
    for (n, x) in names.iter().enumerate() {
        for y in &names[n..] {
            if x == y {
                continue; // locked by itself with QEMU
            }
            assert_eq!(compare(x, y, &[]).0, Some(0), "{x} {y}");
            // See `strict_comparisons_are_of_what_is_stored_not_of_its_order`.
            if (*x, *y) != ("data", "in.raw") {
                compare(x, y, &["-s"]);
            }
        }
    }
    // Encrypted zeros that take space are data all the same.
    lab.good(&[&["io"], &KEYS[..], &["one.a", "-c", "write -P 0 0 64k"]].concat());
    lab.good(&[&["io"], &KEYS[..], &["one.b", "-c", "write -P 9 1M 512"]].concat());
    for strict in [&[][..], &["-s"]] {
        compare("one.a", "plain", strict);
        assert_eq!(compare("one.b", "plain", strict).0, Some(1));
    }
}

/// For QEMU the flag that a part is the last one of its disk belongs to the
/// status: two disks differ where one of them has its last part in one piece
/// and the other has not, although both store the same. Here that makes no
/// difference, and the first offset is the first where something does.
#[test]
fn strict_comparisons_are_of_what_is_stored_not_of_its_order() {
    let lab = Lab::new();
    let full = crate::common::half_random(4 << 20, 3);
    let mut holed = full.clone();
    holed[1 << 20..2 << 20].fill(0);
    fs::write(lab.path("full.raw"), &full).unwrap();
    fs::write(lab.path("holed.raw"), &holed).unwrap();
    for (part, range) in [("low", 0..1 << 20), ("high", 2 << 20..4 << 20)] {
        fs::write(lab.path(part), &full[range]).unwrap();
    }
    let data = |name: &str| format!("data_file={}", lab.file(&format!("{name}.file")));
    for (name, options) in [
        ("ordered", String::new()),
        ("swapped", String::new()),
        ("holed", String::new()),
        ("data", data("data")),
        ("holed.data", data("holed.data")),
    ] {
        let (raw, commands): (&str, &[&str]) = match name {
            "ordered" | "data" => ("full.raw", &["write -s full.raw 0 4M"]),
            "swapped" => (
                "full.raw",
                &["write -s high 2M 2M", "write -s full.raw 0 2M"],
            ),
            _ => ("holed.raw", &["write -s low 0 1M", "write -s high 2M 2M"]),
        };
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            create.extend(["-o", &options]);
        }
        lab.qemu_img(&[&create[..], &[name, "4M"]].concat());
        for command in commands {
            lab.good(&["io", "-c", command, name]);
        }
        let args = ["compare", "-s", "-f", "qcow2", "-F", "raw", name, raw];
        let (code, text) = lab.only_out(super::PROGRAM, &args);
        let (theirs, their_text) = lab.only_out("qemu-img", &args);
        match name {
            "ordered" | "data" => {
                assert_eq!((code, &text), (theirs, &their_text), "{name}");
                assert_eq!(text, "Images are identical.\n");
            }
            "swapped" => {
                assert_eq!((code, &text[..]), (Some(0), "Images are identical.\n"));
                assert_eq!(theirs, Some(1), "as QEMU 10.0");
                assert!(their_text.contains("Offset 0 "), "{their_text}");
            }
            _ => {
                let at = "Strict mode: Offset 1048576 block status mismatch!\n";
                assert_eq!((code, &text[..]), (Some(1), at), "{name}");
                assert_eq!(theirs, Some(1));
                assert!(their_text.contains("Offset 0 "), "{their_text}");
            }
        }
    }
}

/// The base gets what the overlay has, whatever either is, and the overlay is
/// emptied: as with qemu-img where it can (with keys for two layers it
/// cannot), and by the content in any case.
#[test]
fn overlays_of_every_kind_are_committed() {
    let lab = Lab::new();
    let below = disk((2 << 20) + 512, 2);
    let mut above = below.clone();
    above[300 << 10..700 << 10].fill(5);
    above[1 << 20..(1 << 20) + (128 << 10)].fill(0);
    above[(1 << 20) + (500 << 10)..][..512].fill(6);
    fs::write(lab.path("below.raw"), &below).unwrap();
    fs::write(lab.path("above.raw"), &above).unwrap();
    for (base, top) in [
        ("base.b", "top.a"),
        ("base.b", "top"),
        ("base", "top.a"),
        ("data.base", "top"),
        ("data.base.is.raw", "data.top"),
        ("base.b", "data.top"),
        ("data.base", "top.a"),
    ] {
        let what = format!("{top} into {base}");
        // Not by its ending alone: that is for plain raw files.
        let base = &*base.replace(".is.raw", "-raw");
        make(&lab, base, "below.raw", None);
        make(&lab, top, "above.raw", Some((base, "qcow2")));
        assert_same(&lab.content(&[top, base]), &above, &what);
        lab.good(&[&["commit"], &KEYS[..], &[top]].concat());
        lab.check(base);
        assert_same(&lab.content(&[base]), &above, &what);
        assert_same(&lab.content(&[top, base]), &above, &what);
        lab.check_over(top, &[base]);
        let opts = Lab::opts(&[top, base]);
        let map = lab.qemu_img(&["map", "--output=json", "--image-opts", &opts]);
        assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
        if base.ends_with("-raw") {
            assert_same(&lab.read(&format!("{base}.file")), &above, &what);
        }
        if top.starts_with("data") {
            // Nothing of it is mapped any more: the space goes back.
            use std::os::unix::fs::MetadataExt;
            let file = fs::metadata(lab.path(&format!("{top}.file"))).unwrap();
            assert!(file.blocks() * 512 <= 64 << 10, "{what}: {}", file.blocks());
        }
    }
    make(&lab, "base.b", "below.raw", None);
    make(&lab, "top.a", "above.raw", Some(("base.b", "qcow2")));
    lab.refused(&["commit", "--key-file", "a", "top.a"], "opens no key slot");
    lab.refused(&["commit", "top.a"], "--key-file");
}

#[test]
fn images_of_every_kind_are_rebased() {
    let lab = Lab::new();
    let below = disk((2 << 20) + 512, 3);
    let mut above = below.clone();
    above[300 << 10..700 << 10].fill(5);
    let mut other = below.clone();
    other[1 << 20..(1 << 20) + (200 << 10)].fill(7);
    for (name, bytes) in [("below", &below), ("above", &above), ("other", &other)] {
        fs::write(lab.path(&format!("{name}.raw")), bytes).unwrap();
    }
    for (base, top, new) in [
        ("base.b", "top.a", "new"),
        ("base", "top.a", "new.b"),
        ("base.b", "data.top", "new.b"),
        ("base", "top", "data.new"),
    ] {
        let what = format!("{top} from {base} to {new}");
        make(&lab, base, "below.raw", None);
        make(&lab, new, "other.raw", None);
        make(&lab, top, "above.raw", Some((base, "qcow2")));
        let rebase = |to: &[&str]| {
            lab.good(&[&["rebase"], &KEYS[..], to, &[top]].concat());
        };
        rebase(&["-b", new, "-F", "qcow2"]);
        assert_same(&lab.content(&[top, new]), &above, &what);
        lab.check_over(top, &[new]);
        rebase(&["-b", ""]);
        assert_same(&lab.content(&[top]), &above, &format!("{what}, to none"));
        lab.check(top);
    }
}
