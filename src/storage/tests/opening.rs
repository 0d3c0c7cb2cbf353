//! What may be opened, and what is known about it then.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::Mode;

use super::super::*;
use super::{create, disk_dir, memory_dir, runtimes};

fn borrowed(storage: &Storage) -> &File {
    match &storage.backend {
        Backend::Host(file) => file.file(),
        Backend::Sim(_) => unreachable!(),
    }
}

fn refusal(path: &Path) -> Error {
    Storage::open(path, &OpenOptions::read_only()).unwrap_err()
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let dir = memory_dir();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    for (path, name) in [
        (dir.path(), "a directory"),
        (&fifo, "a FIFO"),
        (Path::new("/dev/null"), "a character device"),
    ] {
        let error = refusal(path);
        assert_eq!(error.kind(), ErrorKind::Usage);
        let text = error.to_string();
        assert!(text.ends_with(&format!("this is {name}")), "{text}");
        assert!(text.starts_with(path.to_str().unwrap()), "{text}");
    }
    let missing = dir.path().join("missing");
    assert_eq!(refusal(&missing).kind(), ErrorKind::NotFound);
}

#[test]
fn a_file_has_one_identity_under_all_names() {
    let dir = memory_dir();
    let path = create(&dir, 10);
    let alias = dir.path().join("alias");
    symlink(&path, &alias).unwrap();
    let other = dir.path().join("other");
    std::fs::write(&other, "x").unwrap();
    let identity = |path: &Path| {
        let storage = Storage::open(path, &OpenOptions::read_only()).unwrap();
        assert_eq!(storage.path(), path);
        storage.identity()
    };
    assert_eq!(identity(&path), identity(&alias));
    assert_ne!(identity(&path), identity(&other));
    let disk = sim::SimDisk::new();
    let beside = disk.beside(sim::Image::new());
    let identity = |disk: &sim::SimDisk| Storage::simulated(disk, 1).identity();
    assert_eq!(identity(&disk), identity(&disk.clone()));
    assert_ne!(identity(&disk), identity(&beside));
}

#[test]
fn read_only_means_read_only() {
    let dir = memory_dir();
    let path = create(&dir, 4096);
    for runtime in runtimes() {
        let storage = Storage::open(&path, &OpenOptions::read_only()).unwrap();
        assert!(!storage.writable());
        runtime.block_on(async {
            for result in [
                storage.write(0, &[1]).await,
                storage.write_zeroes(0, 1, false).await,
                storage.punch(0, 1).await.map(drop),
                storage.set_len(1).await,
            ] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
            }
            storage.sync().await.unwrap();
        });
    }
    assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
}

#[test]
fn direct_io_knows_its_alignment() {
    let dir = disk_dir();
    let path = create(&dir, 1 << 20);
    let options = OpenOptions::read_write();
    let cached = Storage::open(&path, &options).unwrap();
    assert_eq!((cached.alignment(), cached.memory_alignment()), (1, 1));
    drop(cached);
    let direct = Storage::open(&path, &options.cache(CacheMode::None)).unwrap();
    assert!([512, 1024, 2048, 4096].contains(&direct.alignment()));
    assert!(direct.memory_alignment() <= 4096);
}

#[test]
fn descriptors_of_others_are_brought_in_line() {
    let dir = disk_dir();
    let path = create(&dir, 8192);
    for runtime in runtimes() {
        // Opened as nobody should: for appending nothing, but non-blocking
        // and direct. Neither must reach the operations.
        let flags = libc::O_NONBLOCK | libc::O_DIRECT;
        let open = |write: bool| -> OwnedFd {
            let mut options = File::options();
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
            options.read(true).write(write).open(&path).unwrap().into()
        };
        let storage = Storage::from_fd(open(true), &path, &OpenOptions::read_write()).unwrap();
        let flags = fcntl(borrowed(&storage), FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & (libc::O_NONBLOCK | libc::O_DIRECT), 0);
        runtime.block_on(async {
            storage.write(3, &[1; 5]).await.unwrap();
            storage.read(5, &mut [0; 3]).await.unwrap();
        });
        drop(storage);
        let error = Storage::from_fd(open(false), &path, &OpenOptions::read_write()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        let storage = Storage::from_fd(open(true), &path, &OpenOptions::read_only()).unwrap();
        assert!(!storage.writable());
    }
}

#[test]
fn a_ring_does_not_keep_what_was_dropped() {
    let dir = memory_dir();
    let path = create(&dir, 8192);
    for runtime in runtimes() {
        runtime.block_on(async {
            for _ in 0..200 {
                // More of them than a ring has slots, each with locks that
                // exclude the next.
                let storage = Storage::open(&path, &OpenOptions::read_write()).unwrap();
                crate::runtime::register_file(storage.fd().unwrap()).unwrap();
                storage.read(0, &mut [0; 10]).await.unwrap();
            }
        });
    }
}
