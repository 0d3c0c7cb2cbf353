//! `convert`, `compare` and `measure` against qemu-img: the same content, a
//! clean image, the same figures.

#[path = "../common/mod.rs"]
mod common;

mod bad;
mod copies;
mod faults;
mod options;
mod reports;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{half_random, qemu_img, qemu_io, run};
use qcow2_ublk::storage::sim::Rng;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// Runs our program; its exit code, and what it said.
fn ours<S: AsRef<str>>(args: &[S]) -> (Option<i32>, String) {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    run(PROGRAM, &args)
}

#[track_caller]
fn well<S: AsRef<str>>(args: &[S]) -> String {
    let (code, text) = ours(args);
    assert_eq!(code, Some(0), "{text}");
    text
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

/// A disk with data, zeros and holes of many lengths, that ends inside a
/// cluster.
fn disk(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let part = (1 + rng.below(60) as usize) * 4096 / (1 + rng.below(8) as usize);
        let seed = rng.next_u64();
        bytes.extend(match rng.below(4) {
            0 => vec![0; part],
            1 => half_random(part, seed),
            2 => vec![seed as u8 | 1; part],
            _ => {
                let mut rng = Rng::new(seed);
                (0..part).map(|_| rng.next_u64() as u8).collect()
            }
        });
    }
    bytes.truncate(len);
    bytes
}

/// A sparse file with that content.
fn write_sparse(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (nth, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|&b| b != 0) {
            file.write_all_at(block, nth as u64 * 4096).unwrap();
        }
    }
}

#[track_caller]
fn assert_same(a: (&str, &str), b: (&str, &str)) {
    qemu_img(&["compare", "-q", "-f", a.0, "-F", b.0, a.1, b.1]);
}

fn len(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn allocated(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn chain(folder: &Folder) -> String {
    let (base, mid, top) = (folder.file("base"), folder.file("mid"), folder.file("top"));
    std::fs::write(&base, disk((2 << 20) + 512, 20)).unwrap();
    let create = |path: &str, below: &str, format: &str, options: &str| {
        let args = [
            "create", "-q", "-f", "qcow2", "-b", below, "-F", format, "-o", options,
        ];
        qemu_img(&[&args[..], &[path, "3M"]].concat());
    };
    create(&mid, "base", "raw", "cluster_size=4k,compression_type=zstd");
    qemu_io(
        Path::new(&mid),
        &[
            "write -c -P 3 64k 4k",
            "write -P 4 300k 200k",
            "write -z 1M 100k",
        ],
    );
    create(&top, "mid", "qcow2", "cluster_size=64k");
    qemu_io(
        Path::new(&top),
        &[
            "write -P 5 100k 30k",
            "write -c -P 6 640k 64k",
            "write -z 320k 64k",
            "write -P 8 2900k 3k",
        ],
    );
    top
}
