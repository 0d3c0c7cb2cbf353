//! What is to be known about a running device beyond what the driver knows:
//! `/run/qcow2-ublk/ublkbN.json`, readable by root only.
//!
//! The process that serves the device writes it before the sandbox is closed.
//! After that it can only write to the file that it has open, and remove it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::storage::CacheMode;
use crate::ublk::Device;

/// Where the records are.
pub(super) const FOLDER: &str = "/run/qcow2-ublk";
const VERSION: u32 = 1;

/// A device of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    version: u32,
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// The process that serves it.
    pub pid: u32,
    /// When that process was started, in the kernel's ticks: tells it from a
    /// later one with the same number.
    started: u64,
    /// The image.
    pub image: PathBuf,
    /// How data moves.
    pub data_path: String,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight in each.
    pub depth: u16,
    /// How the image is read and written.
    pub cache: String,
    /// Writes are refused.
    pub read_only: bool,
    /// Why the image may lack what was not flushed, when the device has ended
    /// that way. Such a record stays, for whoever has ended it.
    #[serde(default)]
    pub failure: Option<String>,
}

impl Record {
    /// Describes a device that this process serves.
    pub(super) fn new(image: &Path, device: &Device, cache: CacheMode, read_only: bool) -> Self {
        let pid = std::process::id();
        Self {
            version: VERSION,
            id: device.id(),
            pid,
            started: start_time(pid).unwrap_or(0),
            image: image.to_owned(),
            data_path: device.data_path().to_string(),
            queues: device.queues(),
            depth: device.depth(),
            cache: match cache {
                CacheMode::None => "none".to_owned(),
                CacheMode::Writeback => "writeback".to_owned(),
            },
            read_only,
            failure: None,
        }
    }

    /// Makes the folder of the records.
    pub(super) fn make_folder() -> Result<()> {
        let folder = Path::new(FOLDER);
        make_folder(folder).map_err(|e| Error::io("make the folder of records", e).path(folder))
    }

    /// Writes it where [`Self::all`] finds it.
    pub(super) fn store(self) -> Result<Stored> {
        self.store_in(Path::new(FOLDER))
    }

    fn store_in(self, folder: &Path) -> Result<Stored> {
        let failed = |e| Error::io("record the device", e).path(folder);
        make_folder(folder).map_err(failed)?;
        let text = self.to_text().map_err(failed)?;
        // Under another name first: a reader sees all of it or nothing.
        let new = folder.join(format!(".ublkb{}.new", self.id));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(failed)?;
        let path = path(folder, self.id);
        file.write_all(&text)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(failed)?;
        Ok(Stored {
            record: self,
            path,
            file,
        })
    }

    fn to_text(&self) -> std::io::Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// The records there are, whether or not their device still is; see
    /// [`Self::is_alive`]. What cannot be read is not there.
    pub fn all() -> Vec<Self> {
        Self::all_in(Path::new(FOLDER))
    }

    fn all_in(folder: &Path) -> Vec<Self> {
        let mut records: Vec<Self> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let record: Self = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
                (record.version == VERSION && entry.path() == path(folder, record.id))
                    .then_some(record)
            })
            .collect();
        records.sort_by_key(|record| record.id);
        records
    }

    /// True while the process that wrote it runs. The record of a process that
    /// was killed stays, and is stale.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Forgets the device, unless another process has recorded its own under
    /// the same number since.
    pub fn remove(&self) {
        self.remove_in(Path::new(FOLDER));
    }

    fn remove_in(&self, folder: &Path) {
        if Self::all_in(folder).contains(self) {
            let _ = fs::remove_file(path(folder, self.id));
        }
    }
}

/// The record of a device that this process serves; dropping it leaves it
/// there.
#[derive(Debug)]
pub(super) struct Stored {
    record: Record,
    path: PathBuf,
    file: File,
}

impl Stored {
    /// Notes that the device ended badly.
    pub(super) fn fail(self, error: &Error) {
        let failed = Record {
            failure: Some(error.to_string()),
            ..self.record
        };
        // Longer than what it replaces, and in one piece.
        let written = failed
            .to_text()
            .and_then(|text| self.file.write_all_at(&text, 0));
        if let Err(error) = written {
            tracing::warn!("cannot record how the device ended: {error}");
        }
    }

    /// Forgets the device, unless another process has recorded its own under
    /// the same number since.
    pub(super) fn remove(self) {
        let same = |named: fs::Metadata| {
            let own = self.file.metadata()?;
            Ok((own.dev(), own.ino()) == (named.dev(), named.ino()))
        };
        let removed = fs::symlink_metadata(&self.path)
            .and_then(same)
            .and_then(|same| {
                if same {
                    fs::remove_file(&self.path)
                } else {
                    Ok(())
                }
            });
        // `list` and `del` know a record whose process is gone.
        if let Err(error) = removed {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn make_folder(folder: &Path) -> std::io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    // Whoever made it, and with whatever mode.
    fs::set_permissions(folder, Permissions::from_mode(0o700))
}

fn path(folder: &Path, id: u32) -> PathBuf {
    folder.join(format!("ublkb{id}.json"))
}

/// When a process was started; none if it is not there or dead already.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields count from behind the name in parentheses, which may hold
    // anything: the state is the third field, the start time the 22nd.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u32) -> Record {
        let pid = std::process::id();
        Record {
            version: VERSION,
            id,
            pid,
            started: start_time(pid).unwrap(),
            image: "/srv/a.qcow2".into(),
            data_path: "copy".to_owned(),
            queues: 1,
            depth: 128,
            cache: "none".to_owned(),
            read_only: false,
            failure: None,
        }
    }

    #[test]
    fn records_come_back_and_the_dead_are_told_from_the_living() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("run");
        assert!(Record::all_in(&folder).is_empty());
        let own = record(3);
        let stored = own.clone().store_in(&folder).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join("ublkb3.json")), 0o600);
        fs::write(folder.join("ublkb4.json"), "nonsense").unwrap();
        assert_eq!(Record::all_in(&folder), vec![own.clone()]);
        assert!(own.is_alive());

        // The same number, another process.
        let stale = Record {
            started: own.started + 1,
            ..own.clone()
        };
        assert!(!stale.is_alive());
        stale.remove_in(&folder);
        assert_eq!(Record::all_in(&folder).len(), 1);
        let error = Error::new(crate::error::ErrorKind::Io, "a disk");
        stored.fail(&error);
        assert_eq!(
            Record::all_in(&folder)[0].failure.as_deref(),
            Some("a disk")
        );

        // Another process has the number now.
        let earlier = own.clone().store_in(&folder).unwrap();
        let later = own.store_in(&folder).unwrap();
        earlier.remove();
        assert_eq!(Record::all_in(&folder).len(), 1);
        later.remove();
        assert!(Record::all_in(&folder).is_empty());
    }
}
