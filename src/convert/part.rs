//! New files, under a name of their own beside the wanted one until they are
//! whole and durable.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::Source;
use super::target::refuse_input;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{OpenOptions, Storage};

/// A file under its first name.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) name: PathBuf,
    /// The file that has the name until then, with its locks.
    old: Option<Storage>,
    state: State,
}

/// Which of its names a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first.
    First,
    /// Its own, which no file had.
    Named,
    /// Its own; the old file has the first.
    Exchanged,
    /// Its own, whatever happens.
    Final,
}

impl Drop for Part {
    fn drop(&mut self) {
        if matches!(self.state, State::First | State::Exchanged) {
            // What led here is the error that counts.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives all of them their names, durably, or none: the last one decides. Only
/// a power cut comes between.
pub(super) fn name_all(mut parts: Vec<Part>) -> Result<()> {
    for index in 0..parts.len() {
        let last = index + 1 == parts.len();
        let Err(error) = parts[index].take_name(last) else {
            continue;
        };
        if parts[index].state != State::Final {
            for part in parts.iter_mut().rev() {
                part.give_name_back();
            }
        }
        return Err(error);
    }
    Ok(())
}

impl Part {
    /// A first name for what is to be `path`.
    pub(super) fn new(path: &Path, source: &Source) -> Result<Self> {
        let failed = |doing: &str, e| Error::io(doing, e).path(path);
        // Links are followed, as writing to the name would.
        let name = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => {
                fs::canonicalize(path).map_err(|e| failed("follow the link", e))?
            }
            _ => path.to_owned(),
        };
        let old = match fs::metadata(&name) {
            Ok(metadata) => {
                check_replaceable(&metadata, path)?;
                refuse_input(source, path, (metadata.dev(), metadata.ino()))?;
                // Nobody uses it now, nor until it is replaced.
                Some(Storage::open(&name, &OpenOptions::read_write())?)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed("examine the file", e)),
        };
        let Some(file_name) = name.file_name() else {
            return Err(Error::new(ErrorKind::Usage, "this is not a file name").path(path));
        };
        for attempt in 0..1000_u32 {
            let mut part = OsString::from(".");
            part.push(file_name);
            part.push(format!(".{}-{attempt}.part", std::process::id()));
            let part = name.with_file_name(part);
            match File::options().write(true).create_new(true).open(&part) {
                Ok(_) => {
                    return Ok(Self {
                        path: part,
                        name,
                        old,
                        state: State::First,
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed("make the file", e)),
            }
        }
        Err(Error::new(
            ErrorKind::Busy,
            "there is no free name for a new file beside it",
        )
        .path(path))
    }

    /// Gives the file its name, durably; for good if it is the last one.
    fn take_name(&mut self, last: bool) -> Result<()> {
        let failed = |doing: &str, e| Error::io(doing, e).path(&self.name);
        if let Some(old) = &self.old {
            let metadata =
                fs::metadata(old.path()).map_err(|e| failed("examine the old file", e))?;
            fs::set_permissions(&self.path, metadata.permissions())
                .map_err(|e| failed("keep the permissions of the old file", e))?;
            // Only root may give files away; others keep the new one.
            let _ =
                std::os::unix::fs::chown(&self.path, Some(metadata.uid()), Some(metadata.gid()));
        }
        // Not every file system can exchange names; then the old file is lost.
        if !last && self.old.is_some() && self.exchange().is_ok() {
            self.state = State::Exchanged;
        } else {
            fs::rename(&self.path, &self.name).map_err(|e| failed("give the file its name", e))?;
            self.state = match &self.old {
                None if !last => State::Named,
                _ => State::Final,
            };
        }
        let folder = match self.name.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| failed("make the name durable", e))
    }

    fn exchange(&self) -> nix::Result<()> {
        let flags = RenameFlags::RENAME_EXCHANGE;
        renameat2(AT_FDCWD, &self.path, AT_FDCWD, &self.name, flags)
    }

    /// What has the name is what had it before.
    fn give_name_back(&mut self) {
        match self.state {
            State::First | State::Final => {}
            State::Named => {
                // What led here is the error that counts.
                let _ = fs::remove_file(&self.name);
            }
            State::Exchanged => match self.exchange() {
                Ok(()) => self.state = State::First,
                Err(error) => {
                    self.state = State::Final;
                    tracing::error!(
                        "cannot give {} its name back, {}: {error}",
                        self.path.display(),
                        self.name.display()
                    );
                }
            },
        }
    }
}

fn check_replaceable(metadata: &Metadata, path: &Path) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let error = if metadata.file_type().is_block_device() {
        Error::new(ErrorKind::Usage, "a block device exists already").cure("write over it with -n")
    } else {
        Error::new(ErrorKind::Usage, "only a regular file can be made anew")
    };
    Err(error.path(path))
}
