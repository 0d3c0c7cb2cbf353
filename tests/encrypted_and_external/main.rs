//! The tools on images whose data is encrypted or in a file of its own, with
//! qemu-img as oracle.

#[path = "../common/mod.rs"]
mod common;

mod check;
mod outputs;
mod overlap;
mod resize;
mod tools;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use qcow2_ublk::storage::sim::Rng;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// The passphrases for QEMU's programs.
const OBJECTS: [&str; 4] = [
    "--object",
    "secret,id=a,file=a",
    "--object",
    "secret,id=b,file=b",
];

/// A folder with two passphrases in key files, `a` and `b`: what ends in
/// `.a` is encrypted with the one, `.b` with the other.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        for key in ["a", "b"] {
            fs::write(lab.path(key), format!("passphrase {key}")).unwrap();
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn run(&self, program: &str, args: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn ours(&self, args: &[&str]) -> (Option<i32>, String) {
        self.run(PROGRAM, args)
    }

    /// Our program, which succeeds.
    #[track_caller]
    fn good(&self, args: &[&str]) -> String {
        let (code, text) = self.ours(args);
        assert_eq!(code, Some(0), "{args:?}: {text}");
        text
    }

    /// Our program, which fails, says `says`, and leaves every file as it was.
    #[track_caller]
    fn refused(&self, args: &[&str], says: &str) {
        let before = self.listing();
        let (code, text) = self.ours(args);
        assert!(
            code.is_some_and(|code| code > 0),
            "{args:?}: {code:?} {text}"
        );
        assert!(text.contains(says), "{args:?}: no {says:?} in {text}");
        assert!(self.listing() == before, "{args:?}: files have changed");
    }

    /// Every file, hidden ones too, with its content.
    fn listing(&self) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let content = self.read(&name);
                (name, content)
            })
            .collect();
        files.sort();
        files
    }

    /// qemu-img, which succeeds and knows the passphrases as `a` and `b`.
    #[track_caller]
    fn qemu_img(&self, args: &[&str]) -> String {
        let (code, text) = self.try_qemu_img(args);
        assert_eq!(code, Some(0), "qemu-img {args:?}: {text}");
        text
    }

    fn try_qemu_img(&self, args: &[&str]) -> (Option<i32>, String) {
        self.with_secrets("qemu-img", args)
    }

    /// The exit code and standard output of a program.
    fn only_out(&self, program: &str, args: &[&str]) -> (Option<i32>, String) {
        let quiet = r#"exec "$0" "$@" 2>/dev/null"#;
        let mut all = vec!["-c", quiet, program];
        let (first, rest) = args.split_at(1);
        all.extend(first);
        if program == "qemu-img" {
            all.extend(OBJECTS);
        }
        all.extend(rest);
        self.run("sh", &all)
    }

    fn with_secrets(&self, program: &str, args: &[&str]) -> (Option<i32>, String) {
        let split = usize::from(program == "qemu-img");
        let (first, rest) = args.split_at(split);
        self.run(program, &[first, &OBJECTS, rest].concat())
    }

    #[track_caller]
    fn qemu_io(&self, opts: &str, commands: &[&str]) {
        let mut args = vec!["--image-opts"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(opts);
        let (code, text) = self.with_secrets("qemu-io", &args);
        assert!(
            code == Some(0) && !text.contains("failed"),
            "{args:?}: {text}"
        );
    }

    /// A raw file, or an image by its name's end, as `--image-opts` name it,
    /// over these others.
    fn opts(chain: &[&str]) -> String {
        let mut opts = String::new();
        for (depth, name) in chain.iter().enumerate() {
            let prefix = "backing.".repeat(depth);
            let (driver, key) = match name.rsplit_once('.') {
                Some((_, "raw")) => ("raw", ""),
                Some((_, "a")) => ("qcow2", "a"),
                Some((_, "b")) => ("qcow2", "b"),
                _ => ("qcow2", ""),
            };
            opts += &format!("{prefix}driver={driver},{prefix}file.filename={name},");
            if !key.is_empty() {
                opts += &format!("{prefix}encrypt.key-secret={key},");
            }
        }
        opts.pop();
        opts
    }

    /// The disk as QEMU sees it.
    #[track_caller]
    fn content(&self, chain: &[&str]) -> Vec<u8> {
        let opts = Self::opts(chain);
        self.qemu_img(&["convert", "--image-opts", &opts, "-O", "raw", "seen.raw"]);
        let content = self.read("seen.raw");
        fs::remove_file(self.path("seen.raw")).unwrap();
        content
    }

    /// What `qemu-img check` says of an image, which is: nothing.
    #[track_caller]
    fn check(&self, name: &str) {
        self.check_over(name, &[]);
    }

    #[track_caller]
    fn check_over(&self, name: &str, below: &[&str]) {
        let opts = Self::opts(&[&[name], below].concat());
        self.qemu_img(&["check", "--image-opts", &opts]);
    }
}

/// Where two disks differ, that is said.
#[track_caller]
fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: the length");
    if let Some(at) = seen.iter().zip(expected).position(|(a, b)| a != b) {
        let (a, b) = (seen[at], expected[at]);
        panic!("{what}: byte {at:#x} is {a:#x}, not {b:#x}");
    }
}

/// A disk with data of several kinds, zeros and holes, all of many lengths.
fn disk(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let part = (1 + rng.below(60) as usize) * 4096 / (1 + rng.below(8) as usize);
        let seed = rng.next_u64();
        bytes.extend(match rng.below(3) {
            0 => vec![0; part],
            1 => vec![seed as u8 | 1; part],
            _ => common::half_random(part, seed),
        });
    }
    bytes.truncate(len);
    bytes
}
