//! The one error of the crate: a few kinds, what was being done to which
//! file, and where; and the one table from kind to errno and exit code.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of thing went wrong; decides the errno a block request gets and
/// the exit code of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller asked for something that is not inside the image.
    OutOfBounds,
    /// An argument, option or configuration value is wrong.
    Usage,
    /// The file is not a qcow2 image or its header breaks the specification.
    InvalidFormat,
    /// The image uses a feature that is not implemented; it is named.
    Unsupported,
    /// The image's metadata contradicts itself.
    Corrupt,
    /// A file the image refers to may not be opened under the current policy.
    Policy,
    /// Something named does not exist.
    NotFound,
    /// The image is locked by, or the device is used by, somebody else.
    Busy,
    /// The caller lacks the privilege.
    Permission,
    /// The object was opened read-only or has been made so.
    ReadOnly,
    /// The host ran out of space.
    NoSpace,
    /// The host's kernel or file system reported an error.
    Io,
    /// An earlier failure (a failed fsync) makes every later write suspect;
    /// the image must be closed and opened again.
    Latched,
    /// The kernel has no ublk driver, or it lacks what is needed.
    Driver,
    /// A command did not finish within its time limit.
    Timeout,
}

impl ErrorKind {
    /// The errno a block request gets for this kind, unless the error carries
    /// one of its own (see [`Error::errno`]).
    pub fn errno(self) -> i32 {
        match self {
            Self::OutOfBounds | Self::Usage | Self::InvalidFormat => libc::EINVAL,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::Corrupt | Self::Io | Self::Latched => libc::EIO,
            Self::Policy | Self::Permission => libc::EPERM,
            Self::NotFound => libc::ENOENT,
            Self::Busy => libc::EBUSY,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::Driver => libc::ENODEV,
            Self::Timeout => libc::ETIMEDOUT,
        }
    }

    /// The exit code of a command that fails with this kind. `check` has
    /// codes of its own, those of `qemu-img check`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage | Self::OutOfBounds => 1,
            Self::Permission => 2,
            Self::NotFound | Self::Driver => 4,
            Self::Busy => 5,
            _ => 1,
        }
    }
}

/// An error: kind, what happened, to which file and where in it, how to cure
/// it, and the error underneath.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    cure: Option<String>,
    source: Option<io::Error>,
    /// See [`Error::is_metadata`].
    metadata: bool,
}

impl Error {
    /// A new error. `message` is a clause without a final stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            cure: None,
            source: None,
            metadata: false,
        }))
    }

    /// An error of the host, of the kind its errno calls for; `doing` says
    /// what was attempted ("read the refcount table").
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::Permission,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::EBUSY) => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        let mut error = Self::new(kind, doing);
        error.0.source = Some(source);
        error
    }

    /// Metadata that cannot be right, at `offset` of the image file.
    pub fn corrupt(message: impl Into<String>, offset: u64) -> Self {
        let mut error = Self::new(ErrorKind::Corrupt, message).at(offset);
        error.0.metadata = true;
        error
    }

    /// Names the file; the innermost name wins.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Names the byte offset in the file; the innermost one wins.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// The offset counted from elsewhere: `base` is where 0 was meant to be.
    #[must_use]
    pub fn shift(mut self, base: u64) -> Self {
        self.0.offset = self.0.offset.map(|offset| offset.saturating_add(base));
        self
    }

    /// Says what the user can do about it, as a sentence without a final stop.
    #[must_use]
    pub fn cure(mut self, cure: impl Into<String>) -> Self {
        self.0.cure.get_or_insert_with(|| cure.into());
        self
    }

    /// Says what was being done, before what went wrong with it.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file, where one is named.
    pub fn file(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Metadata of an image contradicts itself, as opposed to data in it that
    /// cannot be understood.
    pub fn is_metadata(&self) -> bool {
        self.0.metadata
    }

    /// What the user can do about it, when there is something.
    pub fn cure_text(&self) -> Option<&str> {
        self.0.cure.as_deref()
    }

    /// The errno for a block request: the host's own where there is one.
    pub fn errno(&self) -> i32 {
        self.0
            .source
            .as_ref()
            .and_then(io::Error::raw_os_error)
            .unwrap_or_else(|| self.0.kind.errno())
    }

    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        self.0.kind.exit_code()
    }

    /// An equal error for another waiter of the same failed operation.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind,
            message: self.0.message.clone(),
            path: self.0.path.clone(),
            offset: self.0.offset,
            cure: self.0.cure.clone(),
            source: self.0.source.as_ref().map(|source| {
                source.raw_os_error().map_or_else(
                    || io::Error::from(source.kind()),
                    io::Error::from_raw_os_error,
                )
            }),
            metadata: self.0.metadata,
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.0.message)?;
        if let Some(offset) = self.0.offset {
            write!(f, " (at offset {offset:#x})")?;
        }
        if let Some(source) = &self.0.source {
            match source.raw_os_error() {
                Some(errno) => write!(f, ": {}", errno_text(errno))?,
                None => write!(f, ": {source}")?,
            }
        }
        Ok(())
    }
}

/// The system's words for an errno, without the number that `io::Error` adds.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        if let Some(cure) = &self.0.cure {
            write!(f, " [{cure}]")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn innermost_context_wins_and_host_errno_is_kept() {
        let error = Error::io(
            "write the L2 table",
            io::Error::from_raw_os_error(libc::ENOSPC),
        )
        .path("inner")
        .at(4096)
        .path("outer")
        .at(0);
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), libc::ENOSPC);
        assert!(
            error
                .to_string()
                .starts_with("inner: write the L2 table (at offset 0x1000): ")
        );
        assert_eq!(error.duplicate().errno(), libc::ENOSPC);
    }
}
