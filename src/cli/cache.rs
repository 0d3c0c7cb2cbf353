//! Cache modes with qemu-img's names: which cache, and what is durable when.

use crate::chain;
use crate::qcow2::Barrier;
use crate::storage::CacheMode;

/// A cache mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Cache {
    /// Direct I/O: the host does not cache the file
    None,
    /// The host's page cache
    Writeback,
    /// The page cache, and each write is durable before the next
    Writethrough,
    /// Direct I/O, and each write is durable before the next
    Directsync,
    /// The page cache, and nothing is made durable: a crash of the host may
    /// damage the file, even after the end
    Unsafe,
}

impl Cache {
    fn mode(self) -> CacheMode {
        match self {
            Self::None | Self::Directsync => CacheMode::None,
            Self::Writeback | Self::Writethrough | Self::Unsafe => CacheMode::Writeback,
        }
    }

    fn barrier(self) -> Barrier {
        match self {
            Self::None | Self::Writeback => Barrier::Batched,
            Self::Writethrough | Self::Directsync => Barrier::Full,
            Self::Unsafe => Barrier::None,
        }
    }

    /// For what is read.
    pub(super) fn reading(this: Option<Self>, options: chain::Options) -> chain::Options {
        let cache = this.map_or(options.cache, Self::mode);
        chain::Options { cache, ..options }
    }

    /// For what is written.
    pub(super) fn writing(this: Option<Self>, options: chain::Options) -> chain::Options {
        let mut options = Self::reading(this, options);
        if let Some(this) = this {
            options.image.barrier = this.barrier();
        }
        options
    }
}
