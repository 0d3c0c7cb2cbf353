//! Compressed clusters: one cluster in, one deflate or zstd stream out, and
//! back. Knows nothing of images, offsets or files.

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
