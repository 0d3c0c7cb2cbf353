//! `rebase`: another backing file under an image.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use super::cache::Cache;
use super::done;
use super::image::PolicyArgs;
use super::progress::Telling;
use crate::chain;
use crate::engine::{self, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::Backing;
use crate::runtime::Runtime;

/// Put an image over another backing file; what it shows stays
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    /// The new backing file, relative to the image; "" for none
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,

    /// Format of the new backing file; never guessed
    #[arg(short = 'F', long = "backing-fmt", value_name = "qcow2|raw", value_parser = ["qcow2", "raw"])]
    backing_fmt: Option<String>,

    /// Record the name and look at nothing: what the image shows may change
    #[arg(short = 'u', long = "backing-unsafe")]
    unchecked: bool,

    /// Compress what has to be copied
    #[arg(short, long)]
    compress: bool,

    /// How the image and what is below it are cached, and what is durable when
    /// [default: writeback]
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<Cache>,

    /// How the new backing file is cached [default: writeback]
    #[arg(short = 'T', long, value_name = "MODE")]
    backing_cache: Option<Cache>,

    #[command(flatten)]
    telling: Telling,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Rebases the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    runtime
        .block_on(rebase(args))
        .map_err(|e| e.path(&args.file))?;
    done()
}

fn plan(args: &Args) -> Result<Option<Backing>> {
    let usage = |what: String| Error::new(ErrorKind::Usage, what);
    let Some(file) = &args.backing else {
        if args.unchecked {
            return Ok(None);
        }
        return Err(usage(
            "Must specify backing file (-b) or use unsafe mode (-u)".to_owned(),
        ));
    };
    if file.is_empty() {
        return Ok(None);
    }
    if args.backing_fmt.is_none() {
        return Err(usage(format!(
            "Could not change the backing file to '{}': backing format must be specified",
            file.display()
        ))
        .cure("give it with -F qcow2 or -F raw; it is never guessed"));
    }
    Ok(Some(Backing {
        file: file.clone(),
        format: args.backing_fmt.clone(),
    }))
}

async fn rebase(args: &Args) -> Result<()> {
    let backing = plan(args)?;
    let options = chain::Options {
        writable: true,
        ..args.policy.chain_options()?
    };
    let opened = chain::Options {
        no_backing: args.unchecked,
        ..Cache::writing(args.cache, options.clone())
    };
    let chain = chain::open(&args.file, &opened).await?;
    let new = match &backing {
        Some(backing) if !args.unchecked => {
            let format = backing.format.as_deref().unwrap_or_default();
            let options = Cache::reading(args.backing_cache, options);
            chain::open_new_backing(&backing.file, format, &chain, &options).await?
        }
        _ => Vec::new(),
    };
    let engine = Engine::new(chain, engine::Options::default());
    let rebased = if !args.unchecked {
        let mut progress = args.telling.progress();
        progress.show(0, 1);
        let rebased = engine
            .rebase(new, backing.as_ref(), args.compress, &mut |done, total| {
                progress.show(done, total);
            })
            .await;
        drop(progress);
        rebased
    } else {
        engine.record_backing(backing.as_ref()).await
    };
    // What was begun is put in order, whatever came of it.
    let closed = engine.close().await;
    rebased.and(closed)
}
