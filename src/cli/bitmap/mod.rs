//! `bitmap`: the dirty bitmaps of an image. Actions are spelled as in
//! `qemu-img bitmap`; `list` and `dump` are for backup programs.

mod actions;
mod show;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use actions::{Action, Actions};
use show::Show;

use super::{done, output, size};
use crate::chain::{self, Chain};
use crate::disk::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{BitmapAction, ImageOptions};

/// Show and change the dirty bitmaps of an image
///
/// Actions are done in their order, each durably before the next; the first
/// that fails ends the command.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Args {
    #[command(subcommand)]
    show: Option<Show>,

    #[command(flatten)]
    actions: Actions,

    /// Bytes of the disk that one bit of the added bitmap stands for: a power
    /// of two from 512. Without, that of the cluster size, 4K to 64K
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    granularity: Option<u64>,

    /// The image that has the bitmap to be merged, if it is another one
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<PathBuf>,

    /// Format of the image with --source-file
    #[arg(short = 'F', long, value_name = "qcow2", value_parser = ["qcow2"], requires = "source_file")]
    source_format: Option<String>,

    /// Format of the image; there is only one
    #[arg(short, long, value_name = "qcow2", value_parser = ["qcow2"])]
    format: Option<String>,

    /// The image
    #[arg(required = true)]
    file: Option<PathBuf>,

    /// The bitmap's name
    #[arg(required = true)]
    bitmap: Option<OsString>,
}

/// Does the actions, or shows.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(show) = &args.show {
        return show.run();
    }
    let (Some(file), Some(name)) = (&args.file, &args.bitmap) else {
        return Err(usage("Expecting filename and bitmap name"));
    };
    let actions = args.actions.in_order();
    if actions.is_empty() {
        return Err(usage(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let has = |wanted: fn(&Action) -> bool| actions.iter().any(wanted);
    if args.granularity.is_some() && !has(|action| *action == Action::Add) {
        return Err(usage("granularity only supported with --add"));
    }
    if args.source_file.is_some() && !has(|action| matches!(action, Action::Merge(_))) {
        return Err(usage(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    match change(args, file, name.as_bytes(), &actions) {
        Ok(()) => done(),
        Err(error) => {
            // As qemu-img, whatever went wrong.
            output::report(&error);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn change(args: &Args, file: &Path, name: &[u8], actions: &[Action]) -> Result<()> {
    blocking(async {
        let source = match &args.source_file {
            Some(file) => Some(open(file, false, false).await?),
            None => None,
        };
        let chain = open(file, true, false).await?;
        let mut result = Ok(());
        for action in actions {
            result = one(args, &chain, source.as_ref(), name, action).await;
            if result.is_err() {
                break;
            }
        }
        // Actions before the failed one have been done.
        result.and(chain.top().close().await)
    })
}

async fn one(
    args: &Args,
    chain: &Chain,
    source: Option<&Chain>,
    name: &[u8],
    action: &Action,
) -> Result<()> {
    let image = chain.top();
    let content;
    let what = match action {
        Action::Add => BitmapAction::Add {
            granularity: args.granularity,
        },
        Action::Remove => BitmapAction::Remove,
        Action::Clear => BitmapAction::Clear,
        Action::Enable => BitmapAction::Enable,
        Action::Disable => BitmapAction::Disable,
        Action::Merge(from) => {
            let read = source.unwrap_or(chain).top().bitmap(from.as_bytes()).await;
            content = read.map_err(|e| failed(e, action, name))?;
            BitmapAction::Merge(&content)
        }
    };
    let changed = image.change_bitmap(name, &what).await;
    changed.map_err(|e| failed(e, action, name))
}

fn failed(error: Error, action: &Action, name: &[u8]) -> Error {
    let name = String::from_utf8_lossy(name);
    let action = action.word();
    error.context(format_args!("Operation {action} on bitmap {name} failed"))
}

/// Opens the image alone: what is below does not matter here.
async fn open(file: &Path, writable: bool, force_share: bool) -> Result<Chain> {
    let options = chain::Options {
        writable,
        force_share,
        no_backing: true,
        image: ImageOptions {
            record: false,
            metadata_only: true,
            ..ImageOptions::default()
        },
        ..chain::Options::default()
    };
    chain::open(file, &options).await
}

fn usage(text: &str) -> Error {
    Error::new(ErrorKind::Usage, text).cure("see `qcow2-ublk bitmap --help`")
}
