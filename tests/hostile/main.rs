//! Images made by an enemy: each gets its error or its documented reading, at
//! the cost of what its file really has, and nothing else is opened for it.
//! See docs/testing/hostile.md.

#[path = "../common/mod.rs"]
mod common;

mod claims;
mod craft;
mod files;
mod limits;
mod memory;
mod mutation;
mod shortened;
mod tables;
mod text;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use qcow2_ublk::{Disk, Error, chain};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");
/// Seconds after which a command hangs.
const HANGS: u64 = 120;
/// KiB of memory that a command may have: what the program needs at all, and
/// some buffers.
const LIMIT: u64 = 160 << 10;

fn options(writable: bool) -> chain::Options {
    chain::Options {
        writable,
        ..chain::Options::default()
    }
}

fn open(path: &Path, writable: bool) -> Result<Disk, Error> {
    Disk::open(path, &options(writable))
}

/// Runs our program with at most `data` KiB of memory of its own: it neither
/// hangs, nor panics, nor is killed, nor runs out of memory.
fn bounded(data: u64, args: &[&str]) -> Output {
    let output = unchecked(data, args);
    let text = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| code < 100) && !text.contains("panicked"),
        "{args:?}: {:?}, signal {:?}: {text}",
        code,
        output.status.signal(),
    );
    output
}

fn unchecked(data: u64, args: &[&str]) -> Output {
    let script = format!("ulimit -d {data} && exec timeout -s KILL {HANGS} \"$@\"");
    Command::new("sh")
        .args(["-c", &script, "sh", OURS])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The error's text with its cure.
fn whole(error: &Error) -> String {
    format!("{error} [{}]", error.cure_text().unwrap_or_default())
}
