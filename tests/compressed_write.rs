//! Compressing writes: packed like QEMU packs them, every host cluster counted
//! once for each compressed cluster that touches it, whatever is overwritten,
//! discarded and written again between them.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::check::Checked;
use common::lab::{self, How};
use common::{Reader, half_random, qemu_img, qemu_io};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use qcow2_ublk::qcow2::{CompressionType, Selector, create::CreateOptions};
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, crash_images};
use qcow2_ublk::{Disk, ErrorKind, chain};

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that do not compress.
fn random(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| rng.next_u64() as u8).collect()
}

fn zstd(size: u64) -> CreateOptions {
    CreateOptions {
        compression_type: CompressionType::Zstd,
        ..CreateOptions::new(size)
    }
}

/// Every reference is counted exactly: no leak, no corruption.
#[track_caller]
fn assert_exact(image: &sim::Image) {
    let found = Checked::open(image).unwrap().check();
    assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
    assert_eq!(found.leaks, 0, "leaked clusters");
}

/// QEMU finds the image clean, and in it what `model` says.
fn assert_qemu_agrees(path: &Path, model: &[u8]) {
    lab::qemu_check(path, false);
    let flat = path.with_extension("flat");
    std::fs::write(&flat, model).unwrap();
    let args = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
    qemu_img(&[args.as_slice(), &[name(path), name(&flat)]].concat());
}

/// The kinds of content of one cluster after the other: compressible, not at
/// all, zeros.
fn mixed(len: usize, cluster: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut content = Vec::new();
    while content.len() < len {
        let seed = rng.next_u64();
        content.extend(match rng.below(5) {
            0 => random(cluster, seed),
            1 => vec![0; cluster],
            2 => vec![seed as u8; cluster],
            _ => half_random(cluster, seed),
        });
    }
    content.truncate(len);
    content
}

#[test]
fn what_is_written_compressed_is_read_by_qemu() {
    for (index, cluster_size) in [512_u64, 4096, 65536, 2 << 20].into_iter().enumerate() {
        for kind in [CompressionType::Deflate, CompressionType::Zstd] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.qcow2");
            // The last cluster is not whole.
            let clusters = (1 << 20) / cluster_size as usize + 3;
            let size = clusters * cluster_size as usize - 512;
            let size = if cluster_size == 512 {
                size + 256
            } else {
                size
            };
            let size = size / 512 * 512;
            let options = CreateOptions {
                cluster_size,
                compression_type: kind,
                ..CreateOptions::new(size as u64)
            };
            let model = mixed(size, cluster_size as usize, 10 + index as u64);
            let disk = Disk::create(&path, &options).unwrap();
            disk.write_compressed_at(&model, 0, None).unwrap();
            let mut seen = vec![0xee; size];
            disk.read_at(&mut seen, 0).unwrap();
            assert!(seen == model, "read back at once, {cluster_size} {kind:?}");
            disk.close().unwrap();
            assert_qemu_agrees(&path, &model);
            assert_exact(&sim::Image::load(&path).unwrap());
        }
    }
}

#[test]
fn compressible_pattern_and_random_clusters() {
    let folder = tempfile::tempdir().unwrap();
    for (options, file) in [
        (CreateOptions::new(1 << 20), "zlib"),
        (zstd(1 << 20), "zstd"),
    ] {
        let path = folder.path().join(file);
        let disk = Disk::create(&path, &options).unwrap();
        let pattern: Vec<u8> = (0..65536_u32).map(|i| (i % 251) as u8).collect();
        let noise = random(65536, 5);
        disk.write_compressed_at(&vec![b'A'; 65536], 0, None)
            .unwrap();
        disk.write_compressed_at(&pattern, 65536, None).unwrap();
        disk.write_compressed_at(&noise, 2 * 65536, None).unwrap();
        disk.write_compressed_at(&[0; 65536], 3 * 65536, None)
            .unwrap();
        disk.close().unwrap();
        let image = Reader::open(&path);
        let entry = |cluster: u64| image.entry(GuestOffset(cluster * 65536));
        assert!(matches!(entry(0), L2Entry::Compressed(_)));
        assert!(matches!(entry(1), L2Entry::Compressed(_)));
        assert!(
            matches!(entry(2), L2Entry::Data { copied: true, .. }),
            "what does not become smaller is stored as it is"
        );
        assert_eq!(entry(3), L2Entry::Unallocated, "zeros take no space");
        let model = [vec![b'A'; 65536], pattern, noise].concat();
        assert!(image.disk()[..model.len()] == model);
        lab::qemu_check(&path, false);
    }
}

#[test]
fn clusters_are_packed_to_the_byte_and_share_sectors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let disk = Disk::create(&path, &CreateOptions::new(4 << 20)).unwrap();
    let model = half_random(4 << 20, 3);
    disk.write_compressed_at(&model, 0, None).unwrap();
    disk.close().unwrap();
    let image = Reader::open(&path);
    let mut touching: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut shared_sectors, mut crossing) = (0, 0);
    let mut before = None;
    for cluster in 0..64 {
        let L2Entry::Compressed(range) = image.entry(GuestOffset(cluster * 65536)) else {
            panic!("cluster {cluster} is not compressed");
        };
        let touched = range.clusters_touched(&image.geometry());
        crossing += u64::from(touched.start() != touched.end());
        for host in touched {
            *touching.entry(host).or_default() += 1;
        }
        let sector = range.offset.0 / 512;
        shared_sectors += u64::from(before == Some(sector));
        before = Some((range.offset.0 + range.max_len - 1) / 512);
    }
    assert!(shared_sectors >= 60, "{shared_sectors} sectors are shared");
    assert!(crossing > 10, "{crossing} clusters lie across a boundary");
    for (host, count) in touching {
        assert_eq!(image.refcount(host), count, "host cluster {host}");
    }
    // As small as what QEMU makes of it.
    let (raw, theirs) = (folder.path().join("raw"), folder.path().join("qemu"));
    std::fs::write(&raw, &model).unwrap();
    let args = ["convert", "-f", "raw", "-O", "qcow2", "-c"];
    qemu_img(&[args.as_slice(), &[name(&raw), name(&theirs)]].concat());
    let len = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert!(
        len(&path) <= len(&theirs) + 65536,
        "{} bytes, QEMU's {}",
        len(&path),
        len(&theirs)
    );
}

/// As implementations go wrong: the refcounts of a compressed write were not
/// kept, and the host clusters were handed out again after a reopen.
#[test]
fn compressed_clusters_survive_a_reopen_and_overwrites() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let mut model = half_random(2 << 20, 77);
    let disk = Disk::create(&path, &CreateOptions::new(2 << 20)).unwrap();
    disk.write_compressed_at(&model[..1 << 20], 0, None)
        .unwrap();
    disk.close().unwrap();
    // New allocations, ordinary ones and compressed ones, after a reopen.
    let disk = Disk::open(&path, &options).unwrap();
    disk.write_at(&model[1 << 20..(1 << 20) + 65536], 1 << 20)
        .unwrap();
    let rest = (1 << 20) + 65536;
    disk.write_compressed_at(&model[rest..], rest as u64, Some(9))
        .unwrap();
    disk.close().unwrap();
    assert_qemu_agrees(&path, &model);
    // A part of a compressed cluster, all of one, and one compressed anew.
    let disk = Disk::open(&path, &options).unwrap();
    for (offset, len, compressed) in [
        (4096, 4096, false),
        (3 * 65536, 65536, false),
        (5 * 65536, 65536, true),
        (6 * 65536 + 100, 1000, true),
    ] {
        let bytes = half_random(len, offset as u64);
        model[offset..offset + len].copy_from_slice(&bytes);
        if compressed {
            disk.write_compressed_at(&bytes, offset as u64, None)
                .unwrap();
        } else {
            disk.write_at(&bytes, offset as u64).unwrap();
        }
    }
    disk.close().unwrap();
    assert_qemu_agrees(&path, &model);
    assert_exact(&sim::Image::load(&path).unwrap());
    // And QEMU goes on with it.
    qemu_io(&path, &["write -P 9 1000k 200k", "discard 0 192k"]);
    lab::qemu_check(&path, false);
}

#[test]
fn any_offset_and_length_can_be_written_compressed() {
    let below = half_random(300 << 10, 8);
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::write(&base, &below).unwrap();
    let path = folder.path().join("a.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base"];
    let size = "400k";
    qemu_img(&[args.as_slice(), &[name(&path), size]].concat());
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(&path, &options).unwrap();
    let mut model = below;
    model.resize(400 << 10, 0);
    // Inside a cluster, across some, up to the unaligned end of the disk.
    for (offset, len) in [(100, 33), (65_000, 140_000), (399 << 10, 1024), (0, 65536)] {
        let bytes = half_random(len, len as u64);
        disk.write_compressed_at(&bytes, offset as u64, None)
            .unwrap();
        model[offset..offset + len].copy_from_slice(&bytes);
        let mut seen = vec![0xee; model.len()];
        disk.read_at(&mut seen, 0).unwrap();
        assert!(seen == model, "after {len} bytes at {offset}");
    }
    // Zeros hide the backing file.
    disk.write_compressed_at(&[0; 65536], 0, None).unwrap();
    model[..65536].fill(0);
    let past = disk.write_compressed_at(&[1; 1024], 399 << 10 | 512, None);
    assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfBounds);
    disk.close().unwrap();
    assert_qemu_agrees(&path, &model);
}

#[test]
fn levels_trade_speed_for_size() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["cluster", "refcount", "table", "offset", "image", "sector"];
    let mut rng = Rng::new(4);
    let mut text = Vec::new();
    while text.len() < 1 << 20 {
        text.extend(words[rng.below(6) as usize].as_bytes());
        text.extend(rng.below(1000).to_string().as_bytes());
    }
    text.truncate(1 << 20);
    for (options, low, high) in [(CreateOptions::new(1 << 20), 1, 9), (zstd(1 << 20), 1, 15)] {
        let len = |level| {
            let path = folder.path().join("a.qcow2");
            let disk = Disk::create(&path, &options).unwrap();
            disk.write_compressed_at(&text, 0, Some(level)).unwrap();
            disk.close().unwrap();
            assert_qemu_agrees(&path, &text);
            let image = Reader::open(&path);
            let mut bytes = 0;
            for cluster in 0..16 {
                if let L2Entry::Compressed(range) = image.entry(GuestOffset(cluster * 65536)) {
                    bytes += range.max_len;
                }
            }
            bytes
        };
        let (fast, small) = (len(low), len(high));
        assert!(
            small < fast,
            "{fast} bytes at level {low}, {small} at {high}"
        );
    }
}

/// One step of random work on an image and on its model.
async fn step(engine: &Engine, rng: &mut Rng, model: &mut [u8], cluster: u64) {
    let size = model.len() as u64;
    let first = rng.below(size / cluster) * cluster;
    let clusters = 1 + rng.below(6);
    let whole = first..(first + clusters * cluster).min(size);
    let part = {
        let start = rng.below(size / 512) * 512;
        start..(start + 512 + rng.below(3 * cluster) / 512 * 512).min(size)
    };
    let of = |range: &std::ops::Range<u64>| range.start as usize..range.end as usize;
    match rng.below(12) {
        0..5 => {
            let bytes = mixed(
                (whole.end - whole.start) as usize,
                cluster as usize,
                rng.next_u64(),
            );
            engine
                .write_compressed(0, whole.start, &bytes, Some(1))
                .await
                .unwrap();
            model[of(&whole)].copy_from_slice(&bytes);
        }
        5 => {
            let bytes = half_random((part.end - part.start) as usize, rng.next_u64());
            engine
                .write_compressed(0, part.start, &bytes, None)
                .await
                .unwrap();
            model[of(&part)].copy_from_slice(&bytes);
        }
        6 => {
            let bytes = half_random((part.end - part.start) as usize, rng.next_u64());
            lab::write(engine, 0, part.start, &bytes, false)
                .await
                .unwrap();
            model[of(&part)].copy_from_slice(&bytes);
        }
        7 => {
            engine
                .write_zeroes(0, part.start, part.end - part.start, rng.chance(1, 2))
                .await
                .unwrap();
            model[of(&part)].fill(0);
        }
        8..11 => {
            engine
                .discard(0, whole.start, whole.end - whole.start)
                .await
                .unwrap();
            model[of(&whole)].fill(0);
        }
        _ => engine.flush().await.unwrap(),
    }
}

#[test]
fn random_work_keeps_every_count_exact() {
    let mut seed = 1;
    for cluster in [512_u64, 4096, 65536] {
        for bits in [1_u32, 2, 4, 16, 64] {
            for kind in ["zlib", "zstd"] {
                let size = (cluster * 200).min(2 << 20);
                let options =
                    format!("cluster_size={cluster},refcount_bits={bits},compression_type={kind}");
                let disk = SimDisk::with_image(lab::created(&options, size));
                let mut model = vec![0; size as usize];
                let mut rng = Rng::new(seed);
                let how = How {
                    alignment: if cluster > 512 && seed % 3 == 0 {
                        4096
                    } else {
                        1
                    },
                    ..How::default()
                };
                for _ in 0..2 {
                    lab::block_on(async {
                        let engine = lab::open(&disk, &how).await.unwrap();
                        for _ in 0..60 {
                            step(&engine, &mut rng, &mut model, cluster).await;
                        }
                        let seen = lab::read(&engine, 0, 0, size).await.unwrap();
                        assert!(seen == model, "{options}, seed {seed}");
                        engine.close().await.unwrap();
                    });
                    assert_exact(&disk.image());
                }
                if seed % 5 == 0 {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("a.qcow2");
                    disk.image().save(&path).unwrap();
                    assert_qemu_agrees(&path, &model);
                }
                seed += 1;
            }
        }
    }
}

/// With refcounts of one bit no host cluster can be shared.
#[test]
fn narrow_refcounts_limit_the_sharing() {
    for (bits, most) in [(1_u64, 1_u64), (2, 3), (4, 15)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let options = CreateOptions {
            refcount_bits: bits,
            ..CreateOptions::new(4 << 20)
        };
        let disk = Disk::create(&path, &options).unwrap();
        let model: Vec<u8> = (0..64).flat_map(|i| vec![i as u8 + 1; 65536]).collect();
        disk.write_compressed_at(&model, 0, None).unwrap();
        disk.close().unwrap();
        assert_qemu_agrees(&path, &model);
        let image = Reader::open(&path);
        let mut counts = Vec::new();
        for cluster in 0..64 {
            let L2Entry::Compressed(range) = image.entry(GuestOffset(cluster * 65536)) else {
                panic!("not compressed");
            };
            counts.push(image.refcount(range.offset.0 / 65536));
        }
        assert_eq!(counts.iter().max(), Some(&most), "{bits} bits: {counts:?}");
    }
}

/// Power cuts: the model of each flush, and of the work since.
#[test]
fn power_cuts_during_compressed_writes() {
    for (seed, cluster, kind) in [(1, 4096_u64, "zlib"), (2, 65536, "zstd"), (3, 512, "zlib")] {
        lab::watched(120, || cut(seed, cluster, kind));
    }
}

fn cut(seed: u64, cluster: u64, kind: &str) {
    let options = format!("cluster_size={cluster},compression_type={kind}");
    let size = cluster * 24;
    let disk = SimDisk::with_image(lab::created(&options, size));
    disk.shuffle(Some(seed));
    let mut model = vec![0; size as usize];
    // Records when a step was begun, and what the disk shows after it.
    let mut steps = vec![(0, model.clone())];
    // Records when a flush was complete, and the steps it covers.
    let mut flushes = vec![(0, 0)];
    let mut rng = Rng::new(seed);
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        for _ in 0..40 {
            let begun = disk.recorded();
            if rng.chance(1, 5) {
                engine.flush().await.unwrap();
                flushes.push((disk.recorded(), steps.len() - 1));
                continue;
            }
            step(&engine, &mut rng, &mut model, cluster).await;
            steps.push((begun, model.clone()));
        }
        engine.close().await.unwrap();
    });
    let mut judged = 0;
    for crash in crash_images(&disk.history(), seed, 4) {
        if !rng.chance(1, 4) {
            continue;
        }
        judged += 1;
        let image = &crash.images[0];
        let checked = Checked::open(image).unwrap();
        let found = checked.check();
        assert!(
            found.corruptions.is_empty(),
            "{crash}: {:#?}",
            found.corruptions
        );
        let content = checked.active_content(&[]);
        let covered = flushes
            .iter()
            .filter(|(complete, _)| *complete <= crash.point)
            .map(|(_, step)| *step)
            .max()
            .unwrap();
        let possible: Vec<&Vec<u8>> = steps[covered..]
            .iter()
            .enumerate()
            .filter(|(nth, (begun, _))| *nth == 0 || *begun <= crash.point)
            .map(|(_, (_, content))| content)
            .collect();
        for (sector, bytes) in content.chunks(512).enumerate() {
            let at = sector * 512;
            assert!(
                possible.iter().any(|model| model[at..at + 512] == *bytes),
                "{crash}: sector {sector} is from before the last flush, or from nowhere"
            );
        }
        // And the image can be used on.
        let again = SimDisk::with_image(image.clone());
        lab::block_on(async {
            let engine = lab::open(&again, &How::default()).await.unwrap();
            let bytes = half_random(2 * cluster as usize, seed);
            engine.write_compressed(0, 0, &bytes, None).await.unwrap();
            engine.discard(0, cluster, cluster).await.unwrap();
            engine.close().await.unwrap();
        });
        let found = Checked::open(&again.image()).unwrap().check();
        assert!(
            found.corruptions.is_empty(),
            "after more work: {:#?}",
            found.corruptions
        );
    }
    assert!(judged > 50, "{judged} states are too few to mean anything");
}

/// A place for compressed data that was given back, because an action on the
/// open image wants nothing reserved, is taken again: what was read there
/// before is not shown in its stead.
#[test]
fn a_place_given_back_for_an_action_shows_what_is_written_there_next() {
    let disk = SimDisk::with_image(lab::created("", 1 << 20));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        let content = [3, 4].map(|seed| half_random(65536, seed));
        engine
            .write_compressed(0, 0, &content[0], None)
            .await
            .unwrap();
        assert_eq!(lab::read(&engine, 0, 0, 65536).await.unwrap(), content[0]);
        // The place loses its mapping; it is being filled, and so not free.
        lab::write(&engine, 0, 0, &content[1], false).await.unwrap();
        engine.flush().await.unwrap();
        // Everything that is reserved goes back before this is refused.
        let none = Selector::Name(b"none".into());
        let refused = engine.chain().top().delete_snapshot(none).await;
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotFound);
        engine
            .write_compressed(0, 5 << 16, &content[1], None)
            .await
            .unwrap();
        let shown = lab::read(&engine, 0, 5 << 16, 65536).await.unwrap();
        assert!(shown == content[1], "the bytes of another cluster");
        engine.close().await.unwrap();
    });
    assert_exact(&disk.image());
}
