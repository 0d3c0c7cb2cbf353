//! The command line: one file per verb. A verb has `Args`, whose texts are its
//! help, and `run`, which returns the exit code or an error to report.
//!
//! Standard output carries data and nothing else; see [`output`].

mod add;
mod amend;
mod bench;
mod bitmap;
mod cache;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod del;
mod encrypt;
mod features;
mod foreign;
mod image;
mod info;
mod io;
mod key;
mod list;
mod log;
mod map;
mod measure;
mod output;
mod progress;
mod rebase;
mod resize;
mod size;
mod snapshot;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind as ClapKind;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};

use crate::error::{Error, ErrorKind, Result};

/// Serve qcow2 images, with their backing chains, as Linux block devices.
#[derive(Debug, Parser)]
#[command(name = "qcow2-ublk", version, propagate_version = false)]
#[command(subcommand_required = true, disable_help_subcommand = true)]
struct Cli {
    /// Say more on standard error; -vv and -vvv say still more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    /// See [`DETACHED`].
    #[arg(long, hide = true)]
    detached: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(visible_alias = "attach")]
    Add(Box<add::Args>),
    #[command(visible_alias = "detach")]
    Del(del::Args),
    List(list::Args),
    Info(info::Args),
    Check(check::Args),
    Map(map::Args),
    Create(create::Args),
    Snapshot(snapshot::Args),
    Amend(amend::Args),
    Convert(Box<convert::Args>),
    Compare(compare::Args),
    Measure(measure::Args),
    Bitmap(bitmap::Args),
    Resize(resize::Args),
    Commit(commit::Args),
    Rebase(rebase::Args),
    Io(io::Args),
    Key(key::Args),
    Bench(Box<bench::Args>),
    Features(features::Args),
}

/// Tells the program that it is the background process of `add`.
const DETACHED: &str = "--detached";

/// Runs the program: reads the arguments, does what they say, reports errors.
pub fn main() -> ExitCode {
    run(std::env::args_os())
}

fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &args),
    };
    // A process that serves a device has logs of its own.
    if !matches!(cli.verb, Verb::Add(_)) {
        log::to_terminal(cli.verbose);
    }
    let result = match cli.verb {
        Verb::Add(args) => add::run(*args, cli.detached, cli.verbose),
        Verb::Del(args) => del::run(&args),
        Verb::List(args) => list::run(&args),
        Verb::Io(args) => io::run(&args),
        Verb::Key(args) => key::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Features(args) => features::run(&args),
        Verb::Info(args) => info::run(&args),
        Verb::Map(args) => map::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Create(args) => create::run(&args),
        Verb::Amend(args) => amend::run(&args),
        Verb::Snapshot(args) => snapshot::run(&args),
        Verb::Convert(args) => convert::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Measure(args) => measure::run(&args),
        Verb::Bitmap(args) => bitmap::run(&args),
        Verb::Resize(args) => resize::run(&args),
        Verb::Commit(args) => commit::run(&args),
        Verb::Rebase(args) => rebase::run(&args),
    };
    result.unwrap_or_else(|error| {
        output::report(&error);
        ExitCode::from(error.exit_code())
    })
}

/// Help goes to standard output as it is; a mistake becomes one sentence.
fn usage(error: &clap::Error, args: &[OsString]) -> ExitCode {
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            // Nothing to be done if nobody listens.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ClapKind::MissingSubcommand | ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let verbs: Vec<_> = Cli::command()
                .get_subcommands()
                .filter(|verb| !verb.is_hide_set())
                .map(|verb| verb.get_name().to_owned())
                .collect();
            let error = Error::new(
                ErrorKind::Usage,
                format!("say what to do: {}", verbs.join(", ")),
            )
            .cure("see `qcow2-ublk --help`");
            output::report(&error);
            return ExitCode::from(error.exit_code());
        }
        _ => {}
    }
    let text = error.render().to_string();
    let error = foreign::refusal(error, args).unwrap_or_else(|| mistake(&text));
    output::report(&error);
    ExitCode::from(error.exit_code())
}

/// What clap says about a mistake in several paragraphs, in one sentence and a
/// hint.
fn mistake(text: &str) -> Error {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let mut paragraphs = text.split("\n\n");
    let sentence: Vec<&str> = paragraphs
        .next()
        .unwrap_or_default()
        .lines()
        .map(str::trim)
        .collect();
    let tip = paragraphs.find_map(|part| part.trim().strip_prefix("tip: "));
    let error = Error::new(ErrorKind::Usage, sentence.join(" "));
    match tip {
        Some(tip) => error.cure(tip.lines().next().unwrap_or(tip)),
        None => error.cure("see `qcow2-ublk --help`, or --help behind a command"),
    }
}

/// A verb that has done what it should.
fn done() -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_become_one_sentence() {
        let error = Cli::try_parse_from(["qcow2-ublk", "create", "--cluster"]).unwrap_err();
        let error = mistake(&error.render().to_string());
        assert!(!error.to_string().contains('\n'), "{error}");
        assert!(error.to_string().contains("'--cluster'"), "{error}");
        assert!(error.cure_text().is_some());
    }
}
