//! A worker told to misbehave: what the sandbox refuses it, each beside a
//! control run that shows the same deed succeed without; and that serving goes
//! on inside.
//!
//! A test runs this program once more as the worker, and that process enters
//! the same sandbox as the one behind a device.

mod deeds;
mod memory;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The variable that makes a test the worker, and its values.
const ROLE: &str = "SANDBOX_TEST_ROLE";
const FREE: &str = "free";
const CONFINED: &str = "confined";

/// This program as the worker of `test`.
fn spawn(test: &str, role: &str, folder: &Path, more: &[(&str, String)]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env("SANDBOX_TEST_FOLDER", folder)
        .envs(more.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a worker has reported: by deed, "done" or why not.
fn reports(text: &[u8]) -> BTreeMap<String, String> {
    String::from_utf8_lossy(text)
        .lines()
        .filter_map(|line| line.split_once('@')?.1.split_once(": "))
        .map(|(deed, outcome)| (deed.to_owned(), outcome.to_owned()))
        .collect()
}

/// Says how a deed ended.
fn report(deed: &str, outcome: std::io::Result<()>) {
    match outcome {
        Ok(()) => println!("\n@{deed}: done"),
        Err(error) => println!("\n@{deed}: errno {}", error.raw_os_error().unwrap_or(0)),
    }
}
