//! `amend`: changes features of an image, with the options of
//! `qemu-img amend`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::create::{split, switch};
use super::{done, output};
use crate::error::{Error, ErrorKind, Result};
use crate::offline;
use crate::qcow2::amend::Amendment;
use crate::qcow2::create::parse_compat;

/// Change features of an image: its version, the width of its refcounts,
/// whether they may be postponed
///
/// What the disk shows, and its snapshots, stay. A power cut leaves the image
/// as it was or amended.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    /// What to change: compat=0.10|1.1 (or v2|v3), refcount_bits=N,
    /// lazy_refcounts=on|off
    #[arg(short, value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    /// Format of the image; there is only one
    #[arg(short, long, hide = true, value_parser = ["qcow2"])]
    format: Option<String>,

    /// Print nothing but errors
    #[arg(short, long, hide = true)]
    quiet: bool,
}

/// Does it. Whatever goes wrong, the exit code is 1, as qemu-img's.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let amended = amendment(args)
        .map_err(|e| e.path(&args.file))
        .and_then(|amendment| offline::amend(&args.file, &amendment));
    match amended {
        Ok(()) => done(),
        Err(error) => {
            output::report(&error);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn amendment(args: &Args) -> Result<Amendment> {
    let usage = |what: String| Error::new(ErrorKind::Usage, what);
    let mut amendment = Amendment::default();
    for (name, value) in args.options.iter().flat_map(|text| split(text)) {
        match name.as_str() {
            "compat" => amendment.version = Some(parse_compat(&value)?),
            "lazy_refcounts" => amendment.lazy_refcounts = Some(switch(&name, &value)?),
            "refcount_bits" => {
                let bits = value.parse();
                let bits = bits.map_err(|_| usage(format!("{name}={value} is not a number")))?;
                amendment.refcount_bits = Some(bits);
            }
            "backing_file" | "backing_fmt" => {
                return Err(usage("Cannot amend the backing file".to_owned())
                    .cure("use `qcow2-ublk rebase`"));
            }
            "size" => {
                return Err(
                    usage("the size is not amended".to_owned()).cure("use `qcow2-ublk resize`")
                );
            }
            "data_file_raw" => {
                return Err(usage(
                    "data-file-raw cannot be set on existing images".to_owned(),
                ));
            }
            "data_file" => {
                return Err(unsupported("recording another data file")
                    .cure("use `qemu-img amend`, or convert the image"));
            }
            _ if name.starts_with("encrypt.") => {
                return Err(unsupported(&format!("amending {name}"))
                    .cure("use `qcow2-ublk key add`, `key remove` and `key list`"));
            }
            "cluster_size" | "compression_type" | "extended_l2" | "encryption"
            | "preallocation" | "nocow" | "extent_size_hint" => {
                return Err(usage(format!("Invalid parameter '{name}'"))
                    .cure("This option is only supported for image creation"));
            }
            _ => return Err(usage(format!("Invalid parameter '{name}'"))),
        }
    }
    Ok(amendment)
}

fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what} is not supported"))
}
