//! `measure`: how long a new image will be. With the keys of `qemu-img
//! measure`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::encrypt::Purpose;
use super::image::PolicyArgs;
use super::{create, done, output, size};
use crate::chain;
use crate::convert::{Format, Measure, Source, measure_image, measure_size};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::CreateOptions;

/// Tell how long a new file will be
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A disk that will be converted
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    file: Option<PathBuf>,

    /// Size of a new disk
    #[arg(short, long, value_parser = size::parse)]
    size: Option<u64>,

    /// Format of the disk; never guessed
    #[arg(short, long, value_name = "qcow2|raw", default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    format: String,

    /// A snapshot of the disk: ID or name
    #[arg(short = 'l', long, value_name = "SNAPSHOT", requires = "file")]
    snapshot: Option<OsString>,

    /// Format of the new file
    #[arg(short = 'O', long, value_name = "raw|qcow2", default_value = "raw", value_parser = ["raw", "qcow2"])]
    output_format: String,

    /// Options of the new image, as for `create`
    #[arg(short, value_name = "NAME=VALUE,...")]
    options: Vec<String>,

    /// Print JSON, with the keys of qemu-img
    #[arg(short = 'J', long)]
    json: bool,

    /// The same as --json, as qemu-img spells it
    #[arg(long, value_name = "human|json", value_parser = ["human", "json"], conflicts_with = "json")]
    output: Option<String>,

    /// Read images that others may be writing to
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    policy: PolicyArgs,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct View {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

/// Prints the lengths.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let Measure {
        required,
        fully_allocated,
        bitmaps,
    } = measure(args)?;
    if args.json || args.output.as_deref() == Some("json") {
        output::print_json(&View {
            bitmaps,
            required,
            fully_allocated,
        })?;
        return done();
    }
    let mut text = format!("required size: {required}\nfully allocated size: {fully_allocated}\n");
    if let Some(bitmaps) = bitmaps {
        text += &format!("bitmaps size: {bitmaps}\n");
    }
    output::print(&text)?;
    done()
}

fn measure(args: &Args) -> Result<Measure> {
    let format = super::convert::format(&args.output_format);
    let options = |size| match format {
        Format::Qcow2 => {
            // Where the new image would be makes no difference, nor does its
            // passphrase.
            let image = create::Output {
                size,
                options: &args.options,
                ..create::Output::default()
            };
            create::image_options(&image, &Purpose::Measure).map(|(options, _)| options)
        }
        Format::Raw if args.options.is_empty() => Ok(CreateOptions::new(size)),
        Format::Raw => Err(Error::new(
            ErrorKind::Usage,
            "no option changes the size of a raw file",
        )),
    };
    match (&args.file, args.size) {
        (Some(file), _) => {
            super::convert::refuse_snapshot_of_raw(args.snapshot.is_some(), &args.format)?;
            let how = chain::Options {
                force_share: args.force_share,
                snapshot: super::convert::selector(args.snapshot.as_deref()),
                ..args.policy.chain_options()?
            };
            let source = Source::open(file, super::convert::format(&args.format), &how)?;
            measure_image(&source, format, &options(source.size())?)
        }
        (None, Some(size)) => measure_size(size, format, &options(size)?),
        (None, None) => unreachable!("one of them is required"),
    }
}
