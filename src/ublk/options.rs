//! What a device is to be like, and adding it to the driver.

use std::time::Duration;

use super::control::{Control, TIME_LIMIT};
use super::datapath::DataPath;
use super::explain;
use super::uapi::{Features, UBLK_MAX_NR_QUEUES, UBLK_MAX_QUEUE_DEPTH, ublksrv_ctrl_dev_info};
use crate::error::{Error, ErrorKind, Result};

/// The longest read or write the driver takes, in bytes.
const LONGEST_REQUEST: u32 = 32 << 20;

/// What a device is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// The N of `/dev/ublkbN`; the first free one if absent.
    pub id: Option<u32>,
    /// Hardware queues, each with a thread. The driver makes no more of them
    /// than there are processors.
    pub queues: u16,
    /// Requests in flight in each queue.
    pub depth: u16,
    /// The unit in which the disk is addressed, in bytes. Partition tables and
    /// boot loaders in most images count in 512.
    pub logical_block: u32,
    /// Refuse writes, even if the handler would take them.
    pub read_only: bool,
    /// How data moves; the best one the kernel has if absent.
    pub data_path: Option<DataPath>,
    /// The longest read or write, in bytes; the data path's default if absent.
    pub max_request: Option<u32>,
    /// Let the kernel look for partitions. Without it (Linux 7.0), the
    /// kernel's parsers do not see the content of a stranger's image.
    pub part_scan: bool,
    /// How long the driver may take for a command.
    pub time_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            id: None,
            queues: 1,
            depth: 128,
            logical_block: 512,
            read_only: false,
            data_path: None,
            max_request: None,
            part_scan: true,
            time_limit: TIME_LIMIT,
        }
    }
}

impl Options {
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::Usage, what));
        if self.queues == 0 || u32::from(self.queues) > UBLK_MAX_NR_QUEUES {
            return refuse(format!("a device has 1 to {UBLK_MAX_NR_QUEUES} queues"));
        }
        if self.depth == 0 || u32::from(self.depth) > UBLK_MAX_QUEUE_DEPTH {
            return refuse(format!("a queue's depth is 1 to {UBLK_MAX_QUEUE_DEPTH}"));
        }
        match self.max_request {
            Some(max) if !max.is_multiple_of(4096) || !(4096..=LONGEST_REQUEST).contains(&max) => {
                refuse(format!(
                    "the longest request is a multiple of 4096 up to {LONGEST_REQUEST} bytes, \
                     not {max}"
                ))
            }
            _ => Ok(()),
        }
    }

    /// The features to ask for, of those the driver has.
    fn features(&self, data_path: DataPath, driver: Features) -> Result<Features> {
        let mut features = data_path.features() | (Features::UPDATE_SIZE & driver);
        if !self.part_scan {
            if !driver.contains(Features::NO_AUTO_PART_SCAN) {
                let purpose = "a device whose partitions are not looked for";
                return Err(explain::lacks(Features::NO_AUTO_PART_SCAN, purpose));
            }
            features |= Features::NO_AUTO_PART_SCAN;
        }
        Ok(features)
    }

    /// Adds the device with the best data path that the driver grants: it
    /// clears the features that it does not know or not grant.
    pub(super) fn add(&self, control: &mut Control) -> Result<(ublksrv_ctrl_dev_info, DataPath)> {
        let driver = control.features()?;
        let mut data_path = DataPath::choose(self.data_path, driver)?;
        loop {
            let features = self.features(data_path, driver)?;
            let mut info = ublksrv_ctrl_dev_info {
                nr_hw_queues: self.queues,
                queue_depth: self.depth,
                max_io_buf_bytes: self.max_request.unwrap_or_else(|| data_path.max_request()),
                dev_id: self.id.unwrap_or(u32::MAX),
                ublksrv_pid: -1,
                flags: features.bits(),
                ..ublksrv_ctrl_dev_info::default()
            };
            control.add(&mut info)?;
            let granted = Features::from_bits_retain(info.flags);
            // A disk that cannot grow is better than none.
            let missing = features.difference(granted | Features::UPDATE_SIZE);
            let Some(missing) = missing.iter().next() else {
                return Ok((info, data_path));
            };
            control.delete(info.dev_id)?;
            let lower = DataPath::best(granted & data_path.features());
            if self.data_path.is_some() || lower == data_path {
                return Err(explain::lacks(missing, "the device"));
            }
            data_path = lower;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_refused_by_name() {
        let cases = [
            (
                Options {
                    queues: 0,
                    ..Options::default()
                },
                "queues",
            ),
            (
                Options {
                    queues: 4097,
                    ..Options::default()
                },
                "queues",
            ),
            (
                Options {
                    depth: 0,
                    ..Options::default()
                },
                "depth",
            ),
            (
                Options {
                    max_request: Some(100),
                    ..Options::default()
                },
                "longest request",
            ),
        ];
        for (options, word) in cases {
            let error = options.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(word), "{error}");
        }
        Options::default().check().unwrap();
    }

    #[test]
    fn unscanned_partitions_need_the_feature() {
        let options = Options {
            part_scan: false,
            ..Options::default()
        };
        let old = Features::USER_COPY;
        let error = options.features(DataPath::UserCopy, old).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Driver);
        assert!(error.to_string().contains("NO_AUTO_PART_SCAN"));
        let new = old | Features::NO_AUTO_PART_SCAN | Features::UPDATE_SIZE;
        assert_eq!(options.features(DataPath::UserCopy, new).unwrap(), new);
        assert_eq!(
            Options::default().features(DataPath::Copy, old).unwrap(),
            Features::empty()
        );
    }
}
