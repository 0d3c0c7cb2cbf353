//! A folder with images, and both programs to run in it.
#![allow(unreachable_pub, reason = "a part of a test program")]

use std::path::PathBuf;
use std::process::Command;

use qcow2_ublk::{Disk, chain};
use tempfile::TempDir;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// What a program answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn answer(&self, program: &str, args: &[&str]) -> Answer {
        let output = Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .env_remove("QCOW2_UBLK_LOG")
            .output()
            .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Answer {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// Runs our program.
    pub fn ours(&self, args: &[&str]) -> Answer {
        self.answer(PROGRAM, args)
    }

    /// Runs our program, which must succeed and say nothing on standard error.
    #[track_caller]
    pub fn good(&self, args: &[&str]) -> String {
        let answer = self.ours(args);
        assert_eq!(
            (answer.code, answer.err.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
        answer.out
    }

    /// Runs our program, which must fail; what it says.
    #[track_caller]
    pub fn bad(&self, args: &[&str]) -> String {
        let answer = self.ours(args);
        assert_eq!(
            (answer.code, answer.out.as_str()),
            (Some(1), ""),
            "{args:?}"
        );
        answer.err
    }

    /// Runs qemu-img, whatever it answers.
    pub fn theirs(&self, args: &[&str]) -> Answer {
        self.answer("qemu-img", args)
    }

    /// Runs qemu-img, which must succeed.
    #[track_caller]
    pub fn qemu_img(&self, args: &[&str]) -> String {
        let answer = self.theirs(args);
        assert_eq!(answer.code, Some(0), "qemu-img {args:?}: {answer:?}");
        answer.out
    }

    /// Runs commands of qemu-io on an image.
    #[track_caller]
    pub fn qemu_io(&self, format: &str, name: &str, commands: &[&str]) {
        let mut args = vec!["-f", format];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(name);
        let answer = self.answer("qemu-io", &args);
        assert_eq!(answer.code, Some(0), "qemu-io {args:?}: {answer:?}");
    }

    /// `qemu-img check` finds nothing, not even leaks.
    #[track_caller]
    pub fn check(&self, name: &str) {
        let answer = self.theirs(&["check", "-f", "qcow2", name]);
        assert_eq!(answer.code, Some(0), "{name}: {answer:?}");
    }

    /// What QEMU reads in an image with all that is below it.
    #[track_caller]
    pub fn content(&self, format: &str, name: &str) -> Vec<u8> {
        let flat = format!("{name}.flat");
        self.qemu_img(&["convert", "-f", format, "-O", "raw", name, &flat]);
        std::fs::read(self.path(&flat)).unwrap()
    }

    /// What we read in it.
    #[track_caller]
    pub fn our_content(&self, name: &str) -> Vec<u8> {
        let disk = Disk::open(&self.path(name), &chain::Options::default()).unwrap();
        let mut bytes = vec![0xee; disk.size() as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        disk.close().unwrap();
        bytes
    }

    pub fn len(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().len()
    }

    pub fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.path(from), self.path(to)).unwrap();
    }

    /// The value of a key of `qemu-img info`.
    #[track_caller]
    pub fn info(&self, name: &str, key: &str) -> serde_json::Value {
        let text = self.qemu_img(&["info", "-f", "qcow2", "--output=json", name]);
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        info[key].clone()
    }
}

/// Fails where two disks differ.
#[track_caller]
pub fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: the length");
    if let Some(at) = seen.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            seen[at], expected[at]
        );
    }
}
