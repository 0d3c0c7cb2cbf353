//! Every operation of a copy fails once, and for good: on the files and in the
//! program that users have. Then the command fails with that errno, its inputs
//! are untouched, and what was there before is there; a result is whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{half_random, qemu_img, qemu_io};
use crate::{Folder, PROGRAM, assert_same, write_sparse};

/// How operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Error(i32),
    /// That one, and all after it.
    Lasting(i32),
    /// Half of it is read or written.
    Short,
}

/// For operation 0, which there is not.
const NEVER: How = How::Error(libc::EIO);

/// The library that lets operations fail, built for this test.
fn faults(folder: &Path) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/convert/faults.c");
    let library = folder.join("faults.so");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .args([source, "-ldl"])
        .status()
        .unwrap_or_else(|e| panic!("cannot run cc, which linking needs too: {e}"));
    assert!(status.success());
    library
}

/// What became of a command.
struct Ran {
    good: bool,
    text: String,
    /// Operations that there were.
    count: u64,
    /// Which kind the one that failed was.
    hit: String,
}

/// A folder with files, and the library beside it.
struct Lab {
    folder: Folder,
    _beside: tempfile::TempDir,
    library: PathBuf,
    report: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let beside = tempfile::tempdir().unwrap();
        Self {
            folder: Folder::new(),
            library: faults(beside.path()),
            report: beside.path().join("report"),
            _beside: beside,
        }
    }

    fn run(&self, args: &[&str], at: u64, how: How) -> Ran {
        self.run_with(&[&["convert"], args].concat(), at, how, None)
    }

    /// `only` this kind of operation counts.
    fn run_with(&self, args: &[&str], at: u64, how: How, only: Option<&str>) -> Ran {
        let (errno, lasts) = match how {
            How::Error(errno) => (errno, 0),
            How::Lasting(errno) => (errno, 1),
            How::Short => (0, 0),
        };
        let output = Command::new(PROGRAM)
            .args(args)
            .current_dir(self.folder.0.path())
            .env("LD_PRELOAD", &self.library)
            .env("FAULT_AT", at.to_string())
            .env("FAULT_HOW", errno.to_string())
            .env("FAULT_LASTS", lasts.to_string())
            .env("FAULT_REPORT", &self.report)
            .envs(only.map(|only| ("FAULT_ONLY", only)))
            .output()
            .unwrap();
        let report = fs::read_to_string(&self.report).unwrap();
        let (count, hit) = report.trim().split_once(' ').unwrap();
        Ran {
            good: output.status.success(),
            text: String::from_utf8_lossy(&output.stderr).into_owned(),
            count: count.parse().unwrap(),
            hit: hit.to_owned(),
        }
    }

    /// Every file with its content.
    fn listing(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.folder.0.path()).unwrap();
        entries
            .map(|entry| {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let content = fs::read(self.folder.path(&name)).unwrap();
                (name, content)
            })
            .collect()
    }

    /// Puts the files back.
    fn restore(&self, files: &BTreeMap<String, Vec<u8>>) {
        for name in self
            .listing()
            .keys()
            .filter(|name| !files.contains_key(*name))
        {
            fs::remove_file(self.folder.path(name)).unwrap();
        }
        for (name, content) in files {
            fs::write(self.folder.path(name), content).unwrap();
        }
    }

    /// The output is whole: it shows what the input shows, and the other files
    /// but `outputs` are as they were.
    fn assert_whole(&self, before: &BTreeMap<String, Vec<u8>>, outputs: &[&str], what: &str) {
        let mut now = self.listing();
        let mut old = before.clone();
        for name in outputs {
            assert!(now.remove(*name).is_some(), "{what}: no {name}");
            old.remove(*name);
        }
        assert!(now == old, "{what}: other files have changed");
        let out = self.folder.file(outputs[0]);
        let format = if outputs[0].ends_with("raw") {
            "raw"
        } else {
            "qcow2"
        };
        assert_same(("qcow2", &self.folder.file("in")), (format, &out));
        if format == "qcow2" {
            qemu_img(&["check", "-q", &out]);
        }
    }
}

/// An image over a raw file, with clusters of every kind.
fn make_input(folder: &Folder) {
    let (base, input) = (folder.path("base"), folder.path("in"));
    write_sparse(&base, &half_random(300 << 10, 4));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "base",
        input.to_str().unwrap(),
        "700k",
    ]);
    qemu_io(
        &input,
        &[
            "write -c -P 3 64k 64k",
            "write -P 4 200k 70k",
            "write -z 320k 64k",
            "write -P 5 600k 30k",
        ],
    );
}

fn errno_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno)
        .to_string()
        .split(" (os")
        .next()
        .unwrap()
        .to_owned()
}

/// Lets each operation of `convert ARGS in OUTPUT` fail. `outputs` are the
/// files it makes, the image first.
fn trial(lab: &Lab, args: &[&str], outputs: &[&str]) {
    let args = [args, &["-m", "1", "in", outputs[0]]].concat();
    let before = lab.listing();
    let undisturbed = lab.run(&args, 0, How::Short);
    assert!(undisturbed.good, "{args:?}: {}", undisturbed.text);
    lab.assert_whole(&before, outputs, "undisturbed");
    lab.restore(&before);
    let total = lab.run(&args, 0, How::Error(libc::EIO)).count;
    lab.restore(&before);
    assert!(total > 20, "{args:?}: only {total} operations");
    for how in [
        How::Error(libc::EIO),
        How::Error(libc::ENOSPC),
        How::Lasting(libc::EIO),
        How::Short,
        How::Error(libc::EINTR),
    ] {
        let (mut failed, mut reached) = (0, 0);
        for at in 1..=total {
            let ran = lab.run(&args, at, how);
            let what = format!("{args:?}, {how:?} at {at}, a {}: {}", ran.hit, ran.text);
            reached += u64::from(ran.hit != "none");
            match how {
                How::Error(errno) | How::Lasting(errno) if !ran.good => {
                    failed += 1;
                    // Nobody is interrupted in giving a name.
                    let strange = errno == libc::EINTR && ran.hit != "rename";
                    assert!(!strange, "{what}");
                    assert!(ran.text.contains(&errno_text(errno)), "{what}");
                    let now = lab.listing();
                    if now != before {
                        // The name could not be made durable: the result has
                        // it, and is whole.
                        assert_eq!(ran.hit, "fsync", "{what}");
                        lab.assert_whole(&before, outputs, &what);
                    }
                }
                _ => {
                    assert!(ran.good, "{what}");
                    // Space that cannot be given back, or not in the quickest
                    // way, is no failure.
                    let harmless = matches!(&ran.hit[..], "fallocate" | "none");
                    let nothing = how == How::Short || how == How::Error(libc::EINTR);
                    assert!(harmless || nothing, "{what}");
                    lab.assert_whole(&before, outputs, &what);
                }
            }
            lab.restore(&before);
        }
        let errors = !matches!(how, How::Short | How::Error(libc::EINTR));
        assert_eq!(
            failed > total / 2,
            errors,
            "{args:?}, {how:?}: {failed} of {total}"
        );
        assert!(
            reached > total / 2,
            "{args:?}, {how:?}: {reached} of {total}"
        );
    }
}

#[test]
fn a_fault_leaves_no_half_a_new_file() {
    let lab = Lab::new();
    make_input(&lab.folder);
    trial(&lab, &["-O", "raw"], &["out.raw"]);
    trial(&lab, &["-O", "qcow2"], &["out"]);
    trial(
        &lab,
        &["-O", "qcow2", "-c", "-o", "cluster_size=16k"],
        &["out"],
    );
}

#[test]
fn a_fault_leaves_the_old_file() {
    let lab = Lab::new();
    make_input(&lab.folder);
    fs::write(lab.folder.path("out.raw"), b"what was there before").unwrap();
    fs::write(lab.folder.path("out"), b"what was there before").unwrap();
    trial(
        &lab,
        &["-O", "raw", "-o", "preallocation=falloc"],
        &["out.raw"],
    );
    trial(&lab, &["-O", "qcow2", "-B", "base", "-F", "raw"], &["out"]);
    trial(
        &lab,
        &["-O", "qcow2", "-o", "preallocation=metadata"],
        &["out"],
    );
}

#[test]
fn a_fault_leaves_no_half_a_data_file() {
    let lab = Lab::new();
    make_input(&lab.folder);
    // QEMU looks for relative names where it runs.
    let option = format!("data_file={}", lab.folder.file("data"));
    let args = ["-O", "qcow2", "-o", &option];
    trial(&lab, &args, &["out", "data"]);
    fs::write(lab.folder.path("out"), b"what was there before").unwrap();
    fs::write(lab.folder.path("data"), b"and its data").unwrap();
    trial(&lab, &args, &["out", "data"]);
}

/// An existing image that is written over is sound whatever fails, and shows
/// in every cluster what it showed or what it is to show.
#[test]
fn a_fault_leaves_a_sound_image_that_is_written_over() {
    let lab = Lab::new();
    make_input(&lab.folder);
    let out = lab.folder.file("out");
    qemu_img(&["create", "-q", "-f", "qcow2", &out, "700k"]);
    qemu_io(Path::new(&out), &["write -P 9 0 700k"]);
    let flat = lab.folder.file("flat.raw");
    qemu_img(&["convert", "-O", "raw", &lab.folder.file("in"), &flat]);
    let new = fs::read(&flat).unwrap();
    fs::remove_file(&flat).unwrap();
    let args = ["-n", "-O", "qcow2", "-m", "1", "in", "out"];
    let before = lab.listing();
    let total = lab.run(&args, 0, How::Error(libc::EIO)).count;
    lab.restore(&before);
    assert!(total > 20);
    let mut failed = 0;
    for how in [
        How::Error(libc::EIO),
        How::Error(libc::ENOSPC),
        How::Lasting(libc::EIO),
    ] {
        for at in 1..=total {
            let ran = lab.run(&args, at, how);
            let what = format!("{how:?} at {at}, a {}: {}", ran.hit, ran.text);
            failed += u64::from(!ran.good);
            let mut now = lab.listing();
            now.insert("out".to_owned(), before["out"].clone());
            assert!(now == before, "{what}: another file has changed");
            // Clusters may leak: nobody could say that they are free.
            let (code, text) = crate::common::run("qemu-img", &["check", &out]);
            assert!(matches!(code, Some(0 | 3)), "{what}: {text}");
            let beside = lab.report.with_file_name("shown.raw");
            qemu_img(&["convert", "-O", "raw", &out, beside.to_str().unwrap()]);
            let shown = fs::read(&beside).unwrap();
            for (nth, (shown, new)) in shown.chunks(512).zip(new.chunks(512)).enumerate() {
                let old = shown.iter().all(|&byte| byte == 9);
                assert!(shown == new || old, "{what}: sector {nth}");
            }
            if ran.good {
                assert!(shown == new, "{what}");
            }
            lab.restore(&before);
        }
    }
    assert!(failed > total * 3 / 2, "{failed} of {total} three times");
}

/// What each cache mode makes durable: `unsafe` nothing at all, `writethrough`
/// and `directsync` each write; and the result is the same.
#[test]
fn cache_modes_keep_their_promise() {
    let lab = Lab::new();
    make_input(&lab.folder);
    let before = lab.listing();
    // Making an image is durable in any case.
    let ran = lab.run_with(&["create", "out", "700k"], 0, NEVER, Some("sync"));
    assert!(ran.good, "{}", ran.text);
    lab.restore(&before);
    for (format, out, made) in [("raw", "out.raw", 0), ("qcow2", "out", ran.count)] {
        let mut syncs = BTreeMap::new();
        for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            let args = [
                "convert", "-t", mode, "-T", mode, "-m", "1", "-O", format, "in", out,
            ];
            let ran = lab.run_with(&args, 0, NEVER, Some("sync"));
            assert!(ran.good, "{mode}: {}", ran.text);
            lab.assert_whole(&before, &[out], mode);
            lab.restore(&before);
            syncs.insert(mode, ran.count - made);
            let ran = lab.run_with(&args, made + 1, How::Error(libc::EIO), Some("sync"));
            assert_eq!(ran.good, mode == "unsafe", "{mode}: {}", ran.text);
            lab.restore(&before);
        }
        assert_eq!(syncs["unsafe"], 0, "{syncs:?}");
        assert_eq!(syncs["none"], syncs["writeback"]);
        assert_eq!(syncs["directsync"], syncs["writethrough"]);
        assert!(syncs["writethrough"] > syncs["writeback"] + 3, "{syncs:?}");
    }
    // `commit` and `rebase` are no different.
    for args in [
        ["commit", "-d", "in"].as_slice(),
        &["rebase", "-b", "", "-T", "none", "in"],
    ] {
        let mut syncs = Vec::new();
        for mode in ["unsafe", "writeback", "writethrough"] {
            let all = [&args[..1], &["-t", mode], &args[1..]].concat();
            let ran = lab.run_with(&all, 0, NEVER, Some("sync"));
            assert!(ran.good, "{all:?}: {}", ran.text);
            syncs.push(ran.count);
            lab.restore(&before);
        }
        assert_eq!(syncs[0], 0, "{args:?}");
        assert!(0 < syncs[1] && syncs[1] < syncs[2], "{args:?}: {syncs:?}");
    }
}
