//! What the driver knows: its features, its devices.

use std::fmt;
use std::fs;

use super::control::{Control, TIME_LIMIT};
use super::datapath::DataPath;
use super::params::SECTOR;
use super::uapi::{Features, UBLK_ATTR_READ_ONLY, UBLK_PARAM_TYPE_BASIC};
use crate::error::{ErrorKind, Result};

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Not started, or stopped: there is no disk.
    Dead,
    /// Served.
    Live,
    /// Its server is gone, and I/O waits for the next one.
    Quiesced,
    /// Its server is gone, and I/O fails until the next one comes.
    FailIo,
    /// One we do not know.
    Other(u16),
}

impl From<u16> for State {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Dead,
            1 => Self::Live,
            2 => Self::Quiesced,
            3 => Self::FailIo,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dead => f.write_str("dead"),
            Self::Live => f.write_str("live"),
            Self::Quiesced => f.write_str("quiesced"),
            Self::FailIo => f.write_str("failing"),
            Self::Other(number) => write!(f, "state {number}"),
        }
    }
}

/// The driver's record of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether it is served.
    pub state: State,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight in each.
    pub depth: u16,
    /// The longest read or write, in bytes.
    pub max_request: u32,
    /// Its features.
    pub features: Features,
    /// The best data path these features allow.
    pub data_path: DataPath,
    /// The process that serves it.
    pub pid: Option<u32>,
    /// Its size in bytes; 0 before it is known.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
}

impl DeviceInfo {
    pub(super) fn read(control: &mut Control, id: u32) -> Result<Self> {
        let info = control.info(id)?;
        // There are none before the first SET_PARAMS.
        let basic = control
            .params(id)
            .ok()
            .filter(|params| params.types & UBLK_PARAM_TYPE_BASIC != 0)
            .map(|params| params.basic)
            .unwrap_or_default();
        let features = Features::from_bits_retain(info.flags);
        Ok(Self {
            id: info.dev_id,
            state: info.state.into(),
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            max_request: info.max_io_buf_bytes,
            features,
            data_path: DataPath::best(features),
            pid: u32::try_from(info.ublksrv_pid).ok().filter(|&pid| pid > 0),
            size: basic.dev_sectors * SECTOR,
            read_only: basic.attrs & UBLK_ATTR_READ_ONLY != 0,
        })
    }
}

/// What the driver of the running kernel can do.
pub fn features() -> Result<Features> {
    Control::open(TIME_LIMIT)?.features()
}

/// One device.
pub fn info(id: u32) -> Result<DeviceInfo> {
    DeviceInfo::read(&mut Control::open(TIME_LIMIT)?, id)
}

/// All devices, whoever serves them, by number.
pub fn list() -> Result<Vec<DeviceInfo>> {
    let mut control = Control::open(TIME_LIMIT)?;
    let mut ids: Vec<u32> = fs::read_dir("/sys/class/ublk-char")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_prefix("ublkc")?.parse().ok()
        })
        .collect();
    ids.sort_unstable();
    let mut devices = Vec::new();
    for id in ids {
        match DeviceInfo::read(&mut control, id) {
            Ok(device) => devices.push(device),
            // Removed since.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(devices)
}
