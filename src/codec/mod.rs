//! Compressed clusters: one cluster in, one deflate or zstd stream out, and
//! back. Knows nothing of images, offsets or files.
//!
//! The work's state is kept for each thread and reused: after a thread's
//! first call nothing is allocated.
#![forbid(unsafe_code)]

mod deflate;
#[cfg(test)]
mod inflate_oracle;
#[cfg(test)]
mod tests;
mod zstd;

use crate::error::{Error, ErrorKind, Result};

/// How compressed clusters of an image are compressed (header byte 104).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// A raw deflate stream, RFC 1951; every image before 2020.
    #[default]
    Deflate,
    /// One or more zstd frames.
    Zstd,
}

impl CompressionType {
    /// The number in the header, or `None` for one the format does not define.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Deflate),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The number in the header.
    pub fn raw(self) -> u8 {
        match self {
            Self::Deflate => 0,
            Self::Zstd => 1,
        }
    }

    /// The name users and qemu-img give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

impl CompressionType {
    /// The level that gives the usual balance of speed and size.
    pub fn default_level(self) -> i32 {
        match self {
            Self::Deflate => 6,
            Self::Zstd => 3,
        }
    }
}

/// Inflates one cluster: fills `output` from the stream at the beginning of
/// `input`.
///
/// The format does not store a stream's length, so `input` usually goes on
/// behind it, with anything: that is ignored.
///
/// # Errors
///
/// `Corrupt` if the stream is damaged or yields less than a cluster; `output`
/// holds garbage then.
pub fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<()> {
    match kind {
        CompressionType::Deflate => deflate::decompress(input, output),
        CompressionType::Zstd => zstd::decompress(input, output),
    }
    .map_err(|damage| {
        let message = match damage {
            Damage::Invalid => "the data is damaged",
            Damage::Short => "the data ends before the cluster is full",
            Damage::Long => "the data is more than a cluster",
        };
        Error::new(
            ErrorKind::Corrupt,
            format!("cannot decompress a {} cluster: {message}", kind.name()),
        )
    })
}

/// Compresses the cluster `input` into the beginning of `output` and returns
/// how many bytes that took.
///
/// `None` if it would not become smaller, or does not fit into `output`: such
/// a cluster is stored as it is. A `level` out of range means the nearest in
/// it; see [`CompressionType::default_level`].
pub fn compress(
    kind: CompressionType,
    level: i32,
    input: &[u8],
    output: &mut [u8],
) -> Option<usize> {
    let limit = output.len().min(input.len().checked_sub(1)?);
    let output = output.get_mut(..limit)?;
    match kind {
        CompressionType::Deflate => deflate::compress(level, input, output),
        CompressionType::Zstd => zstd::compress(level, input, output),
    }
}

/// What is wrong with a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Invalid,
    Short,
    Long,
}
