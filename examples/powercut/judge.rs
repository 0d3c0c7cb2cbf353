//! What is demanded of an image after a power cut.
#![allow(unreachable_pub, reason = "a part of a program")]

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use qcow2_ublk::qcow2::check::{self, Finding};
use qcow2_ublk::runtime::Runtime;
use qcow2_ublk::storage::{Locks, OpenOptions, Storage};
use qcow2_ublk::{Disk, chain};

use crate::Outcome;
use crate::journal::{BLOCK, Journal, stamp};

/// At most leaks: by our check and, if so wished, by QEMU's. Returns the
/// leaks.
pub fn image(path: &Path, ask_qemu: bool) -> Outcome<u64> {
    let options = OpenOptions::read_only().locks(Locks::None);
    let storage = Storage::open(path, &options)?;
    let mut found = Vec::new();
    let mut observe = |finding: &Finding| found.push(finding.to_string());
    let report = Runtime::inline()?.block_on(check::check(&storage, &mut observe))?;
    if report.corruptions + report.check_errors > 0 {
        return Err(format!("check finds {}", found.join("\n")).into());
    }
    if ask_qemu {
        let mut command = Command::new("qemu-img");
        let output = command.args(["check", "-f", "qcow2"]).arg(path).output()?;
        if ![Some(0), Some(3)].contains(&output.status.code()) {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            return Err(format!("qemu-img check: {text}").into());
        }
    }
    Ok(report.leaks)
}

/// Everything that was acknowledged before flush `marks.start` is there, or
/// what was written over it later.
pub fn content(path: &Path, journal: &Journal, marks: Range<usize>) -> Outcome<()> {
    let disk = Disk::open(path, &chain::Options::default())?;
    let allowed = journal.allowed(disk.size() / BLOCK, marks);
    let mut bytes = vec![0; 1 << 20];
    let per_read = bytes.len() as u64 / BLOCK;
    for (part, allowed) in (0..).zip(allowed.chunks(per_read as usize)) {
        let bytes = &mut bytes[..allowed.len() * BLOCK as usize];
        disk.read_at(bytes, part * per_read * BLOCK)?;
        let blocks = bytes.chunks_exact(BLOCK as usize);
        for (number, (bytes, values)) in (part * per_read..).zip(blocks.zip(allowed)) {
            if !values.iter().any(|&value| bytes == stamp(value, number)) {
                let seen = &bytes[..16];
                let what = format!("block {number} is none of {values:?}: {seen:02x?}");
                return Err(what.into());
            }
        }
    }
    Ok(disk.close()?)
}

/// And life goes on: it can be written to.
pub fn writable(path: &Path) -> Outcome<()> {
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(path, &options)?;
    disk.write_at(&[0xcd; 100_000], 65_000)?;
    disk.close()?;
    image(path, true)?;
    Ok(())
}
