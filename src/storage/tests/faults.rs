//! What goes wrong below becomes the right result, or the right error, above.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::sim::{Change, Fault, Image, SimDisk, SimKind};
use super::super::*;
use super::{create, memory_dir, random_bytes, runtimes};
use crate::runtime::{Buf, Runtime};

fn block_on<T>(future: impl Future<Output = T>) -> T {
    Runtime::inline().unwrap().block_on(future)
}

/// Makes all operations of one kind suffer `fault`, the first `times` times.
fn faults(disk: &SimDisk, kind: SimKind, times: u64, fault: Fault) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&count);
    disk.inject(move |request| {
        (request.kind == kind && seen.fetch_add(1, Ordering::SeqCst) < times).then_some(fault)
    });
    count
}

fn poisoned(len: usize) -> Buf {
    let mut buf = Buf::take(len);
    buf.fill(0xee);
    buf
}

const ALWAYS: u64 = u64::MAX;

#[test]
fn short_transfers_are_finished() {
    for alignment in [1, 512, 4096] {
        // Also by numbers of bytes that direct I/O cannot go on from.
        for short in [1, 511, 512, 700, 4096, 5000] {
            let disk = SimDisk::new();
            let storage = Storage::simulated(&disk, alignment);
            let bytes = random_bytes(&mut super::Rng::new(short), 32_768);
            // A direct write that never gets past a unit cannot succeed.
            let at_once = short.max(alignment.into());
            faults(&disk, SimKind::Write, ALWAYS, Fault::Short(at_once));
            faults(&disk, SimKind::Read, ALWAYS, Fault::Short(at_once));
            block_on(async {
                storage.write(0, &bytes).await.unwrap();
                assert_eq!(disk.image().bytes(0, 32_768), bytes);
                let mut back = vec![0; 32_768];
                storage.read(0, &mut back).await.unwrap();
                assert!(back == bytes, "unit {alignment}, {short} at a time");
                let mut back = vec![0; 10_000];
                storage.read(30_001, &mut back).await.unwrap();
                assert!(back[..2767] == bytes[30_001..]);
                assert!(back[2767..].iter().all(|&b| b == 0));
            });
        }
    }
}

#[test]
fn interrupted_operations_are_tried_again_but_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        for kind in [SimKind::Read, SimKind::Write] {
            let disk = SimDisk::with_image(Image::from_bytes(&[7; 1024]));
            let storage = Storage::simulated(&disk, 1);
            let attempt = async || {
                let mut buf = [7; 512];
                match kind {
                    SimKind::Read => storage.read(0, &mut buf).await,
                    _ => storage.write(0, &buf).await,
                }
            };
            let count = faults(&disk, kind, 5, Fault::Errno(errno));
            block_on(attempt()).unwrap();
            assert_eq!(count.load(Ordering::SeqCst), 6);
            faults(&disk, kind, ALWAYS, Fault::Errno(errno));
            assert_eq!(block_on(attempt()).unwrap_err().errno(), errno);
        }
    }
}

#[test]
fn no_progress_is_an_error_inside_the_file() {
    let disk = SimDisk::with_image(Image::from_bytes(&[7; 1024]));
    let storage = Storage::simulated(&disk, 1);
    faults(&disk, SimKind::Read, ALWAYS, Fault::Short(0));
    faults(&disk, SimKind::Write, ALWAYS, Fault::Short(0));
    block_on(async {
        let mut buf = [0; 600];
        let error = storage.read(100, &mut buf).await.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EIO));
        assert!(error.to_string().contains("(at offset 0x64)"), "{error}");
        let error = storage.write(0, &buf).await.unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        disk.clear_faults();
        faults(&disk, SimKind::Read, 1, Fault::Short(0));
        storage.read(100, &mut buf).await.unwrap();
        assert_eq!(buf, [7; 600]);
    });
    let storage = Storage::simulated(&disk, 512);
    for (times, works) in [(1, true), (ALWAYS, false)] {
        disk.clear_faults();
        faults(&disk, SimKind::Write, times, Fault::Short(511));
        assert_eq!(block_on(storage.write(0, &[8; 1024])).is_ok(), works);
        // Nor through the merging of the rest of a unit.
        disk.clear_faults();
        faults(&disk, SimKind::Write, times, Fault::Short(511));
        assert_eq!(block_on(storage.write(10, &[8; 1000])).is_ok(), works);
    }
}

#[test]
fn a_file_cut_short_by_others_is_an_error_and_one_grown_is_not() {
    let dir = memory_dir();
    let path = create(&dir, 8192);
    for runtime in runtimes() {
        let outsider = std::fs::File::options().write(true).open(&path).unwrap();
        outsider.set_len(8192).unwrap();
        let storage = Storage::open(&path, &OpenOptions::read_only()).unwrap();
        runtime.block_on(async {
            let mut buf = vec![1; 8192];
            outsider.set_len(4096).unwrap();
            let error = storage.read(0, &mut buf).await.unwrap_err();
            assert_eq!(error.errno(), libc::EIO);
            outsider.set_len(16_384).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&outsider, &[9; 4096], 12_288).unwrap();
            storage.read(8192, &mut buf).await.unwrap();
            assert_eq!((buf[0], buf[4096], buf[8191]), (0, 9, 9));
        });
    }
}

#[test]
fn a_short_read_where_another_has_grown_the_file_is_not_its_end() {
    let disk = SimDisk::with_image(Image::from_bytes(&[7; 1024]));
    let storage = Storage::simulated(&disk, 1);
    block_on(async {
        let other = Storage::simulated(&disk, 1);
        other.write(1024, &[8; 8192]).await.unwrap();
        faults(&disk, SimKind::Read, 1, Fault::Short(2000));
        let mut buf = vec![0; 4096];
        storage.read(0, &mut buf).await.unwrap();
        assert!(buf[..1024] == [7; 1024] && buf[1024..] == [8; 3072]);
    });
}

#[test]
fn a_full_disk_fails_what_does_not_fit_and_keeps_the_rest() {
    for alignment in [1, 4096] {
        let disk = SimDisk::new();
        let storage = Storage::simulated(&disk, alignment);
        disk.set_capacity(3 * 4096);
        block_on(async {
            storage.write(0, &[1; 8192]).await.unwrap();
            let error = storage.write(8192, &[2; 8192]).await.unwrap_err();
            assert_eq!(
                (error.kind(), error.errno()),
                (ErrorKind::NoSpace, libc::ENOSPC)
            );
            // What fitted before the end was stored, and counts.
            assert_eq!(storage.len(), 12_288);
            storage.write(0, &[3; 12_288]).await.unwrap();
            disk.set_capacity(u64::MAX);
            storage.write(8192, &[2; 8192]).await.unwrap();
        });
        assert_eq!(storage.len(), 16_384);
    }
}

#[test]
fn part_of_a_unit_is_changed_without_its_neighbours() {
    let disk = SimDisk::with_image(Image::from_bytes(&[7; 16_384]));
    let storage = Storage::simulated(&disk, 4096);
    block_on(async {
        for (offset, len) in [
            (512, 512),
            (0, 100),
            (4000, 200),
            (5000, 9000),
            (16_000, 1000),
        ] {
            disk.forget();
            // Recycled buffers must not happen to hold the right bytes.
            drop(vec![poisoned(4096), poisoned(4096), poisoned(12_288)]);
            storage.write(offset, &vec![9; len]).await.unwrap();
            let mut wanted = Image::from_bytes(&disk.history().start[0].bytes(0, 16_384));
            wanted.write(offset, &vec![9; len]);
            wanted.set_len(disk.len());
            assert_eq!(disk.image(), wanted);
            // In one write, so that a unit is never seen half-changed.
            assert_eq!(disk.history().records.len(), 1);
        }
        // A unit that cannot be read is not written.
        disk.forget();
        faults(&disk, SimKind::Read, ALWAYS, Fault::Errno(libc::EIO));
        let error = storage.write(100, &[1]).await.unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert!(disk.history().records.is_empty());
    });
}

#[test]
fn zeroes_are_written_where_they_cannot_be_asked_for() {
    for errno in [libc::EOPNOTSUPP, libc::EINVAL] {
        for unmap in [false, true] {
            let disk = SimDisk::with_image(Image::from_bytes(&[7; 10_000]));
            let storage = Storage::simulated(&disk, 1);
            let zero = faults(&disk, SimKind::Zero, ALWAYS, Fault::Errno(errno));
            let punch = faults(&disk, SimKind::Punch, ALWAYS, Fault::Errno(errno));
            block_on(async {
                for _ in 0..3 {
                    storage.write(100, &[7; 12_000]).await.unwrap();
                    storage.write_zeroes(100, 12_000, unmap).await.unwrap();
                    assert!(disk.image().bytes(100, 12_000).iter().all(|&b| b == 0));
                    assert!(!storage.punch(0, 4096).await.unwrap());
                }
                assert_eq!(disk.image().bytes(0, 100), [7; 100]);
            });
            assert_eq!(storage.len(), 12_100);
            // What is not supported is asked for once; what cannot be done for
            // one range, for each.
            let asked = zero.load(Ordering::SeqCst);
            let punched = punch.load(Ordering::SeqCst);
            if errno == libc::EOPNOTSUPP {
                assert_eq!((asked, punched), (1, 1));
            } else {
                assert_eq!((asked, punched), (3, if unmap { 6 } else { 3 }));
            }
        }
    }
}

#[test]
fn zeroing_asks_before_it_writes_and_never_shortens() {
    let disk = SimDisk::with_image(Image::from_bytes(&[7; 8192]));
    let storage = Storage::simulated(&disk, 512);
    block_on(async {
        storage.write_zeroes(0, 4096, false).await.unwrap();
        storage.write_zeroes(4096, 4096, true).await.unwrap();
        storage.write_zeroes(6000, 10_000, true).await.unwrap();
    });
    assert!(disk.len() >= 16_000);
    assert_eq!(disk.image().bytes(0, 16_384), vec![0; 16_384]);
    let history = disk.history();
    assert!(matches!(
        history.records[0].change,
        Change::Zero {
            offset: 0,
            len: 4096
        }
    ));
    assert!(matches!(
        history.records[1].change,
        Change::Punch {
            offset: 4096,
            len: 4096
        }
    ));
    assert!(
        history
            .records
            .iter()
            .all(|r| !matches!(r.change, Change::SetLen(_)))
    );
}

#[test]
fn ranges_past_the_largest_offset_are_refused() {
    let storage = Storage::simulated(&SimDisk::new(), 1);
    block_on(async {
        for offset in [u64::MAX, i64::MAX as u64] {
            let mut buf = [0; 2];
            for result in [
                storage.read(offset, &mut buf).await,
                storage.write(offset, &buf).await,
                storage.write_zeroes(offset, 2, true).await,
                storage.punch(offset, 2).await.map(drop),
            ] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfBounds);
            }
        }
    });
}

#[test]
fn a_dropped_transfer_lets_go_of_its_memory() {
    let dir = memory_dir();
    let path = create(&dir, 1 << 20);
    for runtime in runtimes() {
        let storage = Storage::open(&path, &OpenOptions::read_write()).unwrap();
        runtime.block_on(async {
            for i in 0..50 {
                let mut buf = vec![i; 65_536];
                let payload = Payload::of_slice_mut(&mut buf);
                let transfers = [
                    storage.start_write(0, &payload),
                    storage.start_read(0, &payload),
                    storage.start_read(0, &payload),
                ];
                drop(transfers);
            }
            storage.write(0, &[1; 4096]).await.unwrap();
        });
    }
}
