//! The options of every verb that opens an image with its chain.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::chain;
use crate::config::BackingFormat;
use crate::qcow2::Selector;

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
}

impl PolicyArgs {
    /// Options to open a chain with, read-only and through the page cache
    /// until told otherwise.
    pub(super) fn chain_options(&self) -> chain::Options {
        chain::Options {
            policy: chain::Policy {
                trust_chain: self.trust_chain,
                allow_paths: self.allow_path.clone(),
            },
            backing_format: self.backing_format.map(|format| format.name().to_owned()),
            ..chain::Options::default()
        }
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
