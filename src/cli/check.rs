//! `check`: is the image in order? With the numbers, keys and exit codes of
//! `qemu-img check`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::image::Report;
use super::output::{self, printable};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::check::{CheckReport, Finding};
use crate::report;

/// Findings that are shown one by one; of the others, how many there are.
const SHOWN: u64 = 200;

/// The exit codes of `qemu-img check`.
mod exit {
    pub(super) const CLEAN: u8 = 0;
    pub(super) const NOT_CHECKED: u8 = 1;
    pub(super) const CORRUPT: u8 = 2;
    pub(super) const LEAKS: u8 = 3;
    pub(super) const UNSUPPORTED: u8 = 63;
}

/// Look for errors in an image; nothing is changed
///
/// Every reference to a cluster is counted and compared with the image's
/// refcounts. Each finding is a line on standard error, the result is on
/// standard output. Exit code: 0 in order, 1 not (wholly) checked, 2 corrupt,
/// 3 space is lost but no data, 63 the file has no format that can be checked.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    #[command(flatten)]
    report: Report,

    /// Check an image that others may be writing to; they can make sound
    /// images look damaged
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Say nothing but errors of the check itself
    #[arg(short, long)]
    quiet: bool,
}

/// What `--json` prints. What is 0 is left out, as qemu-img does it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    filename: std::borrow::Cow<'a, str>,
    format: &'static str,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's calling convention"
)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Checks the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    match check(args) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) => {
            output::report(&error);
            // A file that is no qcow2 image has nothing to be checked, unless
            // the caller said that it is one.
            let code = match error.kind() {
                ErrorKind::Unsupported => exit::UNSUPPORTED,
                ErrorKind::InvalidFormat if !args.report.format_given() && !has_magic(args) => {
                    exit::UNSUPPORTED
                }
                _ => exit::NOT_CHECKED,
            };
            Ok(ExitCode::from(code))
        }
    }
}

fn has_magic(args: &Args) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(&args.file)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic))
        .is_ok_and(|()| magic == *b"QFI\xfb")
}

fn check(args: &Args) -> Result<u8> {
    let mut findings = 0;
    let mut observe = |finding: &Finding| {
        findings += 1;
        if findings <= SHOWN && !args.quiet {
            // Nothing to be done if nobody listens.
            let _ = writeln!(std::io::stderr(), "{}", printable(&finding.to_string()));
        }
    };
    let found = report::check(&args.file, args.force_share, &mut observe)?;
    if findings > SHOWN && !args.quiet {
        let _ = writeln!(std::io::stderr(), "... and {} more", findings - SHOWN);
    }
    if args.report.json() {
        output::print_json(&Json {
            image_end_offset: found.image_end_offset,
            total_clusters: found.total_clusters,
            check_errors: found.check_errors,
            corruptions: found.corruptions,
            leaks: found.leaks,
            allocated_clusters: found.allocated_clusters,
            fragmented_clusters: found.fragmented_clusters,
            compressed_clusters: found.compressed_clusters,
            filename: args.file.to_string_lossy(),
            format: "qcow2",
        })?;
    } else if !args.quiet {
        output::print(&human(&found))?;
    }
    if found.check_errors > 0 {
        let error = Error::new(ErrorKind::Corrupt, "some of the image could not be checked");
        output::report(&error.path(&args.file));
        return Ok(exit::NOT_CHECKED);
    }
    Ok(match (found.corruptions, found.leaks) {
        (0, 0) => exit::CLEAN,
        (0, _) => exit::LEAKS,
        _ => exit::CORRUPT,
    })
}

/// The result as text. Lines with numbers have the shape that scripts know
/// from qemu-img.
fn human(found: &CheckReport) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text += &line;
        text.push('\n');
    };
    if found.corruptions == 0 && found.leaks == 0 && found.check_errors == 0 {
        line("No errors were found on the image.".to_owned());
    }
    if found.corruptions > 0 {
        line(format!(
            "\n{} errors were found on the image.",
            found.corruptions
        ));
        line("What it holds may be damaged; do not write to it.".to_owned());
    }
    if found.leaks > 0 {
        line(format!(
            "\n{} leaked clusters were found on the image.",
            found.leaks
        ));
        line("They take up space and do no other harm.".to_owned());
    }
    if found.check_errors > 0 {
        line(format!(
            "\n{} internal errors have occurred during the check.",
            found.check_errors
        ));
    }
    if found.total_clusters != 0 && found.allocated_clusters != 0 {
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
        line(format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            found.allocated_clusters,
            found.total_clusters,
            percent(found.allocated_clusters, found.total_clusters),
            percent(found.fragmented_clusters, found.allocated_clusters),
            percent(found.compressed_clusters, found.allocated_clusters),
        ));
    }
    if found.image_end_offset != 0 {
        line(format!("Image end offset: {}", found.image_end_offset));
    }
    text
}
