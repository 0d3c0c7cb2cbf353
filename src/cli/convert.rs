//! `convert`: a disk into another file, in another format, with other options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::cache::Cache;
use super::encrypt::Purpose;
use super::image::PolicyArgs;
use super::progress::Progress;
use super::{create, done, size};
use crate::chain;
use crate::convert::{self, Bitmaps, Format, Output, Source};
use crate::crypto::Secret;
use crate::engine::Rate;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Selector;
use crate::qcow2::create::Preallocation;

/// Most threads, as qemu-img has most coroutines.
const MOST_WORKERS: usize = 16;
/// Longest run of zeros that can be asked for, in bytes.
const MOST_SPARSE: u64 = 16 << 20;

/// Copy a disk into another file and format
///
/// A new output appears under its name when it is complete and durable; until
/// then, and when the copy fails or is interrupted, a file of that name stays
/// as it was.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The disk to copy, with everything below it
    input: PathBuf,

    /// The file to make, or with -n to write over
    output: PathBuf,

    /// Format of the input; never guessed
    #[arg(short, long, value_name = "qcow2|raw", default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    format: String,

    /// Format of the output
    #[arg(short = 'O', long, value_name = "raw|qcow2", default_value = "raw", value_parser = ["raw", "qcow2"])]
    output_format: String,

    /// Compress every cluster that becomes smaller by it
    #[arg(short, long)]
    compress: bool,

    /// Effort of -c: 1 to 9 with zlib (9 by default), 1 to 22 with zstd (3 by
    /// default)
    #[arg(long, value_name = "N", requires = "compress", value_parser = clap::value_parser!(i32).range(1..=22))]
    compression_level: Option<i32>,

    /// Options of the output, with qemu-img's names: those of `create` for
    /// qcow2, preallocation=off|falloc|full for raw. The passphrase of an
    /// encrypted output comes from where those of the inputs come from; its
    /// own is given with --key-file OUTPUT=FILE
    #[arg(short, value_name = "NAME=VALUE,...")]
    options: Vec<String>,

    /// File that holds what the output does not, relative to the output; the
    /// output shows what the input shows whatever is in it
    #[arg(short = 'B', long = "backing", value_name = "FILE")]
    backing: Option<OsString>,

    /// Format of that file
    #[arg(short = 'F', value_name = "qcow2|raw")]
    backing_file_format: Option<String>,

    /// A snapshot of the input in place of its active disk: ID or name
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<OsString>,

    /// With encrypt.format=luks: LUKS version 2, which no QEMU opens
    #[arg(long, conflicts_with = "no_create")]
    luks2: bool,

    /// Show how far it is, on standard error
    #[arg(short, long)]
    progress: bool,

    /// Write whatever is there first: where it is in the output then differs
    /// from run to run. Compressed clusters are written in order all the same
    #[arg(short = 'W', long)]
    out_of_order: bool,

    /// Threads that read and compress [default: one for each CPU]
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<usize>,

    /// The output exists: write over it. Needed for block devices
    #[arg(short, long)]
    no_create: bool,

    /// The existing output reads as zeros: write only what is not
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,

    /// Zeros that take no space are at least as long; 0: everything takes space
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k", value_parser = size::parse)]
    sparse_size: u64,

    /// Copy dirty bitmaps too
    #[arg(long)]
    bitmaps: bool,

    /// Leave out bitmaps that are inconsistent
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// What cannot be read becomes zeros, with a warning
    #[arg(long)]
    salvage: bool,

    /// Write at most so many bytes a second
    #[arg(short, long, value_name = "SIZE", value_parser = size::rate)]
    rate: Option<u64>,

    /// How the output is cached, and what of it is durable when
    /// [default: writeback]
    #[arg(short = 't', long, value_name = "MODE")]
    target_cache: Option<Cache>,

    /// How the inputs are cached [default: writeback]
    #[arg(short = 'T', long, value_name = "MODE")]
    source_cache: Option<Cache>,

    /// Read images that others may be writing to; the copy may be wrong
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Say nothing; there is nothing to say
    #[arg(short, long, hide = true)]
    quiet: bool,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Makes the copy.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    check(args)?;
    let chain = args.policy.chain_options()?;
    let from = chain::Options {
        force_share: args.force_share,
        snapshot: selector(args.snapshot.as_deref()),
        ..Cache::reading(args.source_cache, chain.clone())
    };
    let chain = Cache::writing(args.target_cache, chain);
    refuse_snapshot_of_raw(args.snapshot.is_some(), &args.format)?;
    let mut source = Source::open(&args.input, format(&args.format), &from)?;
    if args.salvage {
        source = source.salvaging();
    }
    let (output, key) = output(args, source.size(), &chain)?;
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&cancel))
            .map_err(|e| Error::io("catch signals", e))?;
    }
    let options = convert::Options {
        path: args.output.clone(),
        output,
        key,
        compress: args.compress.then_some(args.compression_level),
        sparse: args.sparse_size,
        target_is_zero: args.target_is_zero,
        workers: args.parallel.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_WORKERS))
        }),
        out_of_order: args.out_of_order,
        bitmaps: args.bitmaps.then_some(if args.skip_broken_bitmaps {
            Bitmaps::Sound
        } else {
            Bitmaps::All
        }),
        rate: args.rate.map(Rate::new),
        chain,
        cancel: &cancel,
    };
    let mut progress = Progress::new(args.progress);
    convert::convert(&source, &options, |done, of| progress.show(done, of))?;
    done()
}

/// The snapshot that is meant.
pub(super) fn selector(text: Option<&OsStr>) -> Option<Selector> {
    Some(Selector::parse(text?.as_bytes()))
}

pub(super) fn refuse_snapshot_of_raw(wanted: bool, format: &str) -> Result<()> {
    if wanted && format == "raw" {
        return Err(usage("a raw file has no snapshots"));
    }
    Ok(())
}

fn usage(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, what)
}

fn check(args: &Args) -> Result<()> {
    if args
        .parallel
        .is_some_and(|n| !(1..=MOST_WORKERS).contains(&n))
    {
        return Err(usage(format!(
            "the number of threads is between 1 and {MOST_WORKERS}"
        )));
    }
    if args.sparse_size > MOST_SPARSE || !args.sparse_size.is_multiple_of(512) {
        return Err(usage(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up \
             to {MOST_SPARSE}"
        ))
        .cure("0 disables the detection of zeros and allocates everything"));
    }
    if args.bitmaps && args.snapshot.is_some() {
        return Err(usage("bitmaps are of the active disk, not of a snapshot"));
    }
    if args.no_create && !args.options.is_empty() {
        return Err(usage("-o has no effect when skipping image creation"));
    }
    if args.no_create && args.backing.is_some() {
        return Err(usage("-B has no effect when skipping image creation"));
    }
    Ok(())
}

pub(super) fn format(name: &str) -> Format {
    match name {
        "raw" => Format::Raw,
        _ => Format::Qcow2,
    }
}

/// What is to be written, and the passphrase of an image that is to be made.
fn output(args: &Args, size: u64, chain: &chain::Options) -> Result<(Output, Option<Secret>)> {
    let format = format(&args.output_format);
    if args.no_create {
        return Ok(match format {
            Format::Raw => (Output::ExistingRaw, None),
            Format::Qcow2 => (Output::ExistingQcow2, None),
        });
    }
    let passphrase = || {
        let sources = args.policy.keys.sources()?;
        // A descriptor can be read once, and may have been for the input.
        let known = match &chain.image.keys {
            Some(keys) if sources.has(&args.output) => keys.passphrase(&args.output)?,
            _ => None,
        };
        known.map_or_else(|| sources.read_for_new(&args.output), Ok)
    };
    match format {
        Format::Raw => {
            if args.backing.is_some() {
                return Err(usage("Backing file not supported for file format 'raw'"));
            }
            if args.luks2 {
                return Err(usage("a raw file is not encrypted").cure("say -O qcow2"));
            }
            raw_options(&args.options).map(|space| (Output::Raw(space), None))
        }
        Format::Qcow2 => {
            let image = create::Output {
                file: args.output.as_os_str(),
                size,
                options: &args.options,
                backing: args.backing.as_deref(),
                backing_format: args.backing_file_format.as_deref(),
                luks2: args.luks2,
            };
            create::image_options(&image, &Purpose::Image(&passphrase))
                .map(|(image, key)| (Output::Qcow2(Box::new(image)), key))
        }
    }
    .map_err(|e| e.path(&args.output))
}

/// The options that a raw file has.
fn raw_options(options: &[String]) -> Result<Preallocation> {
    let mut preallocation = Preallocation::Off;
    for (name, value) in options.iter().flat_map(|text| create::split(text)) {
        match name.as_str() {
            "preallocation" => preallocation = Preallocation::parse(&value)?,
            "size" => {
                return Err(usage("the size is that of the input").cure("change it afterwards"));
            }
            _ => {
                return Err(usage(format!("there is no option {name:?} for raw files"))
                    .cure("there is preallocation=off, falloc or full"));
            }
        }
    }
    Ok(preallocation)
}
