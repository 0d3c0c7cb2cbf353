//! What there is to be covered, by name.

use std::collections::BTreeSet;

use super::op::{Action, Request};
use super::shape::{Data, Shape};

/// All that the search covers: a bounded one too has each at least once.
pub(crate) const ALL: &[&str] = &[
    "version 2",
    "version 3",
    "clusters of 512",
    "clusters of 1024",
    "clusters of 4096",
    "clusters of 16384",
    "clusters of 65536",
    "refcounts of 1",
    "refcounts of 2",
    "refcounts of 4",
    "refcounts of 8",
    "refcounts of 16",
    "refcounts of 32",
    "refcounts of 64",
    "ext",
    "lazy",
    "data",
    "raw",
    "luks 1",
    "luks 2",
    "over-raw",
    "over-qcow2",
    "metadata",
    "falloc",
    "full-space",
    "zstd",
    "tiny",
    "full",
    "barrier-none",
    "barrier-metadata",
    "barrier-full",
    "nopunch",
    "detect",
    "detect-unmap",
    "direct I/O",
    "several queues",
    "several tasks",
    "write",
    "write of zeros",
    "zero",
    "zero and unmap",
    "discard",
    "compressed write",
    "flush",
    "write back",
    "write with FUA",
    "zero with FUA",
    "reopen",
    "snapshot",
    "delete a snapshot",
    "apply a snapshot",
    "snapshot while closed",
    "delete a snapshot while closed",
    "apply a snapshot while closed",
    "grow",
    "shrink",
    "add a bitmap",
    "remove a bitmap",
    "enable a bitmap",
    "disable a bitmap",
    "clear a bitmap",
    "another refcount width",
    "another version",
    "lazy refcounts on or off",
    "commit",
    "die",
    "repair of leaks",
    "add a key",
    "remove a key",
    "grow while in use",
    "add a bitmap while in use",
    "remove a bitmap while in use",
    "enable a bitmap while in use",
    "disable a bitmap while in use",
    "clear a bitmap while in use",
];

pub(crate) fn of_shape(shape: &Shape) -> BTreeSet<String> {
    let mut found: BTreeSet<String> = shape
        .to_string()
        .split_whitespace()
        .filter(|word| !word.contains('=') && !word.starts_with('v'))
        .map(str::to_owned)
        .collect();
    found.insert(format!("version {}", shape.version));
    found.insert(format!("clusters of {}", shape.cluster));
    found.insert(format!("refcounts of {}", shape.refcount_bits));
    if shape.luks != 0 {
        found.insert(format!("luks {}", shape.luks));
    }
    if shape.alignment > 1 {
        found.insert("direct I/O".to_owned());
    }
    if shape.queues > 1 {
        found.insert("several queues".to_owned());
    }
    debug_assert!(shape.data != Data::File || found.contains("data"));
    found
}

pub(crate) fn of_request(request: Request) -> &'static str {
    match request {
        Request::Write { fua: true, .. } => "write with FUA",
        Request::Write { .. } => "write",
        Request::Nulls { .. } => "write of zeros",
        Request::Zero { fua: true, .. } => "zero with FUA",
        Request::Zero { unmap: true, .. } => "zero and unmap",
        Request::Zero { .. } => "zero",
        Request::Discard { .. } => "discard",
        Request::Compressed { .. } => "compressed write",
        Request::Flush => "flush",
        Request::WriteBack => "write back",
        Request::Live(action) => match action {
            Action::Resize(_) => "grow while in use",
            Action::Bitmap(..) => "add a bitmap while in use",
            Action::Unbitmap(_) => "remove a bitmap while in use",
            Action::Enable(_) => "enable a bitmap while in use",
            Action::Disable(_) => "disable a bitmap while in use",
            Action::Clear(_) => "clear a bitmap while in use",
            _ => unreachable!("requests are not met by {action}"),
        },
    }
}

pub(crate) fn of_action(action: Action, grows: bool) -> &'static str {
    match action {
        Action::Reopen => "reopen",
        Action::Snapshot(_) => "snapshot",
        Action::Unsnapshot(_) => "delete a snapshot",
        Action::Apply(_) => "apply a snapshot",
        Action::OfflineSnapshot(_) => "snapshot while closed",
        Action::OfflineUnsnapshot(_) => "delete a snapshot while closed",
        Action::OfflineApply(_) => "apply a snapshot while closed",
        Action::Resize(_) if grows => "grow",
        Action::Resize(_) => "shrink",
        Action::Bitmap(..) => "add a bitmap",
        Action::Unbitmap(_) => "remove a bitmap",
        Action::Enable(_) => "enable a bitmap",
        Action::Disable(_) => "disable a bitmap",
        Action::Clear(_) => "clear a bitmap",
        Action::Width(_) => "another refcount width",
        Action::Version(_) => "another version",
        Action::Lazy(_) => "lazy refcounts on or off",
        Action::Commit => "commit",
        Action::Die => "die",
        Action::Repair => "repair of leaks",
        Action::Key(_) => "add a key",
        Action::Unkey(_) => "remove a key",
    }
}
