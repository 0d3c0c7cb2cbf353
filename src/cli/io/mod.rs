//! `io`: requests by hand, in the language of qemu-io, on the engine without a
//! device. For tests, and for whoever looks into an image.

mod command;
mod report;
mod session;

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::done;
use super::image::{GuardArgs, PolicyArgs, SnapshotArg, TEMPORARY};
use crate::block::BlockHandler;
use crate::chain;
use crate::config::CacheSetting;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::storage::CacheMode;

use session::{Next, Session};

/// Operations in flight before a submission has to wait.
const RING_ENTRIES: u32 = 256;

/// Read and write an image by hand, with qemu-io's commands
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    image: PathBuf,

    /// A command, such as 'write -P 0xaa 4k 64k'; repeat for more. Without any,
    /// they are read from standard input. `help` lists them
    #[arg(short, long = "cmd", value_name = "COMMAND")]
    command: Vec<String>,

    /// Do not write to the image
    #[arg(short, long)]
    read_only: bool,

    /// Direct I/O or the host's page cache
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: CacheSetting,

    /// Ignore that others write to the image; needs --read-only
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Format of the image
    #[arg(short, long, hide = true, value_parser = ["qcow2"])]
    format: Option<String>,

    #[command(flatten)]
    snapshot: SnapshotArg,

    /// Keep what is written in a file in DIR [default: /var/tmp] until the end,
    /// and then nowhere; the image is opened read-only
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = TEMPORARY)]
    temporary: Option<PathBuf>,

    #[command(flatten)]
    guards: GuardArgs,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Runs the commands; the exit code is 1 when any of them has failed.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let usual = args.policy.chain_options()?;
    let options = chain::Options {
        writable: !args.read_only && args.snapshot.snapshot.is_none(),
        snapshot: args.snapshot.selector(),
        temporary: args.temporary.clone(),
        cache: CacheMode::from(args.cache),
        force_share: args.force_share,
        image: args.guards.apply(usual.image.clone()),
        ..usual
    };
    let runtime = Runtime::best(RING_ENTRIES).map_err(|e| Error::io("make an executor", e))?;
    runtime.block_on(async {
        let chain = chain::open(&args.image, &options).await?;
        let engine = Arc::new(Engine::new(chain, args.guards.engine_options()));
        engine.queue_started(0)?;
        let mut session = Session::new(Arc::clone(&engine));
        let ran = if args.command.is_empty() {
            from_stdin(&mut session).await
        } else {
            from_args(&mut session, &args.command).await
        };
        session.wait_for_all().await;
        engine.close().await?;
        ran?;
        if session.has_failed() {
            return Ok(ExitCode::FAILURE);
        }
        done()
    })
}

async fn from_args(session: &mut Session, commands: &[String]) -> Result<()> {
    for line in commands {
        if session.run(line).await? == Next::Quit {
            break;
        }
    }
    Ok(())
}

async fn from_stdin(session: &mut Session) -> Result<()> {
    let stdin = std::io::stdin();
    let prompt = stdin.is_terminal();
    loop {
        if prompt {
            eprint!("qcow2-ublk> ");
            let _ = std::io::stderr().flush();
        }
        let mut line = String::new();
        let read = stdin
            .lock()
            .read_line(&mut line)
            .map_err(|e| Error::io("read standard input", e))?;
        if read == 0 || session.run(&line).await? == Next::Quit {
            return Ok(());
        }
    }
}
