//! `map`: which file of the chain has which part of the disk. With the keys
//! and columns of `qemu-img map`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::image::{PolicyArgs, Report, SnapshotArg};
use super::output::{self, printable};
use super::{done, size};
use crate::chain::{self, MapEntry};
use crate::error::{Error, ErrorKind, Result};
use crate::report;

/// Text that is collected before it is written.
const BATCH: usize = 64 << 10;

/// Show which part of a disk is in which file of its chain, and where
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    #[command(flatten)]
    report: Report,

    /// First byte of the disk to show
    #[arg(short, long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    start_offset: u64,

    /// Bytes of the disk to show
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size::parse)]
    max_length: Option<u64>,

    /// Read images that others may be writing to; what is shown may be wrong
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    snapshot: SnapshotArg,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Prints the map.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let options = chain::Options {
        force_share: args.force_share,
        snapshot: args.snapshot.selector(),
        ..args.policy.chain_options()?
    };
    let json = args.report.json();
    let mut text = if json {
        "[".to_owned()
    } else {
        format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to")
    };
    let mut first = true;
    let range = (args.start_offset, args.max_length);
    report::map(&args.file, &options, range, |entry, file| {
        if json {
            if !first {
                text.push_str(",\n");
            }
            first = false;
            write_json(&mut text, entry);
        } else {
            write_row(&mut text, entry, file)?;
        }
        if text.len() >= BATCH {
            output::print(&text)?;
            text.clear();
        }
        Ok(())
    })?;
    if json {
        text.push_str("]\n");
    }
    output::print(&text)?;
    done()
}

/// One entry on a line of its own, as qemu-img writes it.
fn write_json(text: &mut String, entry: &MapEntry) {
    let MapEntry {
        start,
        len,
        depth,
        present,
        zero,
        data,
        compressed,
        offset,
    } = entry;
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
         \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
    );
    if let Some(offset) = offset {
        let _ = write!(text, ", \"offset\": {offset}");
    }
    text.push('}');
}

/// A row for data; other parts have none.
fn write_row(text: &mut String, entry: &MapEntry, file: &Path) -> Result<()> {
    if !entry.data || entry.zero {
        return Ok(());
    }
    let Some(offset) = entry.offset else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the image has compressed or encrypted clusters, for which the table has no column",
        )
        .path(file)
        .cure("use --json"));
    };
    let hex = |n: u64| match n {
        0 => "0".to_owned(),
        n => format!("{n:#x}"),
    };
    let _ = writeln!(
        text,
        "{:<16}{:<16}{:<16}{}",
        hex(entry.start),
        hex(entry.len),
        hex(offset),
        printable(&file.to_string_lossy())
    );
    Ok(())
}
