//! `create`: a new image.

use std::path::PathBuf;
use std::process::ExitCode;

use super::size;
use crate::error::{Error, ErrorKind, Result};

/// Make a new, empty image
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image to make
    file: PathBuf,

    /// Size of the disk, with unit: 10G
    #[arg(value_parser = size::parse)]
    size: Option<u64>,
}

/// Makes the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let error = Error::new(ErrorKind::Unsupported, "images cannot be made yet");
    Err(error.path(&args.file).context(args.size.unwrap_or(0)))
}
