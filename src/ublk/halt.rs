//! Writing back a disk and stopping its device, whoever serves it.

use std::fs::{File, read_to_string};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::control::{Control, Failure, Order, STOP_DEV, Watch, block_path};
use super::steward::{Steward, WRITE_BACK};
use super::{apart, explain};
use crate::error::{Error, ErrorKind, Result};

/// Writes back what the page cache holds of a disk. Gives up when `watch` has
/// seen nothing for `limit`: the disk's server may be stuck.
pub(super) fn write_back(
    id: u32,
    limit: Duration,
    steward: Option<&Arc<Steward>>,
    watch: &mut dyn FnMut() -> Watch,
) -> Result<()> {
    let path = block_path(id);
    let result = match steward {
        Some(steward) => {
            let order = Order {
                code: WRITE_BACK,
                id,
                data: 0,
                path_len: 0,
            };
            let result = steward.run(order, &mut [], limit, watch);
            result.map(|result| -result)
        }
        None => apart::run(limit, watch, || write_back_here(id)),
    };
    match result {
        // The disk is gone, and what it had with it.
        Ok(0 | libc::ENOENT | libc::ENXIO | libc::ENODEV) => Ok(()),
        Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
        Err(Failure::Ring(error)) => Err(error),
        Err(_) => {
            let seconds = limit.as_secs();
            let what = format!("its server has not written anything back for {seconds} seconds");
            return Err(Error::new(ErrorKind::Timeout, what).path(path));
        }
    }
    .map_err(|error| Error::io("write back the page cache", error).path(path))
}

/// Writes back a disk from this process: an errno, or 0.
pub(super) fn write_back_here(id: u32) -> i32 {
    // Opened for reading: the end of a writer would make udev look at the disk
    // once more.
    match File::open(block_path(id)).and_then(|file| file.sync_all()) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Stops a device: its disk goes away once what is in flight is done. Nothing
/// happens to one that is stopped or gone.
pub(super) fn stop(
    id: u32,
    limit: Duration,
    steward: Option<&Arc<Steward>>,
    watch: &mut dyn FnMut() -> Watch,
) -> Result<()> {
    if steward.is_some() {
        return match Control::through(steward, limit)?.stop(id, watch) {
            Ok(()) | Err(Failure::Errno(libc::ENODEV)) => Ok(()),
            Err(failure) => Err(explain::command(STOP_DEV, Some(id), failure)),
        };
    }
    let result = apart::run(limit, watch, || {
        // The limit is the waiting process's.
        let stopped = Control::open(Duration::MAX)
            .map(|mut control| control.stop(id, &mut || Watch::Waiting));
        match stopped {
            Ok(Ok(())) => 0,
            Ok(Err(Failure::Errno(errno))) => errno,
            Ok(Err(_)) => libc::EIO,
            Err(error) => error.errno(),
        }
    });
    let failure = match result {
        Ok(0 | libc::ENODEV) => return Ok(()),
        Ok(errno) => Failure::Errno(errno),
        Err(failure) => failure,
    };
    Err(explain::command(STOP_DEV, Some(id), failure))
}

/// Tells whether a disk gets something done, by its I/O statistics.
#[derive(Debug)]
pub(super) struct Activity {
    path: String,
    done: Vec<u64>,
}

impl Activity {
    pub(super) fn new(id: u32) -> Self {
        let path = format!("/sys/block/ublkb{id}/stat");
        Self {
            done: done(&read_to_string(&path).unwrap_or_default()),
            path,
        }
    }

    pub(super) fn look(&mut self) -> Watch {
        let now = done(&read_to_string(&self.path).unwrap_or_default());
        if now == self.done {
            return Watch::Waiting;
        }
        self.done = now;
        Watch::Progress
    }
}

/// The completed reads, writes, discards and flushes of a disk. The times
/// beside them (Documentation/block/stat.rst) go on while requests are stuck.
fn done(stat: &str) -> Vec<u64> {
    let fields: Vec<_> = stat.split_whitespace().collect();
    [0, 4, 11, 15]
        .iter()
        .filter_map(|&field| fields.get(field)?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuck_requests_are_no_activity() {
        let before = "5 0 40 7 3 0 24 9 1 20 16 2 0 64 1 4 2\n";
        let stuck = "5 0 40 7 3 0 24 9 1 920 1916 2 0 64 1 4 2\n";
        let served = "5 0 40 7 4 0 32 9 1 920 1916 2 0 64 1 4 2\n";
        assert_eq!(done(before), [5, 3, 2, 4]);
        assert_eq!(done(before), done(stuck));
        assert_ne!(done(before), done(served));
        assert!(done("").is_empty());
    }
}
