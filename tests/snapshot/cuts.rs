//! Power cuts and failures in the middle of an operation: the image is as it
//! was, or as it is to be, and not one cluster leaks.

use crate::common::check::Checked;
use crate::common::lab::{self, How};
use crate::common::{self, half_random};
use qcow2_ublk::qcow2::{NewSnapshot, Selector, SnapshotJob};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk, crash_images};

/// All that an image shows.
#[derive(PartialEq, Eq)]
struct Shown {
    active: Vec<u8>,
    snapshots: Vec<(Vec<u8>, Vec<u8>, Vec<u8>)>,
}

impl Shown {
    /// What a sound image shows.
    fn of(image: &sim::Image) -> Self {
        let checked = Checked::open(image).expect("it opens");
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
        assert_eq!(found.leaks, 0);
        let snapshots = checked.snapshots().into_iter().enumerate();
        Self {
            active: checked.active_content(&[]),
            snapshots: snapshots
                .map(|(i, s)| (s.id, s.name, checked.snapshot_content(i, &[])))
                .collect(),
        }
    }
}

/// An image with two snapshots of different sizes and an active disk of a
/// third, compressed clusters and zero clusters among them.
fn fixture(options: &str) -> sim::Image {
    let content = half_random(300 << 10, 9);
    let mut image = lab::converted(&content, &["-c", "-o", options]);
    lab::with_file(&mut image, |path| {
        let name = path.to_str().unwrap();
        common::qemu_io(path, &["write -P 0x11 10k 40k", "write -z 100k 30k"]);
        common::qemu_img(&["snapshot", "-c", "first", name]);
        if options.contains("compat=0.10") {
            common::qemu_io(path, &["write -P 0x22 64k 96k"]);
        } else {
            common::qemu_img(&["resize", "-q", name, "500k"]);
            common::qemu_io(path, &["write -P 0x22 300k 96k", "write -z 64k 8k"]);
        }
        common::qemu_img(&["snapshot", "-c", "second", name]);
        common::qemu_io(path, &["write -P 0x33 128k 70k", "discard 0 20k"]);
    });
    image
}

fn jobs() -> Vec<SnapshotJob> {
    let named = |name: &str| Selector::Name(name.into());
    vec![
        SnapshotJob::Create(NewSnapshot::now("third")),
        SnapshotJob::Delete(named("first")),
        SnapshotJob::Delete(named("second")),
        SnapshotJob::Apply(named("first")),
        SnapshotJob::Apply(named("second")),
        SnapshotJob::Rename(named("first"), b"another".to_vec()),
    ]
}

const OPTIONS: [&str; 4] = [
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096",
    "cluster_size=65536,refcount_bits=8",
    "cluster_size=4096,compat=0.10",
];

#[test]
fn a_power_cut_leaves_the_old_state_or_the_new() {
    for (seed, options) in (1..).zip(OPTIONS) {
        let image = fixture(options);
        let before = Shown::of(&image);
        for job in jobs() {
            let disk = SimDisk::with_image(image.clone());
            disk.shuffle(Some(seed));
            let storage = Storage::simulated(&disk, 1);
            lab::block_on(job.run(&storage)).unwrap();
            let after = Shown::of(&disk.image());
            assert!(before != after, "{job:?} does something");
            let history = disk.history();
            let last = history.records.len();
            let mut seen = [0, 0];
            for crash in crash_images(&history, seed, 2) {
                let shown = Shown::of(&crash.images[0]);
                assert!(
                    shown == before || shown == after,
                    "{options} {job:?}: {crash}"
                );
                seen[usize::from(shown == after)] += 1;
                assert!(crash.point < last || shown == after, "it was durable");
            }
            assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
        }
    }
}

/// go-qcow2's CrashDuringSnapshotCreation, on an image that is in use.
#[test]
fn a_power_cut_while_an_open_image_gets_a_snapshot() {
    for (seed, options) in (1..).zip(OPTIONS) {
        let disk = SimDisk::with_image(fixture(options));
        lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            lab::write(&engine, 0, 50 << 10, &[0x44; 90 << 10], false)
                .await
                .unwrap();
            engine.flush().await.unwrap();
            let before = Checked::open(&disk.image()).unwrap().active_content(&[]);
            disk.forget();
            let image = engine.chain().top();
            image.create_snapshot(NewSnapshot::now("x")).await.unwrap();
            lab::write(&engine, 0, 0, &[0x55; 30 << 10], false)
                .await
                .unwrap();
            for crash in crash_images(&disk.history(), seed, 3) {
                let checked = Checked::open(&crash.images[0]).unwrap();
                let found = checked.check();
                assert!(found.corruptions.is_empty(), "{crash}: {found:?}");
                let snapshots = checked.snapshots();
                if let Some(index) = snapshots.iter().position(|s| s.name == b"x") {
                    let content = checked.snapshot_content(index, &[]);
                    assert!(content == before, "{crash}");
                } else {
                    assert!(checked.active_content(&[]) == before, "{crash}");
                }
            }
            engine.close().await.unwrap();
            let image = disk.image();
            let checked = Checked::open(&image).unwrap();
            assert_eq!(checked.check().leaks, 0);
            assert_eq!(checked.snapshots().len(), 3);
        });
    }
}

#[test]
fn a_failure_leaves_the_old_state_or_the_new() {
    let image = fixture(OPTIONS[1]);
    let before = Shown::of(&image);
    for job in jobs() {
        let disk = SimDisk::with_image(image.clone());
        let storage = Storage::simulated(&disk, 1);
        let first = disk.operations();
        lab::block_on(job.run(&storage)).unwrap();
        let after = Shown::of(&disk.image());
        let operations = disk.operations() - first;
        let mut failed = 0;
        for n in 0..operations {
            let disk = SimDisk::with_image(image.clone());
            let storage = Storage::simulated(&disk, 1);
            disk.fail_nth(n, libc::EIO);
            let result = lab::block_on(job.run(&storage));
            let shown = Shown::of(&disk.image());
            match result {
                Ok(()) => assert!(shown == after, "{job:?} {n}"),
                Err(_) => {
                    failed += 1;
                    assert!(shown == before || shown == after, "{job:?} {n}");
                }
            }
        }
        assert!(failed > 5, "{failed} of {operations}");
    }
}

/// An open image goes on after a failure: with the old state, in memory as in
/// the file.
#[test]
fn an_open_image_goes_on_after_a_failure() {
    let image = fixture(OPTIONS[1]);
    let before = Shown::of(&image);
    let which = Selector::Name(b"first".to_vec());
    let mut failures = 0;
    for n in 0.. {
        let disk = SimDisk::with_image(image.clone());
        let failed = lab::block_on(async {
            let engine = lab::open(&disk, &How::default()).await.unwrap();
            // Free clusters that are known to be zeros.
            let (start, len) = (200 << 10, 280 << 10);
            lab::write(&engine, 0, start, &vec![0x55; len], false)
                .await
                .unwrap();
            engine.discard(0, start, len as u64).await.unwrap();
            engine.flush().await.unwrap();
            engine.flush().await.unwrap();
            disk.fail_nth(n, libc::EIO);
            let top = engine.chain().top();
            let failed = top.apply_snapshot(which.clone()).await.is_err();
            disk.clear_faults();
            if top.storage().is_latched() {
                return true;
            }
            let mut content = if failed {
                let mut content = before.active.clone();
                content[start as usize..][..len].fill(0);
                content
            } else {
                before.snapshots[0].2.clone()
            };
            assert_eq!(engine.size(), content.len() as u64, "{n}");
            lab::write(&engine, 0, 4096, &[0x66; 20 << 10], false)
                .await
                .unwrap();
            content[4096..][..20 << 10].fill(0x66);
            // What the attempt has left in free clusters does not show.
            let old = content.len();
            content.resize(old + (512 << 10), 0);
            engine.grow(content.len() as u64).await.unwrap();
            for offset in (old + 1024..content.len()).step_by(4096) {
                lab::write(&engine, 0, offset as u64, &[0x77; 512], false)
                    .await
                    .unwrap();
                content[offset..][..512].fill(0x77);
            }
            engine.close().await.unwrap();
            let shown = Shown::of(&disk.image());
            assert!(shown.active == content, "{n}");
            assert!(shown.snapshots == before.snapshots, "{n}");
            failed
        });
        if failed {
            failures += 1;
        } else if n > 40 {
            break;
        }
    }
    assert!(failures > 10, "{failures}");
}

#[test]
fn direct_io_changes_nothing() {
    for alignment in [512, 4096] {
        let image = fixture(OPTIONS[1]);
        for job in jobs() {
            let run = |alignment| {
                let disk = SimDisk::with_image(image.clone());
                let storage = Storage::simulated(&disk, alignment);
                lab::block_on(job.run(&storage)).unwrap();
                Shown::of(&disk.image())
            };
            assert!(run(alignment) == run(1), "{job:?}");
        }
    }
}
