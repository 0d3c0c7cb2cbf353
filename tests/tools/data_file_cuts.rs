//! Power cuts while a disk with an external data file gets another size: both
//! files lose power at once, and the disk is the old one or the new one.

use qcow2_ublk::qcow2::create::{CreateOptions, Preallocation};
use qcow2_ublk::storage::sim::{self, SimDisk};
use qcow2_ublk::{Disk, chain};

use crate::common::check::Checked;
use crate::common::half_random;
use crate::common::lab::{self, How};
use crate::cuts::sample;

/// An image of 300 KiB, full but for a part, and its data file.
fn images(raw: bool, extended_l2: bool) -> [sim::Image; 2] {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("a.qcow2"), dir.path().join("data"));
    let options = CreateOptions {
        cluster_size: if extended_l2 { 16384 } else { 4096 },
        extended_l2,
        data_file: Some("data".into()),
        data_file_raw: raw,
        ..CreateOptions::new(300 << 10)
    };
    lab::block_on(chain::create(&path, &options)).unwrap();
    let writable = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(&path, &writable).unwrap();
    disk.write_at(&half_random(300 << 10, 7), 0).unwrap();
    disk.write_zeroes_at(64 << 10, 32 << 10, true).unwrap();
    disk.close().unwrap();
    [path, data].map(|path| sim::Image::load(&path).unwrap())
}

fn cut(what: &str, images: &[sim::Image; 2], size: u64, space: Preallocation) {
    let raw = what.starts_with("raw");
    let old = Checked::open(&images[0])
        .unwrap()
        .with_data(Some(&images[1]))
        .active_content(&[]);
    let mut new = old.clone();
    new.resize(size as usize, 0);
    let disks = |image: &sim::Image, data: &sim::Image| {
        let disk = SimDisk::with_image(image.clone());
        let how = How {
            data: Some(disk.beside(data.clone())),
            ..How::default()
        };
        (disk, how)
    };
    let (disk, how) = disks(&images[0], &images[1]);
    lab::block_on(async {
        let engine = lab::open(&disk, &how).await.unwrap();
        if size < old.len() as u64 {
            engine.shrink(size).await.unwrap();
        } else {
            engine.grow_preallocated(size, space).await.unwrap();
        }
        engine.close().await.unwrap();
    });
    let data = how.data.as_ref().unwrap().image();
    assert_eq!(data.len(), size, "{what}: the data file");
    let (mut seen_old, mut seen_new) = (0, 0);
    for crash in sample(&disk.history(), size) {
        let [image, data] = &crash.images[..] else {
            panic!("there are two files");
        };
        let found = Checked::open(image).unwrap().with_data(Some(data)).check();
        assert!(found.corruptions.is_empty(), "{what}, {crash}: {found:?}");
        let (disk, how) = disks(image, data);
        let content = lab::block_on(async {
            let engine = lab::open(&disk, &how).await.unwrap();
            let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            // Whatever was left behind the end does not appear.
            let longer = old.len().max(new.len()) as u64 + 65536;
            engine.grow(longer).await.unwrap();
            let more = lab::read(&engine, 0, 0, longer).await.unwrap();
            assert!(more[..content.len()] == content, "{what}, {crash}");
            let rest = &more[content.len()..];
            assert!(rest.iter().all(|&b| b == 0), "{what}, {crash}: grown");
            engine.close().await.unwrap();
            content
        });
        if content.len() == old.len() {
            assert!(content == old, "{what}, {crash}: the old disk");
            seen_old += 1;
        } else {
            assert!(content == new, "{what}, {crash}: the new disk");
            seen_new += 1;
        }
        if raw {
            let bytes = data.bytes(0, content.len() as u64);
            assert!(bytes == content, "{what}, {crash}: the raw file");
        }
    }
    assert!(
        seen_old > 0 && seen_new > 0,
        "{what}: {seen_old} old, {seen_new} new"
    );
}

#[test]
fn a_power_cut_leaves_the_old_disk_or_the_new_one_in_both_files() {
    for (what, raw, extended_l2) in [
        ("data file", false, false),
        ("raw data file", true, false),
        ("subclusters", false, true),
    ] {
        let images = images(raw, extended_l2);
        for size in [1536, 100_352] {
            cut(what, &images, size, Preallocation::Off);
        }
        for space in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Full,
        ] {
            cut(what, &images, 500_224, space);
        }
    }
}
