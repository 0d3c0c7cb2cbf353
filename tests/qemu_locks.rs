//! Who may open an image beside whom, tried with QEMU's own programs in both
//! directions.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{qemu_img, run};
use nix::fcntl::{FcntlArg, fcntl};
use qcow2_ublk::storage::{Locks, OpenOptions, Role, Storage};
use qcow2_ublk::{Error, ErrorKind};

/// A program just started by another test has our descriptors, and so the
/// locks, for a moment: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn image() -> (MutexGuard<'static, ()>, tempfile::TempDir, PathBuf) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    (alone, dir, path)
}

/// A `qemu-io` that keeps an image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, flags: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .args(["-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run qemu-io, which this test needs: {e}"));
        // It has the image open, with all locks, when it answers.
        let input = child.stdin.as_mut().unwrap();
        input.write_all(b"length\n").unwrap();
        input.flush().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut answer = String::new();
        while !answer.contains("MiB") {
            answer.clear();
            let n = output.read_line(&mut answer).unwrap();
            assert!(n > 0, "qemu-io {flags:?} did not open the image");
        }
        // The pipe stays, or it would be killed for writing to it.
        child.stdout = Some(output.into_inner());
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take()); // ends it
        let _ = self.0.stdout.take().unwrap().read_to_end(&mut Vec::new());
        self.0.wait().unwrap();
    }
}

type Open = fn(&Path) -> Result<Storage, Error>;

fn ours(path: &Path, writable: bool, locks: Locks) -> Result<Storage, Error> {
    let options = if writable {
        OpenOptions::read_write()
    } else {
        OpenOptions::read_only()
    };
    Storage::open(path, &options.locks(locks))
}

fn writer(path: &Path) -> Result<Storage, Error> {
    ours(path, true, Locks::Normal(Role::ReadWrite))
}

fn reader(path: &Path) -> Result<Storage, Error> {
    ours(path, false, Locks::Normal(Role::ReadOnly))
}

fn sharer(path: &Path) -> Result<Storage, Error> {
    ours(path, false, Locks::ForceShare)
}

/// Whether qemu-io can open the image now; when not, because of a lock.
fn qemu_can_open(path: &Path, flags: &[&str]) -> bool {
    let mut args = flags.to_vec();
    args.extend(["-f", "qcow2", "-c", "length", path.to_str().unwrap()]);
    let (code, text) = run("qemu-io", &args);
    assert!(code == Some(0) || text.contains("lock"), "{text}");
    code == Some(0)
}

const READ_WRITE: &[&str] = &[];
const READ_ONLY: &[&str] = &["-r"];
const SHARE: &[&str] = &["-r", "-U"];

#[test]
fn we_honour_the_locks_of_qemu() {
    let (_alone, _dir, path) = image();
    for (flags, writer_may, reader_may) in [
        (READ_WRITE, false, false),
        (READ_ONLY, false, true),
        (SHARE, true, true),
    ] {
        let qemu = QemuIo::open(&path, flags);
        let attempts: [(Open, bool); 3] =
            [(writer, writer_may), (reader, reader_may), (sharer, true)];
        for (open, may) in attempts {
            match open(&path) {
                Ok(_) => assert!(may, "opened beside qemu-io {flags:?}"),
                Err(error) => {
                    assert!(!may, "beside qemu-io {flags:?}: {error}");
                    assert_eq!(error.kind(), ErrorKind::Busy);
                    let holder = format!("locked by qemu-io (pid {}), which ", qemu.0.id());
                    assert!(error.to_string().contains(&holder), "{error}");
                    assert!(error.cure_text().is_some());
                }
            }
        }
        drop(qemu);
        writer(&path).unwrap();
    }
}

#[test]
fn qemu_honours_ours() {
    let (_alone, _dir, path) = image();
    let unlocked = ours(&path, true, Locks::None).unwrap();
    let cases: [(Open, [bool; 3]); 3] = [
        (writer, [false, false, true]),
        (reader, [false, true, true]),
        (sharer, [true, true, true]),
    ];
    for (open, may) in cases {
        let storage = open(&path).unwrap();
        let qemu = [READ_WRITE, READ_ONLY, SHARE].map(|flags| qemu_can_open(&path, flags));
        assert_eq!(qemu, may);
        drop(storage);
        assert!(qemu_can_open(&path, READ_WRITE));
    }
    drop(unlocked);
}

#[test]
fn a_refused_opener_leaves_no_lock_behind() {
    let (_alone, _dir, path) = image();
    let qemu = QemuIo::open(&path, READ_ONLY);
    // What stays open is not what was refused: the descriptor lives on here.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let duplicate = file.as_fd().try_clone_to_owned().unwrap();
    Storage::from_fd(duplicate, &path, &OpenOptions::read_write()).unwrap_err();
    drop(qemu);
    assert!(qemu_can_open(&path, READ_WRITE));
    drop(file);
}

#[test]
fn locks_that_are_left_live_as_long_as_any_duplicate() {
    let (_alone, _dir, path) = image();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let duplicate = || file.as_fd().try_clone_to_owned().unwrap();
    let options = OpenOptions::read_write();
    let first = Storage::from_fd(duplicate(), &path, &options).unwrap();
    // A successor takes over before the first is gone: no gap.
    let second = Storage::from_fd(duplicate(), &path, &options).unwrap();
    first.leave_locks();
    drop(first);
    assert!(!qemu_can_open(&path, READ_ONLY));
    // They were there before it came, and stay when it goes.
    drop(second);
    assert!(!qemu_can_open(&path, READ_ONLY));
    // Nor does one that is refused, or that gives its own up, take them away.
    Storage::from_fd(duplicate(), &path, &options.locks(Locks::ForceShare)).unwrap_err();
    drop(Storage::from_fd(duplicate(), &path, &options.locks(Locks::None)).unwrap());
    assert!(!qemu_can_open(&path, READ_ONLY));
    drop(file);
    assert!(qemu_can_open(&path, READ_WRITE));
}

#[test]
fn who_took_the_locks_gives_them_up() {
    let (_alone, _dir, path) = image();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let duplicate = file.as_fd().try_clone_to_owned().unwrap();
    let storage = Storage::from_fd(duplicate, &path, &OpenOptions::read_write()).unwrap();
    assert!(!qemu_can_open(&path, READ_ONLY));
    // Although the description lives on, as in a ring.
    drop(storage);
    assert!(qemu_can_open(&path, READ_WRITE));
    drop(file);
}

#[test]
fn locks_are_exchanged_without_a_gap_or_kept() {
    let (_alone, _dir, path) = image();
    let storage = ours(&path, true, Locks::Normal(Role::ReadOnly)).unwrap();
    let qemu = QemuIo::open(&path, READ_ONLY);
    let writing = Locks::Normal(Role::ReadWrite);
    let error = storage.set_locks(writing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    // The reader's locks are still there, and no more than they.
    assert!(qemu_can_open(&path, READ_ONLY) && !qemu_can_open(&path, READ_WRITE));
    drop(qemu);
    storage.set_locks(writing).unwrap();
    assert!(!qemu_can_open(&path, READ_ONLY));
    storage.set_locks(Locks::Normal(Role::ReadOnly)).unwrap();
    assert!(qemu_can_open(&path, READ_ONLY) && !qemu_can_open(&path, READ_WRITE));
    storage.set_locks(Locks::None).unwrap();
    assert!(qemu_can_open(&path, READ_WRITE));
    let error = storage.set_locks(Locks::ForceShare).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn two_of_ours_in_one_process_exclude_each_other() {
    let (_alone, _dir, path) = image();
    let first = writer(&path).unwrap();
    let error = reader(&path).unwrap_err();
    let me = format!("locked by this process (pid {})", std::process::id());
    assert!(error.to_string().contains(&me), "{error}");
    drop(first);
    let readers = [reader(&path).unwrap(), reader(&path).unwrap()];
    assert_eq!(writer(&path).unwrap_err().kind(), ErrorKind::Busy);
    drop(readers);
    writer(&path).unwrap();
}

#[test]
fn a_lock_on_the_whole_file_stands_in_the_way_too() {
    // As programs other than QEMU take it.
    let (_alone, _dir, path) = image();
    let other = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert_eq!(reader(&path).unwrap_err().kind(), ErrorKind::Busy);
    drop(other);
    reader(&path).unwrap();
}
