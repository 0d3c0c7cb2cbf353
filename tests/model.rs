//! Random operations on images of many shapes against a flat vector of bytes,
//! with `qemu-img check` and `qemu-img compare` as second opinion.

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2_ublk::{Disk, chain};

const SIZE: u64 = 4 << 20;

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("run qemu-img");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn open(path: &Path, writable: bool) -> Disk {
    let options = chain::Options {
        writable,
        ..Default::default()
    };
    Disk::open(path, &options).unwrap()
}

fn verify(disk: &Disk, model: &[u8], what: &str) {
    let mut seen = vec![0xee; model.len()];
    disk.read_at(&mut seen, 0).unwrap();
    if let Some(at) = seen.iter().zip(model).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            seen[at], model[at]
        );
    }
}

fn exercise(dir: &Path, path: PathBuf, mut model: Vec<u8>, seed: u64, operations: u32) {
    let mut rng = Rng(seed * 2 + 1);
    let name = path.to_str().unwrap().to_owned();
    let size = model.len() as u64;
    let mut disk = open(&path, true);
    verify(&disk, &model, "as made");
    for step in 0..operations {
        let offset = rng.below(size / 512) * 512;
        let largest = if rng.below(4) == 0 { size } else { 256 << 10 };
        let len = (rng.below(largest / 512) * 512 + 512).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match rng.below(12) {
            0..6 => {
                let byte = rng.next() as u8 | 1;
                model[range.clone()].fill(byte);
                disk.write_at(&model[range], offset).unwrap();
            }
            6 => {
                model[range].fill(0);
                disk.write_zeroes_at(offset, len, rng.below(2) == 0)
                    .unwrap();
            }
            7 => {
                disk.discard_at(offset, len).unwrap();
                // A discard promises nothing for parts of clusters.
                disk.read_at(&mut model[range], offset).unwrap();
            }
            8 => disk.flush().unwrap(),
            9 if rng.below(4) == 0 => {
                disk.close().unwrap();
                qemu_img(&["check", "-q", &name]);
                disk = open(&path, true);
            }
            _ => {
                let mut seen = vec![0xee; len as usize];
                disk.read_at(&mut seen, offset).unwrap();
                assert!(seen == model[range], "step {step}: read {len} at {offset}");
            }
        }
    }
    verify(&disk, &model, "at the end");
    disk.close().unwrap();
    qemu_img(&["check", "-q", &name]);
    let flat = dir.join("flat.raw");
    std::fs::write(&flat, &model).unwrap();
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        &name,
        flat.to_str().unwrap(),
    ]);
    verify(&open(&path, false), &model, "reopened read-only");
}

#[test]
fn random_operations_on_images_of_every_shape() {
    let mut seed = 1;
    for compat in ["0.10", "1.1"] {
        for cluster in ["512", "4k", "64k", "2M"] {
            for bits in ["1", "2", "4", "8", "16", "32", "64"] {
                if compat == "0.10" && bits != "16" {
                    continue;
                }
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a.qcow2");
                let options =
                    format!("compat={compat},cluster_size={cluster},refcount_bits={bits}");
                eprintln!("{options} seed {seed}");
                qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    &options,
                    path.to_str().unwrap(),
                    &SIZE.to_string(),
                ]);
                exercise(dir.path(), path, vec![0; SIZE as usize], seed, 150);
                seed += 1;
            }
        }
    }
}

#[test]
fn random_operations_over_backing_files() {
    let mut seed = 100;
    for compat in ["0.10", "1.1"] {
        for (cluster, base_cluster) in
            [("512", "64k"), ("64k", "4k"), ("64k", "64k"), ("2M", "512")]
        {
            // Shorter than, as long as and longer than the overlay; not at the
            // end of a cluster.
            for base_size in [SIZE / 2 + 512 * 3, SIZE, SIZE * 2] {
                let dir = tempfile::tempdir().unwrap();
                let (base, path) = (dir.path().join("base"), dir.path().join("a.qcow2"));
                let name = path.to_str().unwrap();
                let raw = base_size == SIZE;
                eprintln!("{compat} {cluster} over {base_cluster} of {base_size} seed {seed}");
                let mut model = vec![0; base_size as usize];
                let mut rng = Rng(seed);
                for chunk in model.chunks_mut(96 << 10) {
                    chunk.fill(if rng.below(3) == 0 {
                        0
                    } else {
                        rng.next() as u8
                    });
                }
                let flat = dir.path().join("base.raw");
                std::fs::write(&flat, &model).unwrap();
                let format = if raw { "raw" } else { "qcow2" };
                let options = format!("cluster_size={base_cluster}");
                let mut args = vec!["convert", "-f", "raw", "-O", format];
                if !raw {
                    args.extend(["-c", "-o", &options]);
                }
                args.extend([flat.to_str().unwrap(), base.to_str().unwrap()]);
                qemu_img(&args);
                let options = format!("compat={compat},cluster_size={cluster}");
                qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    &options,
                    "-b",
                    "base",
                    "-F",
                    format,
                    name,
                    &SIZE.to_string(),
                ]);
                model.resize(SIZE as usize, 0);
                exercise(dir.path(), path, model, seed, 150);
                seed += 1;
            }
        }
    }
}
