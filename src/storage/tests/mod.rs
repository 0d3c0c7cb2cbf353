//! Storage of every kind does what a vector of bytes does.

mod durability;
mod faults;
mod opening;

use std::fs::File;
use std::future::Future;
use std::path::PathBuf;

use super::sim::{Rng, SimDisk};
use super::*;
use crate::runtime::{Buf, Runtime};

/// A directory on the disk that holds the build: direct I/O means something
/// there, which it may not in the default directory for temporary files.
fn disk_dir() -> tempfile::TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

fn memory_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn create(dir: &tempfile::TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("file");
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

fn runtimes() -> [Runtime; 2] {
    [Runtime::uring(32).unwrap(), Runtime::inline().unwrap()]
}

/// Runs `test` on storage of every kind, with the file's length, on both
/// kinds of runtime.
fn on_every_storage<F: Future<Output = ()>>(len: u64, test: impl Fn(&'static str, Storage) -> F) {
    for runtime in runtimes() {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            for dir in [memory_dir(), disk_dir()] {
                let path = create(&dir, len);
                let storage =
                    Storage::open(&path, &OpenOptions::read_write().cache(cache)).unwrap();
                if let Some(fd) = storage.fd() {
                    runtime.register_file(fd).unwrap();
                }
                runtime.block_on(test("host file", storage));
            }
        }
        for alignment in [1, 512, 4096] {
            for shuffle in [None, Some(1)] {
                let disk = SimDisk::new();
                let storage = Storage::simulated(&disk, alignment);
                runtime.block_on(storage.set_len(len)).unwrap();
                disk.shuffle(shuffle);
                runtime.block_on(test("simulated disk", storage));
            }
        }
    }
}

fn random_bytes(rng: &mut Rng, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    rng.fill(&mut bytes);
    bytes
}

#[test]
fn any_sequence_of_operations_leaves_what_a_vector_holds() {
    on_every_storage(10_000, |what, storage| async move {
        let mut rng = Rng::new(3);
        let mut model = vec![0_u8; 10_000];
        for step in 0..400 {
            let (mut offset, mut len) = (rng.below(200_000), rng.below(20_000));
            if rng.chance(1, 2) {
                offset &= !511;
                len &= !511;
            }
            let end = (offset + len) as usize;
            let grow = |model: &mut Vec<u8>| model.resize(model.len().max(end), 0);
            match rng.below(8) {
                0..3 => {
                    let bytes = random_bytes(&mut rng, len);
                    storage.write(offset, &bytes).await.unwrap();
                    if len > 0 {
                        grow(&mut model);
                        model[offset as usize..end].copy_from_slice(&bytes);
                    }
                }
                3 => {
                    let unmap = rng.chance(1, 2);
                    storage.write_zeroes(offset, len, unmap).await.unwrap();
                    if len > 0 {
                        grow(&mut model);
                        model[offset as usize..end].fill(0);
                    }
                }
                4 => {
                    if storage.punch(offset, len).await.unwrap() {
                        let end = end.min(model.len());
                        model[(offset as usize).min(end)..end].fill(0);
                    }
                }
                5 => {
                    storage.set_len(offset).await.unwrap();
                    model.resize(offset as usize, 0);
                }
                _ => {
                    let mut buf = vec![0xaa; len as usize];
                    storage.read(offset, &mut buf).await.unwrap();
                    let mut wanted = vec![0; len as usize];
                    if let Some(inside) = model.get(offset as usize..) {
                        let n = inside.len().min(len as usize);
                        wanted[..n].copy_from_slice(&inside[..n]);
                    }
                    assert!(
                        buf == wanted,
                        "{what}: {storage:?} step {step} {offset}+{len}"
                    );
                }
            }
            // Direct I/O lengthens the file by whole units.
            let real = storage.backend.current_len().unwrap();
            assert_eq!(storage.len(), real, "{what}: {storage:?} step {step}");
            let rounded = (model.len() as u64).next_multiple_of(storage.alignment().into());
            assert!(real == model.len() as u64 || real == rounded);
            model.resize(real as usize, 0);
        }
        storage.sync().await.unwrap();
    });
}

#[test]
fn transfers_started_together_all_arrive() {
    on_every_storage(0, |what, storage| async move {
        let storage = &storage;
        let bufs: Vec<Buf> = (0..64_u8)
            .map(|i| {
                let mut buf = Buf::take(8192);
                buf.fill(i);
                buf
            })
            .collect();
        let started: Vec<_> = bufs
            .iter()
            .zip(0..)
            .map(|(buf, i)| storage.start_write(i * 8192, &Payload::of_buf(buf)))
            .collect();
        for transfer in started {
            transfer.await.unwrap();
        }
        // Read back across the seams, and past the end.
        let mut bytes = vec![0xff; 64 * 8192 + 1000];
        let parts: Vec<_> = bytes
            .chunks_mut(5000)
            .zip(0..)
            .map(|(part, i)| storage.start_read(i * 5000, &Payload::of_slice_mut(part)))
            .collect();
        for transfer in parts {
            transfer.await.unwrap();
        }
        for (i, &byte) in bytes.iter().enumerate() {
            let wanted = if i < 64 * 8192 { (i / 8192) as u8 } else { 0 };
            assert_eq!(byte, wanted, "{what}: {storage:?} at {i}");
        }
    });
}

#[test]
fn large_and_zero_payloads_go_in_parts() {
    on_every_storage(0, |_, storage| async move {
        let bytes = random_bytes(&mut Rng::new(5), 3_500_000);
        storage.write(77, &bytes).await.unwrap();
        let zeros = Payload::zeros(2_500_001);
        storage.start_write(500_000, &zeros).await.unwrap();
        let mut back = vec![0; bytes.len()];
        storage.read(77, &mut back).await.unwrap();
        let zeroed = 500_000 - 77..3_000_001 - 77;
        assert!(back[zeroed.clone()].iter().all(|&b| b == 0));
        assert!(back[..zeroed.start] == bytes[..zeroed.start]);
        assert!(back[zeroed.end..] == bytes[zeroed.end..]);
    });
}
