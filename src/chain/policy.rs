//! Which files an image may make us open. The image may be a stranger's: by
//! default it reaches no further than its own folder.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::name::normalize;
use crate::error::{Error, ErrorKind, Result};

/// What may be opened on an image's word.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Any file, wherever.
    pub trust_chain: bool,
    /// Files in these folders and below, besides the image's own folder.
    pub allow_paths: Vec<PathBuf>,
}

impl Policy {
    /// Opens a file that the image `inside` refers to, read-only or also for
    /// writing.
    ///
    /// The kernel keeps the resolution inside the allowed folder: a link that
    /// leads out of it is refused, however the folder changes meanwhile.
    pub(super) fn open(&self, path: &Path, inside: &Path, writable: bool) -> Result<OwnedFd> {
        // Something else than a file must not be able to block us.
        let mut extra = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let is_device = |path| {
            std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
        };
        if writable && is_device(path) {
            // Not one that the host uses itself.
            extra |= OFlag::O_EXCL;
        }
        if self.trust_chain {
            let file = File::options()
                .read(true)
                .write(writable)
                .custom_flags(extra.bits())
                .open(path)
                .map_err(|e| open_error(e, inside, path))?;
            return Ok(file.into());
        }
        let wanted = absolute(path)?;
        let own = inside.parent().unwrap_or_else(|| Path::new(""));
        for folder in std::iter::once(own).chain(self.allow_paths.iter().map(PathBuf::as_path)) {
            let folder = absolute(folder)?;
            let Ok(below) = wanted.strip_prefix(&folder) else {
                continue;
            };
            let dir = File::options()
                .read(true)
                .custom_flags(OFlag::O_DIRECTORY.bits())
                .open(&folder)
                .map_err(|e| open_error(e, inside, &folder))?;
            let access = if writable {
                OFlag::O_RDWR
            } else {
                OFlag::O_RDONLY
            };
            let how = OpenHow::new()
                .flags(access | OFlag::O_CLOEXEC | extra)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            return match openat2(&dir, below, how) {
                Ok(fd) => Ok(fd),
                Err(Errno::EXDEV) => Err(refused(path, inside)),
                Err(errno) => Err(open_error(errno.into(), inside, path)),
            };
        }
        Err(refused(path, inside))
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    // An empty path is the current folder.
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    std::path::absolute(path)
        .map(|path| normalize(&path))
        .map_err(|e| Error::io("find the file", e).path(path))
}

fn refused(path: &Path, inside: &Path) -> Error {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    Error::new(
        ErrorKind::Policy,
        format!(
            "the image refers to {}, which is outside its folder",
            path.display()
        ),
    )
    .path(inside)
    .cure(format!(
        "if that is right, allow it with --allow-path {} or --trust-chain",
        folder.display()
    ))
}

fn open_error(error: std::io::Error, inside: &Path, path: &Path) -> Error {
    Error::io(
        format!("cannot open {}, which the image refers to", path.display()),
        error,
    )
    .path(inside)
}
