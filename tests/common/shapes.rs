//! Images of every shape that QEMU makes, and damage to them.

use std::fs;
use std::path::{Path, PathBuf};

use qcow2_ublk::qcow2::spec::{HostOffset, L1Entry};

use super::{Reader, half_random, qemu_create, qemu_img, qemu_io};

/// A generator of numbers that is the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Images of all shapes, each in a file of its own.
pub fn images(dir: &Path) -> Vec<(String, PathBuf)> {
    let shapes = [
        ("default", "cluster_size=64k"),
        ("v2", "compat=0.10"),
        ("v2-512", "compat=0.10,cluster_size=512"),
        ("512-1", "cluster_size=512,refcount_bits=1"),
        ("512-64", "cluster_size=512,refcount_bits=64"),
        ("1k-2", "cluster_size=1k,refcount_bits=2"),
        ("4k-4", "cluster_size=4k,refcount_bits=4"),
        ("4k-8", "cluster_size=4k,refcount_bits=8"),
        ("64k-32", "cluster_size=64k,refcount_bits=32"),
        ("2M", "cluster_size=2M"),
        ("zstd", "compression_type=zstd,cluster_size=8k"),
        ("extended", "extended_l2=on,cluster_size=16k"),
        ("metadata", "preallocation=metadata,cluster_size=4k"),
        ("lazy", "lazy_refcounts=on,cluster_size=4k"),
    ];
    let source = dir.join("source.raw");
    let mut bytes = half_random(600 << 10, 7);
    bytes.extend(vec![0; 200 << 10]);
    bytes.extend(half_random(200 << 10, 9));
    fs::write(&source, bytes).unwrap();
    let mut images = Vec::new();
    for (name, options) in shapes {
        let image = dir.join(format!("{name}.qcow2"));
        let path = image.to_str().unwrap();
        qemu_create(path, options, "5000k");
        qemu_io(
            &image,
            &[
                "write 0 300k",
                "write -z 100k 64k",
                "write -z 1M 128k",
                "write 3M 70k",
                "write 4500k 1k",
                "discard 200k 64k",
            ],
        );
        if !options.contains("refcount_bits=1") {
            qemu_img(&["snapshot", "-c", "first", path]);
            qemu_io(&image, &["write 64k 64k", "write 2M 10k"]);
            if !options.contains("refcount_bits=2") {
                qemu_img(&["snapshot", "-c", "a second one", path]);
                qemu_io(&image, &["write 3M 4k", "discard 0 128k"]);
            }
        }
        if !options.contains("0.10") {
            qemu_img(&["bitmap", "--add", path, "b0"]);
            qemu_img(&["bitmap", "--add", "-g", "512", path, "b1"]);
            qemu_io(&image, &["write 3000k 100k"]);
        }
        images.push((name.to_owned(), image));
    }
    for (name, options) in [
        ("deflated", "cluster_size=64k"),
        ("deflated-v2", "compat=0.10,cluster_size=4k"),
        ("zstandard", "compression_type=zstd,cluster_size=16k"),
        ("extended-c", "extended_l2=on,cluster_size=32k"),
        ("deflated-512", "cluster_size=512,refcount_bits=8"),
        ("deflated-2M", "cluster_size=2M"),
    ] {
        let image = dir.join(format!("{name}.qcow2"));
        let (source, path) = (source.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path,
        ]);
        qemu_io(&image, &["write 100k 20k"]);
        images.push((name.to_owned(), image));
    }
    let image = dir.join("external.qcow2");
    let path = image.to_str().unwrap();
    let options = format!("data_file={path}.raw,cluster_size=4k");
    qemu_create(path, &options, "2M");
    qemu_io(&image, &["write 0 64k", "write 1M 64k", "write -z 8k 4k"]);
    images.push(("external".to_owned(), image));
    images
}

/// The image's file with metadata damaged at random: bits turned, words
/// replaced, the end cut off; and what was done. The header stays, so that
/// programs look further.
pub fn damage(good: &[u8], reader: &Reader, random: &mut Random) -> (Vec<u8>, String) {
    let places = metadata(reader);
    let cluster = reader.header.cluster_size();
    let mut bad = good.to_vec();
    let mut what = String::new();
    for _ in 0..=random.below(3) {
        let place = places[random.below(places.len() as u64) as usize];
        let at = place.0 + random.below(cluster / 8) * 8;
        // Entries that are not 0 are more interesting.
        let at = nonzero_near(&bad, at, place + cluster).unwrap_or(at) as usize;
        if at + 8 > bad.len() {
            continue;
        }
        let old = u64::from_be_bytes(bad[at..at + 8].try_into().unwrap());
        let new = match random.below(6) {
            0 => old ^ 1 << random.below(64),
            1 => old ^ 1 << 63,
            2 => old ^ 1 << (9 + random.below(16)),
            3 => old.wrapping_add(cluster),
            4 => (random.below(good.len() as u64 / cluster) * cluster) | (old & (1 << 63)),
            _ => random.next(),
        };
        what += &format!(" {at:#x}: {old:#x} -> {new:#x}");
        bad[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
    if random.below(8) == 0 {
        let keep = good.len() as u64 * (70 + random.below(30)) / 100;
        what += &format!(" cut at {keep:#x}");
        bad.truncate(keep as usize);
    }
    (bad, what)
}

/// The clusters of refcount blocks and L1 and L2 tables.
pub fn metadata(reader: &Reader) -> Vec<HostOffset> {
    let geometry = reader.geometry();
    let header = &reader.header;
    let mut places = vec![header.refcount_table_offset, header.l1_table_offset];
    for i in 0..header.reftable_bytes() / 8 {
        let block = reader.be64(header.refcount_table_offset + i * 8);
        if block != 0 {
            places.push(HostOffset(block));
        }
    }
    for i in 0..u64::from(header.l1_size) {
        let entry = reader.be64(header.l1_table_offset + i * 8);
        if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(entry, &geometry) {
            // More of them, for there is more to go wrong.
            places.extend([offset, offset]);
        }
    }
    if header.nb_snapshots > 0 {
        let l1 = HostOffset(reader.be64(header.snapshots_offset));
        places.push(l1);
    }
    places
}

fn nonzero_near(bytes: &[u8], from: u64, end: HostOffset) -> Option<u64> {
    (from..end.0.min(bytes.len() as u64).saturating_sub(7))
        .step_by(8)
        .find(|&at| bytes[at as usize..at as usize + 8] != [0; 8])
}
