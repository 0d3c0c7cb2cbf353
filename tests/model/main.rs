//! Random operations on images of many shapes against a flat vector of bytes,
//! with `qemu-img check` and `qemu-img compare` as second opinion: with and
//! without io_uring, through the page cache and past it, several tasks at
//! once, and across reopening.

#[path = "../common/mod.rs"]
mod common;

mod bitmaps;
mod random;
mod shape;
mod task;
mod trial;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::lab::{self, watched};
use common::{half_random, qemu_create, qemu_img};
use qcow2_ublk::block::BlockHandler;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::runtime::{Runtime, spawn};
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::{Disk, chain};
use task::Task;

const SIZE: u64 = 4 << 20;
const TASKS: u64 = 3;

/// A folder beside the build: /tmp may know no direct I/O.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How the work is done; a seed takes its turn through all ways.
#[derive(Clone, Copy, Debug)]
struct Way {
    ring: bool,
    direct: bool,
}

impl Way {
    fn of(seed: u64) -> Self {
        Self {
            ring: seed & 1 == 0,
            direct: seed & 2 == 0,
        }
    }

    fn runtime(self) -> Runtime {
        if self.ring {
            Runtime::uring(32).unwrap()
        } else {
            Runtime::inline().unwrap()
        }
    }

    async fn open(self, path: &Path) -> Arc<Engine> {
        let options = chain::Options {
            writable: true,
            cache: if self.direct {
                CacheMode::None
            } else {
                CacheMode::Writeback
            },
            ..chain::Options::default()
        };
        let chain = chain::open(path, &options).await.unwrap();
        let engine = Engine::new(chain, engine::Options::default());
        engine.queue_started(0).unwrap();
        Arc::new(engine)
    }
}

#[track_caller]
fn assert_same(seen: &[u8], model: &[u8], what: &str) {
    assert_eq!(seen.len(), model.len(), "{what}: the length");
    if let Some(at) = seen.iter().zip(model).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            seen[at], model[at]
        );
    }
}

/// Rounds of work by several tasks side by side; between them the disk is
/// compared as a whole and opened anew. What it holds in the end.
fn exercise(path: &Path, mut model: Vec<u8>, seed: u64, operations: u32) -> Vec<u8> {
    let way = Way::of(seed);
    let mut rng = Rng::new(seed);
    let size = model.len() as u64;
    for round in 0..2 {
        model = way.runtime().block_on(async {
            let engine = way.open(path).await;
            let seen = lab::read(&engine, 0, 0, size).await.unwrap();
            assert_same(&seen, &model, &format!("{way:?}, round {round}"));
            // Where one task's part ends and the next begins is the middle of
            // a cluster, in general.
            let mut tasks = Vec::new();
            let mut start = 0;
            for task in 1..=TASKS {
                let end = if task == TASKS {
                    size
                } else {
                    (size * task / TASKS - rng.below(size / 8)) / 512 * 512
                };
                let task = Task {
                    engine: Arc::clone(&engine),
                    queue: 0,
                    compress: false,
                    discards: true,
                    start,
                    model: model[start as usize..end as usize].to_vec(),
                    rng: Rng::new(rng.next_u64()),
                };
                tasks.push(spawn(task.work(operations / 2 / TASKS as u32)));
                start = end;
            }
            let mut model = Vec::with_capacity(size as usize);
            for task in tasks {
                let done = task.await;
                assert_eq!(done.start, model.len() as u64);
                model.extend(done.model);
            }
            let seen = lab::read(&engine, 0, 0, size).await.unwrap();
            assert_same(&seen, &model, &format!("{way:?}, after round {round}"));
            engine.close().await.unwrap();
            model
        });
        lab::qemu_check(path, false);
    }
    let flat = path.with_extension("flat");
    std::fs::write(&flat, &model).unwrap();
    let args = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
    qemu_img(&[args.as_slice(), &[name(path), name(&flat)]].concat());
    let disk = Disk::open(path, &chain::Options::default()).unwrap();
    let mut seen = vec![0xee; model.len()];
    disk.read_at(&mut seen, 0).unwrap();
    assert_same(&seen, &model, "reopened read-only");
    model
}

fn create(path: &Path, options: &str, size: u64) {
    let size = size.to_string();
    qemu_create(name(path), options, &size);
}

/// Converts `content` to an image beside `path`'s place, which is made.
fn convert(content: &[u8], path: &Path, arguments: &[&str]) {
    let raw: PathBuf = path.with_extension("raw");
    std::fs::write(&raw, content).unwrap();
    let names = [name(&raw), name(path)];
    qemu_img(&[&["convert", "-f", "raw"], arguments, &names].concat());
}

#[test]
fn images_of_every_shape() {
    watched(300, || {
        let mut seed = 1;
        for compat in ["0.10", "1.1"] {
            for cluster in ["512", "4k", "64k", "2M"] {
                for bits in ["1", "2", "4", "8", "16", "32", "64"] {
                    if compat == "0.10" && bits != "16" {
                        continue;
                    }
                    let dir = scratch();
                    let path = dir.path().join("a.qcow2");
                    let options =
                        format!("compat={compat},cluster_size={cluster},refcount_bits={bits}");
                    eprintln!("{options} seed {seed}");
                    create(&path, &options, SIZE);
                    exercise(&path, vec![0; SIZE as usize], seed, 150);
                    seed += 1;
                }
            }
        }
    });
}

/// Guest data in a file of its own, which is the disk where it is raw.
#[test]
fn external_data_files() {
    watched(300, || {
        let shapes = [
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=64k,data_file_raw=on",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=64k,extended_l2=on,data_file_raw=on",
            "cluster_size=2M",
            "cluster_size=512",
            "cluster_size=512,data_file_raw=on",
        ];
        for (seed, options) in (500..).zip(shapes) {
            let dir = scratch();
            let (path, data) = (dir.path().join("a.qcow2"), dir.path().join("data"));
            eprintln!("{options} seed {seed}");
            let raw = options.contains("raw");
            let options = format!("{options},data_file={}", name(&data));
            create(&path, &options, SIZE);
            let model = exercise(&path, vec![0; SIZE as usize], seed, 150);
            if raw {
                assert_same(&std::fs::read(&data).unwrap(), &model, "the raw file");
            }
        }
    });
}

/// Extended L2 entries, also with compressed clusters underneath and with a
/// snapshot, whose content has to stay.
#[test]
fn subclusters() {
    watched(300, || {
        let mut seed = 400;
        for (cluster, bits) in [("16k", "16"), ("64k", "1"), ("128k", "64"), ("2M", "16")] {
            for compressed in [false, true] {
                let dir = scratch();
                let path = dir.path().join("a.qcow2");
                let options = format!("extended_l2=on,cluster_size={cluster},refcount_bits={bits}");
                eprintln!("{options} compressed {compressed} seed {seed}");
                let mut model = half_random(SIZE as usize, seed);
                if compressed {
                    convert(&model, &path, &["-O", "qcow2", "-c", "-o", &options]);
                } else {
                    create(&path, &options, SIZE);
                    model.fill(0);
                }
                model = exercise(&path, model, seed, 150);
                if bits != "1" {
                    qemu_img(&["snapshot", "-c", "one", name(&path)]);
                    exercise(&path, model.clone(), seed + 1000, 150);
                    let seen = dir.path().join("seen");
                    let names = ["snapshot.name=one", name(&path), name(&seen)];
                    qemu_img(&[&["convert", "-O", "raw", "-l"], names.as_slice()].concat());
                    assert_same(&std::fs::read(&seen).unwrap(), &model, "the snapshot");
                }
                seed += 1;
            }
        }
    });
}

#[test]
fn over_backing_files_of_every_length() {
    watched(300, || {
        let mut seed = 100;
        for compat in ["0.10", "1.1"] {
            for (cluster, base_cluster) in [
                ("512", "64k"),
                ("64k", "4k"),
                ("64k", "64k"),
                ("2M", "512"),
                ("extended", "16k"),
            ] {
                let extended = cluster == "extended";
                if extended && compat == "0.10" {
                    continue;
                }
                let cluster = if extended {
                    "64k,extended_l2=on"
                } else {
                    cluster
                };
                // Shorter than, as long as and longer than the overlay; not at
                // the end of a cluster.
                for base_size in [SIZE / 2 + 512 * 3, SIZE, SIZE * 2] {
                    let dir = scratch();
                    let (base, path) = (dir.path().join("base"), dir.path().join("a.qcow2"));
                    let mut model = half_random(base_size as usize, seed);
                    model[256 << 10..700 << 10].fill(0);
                    let options = format!("cluster_size={base_cluster}");
                    let raw = base_size == SIZE;
                    let (format, arguments) = if raw {
                        ("raw", vec!["-O", "raw"])
                    } else {
                        ("qcow2", vec!["-O", "qcow2", "-c", "-o", &options])
                    };
                    convert(&model, &base, &arguments);
                    let options = format!(
                        "compat={compat},cluster_size={cluster},\
                         backing_file=base,backing_fmt={format}"
                    );
                    eprintln!("{options} of {base_size} seed {seed}");
                    create(&path, &options, SIZE);
                    model.resize(SIZE as usize, 0);
                    exercise(&path, model, seed, 150);
                    seed += 1;
                }
            }
        }
    });
}

#[test]
fn compressed_images() {
    watched(300, || {
        let mut seed = 200;
        for kind in ["zlib", "zstd"] {
            for cluster in ["512", "4k", "64k", "2M"] {
                let dir = scratch();
                let path = dir.path().join("a.qcow2");
                let options = format!("compression_type={kind},cluster_size={cluster}");
                eprintln!("{options} seed {seed}");
                let model = half_random(SIZE as usize, seed);
                convert(&model, &path, &["-O", "qcow2", "-c", "-o", &options]);
                exercise(&path, model, seed, 200);
                seed += 1;
            }
        }
    });
}

/// Three layers, a compressed one in the middle, and snapshots in the top one,
/// whose content has to stay.
#[test]
fn chains_with_a_compressed_middle_and_snapshots() {
    watched(300, || {
        for seed in 300..308 {
            let kind = ["zlib", "zstd"][seed as usize / 4 % 2];
            let cluster = ["512", "4k", "64k", "64k"][seed as usize % 4];
            let dir = scratch();
            let place = |name: &str| dir.path().join(name);
            let base = half_random(3 << 20, seed);
            std::fs::write(place("base"), &base).unwrap();
            // The middle layer hides a part of the base with compressed
            // clusters, and is shorter.
            let mut model = base.clone();
            model[512 << 10..2 << 20].copy_from_slice(&half_random(1536 << 10, seed + 1));
            model.truncate((2 << 20) + 1536);
            let options = format!("compression_type={kind}");
            let arguments = [
                "-O", "qcow2", "-c", "-o", &options, "-B", "base", "-F", "raw",
            ];
            convert(&model, &place("middle"), &arguments);
            let top = place("top");
            let options = format!("cluster_size={cluster},backing_file=middle,backing_fmt=qcow2");
            eprintln!("{kind}, {options} seed {seed}");
            create(&top, &options, SIZE);
            model.resize(SIZE as usize, 0);
            model = exercise(&top, model, seed, 90);
            qemu_img(&["snapshot", "-c", "one", name(&top)]);
            let first = model.clone();
            model = exercise(&top, model, seed + 1000, 90);
            qemu_img(&["snapshot", "-c", "two", name(&top)]);
            let second = model.clone();
            exercise(&top, model, seed + 2000, 90);
            for (snapshot, content) in [("one", first), ("two", second)] {
                let seen = place("seen");
                let option = format!("snapshot.name={snapshot}");
                let names = [name(&top), name(&seen)];
                qemu_img(&[&["convert", "-O", "raw", "-l", &option], names.as_slice()].concat());
                assert_same(&std::fs::read(&seen).unwrap(), &content, snapshot);
            }
        }
    });
}
