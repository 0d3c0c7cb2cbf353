//! `del`: devices go away.

use std::process::ExitCode;

use super::{done, output};
use crate::daemon::Record;
use crate::error::{Error, ErrorKind, Result};
use crate::ublk::{self, DeviceInfo, State};

/// Flush, stop and remove devices
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The devices: /dev/ublkb0, ublkb0 or 0
    #[arg(value_name = "DEVICE", required_unless_present = "all", value_parser = device_id)]
    devices: Vec<u32>,

    /// All devices of this program
    #[arg(short, long, conflicts_with = "devices")]
    all: bool,

    /// Also those in use: their users' I/O fails from then on
    #[arg(short, long)]
    force: bool,
}

/// The N of `/dev/ublkbN`.
fn device_id(text: &str) -> Result<u32, String> {
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    let number = name.strip_prefix("ublkb").unwrap_or(name);
    // Not "+1".
    let digits = number.bytes().all(|b| b.is_ascii_digit());
    number
        .parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| format!("{text:?} is not a device such as /dev/ublkb0, ublkb0 or 0"))
}

/// Removes what was named; goes on after a failure, and ends with the first
/// one's exit code.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let records = Record::all();
    let ids = if args.all {
        let devices = ublk::list()?;
        records
            .iter()
            .filter(|record| devices.iter().any(|device| belongs(record, device)))
            .map(|record| record.id)
            .collect()
    } else {
        args.devices.clone()
    };
    let mut code = None;
    for id in ids {
        let served = ublk::info(id).is_ok_and(|device| device.state == State::Live);
        let removed = ublk::remove(id, args.force).and_then(|()| how_it_ended(id, &records));
        match removed {
            Ok(()) => {
                // Not data, so not on standard output.
                let what = if served {
                    "flushed, stopped and removed"
                } else {
                    "removed; nobody was serving it"
                };
                eprintln!("qcow2-ublk: /dev/ublkb{id}: {what}");
            }
            Err(error) => {
                output::report(&error);
                code.get_or_insert_with(|| error.exit_code());
            }
        }
    }
    code.map_or_else(done, |code| Ok(ExitCode::from(code)))
}

/// What the device that is gone has left behind: an error if its image lacks
/// something. `before` are the records from when it was there.
fn how_it_ended(id: u32, before: &[Record]) -> Result<()> {
    let own = |record: &&Record| {
        record.id == id && before.iter().any(|b| b.id == id && b.pid == record.pid)
    };
    let records = Record::all();
    let Some(record) = records.iter().find(own) else {
        return Ok(());
    };
    let Some(failure) = &record.failure else {
        // Of a server that has died; a living one removes its own.
        if !record.is_alive() {
            record.remove();
        }
        return Ok(());
    };
    record.remove();
    Err(Error::new(
        ErrorKind::Io,
        format!(
            "/dev/ublkb{id} is removed, but its image may lack what was not flushed: {failure}"
        ),
    )
    .cure("make room or cure the disk's error, check the image, and repeat what was written"))
}

/// True when the record speaks of this device, and not of an earlier one with
/// its number.
pub(super) fn belongs(record: &Record, device: &DeviceInfo) -> bool {
    // The driver forgets the process that has died.
    record.id == device.id && device.pid.is_none_or(|pid| pid == record.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_people_do() {
        assert_eq!(device_id("/dev/ublkb12"), Ok(12));
        assert_eq!(device_id("ublkb0"), Ok(0));
        assert_eq!(device_id("7"), Ok(7));
        for text in ["", "+1", "-1", "/dev/sda", "/dev/ublkb", "ublkc0", "0x1"] {
            assert!(device_id(text).is_err(), "{text}");
        }
    }
}
