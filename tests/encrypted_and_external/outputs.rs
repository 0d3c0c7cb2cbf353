//! `convert` to images with a data file or encryption, and `measure` of them.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Lab, assert_same, disk};
use crate::common::Reader;
use qcow2_ublk::{Disk, chain};

const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=1";

/// The data goes into the data file, in its place; what such a file held
/// before is lost only when the copy is whole.
#[test]
fn data_files_are_written() {
    let lab = Lab::new();
    let bytes = disk((3 << 20) + 1536, 1);
    fs::write(lab.path("in.raw"), &bytes).unwrap();
    let to = format!("data_file={}", lab.file("data"));
    for more in [
        "",
        ",data_file_raw=on",
        ",cluster_size=4k",
        ",extended_l2=on,data_file_raw=on",
        ",preallocation=metadata",
        ",data_file_raw=on,preallocation=falloc",
    ] {
        for how in [&["-m", "1"][..], &["-W", "-S", "0"]] {
            let options = format!("{to}{more}");
            let what = format!("{more} {how:?}");
            // Longer than the disk, and full of something else.
            fs::write(lab.path("data"), vec![0xdd; 5 << 20]).unwrap();
            let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            lab.good(&[&convert, how, &["in.raw", "out"]].concat());
            lab.check("out");
            assert_same(&lab.content(&["out"]), &bytes, &what);
            let reader = Reader::open(&lab.path("out"));
            let raw = more.contains("raw");
            assert_eq!(reader.header.data_file_is_raw(), raw);
            let recorded = reader.header.data_file().unwrap().to_str();
            assert_eq!(recorded, Some(lab.file("data").as_str()));
            let data = lab.read("data");
            if raw {
                assert_same(&data, &bytes, &what);
            }
            // As theirs: no longer than the disk, and with no more in it.
            let theirs = options.replace("/data", "/theirs.data");
            lab.qemu_img(&[
                "convert", "-f", "raw", "-O", "qcow2", "-o", &theirs, "in.raw", "theirs",
            ]);
            assert!(data.len() <= lab.read("theirs.data").len(), "{what}");
            let blocks = |name: &str| fs::metadata(lab.path(name)).unwrap().blocks();
            if how[0] != "-W" && !more.contains("falloc") {
                assert!(blocks("data") <= blocks("theirs.data") + 256, "{what}");
            }
            // Back, from the data file.
            lab.good(&["convert", "-O", "raw", "out", "back.raw"]);
            assert_same(&lab.read("back.raw"), &bytes, &what);
        }
    }
    assert!(lab.listing().iter().all(|(name, _)| !name.starts_with('.')));

    // Names are relative to the image, which is under another while it grows.
    lab.good(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "data_file=near",
        "in.raw",
        "out",
    ]);
    assert_same(&lab.content(&["out"]), &bytes, "a relative name");
    // Over a backing file, only what differs.
    let mut other = bytes.clone();
    other[1 << 20..(1 << 20) + 512].fill(3);
    other[2 << 20..(2 << 20) + (200 << 10)].fill(0);
    fs::write(lab.path("other.raw"), &other).unwrap();
    let over = ["-B", "in.raw", "-F", "raw"];
    let options = ["convert", "-f", "raw", "-O", "qcow2", "-o", &to];
    lab.good(&[&options[..], &over, &["other.raw", "out"]].concat());
    lab.check("out");
    assert_same(&lab.content(&["out"]), &other, "over a backing file");
    let stored = fs::metadata(lab.path("data")).unwrap().blocks() * 512;
    assert!(stored <= 64 << 10, "{stored} bytes");
    // Over what is there.
    lab.good(&["convert", "-n", "-f", "raw", "-O", "qcow2", "in.raw", "out"]);
    lab.check("out");
    assert_same(&lab.content(&["out"]), &bytes, "written over");
}

/// A data file is an output like the image: never a file that is read, nor
/// one that somebody uses, and whole or as it was.
#[test]
fn a_data_file_is_not_lost_for_nothing() {
    let lab = Lab::new();
    fs::write(lab.path("in.raw"), disk(1 << 20, 2)).unwrap();
    let create = |data: &str, image: &str| {
        let data = format!("data_file={}", lab.file(data));
        lab.good(&["create", "-o", &data, image, "1M"]);
    };
    create("in.data", "in");
    create("old.data", "old");
    let convert = |data: &str, more: &[&str]| {
        let data = format!("data_file={data}");
        let start = ["convert", "-O", "qcow2", "-o", &data];
        [&start[..], more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for (args, says) in [
        (
            convert("in.raw", &["-f", "raw", "in.raw", "out"]),
            "file of the input",
        ),
        (convert("in.data", &["in", "out"]), "file of the input"),
        (
            convert("in.data", &["-U", "in", "out"]),
            "file of the input",
        ),
        (convert("out", &["in", "out"]), "its own data file"),
        (convert("old", &["in", "old"]), "its own data file"),
        (
            convert("old.data", &["-B", "old.data", "-F", "raw", "in", "out"]),
            "old.data",
        ),
        (convert("nbd://x", &["in", "out"]), "protocol"),
        (convert("x", &["-c", "in", "out"]), "data file"),
        (convert("no/such/x", &["in", "out"]), "No such file"),
        (
            convert("x,compat=0.10", &["in", "out"]),
            "External data files are only supported with",
        ),
        (
            vec!["convert".into(), "in".into(), "in.data".into()],
            "file of the input",
        ),
        (
            ["convert", "-U", "in", "in.data"].map(Into::into).into(),
            "file of the input",
        ),
        (
            ["convert", "-n", "-U", "in", "in.data"]
                .map(Into::into)
                .into(),
            "file of the input",
        ),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        lab.refused(&args, says);
    }
    // In use.
    let writable = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let busy = Disk::open(&lab.path("old"), &writable).unwrap();
    let args = convert("old.data", &["-f", "raw", "in.raw", "out"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    lab.refused(&args, "old.data");
    busy.close().unwrap();
    // A copy that fails in the middle: the input's last cluster is nowhere.
    lab.good(&["convert", "-f", "raw", "-O", "qcow2", "in.raw", "damaged"]);
    let reader = Reader::open(&lab.path("damaged"));
    let mut file = lab.read("damaged");
    let l2 = (reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00) as usize;
    file[l2 + 15 * 8..l2 + 16 * 8].copy_from_slice(&(1u64 << 63 | 0x123).to_be_bytes());
    fs::write(lab.path("damaged"), file).unwrap();
    let args = convert("old.data", &["damaged", "old"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    lab.refused(&args, "damaged");
    lab.good(
        &args
            .iter()
            .map(|&arg| if arg == "damaged" { "in" } else { arg })
            .collect::<Vec<_>>(),
    );
}

/// Encrypted outputs, from inputs of every kind, with the keys of each.
#[test]
fn encrypted_images_are_made() {
    let lab = Lab::new();
    let bytes = disk((2 << 20) + 512, 3);
    fs::write(lab.path("in.raw"), &bytes).unwrap();
    let clear: HashSet<&[u8]> = bytes
        .chunks(512)
        .filter(|s| s.iter().any(|&b| b != 0))
        .collect();
    let to = ["convert", "-O", "qcow2", "-o"];
    for options in [
        &format!("{LUKS},data_file={}", lab.file("data")),
        &format!(
            "{LUKS},encrypt.cipher-alg=serpent-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,cluster_size=4k"
        ),
        &format!("{LUKS},extended_l2=on,cluster_size=32k"),
        LUKS,
    ] {
        let raw = ["-f", "raw", "--key-file", "a", "in.raw", "out.a"];
        lab.good(&[&to[..], &[options], &raw].concat());
        lab.check("out.a");
        assert_same(&lab.content(&["out.a"]), &bytes, options);
        for file in ["out.a", "data"].iter().filter(|f| lab.path(f).exists()) {
            let file = lab.read(file);
            let shown = file.chunks(512).filter(|sector| clear.contains(sector));
            assert_eq!(shown.count(), 0, "{options}: sectors in the clear");
        }
    }
    // From one passphrase to another: each image has its own.
    let keys = ["--key-file", "a", "--key-file", "out.b=b"];
    lab.good(&[&to[..], &[LUKS], &keys, &["out.a", "out.b"]].concat());
    lab.check("out.b");
    assert_same(&lab.content(&["out.b"]), &bytes, "another key");
    // One for both; then none.
    let keys = ["--key-file", "a"];
    lab.good(&[&to[..], &[LUKS], &keys, &["out.a", "again.a"]].concat());
    assert_same(&lab.content(&["again.a"]), &bytes, "the same key");
    lab.good(&[&["convert"], &keys[..], &["again.a", "plain.raw"]].concat());
    assert_same(&lab.read("plain.raw"), &bytes, "without a key");
    // Over what is there.
    let theirs = "encrypt.format=luks,encrypt.key-secret=b,encrypt.iter-time=10";
    lab.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-o", theirs, "theirs.b", "3M",
    ]);
    let keys = ["--key-file", "a", "--key-file", "theirs.b=b"];
    lab.good(
        &[
            &["convert", "-n", "-O", "qcow2"],
            &keys[..],
            &["out.a", "theirs.b"],
        ]
        .concat(),
    );
    lab.check("theirs.b");
    assert_same(&lab.content(&["theirs.b"])[..bytes.len()], &bytes, "-n");
    // Over a backing file with a key of its own.
    let mut other = bytes.clone();
    other[1 << 20..(1 << 20) + 512].fill(3);
    other[64 << 10..192 << 10].fill(0);
    fs::write(lab.path("other.raw"), &other).unwrap();
    let over = ["-B", "out.b", "-F", "qcow2", "-f", "raw"];
    let keys = ["--key-file", "a", "--key-file", "out.b=b"];
    lab.good(&[&to[..], &[LUKS], &over, &keys, &["other.raw", "top.a"]].concat());
    lab.check_over("top.a", &["out.b"]);
    assert_same(&lab.content(&["top.a", "out.b"]), &other, "over another");
    assert!(lab.read("top.a").len() < 3 << 20, "only what differs");
    // A descriptor is good for both images.
    let (code, text) = lab.run(
        "sh",
        &[
            "-c",
            &format!(
                "cat a | {} convert -O qcow2 -o {LUKS} --key-fd 0 out.a fd.a",
                super::PROGRAM
            ),
        ],
    );
    assert_eq!(code, Some(0), "{text}");
    assert_same(&lab.content(&["fd.a"]), &bytes, "from a descriptor");
    // LUKS2 is for us alone.
    let luks2 = ["--luks2", "-f", "raw", "--key-file", "a", "in.raw", "two.a"];
    lab.good(&[&to[..], &[LUKS], &luks2].concat());
    assert_ne!(lab.try_qemu_img(&["info", "two.a"]).0, None);
    lab.good(&["compare", "--key-file", "a", "-F", "raw", "two.a", "in.raw"]);
}

#[test]
fn mistakes_with_keys_are_named() {
    let lab = Lab::new();
    fs::write(lab.path("in.raw"), disk(1 << 20, 4)).unwrap();
    let to = ["convert", "-f", "raw", "-O", "qcow2", "-o"];
    lab.good(&[&to[..], &[LUKS, "--key-file", "a", "in.raw", "in.a"]].concat());
    for (args, says) in [
        (
            &["-O", "qcow2", "-o", LUKS, "in.a", "out"][..],
            "--key-file",
        ),
        (
            &["-f", "raw", "-O", "qcow2", "-o", LUKS, "in.raw", "out"],
            "--key-file",
        ),
        (&["-O", "qcow2", "in.a", "out"], "--key-file"),
        (&["--key-file", "b", "in.a", "out"], "opens no key slot"),
        (
            &[
                "-O",
                "qcow2",
                "-c",
                "-o",
                LUKS,
                "--key-file",
                "a",
                "in.a",
                "out",
            ],
            "ncrypt",
        ),
        (&["--luks2", "--key-file", "a", "in.a", "out"], "-O qcow2"),
        (
            &["-O", "qcow2", "--luks2", "--key-file", "a", "in.a", "out"],
            "encrypt.format=luks",
        ),
    ] {
        lab.refused(&[&["convert"], args].concat(), says);
    }
}

/// The figures are those of qemu-img, which wants a passphrase for them.
#[test]
fn measures_are_those_of_qemu() {
    let lab = Lab::new();
    fs::write(lab.path("in.raw"), disk((5 << 20) + 512, 5)).unwrap();
    lab.good(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "data_file=data",
        "in.raw",
        "with",
    ]);
    let both = |options: &str, of: &[&str]| {
        let theirs = options.replace(
            "format=luks",
            "format=luks,encrypt.iter-time=10,encrypt.key-secret=a",
        );
        let measure = |options| {
            [
                &["measure", "--output", "json", "-O", "qcow2", "-o", options],
                of,
            ]
            .concat()
        };
        let theirs = lab.qemu_img(&measure(&theirs));
        assert_eq!(lab.good(&measure(options)), theirs, "{options} {of:?}");
    };
    for options in [
        "encrypt.format=luks,cluster_size=4k",
        "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc",
        "encrypt.format=luks,preallocation=full",
        "data_file=nowhere",
        "data_file=nowhere,data_file_raw=on",
        "data_file=nowhere,preallocation=full",
    ] {
        for size in ["1M", "1T"] {
            both(options, &["--size", size]);
        }
        both(options, &["-f", "qcow2", "with"]);
        both(options, &["-f", "raw", "in.raw"]);
    }
    assert!(!lab.path("nowhere").exists());
}
