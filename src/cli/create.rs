//! `create`: a new image.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use super::encrypt::{Encrypt, Purpose};
use super::image::KeyArgs;
use super::{done, size};
use crate::chain;
use crate::codec::CompressionType;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::{Backing, CreateOptions, Preallocation, parse_compat};
use crate::runtime::Runtime;

/// Make a new, empty image
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image to make; an image of that name is lost, unless in use
    file: PathBuf,

    /// Size of the disk: 10G; by default that of the backing file
    #[arg(value_parser = size::parse)]
    size: Option<u64>,

    /// File that holds what the image does not, relative to the image
    #[arg(short, long = "backing", value_name = "FILE")]
    backing: Option<OsString>,

    /// Format of the backing file; never guessed
    #[arg(short = 'F', long, value_name = "qcow2|raw")]
    backing_format: Option<String>,

    /// Do not look at the backing file; needs SIZE
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Options with qemu-img's names: cluster_size, compat, refcount_bits,
    /// lazy_refcounts, extended_l2, data_file, data_file_raw,
    /// compression_type, backing_file, backing_fmt, size,
    /// preallocation=off|metadata|falloc|full, nocow, encrypt.format=luks
    /// with encrypt.cipher-alg, cipher-mode, ivgen-alg, ivgen-hash-alg,
    /// hash-alg, iter-time
    #[arg(short, value_name = "NAME=VALUE,...")]
    options: Vec<String>,

    /// Say nothing; there is nothing to say
    #[arg(short, long, hide = true)]
    quiet: bool,

    /// Format of the image
    #[arg(short, long, hide = true, value_parser = ["qcow2"])]
    format: Option<String>,

    /// With encrypt.format=luks: LUKS version 2, which no QEMU opens; the
    /// image is for this program alone
    #[arg(long)]
    luks2: bool,

    #[command(flatten)]
    keys: KeyArgs,
}

/// Makes the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let passphrase = || args.keys.sources()?.read_for_new(&args.file);
    let plan = plan(args, &Purpose::Image(&passphrase)).map_err(|e| e.path(&args.file))?;
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    runtime.block_on(make(args, plan))?;
    done()
}

/// What was asked for; the size may have to be learnt.
#[derive(Debug)]
struct Plan {
    size: Option<u64>,
    image: CreateOptions,
    /// The passphrase, if it is encrypted.
    key: Option<Secret>,
}

fn usage(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, what)
}

fn plan(args: &Args, purpose: &Purpose<'_>) -> Result<Plan> {
    let mut size = args.size;
    let mut backing = args.backing.clone();
    let mut format = args.backing_format.clone();
    let mut image = CreateOptions::new(0);
    let mut encrypt = Encrypt::default();
    for (name, value) in args.options.iter().flat_map(|text| split(text)) {
        let value = value.as_str();
        match name.as_str() {
            "size" => {
                size.get_or_insert(size::parse(value).map_err(usage)?);
            }
            "backing_file" => {
                backing.get_or_insert_with(|| value.into());
            }
            "backing_fmt" => {
                format.get_or_insert_with(|| value.to_owned());
            }
            "cluster_size" => image.cluster_size = size::parse(value).map_err(usage)?,
            "compat" => image.version = parse_compat(value)?,
            "refcount_bits" => {
                image.refcount_bits = value
                    .parse()
                    .map_err(|_| usage(format!("refcount_bits={value} is not a number")))?;
            }
            "data_file" => image.data_file = Some(value.into()),
            "data_file_raw" => image.data_file_raw = switch(&name, value)?,
            "extended_l2" => image.extended_l2 = switch(&name, value)?,
            "lazy_refcounts" => image.lazy_refcounts = switch(&name, value)?,
            "compression_type" => image.compression_type = compression(value)?,
            "preallocation" => image.preallocation = Preallocation::parse(value)?,
            "nocow" => image.nocow = switch(&name, value)?,
            other => {
                if !encrypt.take(other, value)? {
                    refuse_unless_off(other, value)?;
                }
            }
        }
    }
    image.backing = match (backing, format) {
        (None, None) => None,
        (None, Some(_)) => {
            return Err(usage("there is a backing format but no backing file")
                .cure("name the file with -b FILE"));
        }
        (Some(_), None) => {
            return Err(
                usage("the backing file's format is missing, and it is never guessed")
                    .cure("give it with -F qcow2 or -F raw"),
            );
        }
        (Some(file), Some(format)) => {
            if !matches!(format.as_str(), "qcow2" | "raw") {
                return Err(usage(format!(
                    "the backing file's format is qcow2 or raw, not {format:?}"
                )));
            }
            let format = Some(format);
            Some(Backing { file, format })
        }
    };
    if size.is_none() && (image.backing.is_none() || args.backing_unsafe) {
        return Err(usage("the size is missing").cure("give it behind the file: 10G"));
    }
    let luks = encrypt.header(args.luks2, purpose)?;
    let (luks, key) = luks.unzip();
    image.luks = luks;
    Ok(Plan { size, image, key })
}

/// An image that another command is to make.
#[derive(Debug, Default)]
pub(super) struct Output<'a> {
    /// Where.
    pub(super) file: &'a OsStr,
    /// Of how many bytes.
    pub(super) size: u64,
    /// What `-o` says.
    pub(super) options: &'a [String],
    /// The file under it, and its format.
    pub(super) backing: Option<&'a OsStr>,
    pub(super) backing_format: Option<&'a str>,
    /// See [`Args::luks2`].
    pub(super) luks2: bool,
}

/// What such an image is to be like, and its passphrase if it is encrypted.
pub(super) fn image_options(
    output: &Output<'_>,
    purpose: &Purpose<'_>,
) -> Result<(CreateOptions, Option<Secret>)> {
    let args = Args {
        file: output.file.into(),
        size: Some(output.size),
        backing: output.backing.map(OsStr::to_owned),
        backing_format: output.backing_format.map(str::to_owned),
        backing_unsafe: true,
        options: output.options.to_vec(),
        quiet: false,
        format: None,
        luks2: output.luks2,
        keys: KeyArgs::default(),
    };
    if output
        .options
        .iter()
        .flat_map(|text| split(text))
        .any(|(name, _)| name == "size")
    {
        return Err(usage("the size is that of the input").cure("change it with `resize`"));
    }
    let plan = plan(&args, purpose)?;
    let mut image = plan.image;
    image.size = output.size;
    Ok((image, plan.key))
}

/// `NAME=VALUE,NAME=VALUE`; a comma in a value is doubled, and a name alone
/// is switched on, as in QEMU's options.
pub(super) fn split(text: &str) -> Vec<(String, String)> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let part = parts.last_mut().expect("never empty");
        match c {
            ',' if chars.next_if_eq(&',').is_some() => part.push(','),
            ',' => parts.push(String::new()),
            c => part.push(c),
        }
    }
    parts
        .into_iter()
        .filter(|part| !part.is_empty())
        .map(|part| match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (part, "on".to_owned()),
        })
        .collect()
}

pub(super) fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(usage(format!("{name} is on or off, not {value:?}"))),
    }
}

fn compression(value: &str) -> Result<CompressionType> {
    [CompressionType::Deflate, CompressionType::Zstd]
        .into_iter()
        .find(|kind| kind.name() == value)
        .ok_or_else(|| usage(format!("compression_type is zlib or zstd, not {value:?}")))
}

/// Options that qemu-img has and we have not: off is what we do.
fn refuse_unless_off(name: &str, value: &str) -> Result<()> {
    let known = matches!(name, "extent_size_hint");
    if !known {
        return Err(usage(format!("there is no option {name:?}")).cure(
            "there are cluster_size, compat, refcount_bits, lazy_refcounts, extended_l2, \
             data_file, data_file_raw, compression_type, backing_file, backing_fmt, size, \
             preallocation and nocow",
        ));
    }
    if matches!(value, "off" | "no" | "false" | "n" | "0") {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("the option {name}={value} is not supported"),
    )
    .cure("make the image with qemu-img"))
}

async fn make(args: &Args, plan: Plan) -> Result<()> {
    let Plan {
        size, mut image, ..
    } = plan;
    let learnt = match &image.backing {
        Some(backing) if !args.backing_unsafe => {
            let format = backing.format.as_deref().unwrap_or_default();
            let size = chain::backing_size(&backing.file, format, &args.file)
                .await
                .map_err(|e| e.context("the backing file"))?;
            Some(size)
        }
        _ => None,
    };
    image.size = size.or(learnt).unwrap_or(0);
    chain::create(&args.file, &image).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_as_qemu_does() {
        let split = |text| {
            split(text)
                .into_iter()
                .map(|(name, value)| format!("{name}:{value}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            split("cluster_size=4k,lazy_refcounts,backing_file=a,,b"),
            ["cluster_size:4k", "lazy_refcounts:on", "backing_file:a,b"]
        );
        assert!(split("").is_empty());
    }
}
