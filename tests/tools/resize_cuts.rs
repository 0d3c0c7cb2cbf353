//! Power cuts while the disk gets another size: it is the old one or the new
//! one, whole.

use qcow2_ublk::storage::sim::{self, SimDisk};

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};
use crate::common::{half_random, qemu_img};
use crate::cuts::sample;

/// Resizes and judges every state that a power cut may leave.
fn cut(name: &str, image: sim::Image, how: &How, below: &[u8], size: u64) {
    let old = Checked::open(&image).unwrap().active_content(below);
    let snapshots: Vec<_> = {
        let checked = Checked::open(&image).unwrap();
        let count = checked.snapshots().len();
        (0..count)
            .map(|i| checked.snapshot_content(i, below))
            .collect()
    };
    let mut new = old.clone();
    new.resize(size as usize, 0);
    let disk = SimDisk::with_image(image);
    lab::block_on(async {
        let engine = lab::open(&disk, how).await.unwrap();
        if size < old.len() as u64 {
            engine.shrink(size).await.unwrap();
        } else {
            engine.grow(size).await.unwrap();
        }
        engine.close().await.unwrap();
    });
    let end = disk.image();
    let found = Checked::open(&end).unwrap().check();
    assert!(
        found.corruptions.is_empty() && found.leaks == 0,
        "{name}: {found:?}"
    );
    let (mut seen_old, mut seen_new) = (0, 0);
    let history = disk.history();
    for crash in sample(&history, size) {
        let checked = Checked::open(&crash.images[0]).unwrap();
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{name}, {crash}: {found:?}");
        for (index, content) in snapshots.iter().enumerate() {
            assert!(
                checked.snapshot_content(index, below) == *content,
                "{name}, {crash}"
            );
        }
        let disk = SimDisk::with_image(crash.images[0].clone());
        let content = lab::block_on(async {
            let engine = lab::open(&disk, how).await.unwrap();
            let content = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            // Growing once more shows nothing but zeros, whatever was left.
            engine
                .grow(old.len().max(new.len()) as u64 + 65536)
                .await
                .unwrap();
            let more = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            assert!(more[..content.len()] == content, "{name}, {crash}");
            assert!(
                more[content.len()..].iter().all(|&b| b == 0),
                "{name}, {crash}"
            );
            engine.close().await.unwrap();
            content
        });
        if content.len() == old.len() {
            assert!(content == old, "{name}, {crash}: the old disk");
            seen_old += 1;
        } else {
            assert!(content == new, "{name}, {crash}: the new disk");
            seen_new += 1;
        }
    }
    assert!(
        seen_old > 0 && seen_new > 0,
        "{name}: {seen_old} old, {seen_new} new"
    );
}

#[test]
fn a_power_cut_leaves_the_old_disk_or_the_new_one() {
    let content = half_random(256 << 10, 3);
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "compat=0.10,cluster_size=4k",
    ] {
        let image = || lab::converted(&content, &["-o", options]);
        for size in [1536, 100_352, 1 << 20] {
            cut(options, image(), &How::default(), &[], size);
        }
        let compressed = lab::converted(&content, &["-c", "-o", options]);
        cut("compressed", compressed, &How::default(), &[], 200_192);
    }
}

#[test]
fn a_power_cut_over_a_longer_backing_file_shows_nothing_of_it() {
    let below = half_random(1 << 20, 9);
    let how = How {
        below: Below::Raw(sim::Image::from_bytes(&below)),
        ..How::default()
    };
    for options in ["cluster_size=4k", "compat=0.10,cluster_size=4k"] {
        for size in [700 << 10, 2 << 20] {
            cut(
                options,
                lab::created(options, 300 << 10),
                &how,
                &below,
                size,
            );
        }
        cut(
            options,
            lab::created(options, 300 << 10),
            &how,
            &below,
            5120,
        );
    }
}

#[test]
fn a_power_cut_leaves_snapshots_alone() {
    let mut image = lab::converted(&half_random(768 << 10, 5), &["-o", "cluster_size=4k"]);
    lab::with_file(&mut image, |path| {
        let name = path.to_str().unwrap();
        qemu_img(&["snapshot", "-c", "one", name]);
    });
    for size in [1024, 300 << 10, 2 << 20] {
        cut("snapshot", image.clone(), &How::default(), &[], size);
    }
}
