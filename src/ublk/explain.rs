//! The driver's refusals in the user's words.

use std::io;
use std::time::Duration;

use super::control::{
    ADD_DEV, CONTROL_PATH, Command, Failure, GET_DEV_INFO2, START_DEV, TRY_STOP_DEV,
};
use super::uapi::Features;
use crate::error::{Error, ErrorKind};

const LOAD_DRIVER: &str = "run \"modprobe ublk_drv\"; where there is no such module, install the \
    kernel's full set (Debian 13 and backports: linux-image-amd64 or linux-image-cloud-amd64, \
    Linux 6.12 or newer; Ubuntu: linux-modules-extra-$(uname -r))";

/// The control node cannot be opened.
pub(super) fn open_control(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            Error::new(ErrorKind::Driver, "the kernel has no ublk driver loaded").cure(LOAD_DRIVER)
        }
        Some(libc::EACCES | libc::EPERM) => not_permitted("open the ublk driver", error),
        _ => Error::io("open the ublk driver", error),
    }
    .path(CONTROL_PATH)
}

/// There is no io_uring for us.
pub(super) fn make_ring(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Error::new(ErrorKind::Driver, "the kernel has no io_uring"),
        Some(libc::EPERM | libc::EACCES) => Error::io("make an io_uring", error).cure(
            "allow io_uring: \"sysctl kernel.io_uring_disabled=0\", and outside a container \
             whose policy forbids it",
        ),
        _ => Error::io("make an io_uring", error),
    }
}

/// A command has failed; `id` is the device, when the caller named one.
pub(super) fn command(command: Command, id: Option<u32>, failure: Failure) -> Error {
    let device = id.map_or_else(
        || "a ublk device".to_owned(),
        |id| format!("ublk device {id}"),
    );
    match failure {
        Failure::Errno(errno) => refused(command, id, &device, errno),
        Failure::TimedOut(limit) => timed_out(command, &device, limit),
        Failure::GivenUp => Error::new(
            ErrorKind::Io,
            format!("{device}: {} was given up", command.name),
        ),
        Failure::Ring(error) => Error::io(format!("{device}: send {}", command.name), error),
    }
}

fn refused(command: Command, id: Option<u32>, device: &str, errno: i32) -> Error {
    let error = io::Error::from_raw_os_error(errno);
    let doing = format!("{device}: {}", command.name);
    match (command, errno) {
        (ADD_DEV, libc::EEXIST) => {
            let id = id.unwrap_or_default();
            Error::new(ErrorKind::Busy, format!("device id {id} is taken"))
                .cure("choose another id, or none to get the first free one")
        }
        // Up to Linux 6.14 the limit holds for all devices, later for those
        // of unprivileged users only.
        (ADD_DEV, libc::EACCES) => Error::new(
            ErrorKind::Busy,
            "the ublk driver has as many devices as it allows",
        )
        .cure(
            "remove one, or raise /sys/module/ublk_drv/parameters/ublks_max \
             (unprivileged_ublks_max on newer kernels)",
        ),
        (ADD_DEV, libc::EINVAL) => Error::new(
            ErrorKind::Driver,
            "the ublk driver refuses the device's features, queues or depth",
        ),
        (START_DEV, libc::EINTR) => Error::new(
            ErrorKind::Io,
            format!("{device}: its start was interrupted"),
        ),
        (_, libc::ENODEV) if command != TRY_STOP_DEV => no_such_device(device),
        (GET_DEV_INFO2, libc::ENOENT) => no_such_device(device),
        (_, libc::EOPNOTSUPP) => Error::new(
            ErrorKind::Driver,
            format!("the kernel's ublk driver has no {}", command.name),
        )
        .cure("use a newer kernel"),
        (_, libc::EPERM | libc::EACCES) => not_permitted(doing, error),
        _ => Error::io(doing, error),
    }
}

fn no_such_device(device: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no {device}"))
}

fn timed_out(command: Command, device: &str, limit: Duration) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!(
            "{device}: the kernel has not answered {} within {} seconds",
            command.name,
            limit.as_secs()
        ),
    )
    .cure("see \"dmesg\" for what the ublk driver is stuck on")
}

fn not_permitted(doing: impl Into<String>, error: io::Error) -> Error {
    Error::io(doing, error).cure("run as root")
}

/// The kernel lacks something that was asked for.
pub(super) fn lacks(feature: Features, purpose: &str) -> Error {
    let name = feature.names().next().unwrap_or("a feature");
    Error::new(
        ErrorKind::Driver,
        format!("the kernel's ublk driver has no {name}, which {purpose} needs"),
    )
    .cure(format!("use Linux {} or newer", feature.since()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ublk::control::STOP_DEV;

    #[test]
    fn refusals_have_the_right_kind_and_name_the_device() {
        let cases = [
            (
                ADD_DEV,
                libc::EEXIST,
                ErrorKind::Busy,
                "device id 3 is taken",
            ),
            (ADD_DEV, libc::EACCES, ErrorKind::Busy, "as many devices"),
            (
                ADD_DEV,
                libc::EPERM,
                ErrorKind::Permission,
                "ublk device 3: ADD_DEV",
            ),
            (
                STOP_DEV,
                libc::ENODEV,
                ErrorKind::NotFound,
                "there is no ublk device 3",
            ),
            (
                TRY_STOP_DEV,
                libc::EOPNOTSUPP,
                ErrorKind::Driver,
                "no TRY_STOP_DEV",
            ),
            (
                STOP_DEV,
                libc::EIO,
                ErrorKind::Io,
                "ublk device 3: STOP_DEV",
            ),
        ];
        for (what, errno, kind, text) in cases {
            let error = command(what, Some(3), Failure::Errno(errno));
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        let late = command(
            STOP_DEV,
            Some(3),
            Failure::TimedOut(Duration::from_secs(30)),
        );
        assert_eq!(late.kind(), ErrorKind::Timeout);
        assert!(late.cure_text().unwrap().contains("dmesg"));
    }

    #[test]
    fn a_missing_driver_and_a_missing_privilege_have_cures() {
        let missing = open_control(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(missing.kind(), ErrorKind::Driver);
        assert!(missing.cure_text().unwrap().contains("modprobe ublk_drv"));
        let denied = open_control(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(denied.kind(), ErrorKind::Permission);
        assert_eq!(denied.cure_text(), Some("run as root"));
    }

    #[test]
    fn a_lacking_feature_is_named_with_its_version() {
        let error = lacks(Features::AUTO_BUF_REG, "the data path auto-buf");
        assert!(error.to_string().contains("AUTO_BUF_REG"));
        assert_eq!(error.cure_text(), Some("use Linux 6.16 or newer"));
    }
}
