//! Storage on what only root can set up: block devices with sectors of 4096
//! bytes, file systems on them, and file systems that are full.
//!
//! Run with `cargo test --test host_root -- --ignored` as root.

use std::path::PathBuf;
use std::process::Command;

use qcow2_ublk::ErrorKind;
use qcow2_ublk::runtime::Runtime;
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::storage::{CacheMode, Locks, OpenOptions, Role, Storage};

fn command(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text.trim().to_owned()
}

const SIZE: u64 = 16 << 20;
const SECTOR: u64 = 4096;

/// A loop device with large sectors, on a file beside the test program.
struct Loop {
    device: PathBuf,
    dir: tempfile::TempDir,
}

impl Loop {
    fn new(flags: &[&str]) -> Self {
        let program = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let mut args = vec!["--find", "--show", "--sector-size", "4096"];
        args.extend_from_slice(flags);
        args.push(file.to_str().unwrap());
        Self {
            device: command("losetup", &args).into(),
            dir,
        }
    }

    fn name(&self) -> &str {
        self.device.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        command("losetup", &["--detach", self.name()]);
    }
}

struct Mount(tempfile::TempDir);

impl Mount {
    fn new(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut all = args.to_vec();
        all.push(dir.path().to_str().unwrap());
        command("mount", &all);
        Self(dir)
    }

    fn file(&self, len: u64) -> PathBuf {
        let path = self.0.path().join("file");
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        command("umount", &[self.0.path().to_str().unwrap()]);
    }
}

fn runtimes() -> [Runtime; 2] {
    [Runtime::uring(32).unwrap(), Runtime::inline().unwrap()]
}

const CACHES: [CacheMode; 2] = [CacheMode::None, CacheMode::Writeback];

/// Random operations inside `size` bytes, against a vector.
async fn exercise(storage: &Storage, size: u64) {
    let mut rng = Rng::new(8);
    let mut model = vec![0xff; size as usize];
    storage.write(0, &model).await.unwrap();
    for step in 0..600 {
        let mut offset = rng.below(size);
        let mut len = rng.below(40_000.min(size - offset) + 1);
        let unit = [1, 512, SECTOR][rng.below(3) as usize];
        offset -= offset % unit;
        len -= len % unit;
        let range = offset as usize..(offset + len) as usize;
        match rng.below(6) {
            0 | 1 => {
                rng.fill(&mut model[range.clone()]);
                storage.write(offset, &model[range]).await.unwrap();
            }
            2 => {
                let unmap = rng.chance(1, 2);
                storage.write_zeroes(offset, len, unmap).await.unwrap();
                model[range].fill(0);
            }
            3 => {
                let done = storage.punch(offset, len).await.unwrap();
                if done {
                    model[range].fill(0);
                }
                // The devices and file systems here all can, whole sectors.
                let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
                assert!(done || !whole, "{offset}+{len}");
            }
            _ => {
                let mut buf = vec![0xaa; len as usize];
                storage.read(offset, &mut buf).await.unwrap();
                assert!(buf == model[range], "step {step}: {offset}+{len}");
            }
        }
    }
    storage.sync().await.unwrap();
    let mut all = vec![0; size as usize];
    storage.read(0, &mut all).await.unwrap();
    assert!(all == model);
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_block_device_with_large_sectors_takes_any_range() {
    for runtime in runtimes() {
        for cache in CACHES {
            let disk = Loop::new(&["--direct-io=on"]);
            let options = OpenOptions::read_write().cache(cache);
            let storage = Storage::open(&disk.device, &options).unwrap();
            assert!(storage.is_block_device());
            assert_eq!(storage.len(), SIZE);
            let unit = match cache {
                CacheMode::None => SECTOR as u32,
                CacheMode::Writeback => 1,
            };
            assert_eq!(storage.alignment(), unit);
            runtime.register_file(storage.fd().unwrap()).unwrap();
            runtime.block_on(async {
                exercise(&storage, 1 << 20).await;
                // Its end is the end.
                storage.set_len(SIZE).await.unwrap();
                storage.set_len(1).await.unwrap();
                assert_eq!(storage.len(), SIZE);
                let error = storage.set_len(SIZE + 1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                let block = [1; SECTOR as usize];
                let error = storage.write(SIZE, &block).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                let mut buf = [9; 8192];
                storage.write(SIZE - 4096, &block).await.unwrap();
                storage.read(SIZE - 4096, &mut buf).await.unwrap();
                assert!(buf[..4096] == block && buf[4096..] == [0; 4096]);
            });
        }
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn devices_in_use_or_read_only_are_not_opened_for_writing() {
    let disk = Loop::new(&[]);
    command("mkfs.ext4", &["-q", disk.name()]);
    let mount = Mount::new(&[disk.name()]);
    let writable = OpenOptions::read_write().locks(Locks::None);
    let error = Storage::open(&disk.device, &writable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.cure_text().is_some());
    Storage::open(&disk.device, &OpenOptions::read_only()).unwrap();
    drop(mount);
    let storage = Storage::open(&disk.device, &writable).unwrap();
    let again = Storage::open(&disk.device, &writable).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Busy);
    drop(storage);
    let disk = Loop::new(&["--read-only"]);
    let error = Storage::open(&disk.device, &writable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

#[test]
#[ignore = "needs root and loop devices"]
fn qemu_honours_locks_on_block_devices() {
    let disk = Loop::new(&[]);
    command(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", disk.name(), "1M"],
    );
    let locks = Locks::Normal(Role::ReadWrite);
    let storage = Storage::open(&disk.device, &OpenOptions::read_write().locks(locks)).unwrap();
    let info = || {
        Command::new("qemu-img")
            .args(["info", disk.name()])
            .output()
            .unwrap()
    };
    assert!(!info().status.success());
    drop(storage);
    assert!(info().status.success());
}

#[test]
#[ignore = "needs root and loop devices"]
fn files_on_large_sectors_take_any_range() {
    for (make, feature) in [("mkfs.ext4", "-Fq"), ("mkfs.xfs", "-fq")] {
        // XFS wants more room than the device has by default.
        let disk = Loop::new(&["--direct-io=on"]);
        if make == "mkfs.xfs" {
            let file = disk.dir.path().join("disk");
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_len(400 << 20).unwrap();
            command("losetup", &["--set-capacity", disk.name()]);
        }
        command(make, &[feature, disk.name()]);
        let mount = Mount::new(&[disk.name()]);
        for runtime in runtimes() {
            for cache in CACHES {
                let path = mount.file(0);
                let options = OpenOptions::read_write().cache(cache);
                let storage = Storage::open(&path, &options).unwrap();
                if cache == CacheMode::None {
                    assert_eq!(u64::from(storage.alignment()), SECTOR, "{make}");
                }
                runtime.block_on(exercise(&storage, 1 << 20));
            }
        }
    }
}

#[test]
#[ignore = "needs root to mount a small file system"]
fn a_full_file_system_fails_what_does_not_fit() {
    let mount = Mount::new(&["-t", "tmpfs", "-o", "size=64k", "tmpfs"]);
    for runtime in runtimes() {
        let path = mount.file(0);
        let storage = Storage::open(&path, &OpenOptions::read_write()).unwrap();
        runtime.block_on(async {
            let bytes = vec![7; 100_000];
            let error = storage.write(1000, &bytes).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            assert_eq!(error.errno(), libc::ENOSPC);
            // The message tells where the space ran out.
            assert!(error.to_string().contains("(at offset 0x10000)"), "{error}");
            assert_eq!(storage.len(), 65_536);
            let mut back = vec![0; 64_536];
            storage.read(1000, &mut back).await.unwrap();
            assert!(back == bytes[..64_536]);
            assert!(storage.punch(0, 32_768).await.unwrap());
            storage.write(0, &bytes[..32_768]).await.unwrap();
            storage.sync().await.unwrap();
        });
        std::fs::remove_file(&path).unwrap();
    }
}
