//! A throw-away image over a chain: it takes what is written, in a file that
//! has no name and is gone when it is closed, however that happens.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::Chain;
use super::create::write;
use crate::crypto::{Effort, Secret, luks1};
use crate::error::{Error, Result};
use crate::qcow2::create::CreateOptions;
use crate::qcow2::{Image, ImageOptions};
use crate::storage::{CacheMode, Locks, OpenOptions, Storage};

/// Puts an empty image over the chain, in a file in `folder`.
pub(super) async fn cover(below: Chain, folder: &Path, options: &ImageOptions) -> Result<Chain> {
    let named = |e: Error| e.path(folder);
    let file = nameless_file(folder)
        .map_err(|e| Error::io("make a file for what will be written", e))
        .map_err(|e| named(e).cure("name another folder"))?;
    let how = OpenOptions {
        writable: true,
        // What need not last goes to the disk only where memory is short.
        cache: CacheMode::Writeback,
        locks: Locks::None,
    };
    let storage = Storage::from_fd(file, folder, &how)?.short_lived();
    let mut image = CreateOptions::new(below.layers()[0].size());
    let mut options = options.clone();
    options.keys = None;
    if below.is_encrypted() {
        // What is copied from below must not get onto a disk in the clear.
        // Nobody else will ever need the key.
        let key = Secret::random()?;
        let format = luks1::Format {
            effort: Effort(Duration::ZERO),
            ..luks1::Format::default()
        };
        image.luks = Some(format.make(key.expose())?.into());
        options.keys = Some(Arc::new(key));
    }
    write(&storage, &image.build().map_err(named)?).await?;
    let top = Image::open(storage, &options).await?;
    Ok(below.covered_by(top))
}

fn nameless_file(folder: &Path) -> io::Result<OwnedFd> {
    let mut how = File::options();
    how.read(true).write(true).mode(0o600);
    let made = how
        .clone()
        .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
        .open(folder);
    match made {
        Ok(file) => return Ok(file.into()),
        // Not every file system can.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        Err(e) => return Err(e),
    }
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!(".qcow2-ublk-{}-{number}", std::process::id());
        let path = folder.join(name);
        match how.create_new(true).open(&path) {
            Ok(file) => {
                fs::remove_file(&path)?;
                return Ok(file.into());
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}
