//! Whole disks: copying one into another file and format, comparing two,
//! and telling how much space one will take. Knows the formats' names, and
//! nothing of command lines.

mod bitmaps;
mod chunk;
mod compare;
mod copy;
mod measure;
mod part;
mod source;
mod target;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use crate::chain;
use crate::crypto::Secret;
use crate::engine::Rate;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::{CreateOptions, Preallocation};

pub use bitmaps::Bitmaps;
pub use compare::{Verdict, compare};
pub use measure::{Measure, measure_image, measure_size};
pub use source::Source;

/// Formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// qcow2.
    Qcow2,
}

/// Where a disk is copied to.
#[derive(Clone, Debug)]
pub enum Output {
    /// A new raw file, sparse unless it is to have its space at once.
    Raw(Preallocation),
    /// A new image; the options' size is not looked at.
    Qcow2(Box<CreateOptions>),
    /// A raw file or device that exists and is written over.
    ExistingRaw,
    /// An image that exists and is written over.
    ExistingQcow2,
}

impl Output {
    fn is_raw(&self) -> bool {
        matches!(self, Self::Raw(_) | Self::ExistingRaw)
    }
}

/// How a disk is copied.
#[derive(Debug)]
pub struct Options<'a> {
    /// Where to.
    pub path: PathBuf,
    /// What is there, or is to be made.
    pub output: Output,
    /// The passphrase of a new output that is encrypted.
    pub key: Option<Secret>,
    /// Write compressed clusters; at this level, or at one that makes them no
    /// larger than qemu-img does.
    pub compress: Option<Option<i32>>,
    /// Zeros at least this many bytes long take no space, 512 or more; 0 makes
    /// everything take its space.
    pub sparse: u64,
    /// An existing output reads as zeros everywhere.
    pub target_is_zero: bool,
    /// Threads that read and compress.
    pub workers: usize,
    /// Data is written by whoever has it first: the result is not the same
    /// each time.
    pub out_of_order: bool,
    /// Which dirty bitmaps go along; None for none.
    pub bitmaps: Option<Bitmaps>,
    /// How fast data is written at most.
    pub rate: Option<Rate>,
    /// How the output and what is below it are opened: policy, keys, cache, and
    /// what is durable when.
    pub chain: chain::Options,
    /// The copy ends early with an error when this becomes true.
    pub cancel: &'a AtomicBool,
}

/// Copies the disk in `source`; `progress` is told how many bytes of how many
/// are done.
///
/// A new output gets its name when it is whole and durable: whatever happens
/// before leaves a file of that name as it was. What was made under another
/// name is removed when the copy fails, and stays only when the process is
/// killed or the power cut: it begins with a dot and ends in `.part`. The same
/// holds for an external data file of the output, which gets its name just
/// before the image does, and loses it when the image does not get its own.
pub fn convert(
    source: &Source,
    options: &Options<'_>,
    progress: impl FnMut(u64, u64),
) -> Result<()> {
    check(options)?;
    bitmaps::check(source, options)?;
    let target = target::Target::make(source, options)?;
    copy::copy(source, &target, options, progress)?;
    bitmaps::copy(source, &target, options)?;
    target.finish()
}

fn check(options: &Options<'_>) -> Result<()> {
    let usage = |what: &str| Err(Error::new(ErrorKind::Usage, what).path(&options.path));
    if options.compress.is_some() {
        match &options.output {
            output if output.is_raw() => {
                return usage("Compression not supported for this file format");
            }
            Output::Qcow2(image) if image.preallocation != Preallocation::Off => {
                return usage("Compression and preallocation not supported at the same time");
            }
            _ => {}
        }
    }
    Ok(())
}
