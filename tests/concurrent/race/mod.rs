//! A race over a few clusters that share an L2 table: writes, compressed
//! writes, zeroes, discards, flushes and reads from several queues, and
//! snapshots that are made, read, applied and deleted meanwhile. Every sector
//! that anybody saw is judged afterwards.

mod hammer;
mod history;
mod mutants;
mod sector;
mod shape;
mod snapshots;

use qcow2_ublk::Disk;
use qcow2_ublk::storage::sim;

use crate::common::check::Checked;
use crate::common::lab;
use crate::common::qemu_img;
use hammer::{Arena, Files, Kept, Work};
use history::{History, Log, Seen, Span};
use sector::{SECTOR, decode};
use shape::{BITMAP, Shape};

const WORK: Work = Work {
    queues: 3,
    tasks: 3,
    steps: 60,
    keepers: 2,
    snapshots: 5,
    resizes: 0,
};

/// How many seeds each shape gets.
fn seeds() -> u64 {
    let seeds = std::env::var("RACE_SEEDS").unwrap_or_else(|_| "2".to_owned());
    seeds.parse().expect("RACE_SEEDS is a number")
}

/// Runs a trial with each seed, and judges it.
fn race(shape: Shape) {
    lab::watched(60 * seeds().max(5), || {
        for seed in 1..=seeds() {
            eprintln!("seed {seed} of {shape:?}");
            race_with(shape, WORK, seed);
        }
    });
}

fn race_with(shape: Shape, work: Work, seed: u64) {
    let work = if shape.has_snapshots() {
        work
    } else {
        Work { keepers: 0, ..work }
    };
    let arena = Arena::new(shape, work);
    let (mut log, kept) = arena.work(work, seed);
    let last = lab::block_on(arena.read_all(&arena.engine));
    let begin = arena.now();
    log.reads.push(Seen {
        span: Span {
            begin,
            end: arena.now(),
        },
        sectors: decode(0, &last).unwrap(),
    });
    let history = History::new(&shape.at_first(), &log);
    if let Err(what) = history.judge(&log) {
        panic!("seed {seed} of {shape:?}: {what}");
    }
    let files = arena.close();
    judge_file(&files, &last, &kept);
    if shape.bitmap {
        judge_bitmap(&files, &log);
    }
}

/// What is in the file: no more and no less than it has to be, and QEMU sees
/// what we saw.
fn judge_file(files: &Files, last: &[u8], kept: &[Kept]) {
    let shape = files.shape;
    let path = &files.path;
    let image = sim::Image::load(path).unwrap();
    let data = shape
        .data_file
        .then(|| sim::Image::load(&path.with_file_name("data")).unwrap());
    let checked = Checked::open(&image).unwrap().with_data(data.as_ref());
    let found = checked.check();
    assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
    assert_eq!(found.leaks, 0);
    assert_eq!(checked.snapshots().len(), kept.len());
    drop(image);

    let (options, name) = shape.for_qemu(path);
    let qemu = |command: &str, more: &[&str]| {
        let mut args = vec![command];
        args.extend(options.iter().map(String::as_str));
        args.extend(more);
        qemu_img(&args)
    };
    qemu("check", &[&name]);
    let raw = path.with_file_name("raw");
    let convert = |which: &[&str]| {
        let names = [&*name, "-O", "raw", raw.to_str().unwrap()];
        qemu("convert", &[which, &names].concat());
        std::fs::read(&raw).unwrap()
    };
    assert!(convert(&[]) == last, "QEMU sees another disk");
    for kept in kept {
        let id = String::from_utf8_lossy(&kept.id);
        let which = format!("snapshot.id={id}");
        let shown = convert(&["-l", &which]);
        assert!(shown == kept.content, "QEMU sees another snapshot {id}");
    }
    if shape.raw {
        let data = std::fs::read(path.with_file_name("data")).unwrap();
        assert!(data == last, "the raw data file");
    }
}

/// Every change is recorded.
fn judge_bitmap(files: &Files, log: &Log) {
    let disk = Disk::open(&files.path, &files.shape.options(1)).unwrap();
    let bitmap = disk.bitmap(BITMAP).unwrap();
    for change in &log.changes {
        for sector in change.sectors() {
            assert!(
                bitmap.is_dirty(sector * SECTOR),
                "sector {sector} of {change:?} is not recorded"
            );
        }
    }
}

const K64: Shape = Shape::of_clusters(65536);
const K4: Shape = Shape::of_clusters(4096);

#[test]
fn clusters_of_64k() {
    race(K64);
}

/// Two L2 tables, in part of a cluster that both writers of a table want.
#[test]
fn clusters_of_512() {
    race(Shape {
        sectors: 70,
        ..Shape::of_clusters(512)
    });
}

#[test]
fn version_2() {
    race(Shape { version: 2, ..K4 });
}

#[test]
fn subclusters() {
    for cluster in [16384, 65536] {
        race(Shape {
            extended: true,
            zstd: true,
            ..Shape::of_clusters(cluster)
        });
    }
}

#[test]
fn lazy_refcounts() {
    race(Shape { lazy: true, ..K4 });
}

#[test]
fn over_a_backing_file() {
    race(Shape { below: true, ..K64 });
    race(Shape {
        below: true,
        extended: true,
        ..Shape::of_clusters(16384)
    });
}

#[test]
fn external_data_files() {
    for raw in [false, true] {
        for extended in [false, true] {
            race(Shape {
                data_file: true,
                raw,
                extended,
                ..Shape::of_clusters(16384)
            });
        }
    }
}

#[test]
fn encrypted() {
    for extended in [false, true] {
        race(Shape {
            luks: true,
            extended,
            ..Shape::of_clusters(16384)
        });
    }
}

#[test]
fn while_bitmaps_record() {
    race(Shape {
        bitmap: true,
        ..K64
    });
    race(Shape {
        bitmap: true,
        lazy: true,
        sectors: 70,
        ..Shape::of_clusters(512)
    });
}

/// The disk gets smaller and larger: requests that come too late are refused.
#[test]
fn while_the_size_changes() {
    lab::watched(120, || {
        for cluster in [4096, 65536] {
            let shape = Shape {
                sectors: 6 * cluster / SECTOR,
                ..Shape::of_clusters(cluster)
            };
            let work = Work {
                keepers: 0,
                resizes: 15,
                ..WORK
            };
            race_with(shape, work, cluster);
        }
    });
}

#[test]
fn with_direct_io() {
    for shape in [K4, K64] {
        race(Shape {
            direct: true,
            sectors: shape.sectors.next_multiple_of(8),
            ..shape
        });
    }
}
