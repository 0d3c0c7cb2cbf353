//! What must not be done, and what a failure leaves: nothing that looks like a
//! result.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::lab::qemu_check;
use super::common::{Reader, half_random, qemu_img, run};
use super::{Folder, PROGRAM, assert_same, chain, disk, ours, well};
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use qcow2_ublk::{Disk, chain as layers};

/// Fails with exit code 1 or more, saying all of `parts`, and leaves the folder
/// as it was.
#[track_caller]
fn refused(folder: &Folder, args: &[&str], parts: &[&str]) {
    let before = listing(folder);
    let (code, text) = ours(args);
    assert!(
        code.is_some_and(|code| code > 0),
        "{args:?}: {code:?} {text}"
    );
    for part in parts {
        assert!(text.contains(part), "{args:?}: no {part:?} in {text}");
    }
    assert_eq!(listing(folder), before, "{args:?}");
}

/// Every file, hidden ones too, with its content.
fn listing(folder: &Folder) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder.0.path())
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let content = fs::read(entry.path()).unwrap_or_default();
            (entry.file_name().into_string().unwrap(), content)
        })
        .collect();
    files.sort();
    files
}

#[test]
fn mistakes_are_named_and_change_nothing() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    fs::write(&raw, disk(1 << 20, 1)).unwrap();
    let nowhere = folder.file("nowhere");
    let far = folder.file("no/such/folder/out");
    let qcow2 = &["convert", "-f", "raw", "-O", "qcow2"][..];
    let to = |more: &'static [&'static str]| [qcow2, more, &[&raw, &out]].concat();
    for (args, parts) in [
        (
            vec!["convert", &nowhere, &out],
            &["nowhere", "No such file"][..],
        ),
        (
            vec!["convert", "-f", "raw", &raw, &far],
            &["no/such/folder/out", "No such file"],
        ),
        (
            vec!["convert", "-n", "-f", "raw", &raw, &nowhere],
            &["nowhere", "No such file"],
        ),
        (vec!["convert", &raw, &out], &["raw", "not a qcow2 image"]),
        (
            vec!["convert", "-c", "-f", "raw", &raw, &out],
            &["Compression not supported"],
        ),
        (
            to(&["-c", "-o", "preallocation=full"]),
            &["Compression and preallocation"],
        ),
        (to(&["-n", "-o", "cluster_size=4k"]), &["-o has no effect"]),
        (to(&["-o", "cluster_size=3k"]), &["out", "power of two"]),
        (to(&["-o", "size=4M"]), &["size is that of the input"]),
        (to(&["-o", "unheard_of=1"]), &["unheard_of"]),
        (to(&["-B", "nowhere"]), &["format is missing"]),
        (
            to(&["-B", "nowhere", "-F", "raw"]),
            &["nowhere", "No such file"],
        ),
        (to(&["-m", "0"]), &["between 1 and 16"]),
        (to(&["-m", "17"]), &["between 1 and 16"]),
        (to(&["-S", "100"]), &["multiples of 512"]),
        (to(&["--compression-level", "5"]), &["--compress"]),
        (vec!["convert", "-O", "vmdk", &raw, &out], &["vmdk"]),
        (
            vec![
                "convert", "-f", "raw", "-O", "raw", "-B", "x", "-F", "raw", &raw, &out,
            ],
            &["Backing file not supported"],
        ),
        (
            vec![
                "convert",
                "-f",
                "raw",
                "-o",
                "preallocation=metadata",
                &raw,
                &out,
            ],
            &["metadata"],
        ),
        (
            vec![
                "convert",
                "-f",
                "raw",
                &raw,
                folder.0.path().to_str().unwrap(),
            ],
            &["regular file"],
        ),
        (
            vec!["convert", "-f", "raw", &raw, "/dev/null"],
            &["/dev/null", "regular file"],
        ),
    ] {
        refused(&folder, &args, parts);
    }
}

#[test]
fn an_input_is_never_the_output() {
    let folder = Folder::new();
    let top = chain(&folder);
    let (base, mid) = (folder.file("base"), folder.file("mid"));
    fs::hard_link(&base, folder.path("hard")).unwrap();
    symlink("mid", folder.path("soft")).unwrap();
    for output in [
        &base,
        &mid,
        &top,
        &folder.file("hard"),
        &folder.file("soft"),
    ] {
        for more in [
            &[][..],
            &["-n"],
            &["-O", "qcow2"],
            &["-n", "-O", "qcow2"],
            &["-W", "-c", "-O", "qcow2"],
        ] {
            refused(
                &folder,
                &[&["convert"], more, &[&top, output]].concat(),
                &["file of the input"],
            );
        }
    }
    // Nor is the backing file of the output.
    let raw = folder.file("raw");
    fs::write(&raw, disk(1 << 20, 1)).unwrap();
    let other = folder.file("other");
    fs::write(&other, [1; 512]).unwrap();
    let args = [
        "convert", "-f", "raw", "-O", "qcow2", "-B", "other", "-F", "raw",
    ];
    refused(
        &folder,
        &[&args[..], &[&raw, &other]].concat(),
        &["its own backing file"],
    );
    // A link is followed, not replaced.
    well(&["convert", "-f", "raw", "-O", "qcow2", &raw, &other]);
    symlink("other", folder.path("link")).unwrap();
    well(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        &raw,
        &folder.file("link"),
    ]);
    assert!(
        fs::symlink_metadata(folder.path("link"))
            .unwrap()
            .is_symlink()
    );
    assert!(fs::read(&other).unwrap() == fs::read(&raw).unwrap());
}

#[test]
fn an_output_in_use_is_left_alone() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    fs::write(&raw, disk(1 << 20, 1)).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &out, "1M"]);
    let options = layers::Options {
        writable: true,
        ..layers::Options::default()
    };
    let user = Disk::open(Path::new(&out), &options).unwrap();
    for more in [&[][..], &["-n"]] {
        let args = ["convert", "-f", "raw", "-O", "qcow2"];
        refused(
            &folder,
            &[&args, more, &[&raw, &out]].concat(),
            &["out", "lock"],
        );
    }
    user.close().unwrap();
    well(&["convert", "-f", "raw", "-O", "qcow2", &raw, &out]);
    assert_same(("raw", &raw), ("qcow2", &out));
}

/// The file may not grow further, as on a full file system.
#[test]
fn a_full_file_system_leaves_no_half_a_result() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    fs::write(&raw, half_random(4 << 20, 6)).unwrap();
    let limited = |args: &str| {
        let script = format!(
            "trap '' XFSZ; ulimit -f 1500; exec {PROGRAM} convert -f raw {args} {raw} {out}"
        );
        run("bash", &["-c", &script])
    };
    for old in [None, Some(b"what was there before".to_vec())] {
        if let Some(old) = &old {
            fs::write(&out, old).unwrap();
        }
        let before = listing(&folder);
        for args in [
            "",
            "-O qcow2",
            "-O qcow2 -c",
            "-O qcow2 -W",
            "-O qcow2 -o preallocation=full",
            "-o preallocation=full",
            "-S 0",
        ] {
            let (code, text) = limited(args);
            assert_eq!(code, Some(1), "{args}: {text}");
            assert!(
                text.contains("File too large") && text.contains("out"),
                "{args}: {text}"
            );
            assert!(
                listing(&folder) == before,
                "{args}: something is left, or gone"
            );
        }
    }
    // Written over, an image is at most incomplete.
    let base = folder.file("base");
    qemu_img(&["create", "-q", "-f", "qcow2", &base, "4M"]);
    let script = format!(
        "trap '' XFSZ; ulimit -f 1500; exec {PROGRAM} convert -n -f raw -O qcow2 {raw} {base}"
    );
    let (code, text) = run("bash", &["-c", &script]);
    assert!(code == Some(1) && text.contains("File too large"), "{text}");
    qemu_check(Path::new(&base), true);
}

#[test]
fn an_interrupted_copy_leaves_nothing_but_what_was_there() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    fs::write(&raw, half_random(96 << 20, 6)).unwrap();
    fs::write(&out, b"what was there before").unwrap();
    let part = || {
        let mut names = fs::read_dir(folder.0.path()).unwrap();
        names.find_map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let begun = entry.metadata().is_ok_and(|m| m.len() > 2 << 20);
            (name.ends_with(".part") && begun).then_some(name)
        })
    };
    for signal in ["INT", "TERM", "HUP", "KILL"] {
        let mut child = Command::new(PROGRAM)
            .args(["convert", "-c", "--compression-level", "9", "-m", "1"])
            .args(["-f", "raw", "-O", "qcow2", &raw, &out])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let since = Instant::now();
        while part().is_none() {
            assert!(since.elapsed() < Duration::from_secs(60), "nothing happens");
            assert!(child.try_wait().unwrap().is_none(), "it was too quick");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (code, _) = run("kill", &[format!("-{signal}"), child.id().to_string()]);
        assert_eq!(code, Some(0));
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success());
        assert_eq!(fs::read(&out).unwrap(), b"what was there before");
        if signal == "KILL" {
            // Nobody could remove it; nobody takes it for the result.
            assert!(part().is_some_and(|name| name.starts_with(".out.")));
        } else {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains("out: interrupted"), "{text}");
            assert_eq!(part(), None);
        }
    }
}

#[test]
fn damaged_inputs_are_errors() {
    let folder = Folder::new();
    let (raw, image, out) = (folder.file("raw"), folder.file("image"), folder.file("out"));
    fs::write(&raw, half_random(2 << 20, 6)).unwrap();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]);
    // A stream that begins with a kind of block that does not exist.
    let L2Entry::Compressed(range) = Reader::open(Path::new(&image)).entry(GuestOffset(1 << 20))
    else {
        panic!("not compressed");
    };
    let mut bytes = fs::read(&image).unwrap();
    let at = range.offset.0 as usize;
    bytes[at..at + 64].fill(0xff);
    fs::write(&image, bytes).unwrap();
    for more in [&[][..], &["-W"], &["-O", "qcow2", "-c"]] {
        refused(
            &folder,
            &[&["convert"], more, &[&image, &out]].concat(),
            &["image", "decompress"],
        );
    }
    let (code, text) = ours(&["compare", "-F", "raw", &image, &raw]);
    assert!(code == Some(4) && text.contains("decompress"), "{text}");
    let (code, _) = ours(&["measure", &folder.file("nowhere")]);
    assert_eq!(code, Some(4));
}
