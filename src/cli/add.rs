//! `add`: an image becomes a device.

use std::io::IsTerminal;
use std::path::{Path, PathBuf, absolute};
use std::process::ExitCode;

use super::image::{GuardArgs, PolicyArgs, TEMPORARY};
use super::{done, log, output, size};
use crate::config::{Ask, CacheSetting, DataPathSetting, DiscardSetting, Plan, Settings};
use crate::crypto::Secret;
use crate::daemon::{self, Background, Hangup, Started};
use crate::error::{Error, Result};
use crate::qcow2::spec::header::CryptMethod;
use crate::report;

/// Serve an image as a block device; prints the device when it can be used
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    image: Option<PathBuf>,

    /// Read what is not said here from a file: a path, or NAME for
    /// /etc/qcow2-ublk/NAME.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Stay in the foreground; as a service of systemd this goes without saying
    #[arg(long)]
    foreground: bool,

    /// The N of /dev/ublkbN [default: the first free one]
    #[arg(short, long, value_name = "N")]
    number: Option<u32>,

    /// Hardware queues, each with a thread [default: as many as processors, up
    /// to 4]
    #[arg(short, long, value_name = "N")]
    queues: Option<u16>,

    /// Requests in flight in each queue [default: 128]
    #[arg(short, long, value_name = "N")]
    depth: Option<u16>,

    /// Unit in which the disk is addressed, 512 or 4096 [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    logical_block_size: Option<u32>,

    /// Do not write to the image
    #[arg(short, long)]
    read_only: bool,

    /// Serve a snapshot in place of the active disk, read-only: its ID or name
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Keep what is written in a file in DIR [default: /var/tmp] that is lost
    /// with the device; the image is opened read-only, and others may do the
    /// same. Encrypted with a
    /// key of its own where a file of the chain is
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = TEMPORARY)]
    temporary: Option<PathBuf>,

    /// How data moves between the kernel and us [default: auto]
    #[arg(long, value_name = "PATH")]
    data_path: Option<DataPathSetting>,

    /// Direct I/O or the host's page cache [default: none, where the file
    /// system can]
    #[arg(long, value_name = "MODE")]
    cache: Option<CacheSetting>,

    /// What discards do [default: unmap]
    #[arg(long, value_name = "WHAT")]
    discard: Option<DiscardSetting>,

    /// The kernel does not look for partitions
    #[arg(long)]
    no_part_scan: bool,

    /// Serve with all rights and system calls: a hostile image that takes the
    /// process over has the machine
    #[arg(long)]
    no_sandbox: bool,

    #[command(flatten)]
    guards: GuardArgs,

    #[command(flatten)]
    policy: PolicyArgs,
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text)?;
    match bytes {
        512 | 4096 => Ok(bytes as u32),
        _ => Err("it is 512 or 4096".to_owned()),
    }
}

impl Args {
    /// What the command line says.
    fn settings(self) -> Result<Settings> {
        let mut settings = Settings {
            image: self.image,
            number: self.number,
            queues: self.queues,
            depth: self.depth,
            logical_block_size: self.logical_block_size,
            read_only: self.read_only.then_some(true),
            snapshot: self.snapshot,
            temporary: self.temporary,
            data_path: self.data_path,
            cache: self.cache,
            discard: self.discard,
            detect_zeroes: self.guards.detect_zeroes,
            barrier: self.guards.barrier,
            overlap_check: self.guards.overlap_check,
            part_scan: self.no_part_scan.then_some(false),
            sandbox: self.no_sandbox.then_some(false),
            allow_path: self.policy.allow_path,
            trust_chain: self.policy.trust_chain.then_some(true),
            backing_format: self.policy.backing_format,
            ..Settings::default()
        };
        self.policy.keys.into_settings(&mut settings)?;
        Ok(settings)
    }
}

/// Makes the device. In the foreground it is served until something stops it;
/// otherwise a process in the background does that, and this one returns when
/// the device can be used. `detached` is that process.
pub(super) fn run(args: Args, detached: bool, verbose: u8) -> Result<ExitCode> {
    let config = args.config.clone();
    let by_systemd = std::env::var_os("NOTIFY_SOCKET").is_some();
    let foreground = args.foreground || by_systemd;
    let mut settings = args.settings()?;
    if let Some(text) = config {
        settings = settings.over(Settings::read(&Settings::locate(&text))?);
    }
    // The process in the background is given what was typed here.
    let ask = if detached {
        Ask::StandardInput
    } else {
        Ask::Terminal
    };
    let mut plan = settings.plan(ask)?;
    // The process will go to the root directory.
    let whole = |path: &Path| {
        absolute(path).map_err(|e| Error::io("find out the whole path", e).path(path))
    };
    plan.image = whole(&plan.image)?;
    if let Some(folder) = &mut plan.chain.temporary {
        *folder = whole(folder)?;
    }

    if detached {
        let background = Background::enter()?;
        log::to_service(verbose, true);
        daemon::serve(&plan, Hangup::Ignore, |path| background.let_go(path))?;
        return done();
    }
    if foreground {
        log::to_service(verbose, false);
        let hangup = if by_systemd {
            Hangup::Ignore
        } else {
            Hangup::Stop
        };
        daemon::serve(&plan, hangup, |path| {
            output::print(&format!("{}\n", path.display()))
        })?;
        return done();
    }
    let typed = ask_ahead(&plan)?;
    match daemon::start(super::DETACHED, typed.as_ref().map(Secret::expose))? {
        Started::Ready(path) => {
            output::print(&format!("{}\n", path.display()))?;
            done()
        }
        Started::Failed(code) => Ok(ExitCode::from(code)),
    }
}

/// Asks for the passphrase that the process in the background, which has no
/// terminal, will need.
fn ask_ahead(plan: &Plan) -> Result<Option<Secret>> {
    if !plan.keys.is_silent() || !std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let layers = report::info(&plan.image, &plan.chain)?;
    let without_key = layers.iter().find(|layer| {
        let own = plan
            .keys
            .layers
            .keys()
            .any(|image| image.file_name() == layer.path.file_name());
        !own && layer
            .image
            .as_ref()
            .is_some_and(|image| image.header.crypt_method != CryptMethod::None)
    });
    match without_key {
        None => Ok(None),
        Some(layer) => {
            let what = format!("the passphrase of {}", layer.path.display());
            plan.keys.read(&what)
        }
    }
}
