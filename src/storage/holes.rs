//! Where a file has data and where it only says so: holes read as zeros
//! without being read.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Storage;
use super::backend::Backend;
use crate::error::{Error, Result};

/// What a part of a file is, up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// False for a hole: it reads as zeros.
    pub data: bool,
    /// Where that ends, in bytes; `u64::MAX` for what lies past the end of
    /// the file.
    pub end: u64,
}

impl Storage {
    /// What is at byte `offset`: data or a hole, and up to where. Where the
    /// host does not tell, all of the file is data.
    pub fn extent_at(&self, offset: u64) -> FileExtent {
        let len = self.len();
        if offset >= len {
            return FileExtent {
                data: false,
                end: u64::MAX,
            };
        }
        let all = FileExtent {
            data: true,
            end: len,
        };
        let Backend::Host(host) = &self.backend else {
            return all;
        };
        let Ok(start) = i64::try_from(offset) else {
            return all;
        };
        let seek = |whence| {
            lseek(host.file().as_fd(), start, whence)
                .map(|at| u64::try_from(at).unwrap_or_default())
        };
        if self.is_block_device() {
            return all;
        }
        match seek(Whence::SeekData) {
            Ok(data) if data > offset => FileExtent {
                data: false,
                end: data,
            },
            Ok(_) => FileExtent {
                data: true,
                end: seek(Whence::SeekHole).map_or(len, |hole| hole.max(offset + 1)),
            },
            Err(Errno::ENXIO) => FileExtent {
                data: false,
                end: u64::MAX,
            },
            Err(_) => all,
        }
    }

    /// Bytes that the file takes up on the host; for a block device 0, as the
    /// host has it.
    pub fn allocated_bytes(&self) -> Result<u64> {
        match &self.backend {
            Backend::Host(host) => host
                .file()
                .metadata()
                .map(|metadata| metadata.blocks().saturating_mul(512))
                .map_err(|e: io::Error| Error::io("examine the file", e).path(self.path())),
            Backend::Sim(_) => Ok(self.len()),
        }
    }
}
