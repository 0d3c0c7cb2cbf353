//! The options of every verb that opens an image with its chain.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::size;
use crate::chain;
use crate::config::{
    Ask, BackingFormat, BarrierSetting, DetectZeroesSetting, KeySources, OverlapSetting, Settings,
    parse_key_file,
};
use crate::engine;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{ImageOptions, Selector};

/// What an image may make us open.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Backing files")]
pub(super) struct PolicyArgs {
    /// Let the image refer to files in this directory, besides its own
    #[arg(long, value_name = "DIR")]
    pub(super) allow_path: Vec<PathBuf>,

    /// Let the image refer to any file
    #[arg(long)]
    pub(super) trust_chain: bool,

    /// Format of backing files whose image does not record it
    #[arg(long, value_name = "FORMAT")]
    pub(super) backing_format: Option<BackingFormat>,

    #[command(flatten)]
    pub(super) keys: KeyArgs,
}

/// Where the passphrases of encrypted images come from.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Encryption")]
pub(super) struct KeyArgs {
    /// File whose content is the passphrase, to the last byte; with IMAGE=,
    /// that of this image of the chain alone. Repeatable
    #[arg(long, value_name = "[IMAGE=]FILE")]
    key_file: Vec<String>,

    /// Open file descriptor with the passphrase
    #[arg(long, value_name = "N", conflicts_with = "key_credential")]
    key_fd: Option<i32>,

    /// Credential of the systemd service with the passphrase
    #[arg(long, value_name = "NAME")]
    key_credential: Option<String>,

    /// Memory that deriving a key may take [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    key_memory: Option<u64>,

    /// Iterations that deriving a key may take [default: 100000000]
    #[arg(long, value_name = "N")]
    key_iterations: Option<u64>,
}

impl KeyArgs {
    /// Notes what is said here.
    pub(super) fn into_settings(self, settings: &mut Settings) -> Result<()> {
        for text in self.key_file {
            match parse_key_file(&text) {
                (Some(image), file) => {
                    settings.layer_keys.insert(image, file);
                }
                (None, file) if settings.key_file.is_none() => settings.key_file = Some(file),
                (None, _) => {
                    return Err(Error::new(
                        ErrorKind::Usage,
                        "there are two key files for the same images",
                    )
                    .cure("say which image a file is for: --key-file IMAGE=FILE"));
                }
            }
        }
        settings.key_fd = self.key_fd;
        settings.key_credential = self.key_credential;
        settings.check_key_source()?;
        settings.key_memory = self.key_memory;
        settings.key_iterations = self.key_iterations;
        Ok(())
    }

    /// Where passphrases come from; what nothing gives is asked for at the
    /// terminal.
    pub(super) fn sources(&self) -> Result<KeySources> {
        let mut settings = Settings::default();
        self.clone().into_settings(&mut settings)?;
        Ok(settings.key_sources(Ask::Terminal))
    }
}

impl PolicyArgs {
    /// Options to open a chain with, read-only and through the page cache
    /// until told otherwise.
    pub(super) fn chain_options(&self) -> Result<chain::Options> {
        Ok(chain::Options {
            policy: chain::Policy {
                trust_chain: self.trust_chain,
                allow_paths: self.allow_path.clone(),
            },
            backing_format: self.backing_format.map(|format| format.name().to_owned()),
            image: ImageOptions {
                keys: Some(self.keys.sources()?.keyring()),
                ..ImageOptions::default()
            },
            ..chain::Options::default()
        })
    }
}

/// Where what need not last is kept: on a disk, and not in memory as /tmp may
/// be.
pub(super) const TEMPORARY: &str = "/var/tmp";

/// Which disk of an image.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct SnapshotArg {
    /// A snapshot in place of the active disk, read-only: its ID or name
    #[arg(long, value_name = "SNAPSHOT")]
    pub(super) snapshot: Option<OsString>,
}

impl SnapshotArg {
    pub(super) fn selector(&self) -> Option<Selector> {
        let text = self.snapshot.as_ref()?;
        Some(Selector::parse(text.as_bytes()))
    }
}

/// What is durable when, what is never written over, what becomes of zeros.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Writes")]
pub(super) struct GuardArgs {
    /// What is durable when [default: batched]
    #[arg(long, value_name = "WHEN")]
    pub(super) barrier: Option<BarrierSetting>,

    /// Which metadata is protected from being written over [default: cached]
    #[arg(long, value_name = "WHAT")]
    pub(super) overlap_check: Option<OverlapSetting>,

    /// What becomes of writes of zeros [default: off]
    #[arg(long, value_name = "WHAT")]
    pub(super) detect_zeroes: Option<DetectZeroesSetting>,
}

impl GuardArgs {
    /// How the engine treats requests.
    pub(super) fn engine_options(&self) -> engine::Options {
        engine::Options {
            detect_zeroes: self.detect_zeroes.map_or_else(Default::default, Into::into),
            ..engine::Options::default()
        }
    }

    /// The usual options of an image, but for these.
    pub(super) fn apply(&self, usual: ImageOptions) -> ImageOptions {
        ImageOptions {
            barrier: self.barrier.map_or_else(Default::default, Into::into),
            overlap_check: self.overlap_check.map_or_else(Default::default, Into::into),
            ..usual
        }
    }
}

/// How a report is printed.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Report {
    /// Print JSON, with the keys of qemu-img
    #[arg(short = 'J', long)]
    json: bool,

    /// The same as --json, as qemu-img spells it
    #[arg(long, value_name = "human|json", value_parser = ["human", "json"], conflicts_with = "json")]
    output: Option<String>,

    /// Format of the image; there is only one
    #[arg(short, long, value_name = "qcow2", value_parser = ["qcow2"])]
    format: Option<String>,
}

impl Report {
    /// JSON is wanted.
    pub(super) fn json(&self) -> bool {
        self.json || self.output.as_deref() == Some("json")
    }

    /// The caller vouches for the format.
    pub(super) fn format_given(&self) -> bool {
        self.format.is_some()
    }
}
