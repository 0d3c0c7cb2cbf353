//! Removing a device that another process serves, or served.

use std::time::Duration;

use super::control::{Control, Failure, TIME_LIMIT, TRY_STOP_DEV};
use super::device::poll;
use super::halt::{self, Activity};
use super::info::{DeviceInfo, State};
use super::uapi::Features;
use super::{explain, users::users};
use crate::error::{Error, ErrorKind, Result};

/// How long a disk that is in use may turn out not to be: udev looks into
/// disks for moments.
const PATIENCE: Duration = Duration::from_secs(1);

/// Stops and removes a device, whoever serves it. One that is in use is left
/// alone unless `force`d, which makes its users' I/O fail.
///
/// No signal is needed, and so no trust in a process id: the server notices
/// that its device is stopped, closes the image and removes the device. This
/// waits for that, so when it returns, the image is closed. A device whose
/// server is dead is removed from here.
pub fn remove(id: u32, force: bool) -> Result<()> {
    let mut control = Control::open(TIME_LIMIT)?;
    let device = DeviceInfo::read(&mut control, id)?;
    let server = device.pid.filter(|&pid| is_alive(pid));
    if force {
        if device.state == State::Live && server.is_some() {
            let mut activity = Activity::new(id);
            let written = halt::write_back(id, TIME_LIMIT, None, &mut || activity.look());
            if let Err(error) = written {
                tracing::warn!("{error}");
            }
        }
        stop(&device)?;
    } else if device.state != State::Dead {
        stop_unused(&mut control, &device)?;
    }
    wait_gone(&mut control, id, server)
}

fn stop(device: &DeviceInfo) -> Result<()> {
    let mut activity = Activity::new(device.id);
    let stopped = halt::stop(device.id, TIME_LIMIT, None, &mut || activity.look());
    match (stopped, device.pid) {
        (Err(error), Some(pid)) if error.kind() == ErrorKind::Timeout => Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "ublk device {} cannot be stopped: its server (pid {pid}) does not finish its \
                 requests",
                device.id
            ),
        )
        .cure(format!("kill process {pid}: the device is stopped by that"))),
        (stopped, _) => stopped,
    }
}

fn stop_unused(control: &mut Control, device: &DeviceInfo) -> Result<()> {
    let id = device.id;
    if device.features.contains(Features::SAFE_STOP_DEV) {
        let result = poll(PATIENCE, || match control.try_stop(id) {
            Err(Failure::Errno(libc::EBUSY)) => None,
            // Stopped meanwhile.
            Err(Failure::Errno(libc::ENODEV)) => Some(Ok(())),
            result => Some(result),
        });
        return match result {
            None => Err(in_use(id, &users(id))),
            Some(result) => {
                result.map_err(|failure| explain::command(TRY_STOP_DEV, Some(id), failure))
            }
        };
    }
    // Before Linux 7.0 we can only look, and be wrong about who comes next.
    let free = poll(PATIENCE, || users(id).is_empty().then_some(()));
    if free.is_none() {
        return Err(in_use(id, &users(id)));
    }
    stop(device)
}

fn in_use(id: u32, users: &[String]) -> Error {
    let by = if users.is_empty() {
        "somebody has it open".to_owned()
    } else {
        users.join(", ")
    };
    Error::new(ErrorKind::Busy, format!("ublk device {id} is in use: {by}"))
        .cure("unmount or close it first, or force its removal: its users' I/O then fails")
}

/// Waits until the server has removed its device; removes it when there is no
/// server any more.
fn wait_gone(control: &mut Control, id: u32, server: Option<u32>) -> Result<()> {
    let gone = |control: &mut Control| match control.info(id) {
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some(Ok(())),
        Err(error) => Some(Err(error)),
    };
    if let Some(pid) = server {
        let done = poll(TIME_LIMIT, || {
            gone(control).or_else(|| (!is_alive(pid)).then_some(Ok(())))
        });
        match done {
            None => {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!(
                        "ublk device {id} is stopped, but its server (pid {pid}) has not let go \
                         of it within {} seconds",
                        TIME_LIMIT.as_secs()
                    ),
                )
                .cure(format!("look at what process {pid} is doing")));
            }
            Some(result) => result?,
        }
    }
    control.delete(id)
}

/// True for a process that still runs; not for one that nobody has waited for.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state comes after the name in parentheses, which may hold anything.
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living() {
        assert!(is_alive(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let dead = poll(Duration::from_secs(10), || (!is_alive(pid)).then_some(()));
        assert!(dead.is_some(), "a zombie counts as alive");
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }

    #[test]
    fn who_is_in_the_way_is_named() {
        let error = in_use(2, &["mounted on /mnt".to_owned()]);
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(
            error.to_string(),
            "ublk device 2 is in use: mounted on /mnt"
        );
    }
}
