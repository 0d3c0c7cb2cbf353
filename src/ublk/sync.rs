//! Writing back a disk's page cache, with an end to the waiting.

use std::fs::{File, read_to_string};
use std::io;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::control::{Watch, block_path};
use crate::error::{Error, ErrorKind, Result};

/// Writes back what the page cache holds of a disk. Gives up when the disk has
/// not moved for `limit`: its server may be stuck.
pub(super) fn disk(id: u32, limit: Duration) -> Result<()> {
    let path = block_path(id);
    let (sender, receiver) = mpsc::channel();
    let file = path.clone();
    // A thread, because nothing ends an fsync early. When it is stuck it stays.
    let thread = std::thread::Builder::new()
        .name("ublk-sync".to_owned())
        .spawn(move || {
            // Opened for reading: the end of a writer would make udev look at
            // the disk once more.
            let result = File::open(file).and_then(|file| file.sync_all());
            let _ = sender.send(result);
        });
    if let Err(error) = thread {
        return Err(Error::io("start a thread", error));
    }
    let mut activity = Activity::new(id);
    let mut since = Instant::now();
    let result = loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(result) => break result,
            Err(_) if activity.look() == Watch::Progress => since = Instant::now(),
            Err(_) if since.elapsed() < limit => {}
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!(
                        "its server has not written anything back for {} seconds",
                        limit.as_secs()
                    ),
                )
                .path(path));
            }
        }
    };
    match result {
        // The disk is gone, and what it had with it.
        Err(error) if is_gone(&error) => Ok(()),
        result => result.map_err(|error| Error::io("write back the page cache", error).path(path)),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)
    )
}

/// Tells whether a disk is doing something, by its I/O statistics.
#[derive(Debug)]
pub(super) struct Activity {
    path: String,
    last: Option<String>,
}

impl Activity {
    pub(super) fn new(id: u32) -> Self {
        let path = format!("/sys/block/ublkb{id}/stat");
        Self {
            last: read_to_string(&path).ok(),
            path,
        }
    }

    pub(super) fn look(&mut self) -> Watch {
        let now = read_to_string(&self.path).ok();
        if now == self.last {
            return Watch::Waiting;
        }
        self.last = now;
        Watch::Progress
    }
}
