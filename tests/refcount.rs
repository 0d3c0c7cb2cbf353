//! The allocator: every refcount width, reuse of what was freed, growth, and
//! its cost on huge and fragmented images, in reads and not in time.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::check::Checked;
use common::lab::{self, How};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::check::{self, CheckReport};
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk, SimKind};

const K: u64 = 1024;
const M: u64 = 1024 * K;
const CLUSTER: u64 = 64 * K;

fn checked(image: &sim::Image) -> CheckReport {
    let storage = Storage::simulated(&SimDisk::with_image(image.clone()), 1);
    lab::block_on(check::check(&storage, &mut |_| {})).unwrap()
}

async fn write(engine: &Engine, offset: u64, len: u64, byte: u8) {
    lab::write(engine, 0, offset, &vec![byte; len as usize], false)
        .await
        .unwrap();
}

async fn assert_reads(engine: &Engine, offset: u64, len: u64, byte: u8) {
    let bytes = lab::read(engine, 0, offset, len).await.unwrap();
    assert!(bytes.iter().all(|&b| b == byte), "at {offset:#x}");
}

fn qemu_agrees(disk: &SimDisk) {
    let mut image = disk.image();
    lab::with_file(&mut image, |path| lab::qemu_check(path, false));
}

/// Allocation, freeing and reuse, with refcounts of 1 to 64 bits.
#[test]
fn every_width_counts() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = format!("cluster_size=512,refcount_bits={bits}");
        let disk = SimDisk::with_image(lab::created(&options, 2 * M));
        lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            write(&engine, 0, 700 * K, 1).await;
            engine.discard(0, 100 * K, 300 * K).await.unwrap();
            engine.flush().await.unwrap();
            write(&engine, M, 500 * K, 2).await;
            write(&engine, 90 * K, 20 * K, 3).await;
            engine.close().await.unwrap();
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            assert_reads(&engine, 0, 90 * K, 1).await;
            assert_reads(&engine, 90 * K, 20 * K, 3).await;
            assert_reads(&engine, 110 * K, 290 * K, 0).await;
            assert_reads(&engine, 400 * K, 300 * K, 1).await;
            assert_reads(&engine, M, 500 * K, 2).await;
        });
        let found = checked(&disk.image());
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{bits} bits");
        qemu_agrees(&disk);
    }
}

/// Clusters of 512 bytes and wide refcounts: a block counts 64 clusters, so
/// that blocks come often, each counting itself, and the table moves.
#[test]
fn blocks_count_themselves_and_the_table_grows() {
    let disk = SimDisk::with_image(lab::created("cluster_size=512,refcount_bits=64", 8 * M));
    let table_at = |image: &sim::Image| {
        let header = Checked::open(image).unwrap().header.clone();
        (header.refcount_table_offset, header.refcount_table_clusters)
    };
    let before = table_at(&disk.image());
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        for n in 0..16 {
            write(&engine, n * 512 * K, 512 * K, n as u8 + 1).await;
        }
        engine.close().await.unwrap();
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        for n in 0..16 {
            assert_reads(&engine, n * 512 * K, 512 * K, n as u8 + 1).await;
        }
    });
    let after = table_at(&disk.image());
    assert!(
        after.1 > before.1 && after.0 != before.0,
        "{before:?}, {after:?}"
    );
    let found = checked(&disk.image());
    assert_eq!((found.corruptions, found.leaks), (0, 0));
    qemu_agrees(&disk);
}

/// Freed clusters are found again before the file grows, also those in front
/// of the last one that was given out, and after the image was opened anew.
#[test]
fn freed_clusters_are_used_before_the_file_grows() {
    let disk = SimDisk::with_image(lab::created("", 64 * M));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        write(&engine, 0, 16 * M, 1).await;
        engine.close().await.unwrap();
        let len = disk.len();
        // Now and after reopening; holes of one cluster and of many.
        for round in 0..4_u64 {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            for hole in 0..8 {
                let at = (hole * 2 + round % 2) * M;
                engine.discard(0, at, CLUSTER * (1 + hole)).await.unwrap();
            }
            engine.flush().await.unwrap();
            engine.flush().await.unwrap();
            for hole in 0..8 {
                let at = (hole * 2 + round % 2) * M;
                write(&engine, at, CLUSTER * (1 + hole), 2 + round as u8).await;
            }
            engine.close().await.unwrap();
            assert_eq!(disk.len(), len, "round {round}");
        }
    });
    let found = checked(&disk.image());
    assert_eq!((found.corruptions, found.leaks), (0, 0));
}

/// Refcounts of a large file: its clusters are used but for some.
fn fragmented(blocks: u64, is_free: impl Fn(u64) -> bool) -> sim::Image {
    let new = CreateOptions::new(1 << 40).build().unwrap();
    let mut image = sim::Image::new();
    image.set_len(new.file_len);
    for (offset, bytes) in &new.chunks {
        image.write(offset.0, bytes);
    }
    let first_free = new.file_len.div_ceil(CLUSTER);
    let per_block = CLUSTER / 2;
    for index in 0..blocks {
        // Each block is in the first cluster it counts, the first one where
        // it was made.
        let entry = new.header.refcount_table_offset.0 + index * 8;
        let at = if index == 0 {
            u64::from_be_bytes(image.bytes(entry, 8).try_into().unwrap())
        } else {
            index * per_block * CLUSTER
        };
        image.write(entry, &at.to_be_bytes());
        let first = index * per_block;
        let counts: Vec<u8> = (first..first + per_block)
            .flat_map(|cluster| {
                let free = cluster >= first_free && cluster != first && is_free(cluster);
                [0, u8::from(!free)]
            })
            .collect();
        image.write(at, &counts);
    }
    image.set_len(blocks * per_block * CLUSTER);
    image
}

/// Counts reads of refcount blocks.
fn count_loads(disk: &SimDisk, blocks: u64) -> Arc<AtomicU64> {
    let loads = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&loads);
    let span = CLUSTER / 2 * CLUSTER;
    disk.inject(move |request| {
        let in_block = request.offset % span < CLUSTER && request.offset / span < blocks;
        // The first block is behind the header and the table.
        let in_first = request.offset / CLUSTER == 2;
        if request.kind == SimKind::Read && (in_block && request.offset >= span || in_first) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        None
    });
    loads
}

/// 384 GiB, one cluster in a thousand free: each allocation looks at a few
/// slices of refcounts, and none is looked at twice.
#[test]
fn a_fragmented_image_costs_few_reads_per_allocation() {
    let blocks = 192;
    let image = fragmented(blocks, |cluster| cluster % 1000 == 7);
    let disk = SimDisk::with_image(image);
    let loads = count_loads(&disk, blocks);
    let written = 600;
    let len = disk.len();
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        assert!(
            loads.load(Ordering::Relaxed) == 0,
            "opening reads no counts"
        );
        let mut most = 0;
        for n in 0..written {
            let before = loads.load(Ordering::Relaxed);
            write(&engine, n * CLUSTER, CLUSTER, 5).await;
            most = most.max(loads.load(Ordering::Relaxed) - before);
        }
        assert!(most <= 12, "{most} reads for one write");
        let all = loads.load(Ordering::Relaxed);
        assert!(
            all <= written * 3 / 4 + 16,
            "{all} reads for {written} writes"
        );
        assert_reads(&engine, 0, CLUSTER * 4, 5).await;
        engine.flush().await.unwrap();
    });
    assert_eq!(disk.len(), len, "the free clusters suffice");
}

/// 384 GiB without a free cluster: the search ends, and is not made again.
#[test]
fn a_full_image_is_searched_once() {
    let blocks = 192;
    let disk = SimDisk::with_image(fragmented(blocks, |_| false));
    let loads = count_loads(&disk, blocks);
    let slices = blocks * CLUSTER / 4096;
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        let before = loads.load(Ordering::Relaxed);
        write(&engine, 0, 4 * M, 5).await;
        let first = loads.load(Ordering::Relaxed) - before;
        assert!(first <= 24, "{first} reads for the first write");
        // As many allocations as it takes to have seen all slices.
        for n in 1..slices / 4 + 20 {
            write(&engine, n * 4 * M, 4 * K, 5).await;
            engine.discard(0, n * 4 * M, CLUSTER).await.unwrap();
        }
        let all = loads.load(Ordering::Relaxed);
        assert!(all <= slices + 64, "{all} reads of {slices} slices");
    });
}

/// Clusters at the end of the file that are freed before anybody has asked
/// where it ends, and then taken by what wants adjacent ones, are not given out
/// a second time.
#[test]
fn what_is_freed_at_the_end_is_taken_once() {
    let disk = SimDisk::with_image(lab::created("cluster_size=512", 64 * K));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        write(&engine, 0, 64 * K, 1).await;
        engine.close().await.unwrap();
        drop(engine);
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        engine.discard(0, 0, 64 * K).await.unwrap();
        engine.flush().await.unwrap();
        // The L1 table moves to the end.
        engine.grow(8 * M).await.unwrap();
        write(&engine, 0, 64 * K, 2).await;
        write(&engine, 4 * M, 64 * K, 3).await;
        assert_reads(&engine, 0, 64 * K, 2).await;
        engine.close().await.unwrap();
    });
    let report = checked(&disk.image());
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    qemu_agrees(&disk);
}
