//! `resize`: another size for the disk in an image.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::image::PolicyArgs;
use super::{done, output, size};
use crate::chain;
use crate::engine::{self, Engine, RawDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::Preallocation;
use crate::runtime::Runtime;

/// Change the size of the disk in an image that nobody uses
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    /// The new size, or what to add or to take away: 10G, +1G, -512M
    #[arg(allow_hyphen_values = true, value_parser = Change::parse)]
    size: Change,

    /// Allow a smaller size: what lies behind it is lost
    #[arg(long)]
    shrink: bool,

    /// Space for what is new
    #[arg(long, value_name = "off|metadata|falloc|full", default_value = "off", value_parser = preallocation)]
    preallocation: Preallocation,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// Format of the image
    #[arg(short, long, value_name = "qcow2|raw", default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    format: String,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// A size as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    To(u64),
    By(i64),
}

impl Change {
    fn parse(text: &str) -> Result<Self, String> {
        // Not above i64::MAX, as the parser has it.
        let bytes = |text| size::parse(text).map(|bytes| bytes as i64);
        match text.as_bytes().first() {
            Some(b'+') => bytes(&text[1..]).map(Self::By),
            Some(b'-') => bytes(&text[1..]).map(|bytes| Self::By(-bytes)),
            _ => size::parse(text).map(Self::To),
        }
    }

    /// The new size of a disk of `old` bytes.
    fn apply(self, old: u64) -> Result<u64> {
        let new = match self {
            Self::To(new) => Some(new),
            Self::By(by) => old.checked_add_signed(by),
        };
        match new {
            Some(new) if new > 0 && i64::try_from(new).is_ok() => Ok(new),
            _ => Err(Error::new(
                ErrorKind::Usage,
                "New image size must be positive",
            )),
        }
    }
}

fn preallocation(text: &str) -> Result<Preallocation, String> {
    Preallocation::parse(text).map_err(|_| format!("Invalid preallocation mode '{text}'"))
}

/// Resizes the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    let resized = if args.format == "raw" {
        runtime.block_on(raw(args))
    } else {
        runtime.block_on(qcow2(args))
    };
    resized.map_err(|e| e.path(&args.file))?;
    if !args.quiet {
        output::print("Image resized.\n")?;
    }
    done()
}

/// The new size, if the arguments allow it.
fn plan(args: &Args, old: u64) -> Result<u64> {
    let new = args.size.apply(old)?;
    if new <= old && args.preallocation != Preallocation::Off {
        return Err(Error::new(
            ErrorKind::Usage,
            "Preallocation can only be used for growing images",
        ));
    }
    if new < old && !args.shrink {
        return Err(Error::new(
            ErrorKind::Usage,
            "Use the --shrink option to perform a shrink operation.",
        )
        .cure(
            "shrinking deletes all data beyond the new end: make sure there is nothing important",
        ));
    }
    Ok(new)
}

async fn raw(args: &Args) -> Result<()> {
    let disk = RawDisk::open(&args.file)?;
    let new = plan(args, disk.size())?;
    disk.resize(new, args.preallocation).await
}

async fn qcow2(args: &Args) -> Result<()> {
    let options = chain::Options {
        writable: true,
        ..args.policy.chain_options()?
    };
    let chain = chain::open(&args.file, &options).await?;
    let engine = Arc::new(Engine::new(chain, engine::Options::default()));
    let old = engine.size();
    let new = plan(args, old)?;
    let resized = if new < old {
        engine.shrink(new).await
    } else {
        engine.grow_preallocated(new, args.preallocation).await
    };
    // What was begun is put in order, whatever came of it.
    let closed = engine.close().await;
    resized.and(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        assert_eq!(Change::parse("10M"), Ok(Change::To(10 << 20)));
        assert_eq!(Change::parse("+1k"), Ok(Change::By(1024)));
        assert_eq!(Change::parse("-1k"), Ok(Change::By(-1024)));
        assert!(Change::parse("+-1k").is_err() && Change::parse("").is_err());
        assert_eq!(Change::By(-1).apply(1024).unwrap(), 1023);
        assert!(Change::By(-1024).apply(1024).is_err());
        assert!(Change::By(i64::MAX).apply(1024).is_err());
        assert!(Change::To(0).apply(1024).is_err());
    }
}
