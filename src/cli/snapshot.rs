//! `snapshot`: lists, makes, applies, deletes and renames internal snapshots.
//! With words, or with the letters of `qemu-img snapshot`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use super::image::Report;
use super::{done, info, output};
use crate::error::{Error, ErrorKind, Result};
use crate::offline;
use crate::qcow2::{NewSnapshot, Selector, SnapshotJob};
use crate::report;

/// List and change the snapshots inside an image
///
/// Besides the commands below, the options of qemu-img are taken: -l, -c NAME,
/// -a SNAPSHOT, -d SNAPSHOT, and the image; -l goes without saying.
///
/// `apply` takes an ID or a name, in that order; `delete` and `rename` take a
/// name, as QEMU does: to go by the ID, say snapshot.id=ID. Of several
/// snapshots with one name the first is meant.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Option<Action>,

    #[command(flatten)]
    letters: Letters,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the snapshots
    List {
        /// The image
        file: PathBuf,

        #[command(flatten)]
        report: Report,

        /// Read an image that others may be writing to
        #[arg(short = 'U', long)]
        force_share: bool,
    },
    /// Make a snapshot of the active disk
    Create {
        /// The image
        file: PathBuf,
        /// What the snapshot is to be called
        name: OsString,
    },
    /// Make the active disk what it was; what was written since is lost
    Apply {
        /// The image
        file: PathBuf,
        /// The snapshot's ID or name
        snapshot: OsString,
    },
    /// Delete a snapshot
    Delete {
        /// The image
        file: PathBuf,
        /// The snapshot's name
        snapshot: OsString,
    },
    /// Give a snapshot another name
    Rename {
        /// The image
        file: PathBuf,
        /// The snapshot's name
        snapshot: OsString,
        /// Its new name
        name: OsString,
    },
}

#[derive(Debug, clap::Args)]
#[group(skip)]
struct Letters {
    /// List the snapshots
    #[arg(short, long, group = "what", hide = true)]
    list: bool,

    /// Make a snapshot
    #[arg(short, long, group = "what", value_name = "NAME", hide = true)]
    create: Option<OsString>,

    /// Make the active disk what it was
    #[arg(short, long, group = "what", value_name = "SNAPSHOT", hide = true)]
    apply: Option<OsString>,

    /// Delete a snapshot
    #[arg(short, long, group = "what", value_name = "SNAPSHOT", hide = true)]
    delete: Option<OsString>,

    /// Print nothing but errors and the list
    #[arg(short, long, hide = true)]
    quiet: bool,

    /// Read an image that others may be writing to
    #[arg(short = 'U', long, hide = true)]
    force_share: bool,

    #[command(flatten)]
    report: Report,

    /// The image
    #[arg(required = true)]
    file: Option<PathBuf>,
}

/// Does it. Whatever goes wrong, the exit code is 1, as qemu-img's.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    match act(args) {
        Ok(()) => done(),
        Err(error) => {
            output::report(&error);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn act(args: &Args) -> Result<()> {
    match &args.action {
        Some(Action::List {
            file,
            report,
            force_share,
        }) => list(file, report, *force_share),
        Some(Action::Create { file, name }) => create(file, name),
        Some(Action::Apply { file, snapshot }) => apply(file, snapshot),
        Some(Action::Delete { file, snapshot }) => delete(file, snapshot),
        Some(Action::Rename {
            file,
            snapshot,
            name,
        }) => {
            let which = Selector::parse_name(snapshot.as_bytes());
            let job = SnapshotJob::Rename(which, name.as_bytes().to_vec());
            offline::snapshot(file, &job)
        }
        None => by_letters(&args.letters),
    }
}

fn by_letters(letters: &Letters) -> Result<()> {
    let Some(file) = letters.file.as_deref() else {
        return Err(Error::new(ErrorKind::Usage, "the image is missing"));
    };
    if let Some(name) = &letters.create {
        create(file, name)
    } else if let Some(snapshot) = &letters.apply {
        apply(file, snapshot)
    } else if let Some(snapshot) = &letters.delete {
        delete(file, snapshot)
    } else {
        list(file, &letters.report, letters.force_share)
    }
}

fn list(file: &Path, report: &Report, force_share: bool) -> Result<()> {
    let snapshots = report::snapshots(file, force_share)?;
    info::show_snapshots(&snapshots, report.json())
}

fn create(file: &Path, name: &OsStr) -> Result<()> {
    let new = NewSnapshot::now(name.as_bytes());
    offline::snapshot(file, &SnapshotJob::Create(new))
}

fn apply(file: &Path, snapshot: &OsStr) -> Result<()> {
    let which = Selector::parse(snapshot.as_bytes());
    offline::snapshot(file, &SnapshotJob::Apply(which))
}

fn delete(file: &Path, snapshot: &OsStr) -> Result<()> {
    let which = Selector::parse_name(snapshot.as_bytes());
    offline::snapshot(file, &SnapshotJob::Delete(which))
}
