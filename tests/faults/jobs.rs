//! A fault at each operation of commands that work on whole images: nothing
//! that is shown gets lost, the image is sound, and the next attempt succeeds.

use std::sync::{Arc, Mutex};

use qcow2_ublk::chain::{Apart, Chain, Layer};
use qcow2_ublk::engine::Commit;
use qcow2_ublk::qcow2::amend::Amendment;
use qcow2_ublk::qcow2::check::{self, Repair};
use qcow2_ublk::qcow2::create::Backing;
use qcow2_ublk::qcow2::{Image, ImageOptions, NewSnapshot, Selector, SnapshotJob};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, Fault, SimDisk, SimRequest};
use qcow2_ublk::{Error, Result};

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};
use crate::common::{half_random, qemu_img, qemu_io};
use crate::{errno, faults, is_harmless};

/// All that is shown: disks, and names with it.
type Shown = Vec<(String, Vec<u8>)>;

type Do = dyn Fn(&[SimDisk]) -> Result<()>;
type Show = dyn Fn(&[sim::Image]) -> Shown;

struct Job {
    name: String,
    /// The first is the image; all but a raw one at the end are qcow2.
    images: Vec<sim::Image>,
    raw: bool,
    /// Its entries or refcounts are wrong at first.
    damaged: bool,
    run: Box<Do>,
    shown: Box<Show>,
}

fn machine(images: &[sim::Image]) -> Vec<SimDisk> {
    let first = SimDisk::with_image(images[0].clone());
    let others = images[1..].iter().map(|image| first.beside(image.clone()));
    let others: Vec<_> = others.collect();
    [vec![first], others].concat()
}

fn images(disks: &[SimDisk]) -> Vec<sim::Image> {
    disks.iter().map(SimDisk::image).collect()
}

impl Job {
    fn assert_sound(&self, images: &[sim::Image], what: &str) {
        let count = images.len() - usize::from(self.raw);
        for image in &images[..count] {
            let checked = Checked::open(image).unwrap_or_else(|e| panic!("{what}: {e}"));
            let found = checked.check().corruptions;
            assert!(found.is_empty(), "{what}: {found:#?}");
        }
    }

    fn every_operation(&self) {
        let disks = machine(&self.images);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&seen);
        disks[0].inject(move |request| {
            list.lock().unwrap().push(*request);
            None
        });
        (self.run)(&disks).unwrap();
        let old = (self.shown)(&self.images);
        let new = (self.shown)(&images(&disks));
        self.assert_sound(&images(&disks), &self.name);
        let operations: Vec<SimRequest> = seen.lock().unwrap().clone();
        let mut failed = 0;
        for request in &operations {
            for fault in faults(request.kind, request.number) {
                failed += u32::from(self.one_fault(request, fault, &old, &new));
            }
        }
        let count = operations.len();
        assert!(failed > 2, "{}: {failed} of {count} failed", self.name);
    }

    /// True if the job was told.
    fn one_fault(&self, request: &SimRequest, fault: Fault, old: &Shown, new: &Shown) -> bool {
        let what = format!("{}: {fault:?} at {request:?}", self.name);
        let disks = machine(&self.images);
        let number = request.number;
        disks[0].inject(move |request| (request.number == number).then_some(fault));
        let result = (self.run)(&disks);
        disks[0].clear_faults();
        let now = images(&disks);
        let shown = (self.shown)(&now);
        let Err(error) = result else {
            assert!(shown == *new, "{what}: it is not done");
            self.assert_sound(&now, &what);
            return false;
        };
        assert!(!is_harmless(fault), "{what}: {error}");
        assert_eq!(error.errno(), errno(fault), "{what}: {error}");
        assert!(
            shown == *old || shown == *new,
            "{what}: neither old nor new"
        );
        if !self.damaged {
            self.assert_sound(&now, &what);
        }
        // The next attempt is better.
        if shown == *old {
            (self.run)(&disks).unwrap_or_else(|e| panic!("{what}: once more: {e}"));
            let now = images(&disks);
            self.assert_sound(&now, &format!("{what}: once more"));
            assert!((self.shown)(&now) == *new, "{what}: once more");
        }
        true
    }
}

/// The disk and the snapshots of an image that stands alone.
fn alone(images: &[sim::Image]) -> Shown {
    let checked = Checked::open(&images[0]).unwrap();
    let snapshots = checked.snapshots().into_iter().enumerate();
    let snapshots = snapshots.map(|(i, s)| {
        let name = String::from_utf8(s.name).unwrap();
        (name, checked.snapshot_content(i, &[]))
    });
    let active = (String::new(), checked.active_content(&[]));
    [active].into_iter().chain(snapshots).collect()
}

fn with_snapshots(options: &str) -> sim::Image {
    let mut image = lab::converted(&half_random(60 << 10, 9), &["-c", "-o", options]);
    lab::with_file(&mut image, |path| {
        let name = path.to_str().unwrap();
        qemu_io(path, &["write -P 0x11 10k 20k", "write -z 40k 8k"]);
        qemu_img(&["snapshot", "-c", "first", name]);
        qemu_io(path, &["write -P 0x22 30k 20k"]);
        qemu_img(&["snapshot", "-c", "second", name]);
        qemu_io(path, &["write -P 0x33 8k 20k", "discard 0 8k"]);
    });
    image
}

#[test]
fn snapshot_commands() {
    let named = |name: &str| Selector::Name(name.into());
    for options in ["cluster_size=4k", "cluster_size=4k,compat=0.10"] {
        for job in [
            SnapshotJob::Create(NewSnapshot::now("third")),
            SnapshotJob::Delete(named("first")),
            SnapshotJob::Apply(named("first")),
            SnapshotJob::Rename(named("first"), b"another".to_vec()),
        ] {
            let job = Job {
                name: format!("{options} {job:?}"),
                images: vec![with_snapshots(options)],
                raw: false,
                damaged: false,
                run: Box::new(move |disks| {
                    let storage = Storage::simulated(&disks[0], 1);
                    lab::block_on(job.run(&storage))
                }),
                shown: Box::new(alone),
            };
            job.every_operation();
        }
    }
}

#[test]
fn amendments() {
    let amend = |options: &str, amendment: Amendment, damaged: bool| {
        let image = with_snapshots(options);
        let job = Job {
            name: format!("{options} {amendment:?}"),
            images: vec![image],
            raw: false,
            damaged,
            run: Box::new(move |disks| {
                let storage = Storage::simulated(&disks[0], 1);
                lab::block_on(amendment.run(&storage))
            }),
            shown: Box::new(alone),
        };
        job.every_operation();
    };
    let nothing = Amendment::default();
    let version = |version| Amendment {
        version: Some(version),
        ..nothing
    };
    amend("cluster_size=4k,compat=0.10", version(3), false);
    amend("cluster_size=4k", version(2), false);
    let bits = Amendment {
        refcount_bits: Some(64),
        ..nothing
    };
    amend("cluster_size=4k", bits, false);
}

const COPIED: u64 = 1 << 63;

/// Refcounts too low and too high, a flag that is wrong, two owners.
#[test]
fn repairs() {
    let good = with_snapshots("cluster_size=4k");
    let be64 = |at| u64::from_be_bytes(good.bytes(at, 8).try_into().unwrap());
    let header = Checked::open(&good).unwrap().header;
    let block = be64(header.refcount_table_offset.0) & !511;
    let l1 = header.l1_table_offset.0;
    let l2 = be64(l1) & !511 & !COPIED;
    let entries: Vec<u64> = (0..512)
        .map(|i| l2 + i * 8)
        .filter(|&at| be64(at) & COPIED != 0 && be64(at) & 1 << 62 == 0)
        .collect();
    let mut bad = good.clone();
    bad.write(block, &[0; 16]);
    bad.write(block + 24, &[0, 9, 0, 1, 0, 3]);
    bad.write(entries[0], &(be64(entries[0]) & !COPIED).to_be_bytes());
    let mut rebuilt = good.clone();
    rebuilt.write(header.refcount_table_offset.0, &[0; 8]);
    for (name, image) in [("entries and counts", bad), ("counted anew", rebuilt)] {
        let job = Job {
            name: format!("repair: {name}"),
            images: vec![image],
            raw: false,
            damaged: true,
            run: Box::new(|disks| {
                let storage = Storage::simulated(&disks[0], 1);
                let mut quiet = |_: &_| {};
                let repaired = check::repair(&storage, Repair::All, &mut quiet);
                let report = lab::block_on(repaired)?.report;
                let left = report.corruptions + report.leaks + report.check_errors;
                if left > 0 {
                    // It says that it could not read everything.
                    let unread = std::io::Error::from_raw_os_error(libc::EIO);
                    return Err(Error::io(format!("{report:?}"), unread));
                }
                Ok(())
            }),
            shown: Box::new(alone),
        };
        job.every_operation();
    }
}

/// An overlay of 96 KiB with data, zeros and holes.
fn overlay(options: &str) -> sim::Image {
    let mut image = lab::created(options, 96 << 10);
    lab::with_file(&mut image, |path| {
        qemu_io(
            path,
            &["write -P 5 3k 20k", "write -z 40k 16k", "write -P 6 70k 9k"],
        );
    });
    image
}

async fn open(disk: &SimDisk) -> Result<Image> {
    Image::open(Storage::simulated(disk, 1), &ImageOptions::default()).await
}

async fn commit(disks: &[SimDisk], raw: bool) -> Result<()> {
    let layer = if raw {
        Layer::Raw(Storage::simulated(&disks[1], 1))
    } else {
        Layer::Qcow2(Box::new(open(&disks[1]).await?))
    };
    let apart = Apart {
        upper: Chain::new(open(&disks[0]).await?, Vec::new()),
        base: vec![layer],
    };
    let commit = Commit::new(apart)?;
    commit.copy(&mut |_, _| {}).await?;
    commit.empty().await
}

/// What the overlay shows never changes; and once it is committed, the base
/// shows the same.
#[test]
fn commits() {
    for raw in [true, false] {
        let text = half_random(60 << 10, 4);
        let base = if raw {
            sim::Image::from_bytes(&text)
        } else {
            lab::converted(&text, &["-c", "-o", "cluster_size=8k"])
        };
        let job = Job {
            name: format!("commit, raw: {raw}"),
            images: vec![overlay("cluster_size=4k"), base],
            raw,
            damaged: false,
            run: Box::new(move |disks| lab::block_on(commit(disks, raw))),
            shown: Box::new(move |images| {
                let below = if raw {
                    images[1].bytes(0, images[1].len())
                } else {
                    Checked::open(&images[1]).unwrap().active_content(&[])
                };
                let top = Checked::open(&images[0]).unwrap();
                vec![(String::new(), top.active_content(&below))]
            }),
        };
        job.every_operation();
        let disks = machine(&job.images);
        (job.run)(&disks).unwrap();
        let end = images(&disks);
        let emptied = Checked::open(&end[0]).unwrap().active_content(&[]);
        assert!(emptied.iter().all(|&b| b == 0), "emptied");
    }
}

async fn rebase(disk: &SimDisk, old: &[u8], new: &[u8], name: &str) -> Result<()> {
    let named = Checked::open(&disk.image()).unwrap().header.backing_file;
    if named.as_deref() == Some(name.as_ref()) {
        return Ok(()); // it was done before something failed
    }
    let how = How {
        below: Below::Raw(sim::Image::from_bytes(old)),
        ..How::default()
    };
    let engine = lab::open(disk, &how).await?;
    let below = SimDisk::with_image(sim::Image::from_bytes(new));
    let layers = vec![Layer::Raw(Storage::simulated(&below, 1))];
    let backing = Backing {
        file: name.into(),
        format: Some("raw".to_owned()),
    };
    let rebased = engine
        .rebase(layers, Some(&backing), false, &mut |_, _| {})
        .await;
    let closed = engine.close().await;
    rebased.and(closed)
}

#[test]
fn rebases() {
    let old = half_random(80 << 10, 21);
    let mut new = old.clone();
    new[30 << 10..50 << 10].fill(0);
    new.truncate(70 << 10);
    for options in ["cluster_size=4k", "compat=0.10,cluster_size=4k"] {
        let mut top = overlay(options);
        lab::with_file(&mut top, |path| {
            let path = path.to_str().unwrap();
            qemu_img(&["rebase", "-u", "-b", "a/name", "-F", "raw", path]);
        });
        let (old, new) = (old.clone(), new.clone());
        let (before, after) = (old.clone(), new.clone());
        let job = Job {
            name: format!("rebase, {options}"),
            images: vec![top],
            raw: false,
            damaged: false,
            run: Box::new(move |disks| {
                lab::block_on(rebase(&disks[0], &before, &after, "another/longer/name"))
            }),
            shown: Box::new(move |images| {
                let top = Checked::open(&images[0]).unwrap();
                let named = top.header.backing_file.clone();
                let is_old = named.as_deref() == Some("a/name".as_ref());
                let below = if is_old { &old } else { &new };
                vec![(String::new(), top.active_content(below))]
            }),
        };
        job.every_operation();
    }
}
