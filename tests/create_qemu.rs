//! Images that we lay out, judged by QEMU: equal to its own byte for byte
//! where both have one refcount block, clean everywhere.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Reader, half_random, qemu_img, qemu_io, run};
use qcow2_ublk::codec::{self, CompressionType};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions, NewImage, Preallocation};
use qcow2_ublk::qcow2::spec::{CompressedRange, HostOffset, L1Entry, L2Entry, refcount};

fn write(image: &NewImage, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(image.file_len).unwrap();
    for (offset, bytes) in &image.chunks {
        file.write_all_at(bytes, offset.0).unwrap();
    }
}

fn qemu_is_happy(path: &Path, what: &str) {
    let (code, text) = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    assert_eq!(code, Some(0), "{what}: {text}");
}

/// Every version, cluster size and refcount width, with disks of no, little
/// and the greatest possible size.
#[test]
fn every_geometry_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for bits in 9..=21u32 {
        let greatest = ((32 << 20) / 8u64).saturating_mul(1 << (2 * bits - 3));
        let widths = (0..=6).map(|order| (3, 1 << order)).chain([(2, 16)]);
        for (version, refcount_bits) in widths {
            // The greatest disk has an L1 table of 32 MiB, which QEMU reads at
            // every check: three widths shall do.
            let great = [1, 16, 64].contains(&refcount_bits).then_some(greatest);
            for size in [0, 1].into_iter().chain(great) {
                let options = CreateOptions {
                    cluster_size: 1 << bits,
                    refcount_bits,
                    version,
                    ..CreateOptions::new(size)
                };
                let what = format!("{options:?}");
                write(&options.build().unwrap(), &path);
                qemu_is_happy(&path, &what);
                if size == 1 {
                    let info = qemu_img(&[
                        "info",
                        "--output=json",
                        "-f",
                        "qcow2",
                        path.to_str().unwrap(),
                    ]);
                    let says = |text: &str| assert!(info.contains(text), "{what}: {info}");
                    says("\"virtual-size\": 512");
                    says(&format!("\"cluster-size\": {}", 1 << bits));
                    says(if version == 2 {
                        "\"compat\": \"0.10\""
                    } else {
                        "\"compat\": \"1.1\""
                    });
                    if version == 3 {
                        says(&format!("\"refcount-bits\": {refcount_bits}"));
                    }
                }
            }
            let too_large = CreateOptions {
                cluster_size: 1 << bits,
                ..CreateOptions::new(greatest + 1)
            };
            assert!(
                too_large
                    .build()
                    .unwrap_err()
                    .to_string()
                    .contains("too large")
            );
        }
    }
}

#[test]
fn the_same_bytes_as_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let backing = Backing {
        file: "some/base file".into(),
        format: Some("raw".into()),
    };
    for (size, cluster_size, refcount_bits, version, zstd, lazy, backed) in [
        (0, 65536, 16, 3, false, false, false),
        (1, 65536, 16, 3, false, false, false),
        (10 << 30, 65536, 16, 3, true, true, true),
        (10 << 30, 65536, 16, 2, false, false, true),
        (10 << 30, 65536, 16, 2, false, false, false),
        (1 << 40, 2 << 20, 64, 3, false, true, true),
        (1 << 20, 512, 1, 3, true, false, true),
        (1 << 30, 4096, 8, 3, true, true, false),
        (1 << 30, 8192, 2, 3, false, false, true),
    ] {
        let options = CreateOptions {
            size,
            cluster_size,
            refcount_bits,
            version,
            compression_type: if zstd {
                CompressionType::Zstd
            } else {
                CompressionType::Deflate
            },
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            lazy_refcounts: lazy,
            preallocation: Preallocation::Off,
            nocow: false,
            luks: None,
            backing: backed.then(|| backing.clone()),
        };
        write(&options.build().unwrap(), &ours);
        let text = format!(
            "cluster_size={cluster_size},refcount_bits={refcount_bits},compat={},compression_type={},lazy_refcounts={}",
            if version == 2 { "0.10" } else { "1.1" },
            options.compression_type.name(),
            if lazy { "on" } else { "off" },
        );
        let (path, size) = (theirs.to_str().unwrap(), size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-u", "-o", &text];
        if backed {
            args.extend(["-b", "some/base file", "-F", "raw"]);
        }
        args.extend([path, &size]);
        qemu_img(&args);
        let (ours, mut theirs) = (
            std::fs::read(&ours).unwrap(),
            std::fs::read(&theirs).unwrap(),
        );
        // QEMU may leave the last cluster whole or cut it after the L1 table;
        // what is there reads as zeros either way.
        assert!(theirs.len() >= ours.len(), "{text}");
        assert!(theirs.drain(ours.len()..).all(|byte| byte == 0), "{text}");
        assert!(ours == theirs, "{text}");
    }
}

#[test]
fn qemu_writes_to_our_images() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (cluster_size, refcount_bits) in
        [(512, 1), (512, 64), (4096, 4), (65536, 16), (2 << 20, 32)]
    {
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            ..CreateOptions::new((8 << 20) + 512)
        };
        write(&options.build().unwrap(), &path);
        qemu_io(&path, &["write -P 1 1M 3M", "write -P 2 8M 512"]);
        qemu_is_happy(&path, &format!("{options:?}"));
        let mut expected = vec![0; (8 << 20) + 512];
        expected[1 << 20..4 << 20].fill(1);
        expected[8 << 20..].fill(2);
        assert!(Reader::open(&path).disk() == expected);
    }
}

/// Compressed clusters packed without gaps, as a writer of ours will: QEMU
/// must find them, their refcounts and their content right.
#[test]
fn qemu_reads_our_compressed_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("image"), dir.path().join("raw"));
    for compression_type in [CompressionType::Deflate, CompressionType::Zstd] {
        for cluster_bits in [12u32, 16, 21] {
            let cluster_size = 1usize << cluster_bits;
            let disk = half_random(5 * cluster_size, u64::from(cluster_bits));
            let options = CreateOptions {
                compression_type,
                cluster_size: 1 << cluster_bits,
                ..CreateOptions::new(disk.len() as u64)
            };
            let mut image = options.build().unwrap();
            let geometry = image.header.geometry();
            let l2 = HostOffset(image.file_len.next_multiple_of(1 << cluster_bits));
            let l1_entry = L1Entry::Table {
                offset: l2,
                copied: true,
            };
            let l1 = image.header.l1_table_offset;
            image
                .chunks
                .push((l1, l1_entry.encode(&geometry).to_be_bytes().to_vec()));

            let data = l2 + geometry.cluster_size();
            let (mut bytes, mut table) = (Vec::new(), Vec::new());
            let mut refs = vec![l2.cluster(cluster_bits)];
            for cluster in disk.chunks(cluster_size) {
                let mut packed = vec![0; cluster_size];
                let level = compression_type.default_level();
                let len = codec::compress(compression_type, level, cluster, &mut packed).unwrap();
                let offset = data + bytes.len() as u64;
                let range = CompressedRange::new(offset, len as u64, &geometry).unwrap();
                refs.extend(range.clusters_touched(&geometry));
                table.extend_from_slice(
                    &L2Entry::Compressed(range)
                        .encode(&geometry)
                        .descriptor
                        .to_be_bytes(),
                );
                bytes.extend_from_slice(&packed[..len]);
            }
            image.file_len = (data + bytes.len() as u64)
                .0
                .next_multiple_of(1 << cluster_bits);
            let (_, counts) = &mut image.chunks[0];
            counts.resize(cluster_size, 0);
            for cluster in refs {
                refcount::adjust(counts, geometry.refcount_order, cluster as usize, 1).unwrap();
            }
            image.chunks.extend([(l2, table), (data, bytes)]);

            write(&image, &path);
            std::fs::write(&raw, &disk).unwrap();
            let what = format!("{compression_type:?} {cluster_bits}");
            qemu_is_happy(&path, &what);
            let (a, b) = (path.to_str().unwrap(), raw.to_str().unwrap());
            let compare = ["compare", "-f", "qcow2", "-F", "raw", a, b];
            let (code, text) = run("qemu-img", &compare);
            assert_eq!(code, Some(0), "{what}: {text}");
            assert!(Reader::open(&path).disk() == disk, "{what}");
        }
    }
}
