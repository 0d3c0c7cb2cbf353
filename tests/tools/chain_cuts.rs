//! Power cuts while an overlay is committed or rebased: what it shows does not
//! change.

use qcow2_ublk::chain::{Apart, Chain, Layer};
use qcow2_ublk::engine::Commit;
use qcow2_ublk::qcow2::create::Backing;
use qcow2_ublk::qcow2::{Image, ImageOptions};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk};

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};
use crate::common::{half_random, qemu_img, qemu_io};
use crate::cuts::sample;

async fn image(disk: &SimDisk) -> Image {
    let storage = Storage::simulated(disk, 1);
    Image::open(storage, &ImageOptions::default())
        .await
        .unwrap()
}

/// An overlay of 512 KiB with data, zeros and compressed clusters of its own.
fn overlay(options: &str, compressed: bool, with_snapshot: bool) -> sim::Image {
    let mut image = lab::created(options, 512 << 10);
    if compressed {
        image = lab::converted(&half_random(512 << 10, 8), &["-c", "-o", options]);
    }
    lab::with_file(&mut image, |path| {
        let commands = [
            "write -P 5 3k 90k",
            "write -z 128k 64k",
            "write -P 6 300k 100k",
        ];
        qemu_io(path, &commands);
        if with_snapshot {
            qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
            qemu_io(path, &["write -P 7 50k 20k"]);
        }
    });
    image
}

/// What a layer shows by itself.
fn shown_by(image: &sim::Image, raw: bool) -> Vec<u8> {
    if raw {
        image.bytes(0, image.len())
    } else {
        Checked::open(image).unwrap().active_content(&[])
    }
}

fn commit(name: &str, top: &sim::Image, base: &sim::Image, raw: bool) {
    let shown = Checked::open(top)
        .unwrap()
        .active_content(&shown_by(base, raw));
    let disk = SimDisk::with_image(top.clone());
    let base_disk = disk.beside(base.clone());
    lab::block_on(async {
        let layer = if raw {
            Layer::Raw(Storage::simulated(&base_disk, 1))
        } else {
            Layer::Qcow2(Box::new(image(&base_disk).await))
        };
        let apart = Apart {
            upper: Chain::new(image(&disk).await, Vec::new()),
            base: vec![layer],
        };
        let commit = Commit::new(apart).unwrap();
        commit.copy(&mut |_, _| {}).await.unwrap();
        commit.empty().await.unwrap();
    });
    assert!(
        shown_by(&base_disk.image(), raw)[..shown.len()] == shown,
        "{name}"
    );
    let (top_end, base_end) = (disk.image(), base_disk.image());
    let top_end = Checked::open(&top_end).unwrap();
    assert_eq!(top_end.check().leaks, 0, "{name}");
    assert!(
        top_end.active_content(&[]).iter().all(|&byte| byte == 0),
        "{name}: emptied"
    );
    if !raw {
        assert_eq!(Checked::open(&base_end).unwrap().check().leaks, 0, "{name}");
    }
    let (mut states, mut emptied) = (0, 0);
    for crash in sample(&disk.history(), 3) {
        let top = Checked::open(&crash.images[0]).unwrap();
        let found = top.check();
        assert!(found.corruptions.is_empty(), "{name}, {crash}: {found:?}");
        if !raw {
            let found = Checked::open(&crash.images[1]).unwrap().check();
            assert!(found.corruptions.is_empty(), "{name}, {crash}: {found:?}");
        }
        let now = top.active_content(&shown_by(&crash.images[1], raw));
        if let Some(at) = now.iter().zip(&shown).position(|(a, b)| a != b) {
            panic!("{name}, {crash}: byte {at:#x} changed");
        }
        assert_eq!(now.len(), shown.len(), "{name}, {crash}");
        states += 1;
        emptied += u32::from(top.active_content(&[]).iter().all(|&byte| byte == 0));
    }
    assert!(
        states > 50 && emptied > 0 && emptied < states,
        "{name}: {states}, {emptied}"
    );
}

#[test]
fn a_power_cut_during_commit_changes_nothing_that_is_shown() {
    let content = half_random(300 << 10, 4);
    for options in [
        "cluster_size=4k",
        "compat=0.10,cluster_size=4k",
        "cluster_size=64k",
    ] {
        for (compressed, with_snapshot) in [(false, false), (true, false), (false, true)] {
            let top = overlay(options, compressed, with_snapshot);
            // Shorter than the overlay and longer.
            if compressed {
                commit(options, &top, &sim::Image::from_bytes(&content), true);
            } else if with_snapshot {
                let base = lab::converted(&content, &["-o", "cluster_size=4k"]);
                commit(options, &top, &base, false);
            } else {
                let long = half_random(700 << 10, 6);
                let base = lab::converted(&long, &["-c", "-o", "compat=0.10,cluster_size=64k"]);
                commit(options, &top, &base, false);
            }
        }
    }
}

/// Gives the image `name` as its backing file, by hand.
fn name_backing(image: &mut sim::Image, name: &str) {
    lab::with_file(image, |path| {
        let path = path.to_str().unwrap();
        qemu_img(&["rebase", "-u", "-b", name, "-F", "raw", path]);
    });
}

fn rebase(options: &str, old: &[u8], new: Option<&[u8]>, names: [&str; 2], compress: bool) {
    let mut top = overlay(options, false, false);
    name_backing(&mut top, names[0]);
    let shown = Checked::open(&top).unwrap().active_content(old);
    let disk = SimDisk::with_image(top);
    let how = How {
        below: Below::Raw(sim::Image::from_bytes(old)),
        ..How::default()
    };
    lab::block_on(async {
        let engine = lab::open(&disk, &how).await.unwrap();
        let layers = new.map(|bytes| {
            let disk = SimDisk::with_image(sim::Image::from_bytes(bytes));
            Layer::Raw(Storage::simulated(&disk, 1))
        });
        let backing = new.map(|_| Backing {
            file: names[1].into(),
            format: Some("raw".to_owned()),
        });
        let layers = layers.into_iter().collect();
        engine
            .rebase(layers, backing.as_ref(), compress, &mut |_, _| {})
            .await
            .unwrap();
        engine.close().await.unwrap();
    });
    let end = disk.image();
    assert_eq!(Checked::open(&end).unwrap().check().leaks, 0, "{options}");
    let (mut before, mut after) = (0, 0);
    for crash in sample(&disk.history(), 5) {
        let checked = Checked::open(&crash.images[0]).unwrap();
        let found = checked.check();
        assert!(
            found.corruptions.is_empty(),
            "{options}, {crash}: {found:?}"
        );
        let name = checked.header.backing_file.clone();
        let below = if name.as_deref() == Some(names[0].as_ref()) {
            before += 1;
            old
        } else {
            let wanted = new.map(|_| names[1].into());
            assert_eq!(name, wanted, "{options}, {crash}: half a name");
            after += 1;
            new.unwrap_or_default()
        };
        assert!(checked.active_content(below) == shown, "{options}, {crash}");
    }
    assert!(
        before > 10 && after > 2,
        "{options}: {before} before, {after} after"
    );
}

#[test]
fn a_power_cut_during_rebase_leaves_the_old_backing_file_or_the_new_one() {
    let old = half_random(400 << 10, 21);
    let mut new = old.clone();
    new[200 << 10..260 << 10].fill(0);
    new.truncate(250 << 10);
    new.extend(half_random(600 << 10, 23));
    let long = ["a", "b"].map(|letter| letter.repeat(900));
    for options in [
        "cluster_size=4k",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512",
    ] {
        let short = ["a/name/of/a/file", "b"];
        rebase(options, &old, Some(&new), short, false);
        rebase(options, &old, Some(&new), short, true);
        rebase(
            options,
            &new,
            Some(&old),
            ["c", "a/much/longer/name/for/the/other/file"],
            false,
        );
        rebase(options, &old, None, short, false);
        if !options.contains("512") {
            // More than a sector.
            rebase(options, &old, Some(&new), [&long[0], &long[1]], false);
            rebase(options, &old, Some(&new), [&long[0], "b"], false);
            rebase(options, &old, None, [&long[0], ""], false);
        }
    }
}
