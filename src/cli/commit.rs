//! `commit`: an overlay's data goes into the file below it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use super::cache::Cache;
use super::image::PolicyArgs;
use super::progress::Telling;
use super::{done, output, size};
use crate::chain;
use crate::engine::{Commit, Rate};
use crate::error::{Error, Result};
use crate::runtime::Runtime;

/// Write what an image has itself into its backing file, and empty the image
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    /// The file of the chain to write into, in place of the next one; the
    /// image is not emptied then
    #[arg(short, long, value_name = "FILE")]
    base: Option<OsString>,

    /// Do not empty the image
    #[arg(short, long)]
    drop: bool,

    /// Write at most so many bytes a second
    #[arg(short, long, value_name = "SIZE", value_parser = size::rate)]
    rate: Option<u64>,

    /// How the files are cached, and what is durable when [default: writeback]
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<Cache>,

    #[command(flatten)]
    telling: Telling,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Commits the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    runtime
        .block_on(commit(args))
        .map_err(|e| e.path(&args.file))?;
    if !args.telling.is_quiet() {
        output::print("Image committed.\n")?;
    }
    done()
}

async fn commit(args: &Args) -> Result<()> {
    let empties = !args.drop && args.base.is_none();
    let options = chain::Options {
        writable: empties,
        ..Cache::writing(args.cache, args.policy.chain_options()?)
    };
    let apart = chain::open_apart(&args.file, &options, args.base.as_deref()).await?;
    let commit = Commit::new(apart)?
        .at_rate(args.rate.map(Rate::new))
        .with_barrier(options.image.barrier);
    let mut progress = args.telling.progress();
    progress.show(0, 1);
    let copied = commit
        .copy(&mut |done, total| progress.show(done, total))
        .await;
    drop(progress);
    copied?;
    if empties {
        commit.empty().await
    } else {
        Ok(())
    }
}
