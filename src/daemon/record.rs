//! What is to be known about a running device beyond what the driver knows:
//! `/run/qcow2-ublk/ublkbN.json`, readable by root only.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::storage::CacheMode;
use crate::ublk::Device;

const FOLDER: &str = "/run/qcow2-ublk";
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
    pub(super) fn new(image: &Path, device: &Device, cache: CacheMode) -> Result<Self> {
        let info = device.handle().info()?;
        let pid = std::process::id();
        Ok(Self {
            version: VERSION,
            id: device.id(),
            pid,
            started: start_time(pid).unwrap_or(0),
            image: image.to_owned(),
            data_path: device.data_path().to_string(),
            queues: info.queues,
            depth: info.depth,
            cache: match cache {
                CacheMode::None => "none".to_owned(),
                CacheMode::Writeback => "writeback".to_owned(),
            },
            read_only: info.read_only,
            failure: None,
        })
    }

    /// Writes it where [`Self::all`] finds it.
    pub(super) fn store(&self) -> Result<()> {
        self.store_in(Path::new(FOLDER))
    }

    /// Notes that the device ended badly.
    pub(super) fn fail(self, error: &Error) {
        let failed = Self {
            failure: Some(error.to_string()),
            ..self
        };
        if let Err(error) = failed.store() {
            tracing::warn!("{error}");
        }
    }

    fn store_in(&self, folder: &Path) -> Result<()> {
        let failed = |e| Error::io("record the device", e).path(folder);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed)?;
        // Whoever made it, and with whatever mode.
        fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(failed)?;
        let text = serde_json::to_vec_pretty(self).map_err(|e| failed(e.into()))?;
        // Under another name first: a reader sees all of it or nothing.
        let new = folder.join(format!(".ublkb{}.new", self.id));
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&new, path(folder, self.id)))
            .map_err(failed)
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
        own.store_in(&folder).unwrap();
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
        own.remove_in(&folder);
        assert!(Record::all_in(&folder).is_empty());
    }
}
