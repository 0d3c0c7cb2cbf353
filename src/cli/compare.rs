//! `compare`: whether two disks show the same. Exit codes as `qemu-img
//! compare`: 0 the same, 1 not, 2 and more for errors.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::cache::Cache;
use super::image::PolicyArgs;
use super::output;
use super::progress::Progress;
use crate::chain;
use crate::convert::{self, Source, Verdict};
use crate::error::{Error, Result};

/// The disks differ.
const DIFFERENT: u8 = 1;
/// One cannot be opened.
const UNOPENED: u8 = 2;
/// One cannot be read.
const UNREAD: u8 = 4;

/// Tell whether two disks have the same content
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A disk
    a: PathBuf,

    /// Another one
    b: PathBuf,

    /// Format of the first; never guessed
    #[arg(short, long, alias = "a-format", value_name = "qcow2|raw", default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    format: String,

    /// Format of the second
    #[arg(short = 'F', long = "b-format", value_name = "qcow2|raw", default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    second_format: String,

    /// The sizes have to be equal, and the same parts to be allocated
    #[arg(short, long)]
    strict: bool,

    /// Say nothing: the exit code tells
    #[arg(short, long)]
    quiet: bool,

    /// Show how far it is, on standard error
    #[arg(short, long)]
    progress: bool,

    /// How the files are cached [default: writeback]
    #[arg(short = 'T', long, value_name = "MODE")]
    cache: Option<Cache>,

    /// Read images that others may be writing to
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Compares.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let options = chain::Options {
        force_share: args.force_share,
        ..Cache::reading(args.cache, args.policy.chain_options()?)
    };
    let open =
        |path: &Path, format: &str| Source::open(path, super::convert::format(format), &options);
    let opened = open(&args.a, &args.format)
        .and_then(|a| open(&args.b, &args.second_format).map(|b| (a, b)));
    let (a, b) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(failed(&error, UNOPENED)),
    };
    let say = |text: &str| {
        if args.quiet {
            return Ok(());
        }
        output::print(text)
    };
    if a.size() != b.size() && !args.strict {
        say("Warning: Image size mismatch!\n")?;
    }
    let mut progress = Progress::new(args.progress);
    let verdict = convert::compare(&a, &b, args.strict, |done, of| progress.show(done, of));
    drop(progress);
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(error) => return Ok(failed(&error, UNREAD)),
    };
    let text = match verdict {
        Verdict::Same => {
            say("Images are identical.\n")?;
            return Ok(ExitCode::SUCCESS);
        }
        Verdict::Size => "Strict mode: Image size mismatch!\n".to_owned(),
        Verdict::Status(at) => format!("Strict mode: Offset {at} block status mismatch!\n"),
        Verdict::Content(at) => format!("Content mismatch at offset {at}!\n"),
    };
    say(&text)?;
    Ok(ExitCode::from(DIFFERENT))
}

fn failed(error: &Error, code: u8) -> ExitCode {
    output::report(error);
    ExitCode::from(code)
}
