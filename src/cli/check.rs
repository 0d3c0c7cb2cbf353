//! `check`: is the image in order? With the numbers, keys and exit codes of
//! `qemu-img check`.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::image::Report;
use super::output::{self, printable};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::check::{Finding, Repair, Repaired, Severity};
use crate::report;

/// Findings of each severity that are shown one by one; of the others, how many
/// there are. A sparse file of some kilobytes can have millions.
const SHOWN: u64 = 200;

/// The exit codes of `qemu-img check`.
mod exit {
    pub(super) const CLEAN: u8 = 0;
    pub(super) const NOT_CHECKED: u8 = 1;
    pub(super) const CORRUPT: u8 = 2;
    pub(super) const LEAKS: u8 = 3;
    pub(super) const UNSUPPORTED: u8 = 63;
}

/// Look for errors in an image, and with --repair put them right
///
/// Every reference to a cluster is counted and compared with the image's
/// refcounts. Each finding is a line on standard error, up to 200 of each kind
/// and then how many more there are; the result is on standard output. Exit
/// code: 0 in order, 1 not (wholly) checked, 2 corrupt,
/// 3 space is lost but no data, 63 the file has no format that can be checked.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    #[command(flatten)]
    report: Report,

    /// Repair what is found: 'leaks' gives lost space back, 'all' puts
    /// everything right that can be
    #[arg(short, long, value_name = "leaks|all", conflicts_with = "force_share")]
    repair: Option<RepairArg>,

    /// Check an image that others may be writing to; they can make sound
    /// images look damaged
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Say nothing but errors of the check itself
    #[arg(short, long)]
    quiet: bool,
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum RepairArg {
    Leaks,
    All,
}

impl From<RepairArg> for Repair {
    fn from(what: RepairArg) -> Self {
        match what {
            RepairArg::Leaks => Self::Leaks,
            RepairArg::All => Self::All,
        }
    }
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
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
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

/// How many findings there were.
#[derive(Default)]
struct Findings {
    corruptions: u64,
    leaks: u64,
    errors: u64,
}

impl Findings {
    /// Counts a finding; true if it is one of the first of its kind.
    fn is_shown(&mut self, finding: &Finding) -> bool {
        let count = match finding.severity {
            Severity::Corruption => &mut self.corruptions,
            Severity::Leak => &mut self.leaks,
            Severity::Error => &mut self.errors,
        };
        *count += 1;
        *count <= SHOWN
    }

    /// How many were not shown, a line for each kind.
    fn others(&self) -> String {
        [
            (self.corruptions, "corruptions"),
            (self.leaks, "leaks"),
            (self.errors, "errors of the check"),
        ]
        .iter()
        .filter(|(count, _)| *count > SHOWN)
        .map(|(count, what)| format!("... and {} more {what}\n", count - SHOWN))
        .collect()
    }
}

/// How far the check is, in qemu-img's way, on a terminal.
struct Meter {
    wanted: bool,
    /// Hundredths of a per cent that are on the screen.
    shown: Option<u32>,
}

impl Meter {
    fn new(wanted: bool) -> Self {
        Self {
            wanted,
            shown: None,
        }
    }

    fn show(&mut self, done: f64, to: &mut impl Write) {
        let now = (done * 1000.0) as u32 * 10;
        if self.wanted && self.shown != Some(now) {
            self.shown = Some(now);
            let _ = write!(to, "    ({:.2}/100%)\r", f64::from(now) / 100.0);
        }
    }

    /// Makes room for a line.
    fn clear(&mut self, to: &mut impl Write) {
        if self.shown.take().is_some() {
            let _ = write!(to, "{:20}\r", "");
        }
    }
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
    let mut findings = Findings::default();
    let listened = std::io::stderr().is_terminal() && !args.quiet;
    let meter = RefCell::new(Meter::new(listened));
    let mut observe = |finding: &Finding| {
        if findings.is_shown(finding) && !args.quiet {
            meter.borrow_mut().clear(&mut std::io::stderr());
            // Nothing to be done if nobody listens.
            let _ = writeln!(std::io::stderr(), "{}", printable(&finding.to_string()));
        }
    };
    let done = match args.repair {
        None => Repaired {
            report: report::check_and_tell(&args.file, args.force_share, &mut observe, |done| {
                meter.borrow_mut().show(done, &mut std::io::stderr());
            })?,
            ..Repaired::default()
        },
        Some(what) => report::repair(&args.file, what.into(), &mut observe)?,
    };
    meter.borrow_mut().clear(&mut std::io::stderr());
    let found = done.report;
    if !args.quiet {
        let _ = write!(std::io::stderr(), "{}", findings.others());
    }
    if args.report.json() {
        output::print_json(&Json {
            image_end_offset: found.image_end_offset,
            total_clusters: found.total_clusters,
            check_errors: found.check_errors,
            corruptions: found.corruptions,
            leaks: found.leaks,
            corruptions_fixed: done.corruptions_fixed,
            leaks_fixed: done.leaks_fixed,
            allocated_clusters: found.allocated_clusters,
            fragmented_clusters: found.fragmented_clusters,
            compressed_clusters: found.compressed_clusters,
            filename: args.file.to_string_lossy(),
            format: "qcow2",
        })?;
    } else if !args.quiet {
        output::print(&human(&done))?;
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
fn human(done: &Repaired) -> String {
    let found = &done.report;
    let mut text = String::new();
    let mut line = |line: String| {
        text += &line;
        text.push('\n');
    };
    if done.corruptions_fixed + done.leaks_fixed > 0 {
        line(format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nThe image was checked once more:",
            done.leaks_fixed, done.corruptions_fixed
        ));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_for_terminals_and_leaves_nothing() {
        let mut text = Vec::new();
        let mut meter = Meter::new(true);
        for done in [0.0, 0.12345, 0.12349, 0.5] {
            meter.show(done, &mut text);
        }
        meter.clear(&mut text);
        meter.clear(&mut text);
        let text = String::from_utf8(text).unwrap();
        let parts: Vec<&str> = text.split('\r').collect();
        let blank = " ".repeat(20);
        assert_eq!(
            parts,
            [
                "    (0.00/100%)",
                "    (12.30/100%)",
                "    (50.00/100%)",
                &blank,
                ""
            ]
        );
        let mut quiet = Vec::new();
        Meter::new(false).show(0.5, &mut quiet);
        assert!(quiet.is_empty());
    }
}
