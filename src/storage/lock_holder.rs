//! Who holds a lock, as far as /proc tells: locks of open file descriptions
//! carry no process id, so the open files of all processes are looked through.

use std::fmt::Write;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How many processes are named.
const NAMED: usize = 3;

/// The processes, other than through `file` itself, that hold a lock on byte
/// `byte` of the file: "qemu-system-x86 (pid 1234)". None when none is found,
/// as for other users' processes without privilege.
pub(super) fn describe(file: &File, byte: u16) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let identity = (metadata.dev(), metadata.ino());
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| holds(pid, file, identity, byte))
        .collect();
    pids.sort_unstable();
    let mut text = String::new();
    for (i, &pid) in pids.iter().take(NAMED).enumerate() {
        let separator = if i == 0 { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{} (pid {pid})", name(pid));
    }
    if pids.len() > NAMED {
        let _ = write!(text, " and {} more", pids.len() - NAMED);
    }
    (!text.is_empty()).then_some(text)
}

/// Those of `bytes` on which the open file description of `file` itself holds
/// a lock.
pub(super) fn own(file: &File, bytes: impl Iterator<Item = u16>) -> Vec<u16> {
    let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let info = fs::read_to_string(info).unwrap_or_default();
    bytes
        .filter(|&byte| info.lines().any(|line| covers(line, byte)))
        .collect()
}

fn name(pid: u32) -> String {
    if pid == std::process::id() {
        return "this process".to_owned();
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // Processes choose their names: no control characters in our messages.
    let name: String = name.trim().chars().filter(|c| !c.is_control()).collect();
    if name.is_empty() {
        "a process".to_owned()
    } else {
        name
    }
}

fn holds(pid: u32, own: &File, identity: (u64, u64), byte: u16) -> bool {
    let process = format!("/proc/{pid}");
    let own = (pid == std::process::id()).then(|| own.as_raw_fd().to_string());
    let Ok(descriptors) = fs::read_dir(Path::new(&process).join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|entry| {
        if own.as_deref().is_some_and(|own| entry.file_name() == own) {
            return false;
        }
        // Follows the link to the open file without opening it.
        let same_file = fs::metadata(entry.path())
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == identity);
        same_file
            && fs::read_to_string(Path::new(&process).join("fdinfo").join(entry.file_name()))
                .is_ok_and(|info| info.lines().any(|line| covers(line, byte)))
    })
}

/// Whether a line of fdinfo describes a lock on `byte`, such as
/// "lock:   1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101".
fn covers(line: &str, byte: u16) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else {
        return false;
    };
    let mut fields = lock.split_whitespace().rev();
    let (Some(end), Some(start)) = (fields.next(), fields.next()) else {
        return false;
    };
    let byte = u64::from(byte);
    let after_start = start.parse::<u64>().is_ok_and(|start| start <= byte);
    after_start && (end == "EOF" || end.parse::<u64>().is_ok_and(|end| byte <= end))
}

#[cfg(test)]
mod tests {
    use super::covers;

    #[test]
    fn lines_of_fdinfo_are_understood() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101";
        assert!(covers(line, 100) && covers(line, 101));
        assert!(!covers(line, 99) && !covers(line, 102));
        assert!(covers(
            "lock:\t1: POSIX ADVISORY WRITE 12 00:1:2 0 EOF",
            203
        ));
        assert!(!covers("pos:\t100 101", 100));
        assert!(!covers("lock:", 100));
    }
}
