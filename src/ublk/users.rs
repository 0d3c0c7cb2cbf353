//! Who uses a disk.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::control::block_path;

/// Who uses a disk or one of its partitions, in words; empty when nobody does
/// as far as can be seen.
pub(super) fn users(id: u32) -> Vec<String> {
    let disk = Disk::new(id);
    let mut users = disk.mounts();
    users.extend(disk.swaps());
    users.extend(disk.holders());
    if users.is_empty() {
        users.extend(disk.openers());
    }
    if users.is_empty() && disk.is_claimed() {
        users.push("mounted or held in another mount namespace".to_owned());
    }
    users
}

/// A disk and its partitions.
struct Disk {
    id: u32,
    /// Name and device number of each.
    parts: Vec<(String, u64)>,
}

impl Disk {
    fn new(id: u32) -> Self {
        let name = format!("ublkb{id}");
        let sys = format!("/sys/block/{name}");
        let mut parts = Vec::new();
        let mut add = |name: String, directory: &Path| {
            if let Some(number) = device_number(&directory.join("dev")) {
                parts.push((name, number));
            }
        };
        add(name.clone(), Path::new(&sys));
        for entry in fs::read_dir(&sys).into_iter().flatten().flatten() {
            let part = entry.file_name().to_string_lossy().into_owned();
            if part.starts_with(&name) {
                add(part, &entry.path());
            }
        }
        Self { id, parts }
    }

    fn has(&self, number: u64) -> bool {
        self.parts.iter().any(|part| part.1 == number)
    }

    fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mount = |line: &str| {
            // id, parent, major:minor, root, mount point (with \040 for blanks)
            let mut fields = line.split(' ');
            let number = parse_number(fields.nth(2)?)?;
            let point = fields.nth(1)?.replace("\\040", " ");
            self.has(number).then(|| format!("mounted on {point}"))
        };
        table.lines().filter_map(mount).collect()
    }

    fn swaps(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let is_ours = |path: &str| fs::metadata(path).is_ok_and(|meta| self.has(meta.rdev()));
        table
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next())
            .filter(|path| is_ours(path))
            .map(|path| format!("{path} is swap space"))
            .collect()
    }

    /// Device mapper, md and the like on top.
    fn holders(&self) -> Vec<String> {
        let mut holders = Vec::new();
        for (part, _) in &self.parts {
            let directory = format!("/sys/class/block/{part}/holders");
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                holders.push(format!("held by {}", entry.file_name().display()));
            }
        }
        holders
    }

    /// Processes that have it open. Sees all of them only as root.
    fn openers(&self) -> Vec<String> {
        let mut openers = Vec::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = process.file_name();
            let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
                continue;
            };
            let mut files = fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            let has_it = files.any(|file| {
                fs::metadata(file.path())
                    .is_ok_and(|meta| meta.file_type().is_block_device() && self.has(meta.rdev()))
            });
            if has_it {
                let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                openers.push(format!("opened by {} (pid {pid})", command.trim_end()));
            }
        }
        openers
    }

    /// True when a file system or driver has it for itself, in whatever
    /// namespace.
    fn is_claimed(&self) -> bool {
        let exclusive = File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(block_path(self.id));
        matches!(exclusive, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
    }
}

fn device_number(path: &Path) -> Option<u64> {
    parse_number(fs::read_to_string(path).ok()?.trim_end())
}

/// "major:minor"
fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_disk_is_found_by_its_number() {
        // The file system the root is on, as if it were ours.
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = table
            .lines()
            .find(|line| line.split(' ').nth(4) == Some("/"))
            .unwrap();
        let number = parse_number(root.split(' ').nth(2).unwrap()).unwrap();
        let disk = Disk {
            id: u32::MAX,
            parts: vec![("none".to_owned(), number)],
        };
        assert!(disk.mounts().contains(&"mounted on /".to_owned()));
        assert!(Disk::new(u32::MAX).parts.is_empty());
        assert!(users(u32::MAX).is_empty());
    }

    #[test]
    fn device_numbers() {
        assert_eq!(parse_number("259:3"), Some(libc::makedev(259, 3)));
        assert_eq!(parse_number("259"), None);
        assert_eq!(parse_number("a:b"), None);
    }
}
