//! The kinds of images and of work.

use super::*;

/// Half-random bytes: they compress, but not to nothing.
fn text(len: u64, seed: u64) -> Vec<u8> {
    common::half_random(len as usize, seed)
}

#[test]
fn small_clusters_and_every_refcount_width() {
    let mut seed = 1;
    for cluster in ["512", "4096", "65536"] {
        let size = cluster.parse::<u64>().unwrap().min(16384) * 256;
        let size = size.min(1 << 20);
        for bits in ["1", "16", "64"] {
            let options = format!("cluster_size={cluster},refcount_bits={bits}");
            let mut scenario = Scenario::new("empty image", lab::created(&options, size), seed);
            scenario.grows = bits != "16";
            scenario.states = 150;
            if cluster != "512" {
                scenario.how.alignment = 512 << (seed % 4);
            }
            scenario.run();
            seed += 1;
        }
    }
}

#[test]
fn version_2_with_and_without_backing() {
    for (seed, backed) in [(100, false), (101, true)] {
        let image = lab::created("compat=0.10,cluster_size=4096", 512 << 10);
        let mut scenario = Scenario::new("version 2", image, seed);
        if backed {
            scenario.below = text(300 << 10, 7);
            scenario.how.below = Below::Raw(sim::Image::from_bytes(&scenario.below));
        }
        scenario.run();
    }
}

#[test]
fn over_a_backing_image() {
    for seed in 200..203 {
        // Shorter than the overlay, and its end is not the end of a cluster.
        let below = text((400 << 10) + 1536, seed);
        let image = lab::created("cluster_size=4096", 512 << 10);
        let mut scenario = Scenario::new("over a compressed base", image, seed);
        let base = lab::converted(&below, &["-c", "-o", "cluster_size=65536"]);
        scenario.how.below = Below::Qcow2(base);
        scenario.below = below;
        scenario.grows = seed % 2 == 0;
        scenario.run();
    }
}

#[test]
fn snapshots_share_tables_and_clusters() {
    for (seed, cluster) in [(300, "512"), (301, "4096"), (302, "65536")] {
        let size = 512 << 10;
        let options = format!("cluster_size={cluster}");
        let mut image = lab::converted(&text(size, 9), &["-o", &options]);
        lab::with_file(&mut image, |path| {
            let name = path.to_str().unwrap();
            common::qemu_img(&["snapshot", "-c", "first", name]);
            common::qemu_io(path, &["write -P 0x21 0 96k", "write -z 256k 64k"]);
            common::qemu_img(&["snapshot", "-c", "second", name]);
        });
        Scenario::new("two snapshots", image, seed).run();
    }
}

/// Extended L2 entries: parts of clusters are data, zeros or not there; over a
/// backing file, shared with a snapshot, and with compressed clusters.
#[test]
fn subclusters() {
    for (seed, cluster) in [(600, "16384"), (601, "65536"), (602, "16384")] {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        let image = lab::created(&options, 512 << 10);
        let mut scenario = Scenario::new("subclusters", image, seed);
        scenario.grows = seed == 600;
        scenario.how.alignment = if seed == 601 { 4096 } else { 1 };
        scenario.states = 200;
        if seed == 602 {
            scenario.below = text((400 << 10) + 1536, seed);
            scenario.how.below = Below::Raw(sim::Image::from_bytes(&scenario.below));
            scenario.grows = true;
        }
        scenario.run();
    }
    for (seed, convert) in [(610, &["-c"][..]), (611, &[])] {
        let options = ["-o", "extended_l2=on,cluster_size=16384"];
        let arguments = [convert, &options].concat();
        let mut image = lab::converted(&text(512 << 10, seed), &arguments);
        lab::with_file(&mut image, |path| {
            let name = path.to_str().unwrap();
            common::qemu_io(path, &["write -P 0x21 3k 30k", "write -z 64k 9k"]);
            common::qemu_img(&["snapshot", "-c", "first", name]);
            common::qemu_io(path, &["write -P 0x22 30k 3k", "write -z 71k 2k"]);
        });
        Scenario::new("subclusters and a snapshot", image, seed).run();
    }
}

/// An external data file is another file, which loses power with the image;
/// a raw one is the disk at every moment.
#[test]
fn external_data_files() {
    for (seed, raw, extended_l2) in [
        (700, false, false),
        (701, true, false),
        (702, false, true),
        (703, false, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("a.qcow2"), dir.path().join("data"));
        let options = CreateOptions {
            cluster_size: if extended_l2 { 16384 } else { 4096 },
            extended_l2,
            data_file: Some("data".into()),
            data_file_raw: raw,
            ..CreateOptions::new(512 << 10)
        };
        lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
        let bytes = vec![0x41; 100 << 10];
        let writable = qcow2_ublk::chain::Options {
            writable: true,
            ..Default::default()
        };
        let made = qcow2_ublk::Disk::open(&path, &writable).unwrap();
        made.write_at(&bytes, 64 << 10).unwrap();
        if !raw {
            made.write_zeroes_at(96 << 10, 8 << 10, false).unwrap();
        }
        made.close().unwrap();
        let image = sim::Image::load(&path).unwrap();
        let mut scenario = Scenario::new("external data file", image, seed);
        scenario.data = Some(sim::Image::load(&data).unwrap());
        scenario.raw = raw;
        scenario.states = 200;
        if seed == 703 {
            scenario.below = text((400 << 10) + 1536, seed);
            scenario.how.below = Below::Raw(sim::Image::from_bytes(&scenario.below));
        } else {
            scenario.grows = true;
        }
        scenario.run();
    }
}

#[test]
fn compressed_clusters_share_host_clusters() {
    for (seed, cluster, kind) in [
        (400, "4096", "zlib"),
        (401, "65536", "zlib"),
        (402, "4096", "zstd"),
    ] {
        let options = format!("cluster_size={cluster},compression_type={kind}");
        let mut image = lab::converted(&text(512 << 10, seed), &["-c", "-o", &options]);
        if seed == 400 {
            lab::with_file(&mut image, |path| {
                common::qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
            });
        }
        Scenario::new("compressed", image, seed).run();
    }
}

#[test]
fn the_refcount_table_grows() {
    // 64 refcounts per block, 64 blocks per cluster of the table: it is full
    // at 2 MiB of file.
    let options = "cluster_size=512,refcount_bits=64";
    for seed in 500..502 {
        let mut image = lab::created(options, 2 << 20);
        lab::with_file(&mut image, |path| {
            // With the snapshot every write needs a cluster.
            common::qemu_io(path, &["write -P 0x33 0 1930k"]);
            common::qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
        });
        let tables = Checked::open(&image)
            .unwrap()
            .header
            .refcount_table_clusters;
        eprintln!("{tables} clusters of table, {} bytes of file", image.len());
        let mut scenario = Scenario::new("refcount table", image, seed);
        scenario.steps = 60;
        scenario.rounds = 3;
        scenario.reopens = false;
        scenario.states = 100;
        let trial = Trial::new(scenario);
        let disk = trial.disk.clone();
        lab::watched(120, || trial.run());
        let image = disk.image();
        let now = Checked::open(&image)
            .unwrap()
            .header
            .refcount_table_clusters;
        assert!(
            now > tables,
            "the table did not grow: the test is too small"
        );
    }
}

/// Row 23: QEMU loses guest data at 64k here. The two rewrites free a host
/// cluster in memory only; the third write must not be put there.
#[test]
fn row_23_freed_cluster_is_not_reused_before_its_unmapping_is_durable() {
    let original = [
        vec![0x11; 64 << 10],
        vec![0x22; 64 << 10],
        vec![0; 1920 << 10],
    ]
    .concat();
    let mut image = lab::converted(&original, &["-c"]);
    // No room but at the end and in what is freed.
    lab::with_file(&mut image, |path| lab::qemu_check(path, false));
    let disk = SimDisk::with_image(image);
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0xa1; 4096], false)
            .await
            .unwrap();
        lab::write(&engine, 0, 64 << 10, &[0xa2; 4096], false)
            .await
            .unwrap();
        lab::write(&engine, 0, 1 << 20, &[0xa3; 64 << 10], false)
            .await
            .unwrap();
        let history = disk.history();
        let mut states = 0;
        for crash in crash_images(&history, 23, 200) {
            let found = Checked::open(&crash.images[0]).unwrap().check();
            assert!(found.corruptions.is_empty(), "{crash}: {found:?}");
            let engine = lab::open(
                &SimDisk::with_image(crash.images[0].clone()),
                &How::default(),
            )
            .await
            .unwrap();
            let content = lab::read(&engine, 0, 0, 2 << 20).await.unwrap();
            for (byte, offset) in [(0x11, 0), (0x22, 64 << 10)] {
                let rest = &content[offset + 4096..offset + (64 << 10)];
                assert!(rest.iter().all(|&b| b == byte), "{crash}: {offset:#x}");
            }
            states += 1;
        }
        assert!(states > 400);
        // And when all of it is flushed, it is all there.
        engine.flush().await.unwrap();
        let flushed = crash_images(&disk.history(), 1, 0).last().unwrap();
        let engine = lab::open(
            &SimDisk::with_image(flushed.images[0].clone()),
            &How::default(),
        )
        .await
        .unwrap();
        let content = lab::read(&engine, 0, 0, 2 << 20).await.unwrap();
        assert!(content[..4096] == [0xa1; 4096] && content[4096] == 0x11);
        assert!(content[1 << 20..(1 << 20) + (64 << 10)] == [0xa3; 64 << 10]);
    });
}
