//! File names as images record them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Where a name recorded in the image `inside` leads: names are relative to
/// the image that records them. `json:` and protocol names are refused, as is
/// everything else that is not plainly a path.
pub(super) fn resolve(name: &OsStr, inside: &Path) -> Result<PathBuf> {
    let cure = "record a plain file name, with `qcow2-ublk rebase -u -F FORMAT -b FILE`";
    resolved(name, inside).map_err(|e| e.cure(cure))
}

/// The same for the name of an external data file.
pub(super) fn resolve_data(name: &OsStr, inside: &Path) -> Result<PathBuf> {
    let cure = "record a plain file name, with `qemu-img amend -o data_file=FILE`";
    resolved(name, inside).map_err(|e| e.cure(cure))
}

fn resolved(name: &OsStr, inside: &Path) -> Result<PathBuf> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(refused(inside, "an empty name, or one with a NUL byte"));
    }
    // What QEMU takes for a protocol: a colon before any slash.
    let before_slash = bytes.split(|&b| b == b'/').next().unwrap_or(bytes);
    if before_slash.contains(&b':') {
        let what = format!("{} (a protocol or json: name)", name.display());
        return Err(refused(inside, &what));
    }
    let folder = inside.parent().unwrap_or_else(|| Path::new(""));
    Ok(normalize(&folder.join(name)))
}

fn refused(inside: &Path, what: &str) -> Error {
    Error::new(
        ErrorKind::Policy,
        format!("the image refers to {what}, which is not opened"),
    )
    .path(inside)
}

/// Removes `.` and `..` without looking at the file system: the policy must
/// judge the name that is opened.
pub(super) fn normalize(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if parts.file_name().is_some() => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_their_image() {
        let inside = Path::new("/images/vm/top.qcow2");
        let resolved = |name: &str| resolve(OsStr::new(name), inside);
        assert_eq!(resolved("base").unwrap(), Path::new("/images/vm/base"));
        assert_eq!(resolved("../base").unwrap(), Path::new("/images/base"));
        assert_eq!(resolved("/etc/x").unwrap(), Path::new("/etc/x"));
        assert_eq!(resolved("./a:b").unwrap(), Path::new("/images/vm/a:b"));
        for bad in ["json:{}", "nbd://host", "file:base", "fat:/etc", ""] {
            assert_eq!(
                resolved(bad).unwrap_err().kind(),
                ErrorKind::Policy,
                "{bad}"
            );
        }
    }
}
