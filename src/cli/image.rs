//! The options of every verb that opens an image with its chain.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::chain;
use crate::storage::CacheMode;

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
    #[arg(long, value_name = "qcow2|raw", value_parser = ["qcow2", "raw"])]
    pub(super) backing_format: Option<String>,
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
            backing_format: self.backing_format.clone(),
            ..chain::Options::default()
        }
    }
}

/// The names of cache modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Cache {
    /// Direct I/O: the host caches nothing
    None,
    /// The host's page cache
    Writeback,
}

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::None,
            Cache::Writeback => Self::Writeback,
        }
    }
}
