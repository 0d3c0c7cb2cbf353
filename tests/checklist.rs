//! Rows of docs/testing/names.md that are no other test's subject: extremes of the
//! disk, small damage, and images far larger than what is cached.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{Reader, qemu_create, qemu_img, qemu_io, run};
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::ImageOptions;
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::{Disk, chain};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

fn writable() -> chain::Options {
    chain::Options {
        writable: true,
        ..chain::Options::default()
    }
}

fn created(dir: &Path, options: &str, size: &str) -> PathBuf {
    let image = dir.join("a.qcow2");
    let options = if options.is_empty() {
        "compat=1.1"
    } else {
        options
    };
    qemu_create(&image, options, size);
    image
}

fn poke(image: &Path, offset: u64, value: u64) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&value.to_be_bytes(), offset).unwrap();
}

fn clean(image: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
}

/// What `qemu-img check` and ours end with.
fn both_checks(image: &Path) -> (Option<i32>, Option<i32>) {
    let path = image.to_str().unwrap();
    let theirs = run("qemu-img", &["check", "-q", "-f", "qcow2", path]).0;
    let ours = run(env!("CARGO_BIN_EXE_qcow2-ublk"), &["check", path]).0;
    (theirs, ours)
}

#[test]
fn a_missing_backing_file_is_named_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", base.to_str().unwrap(), "1M"]);
    let image = dir.path().join("a.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "lazy_refcounts=on",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        image.to_str().unwrap(),
    ]);
    let before = std::fs::read(&image).unwrap();
    std::fs::remove_file(&base).unwrap();
    for options in [chain::Options::default(), writable()] {
        let error = Disk::open(&image, &options).unwrap_err().to_string();
        assert!(error.contains("base.qcow2"), "{error}");
        assert!(error.contains("No such file"), "{error}");
    }
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn ranges_of_nothing_and_beyond_everything() {
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "", "1M");
    let disk = Disk::open(&image, &writable()).unwrap();
    let before = std::fs::read(&image).unwrap();
    for at in [0, 1, 64 * K, M - 1, M] {
        disk.write_at(&[], at).unwrap();
        disk.read_at(&mut [], at).unwrap();
        disk.write_zeroes_at(at, 0, true).unwrap();
        disk.discard_at(at, 0).unwrap();
    }
    assert!(
        std::fs::read(&image).unwrap() == before,
        "nothing is written by nothing"
    );
    // A negative offset is a very large one.
    for at in [M - 511, M, M + 1, i64::MAX as u64, u64::MAX - 511, u64::MAX] {
        let mut bytes = [0x5a; 512];
        for error in [
            disk.write_at(&bytes, at).unwrap_err(),
            disk.read_at(&mut bytes, at).unwrap_err(),
            disk.write_zeroes_at(at, 512, false).unwrap_err(),
            disk.discard_at(at, 512).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{error}");
        }
        assert_eq!(bytes, [0x5a; 512]);
    }
    disk.write_at(&[7], M - 1).unwrap();
    let mut last = [0];
    disk.read_at(&mut last, M - 1).unwrap();
    assert_eq!(last, [7]);
    disk.close().unwrap();
    clean(&image);
}

#[test]
fn disks_of_nothing_and_of_petabytes() {
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "", "0");
    let disk = Disk::open(&image, &writable()).unwrap();
    assert_eq!(disk.size(), 0);
    assert_eq!(
        disk.read_at(&mut [0], 0).unwrap_err().kind(),
        ErrorKind::OutOfBounds
    );
    disk.grow(M).unwrap();
    disk.write_at(&[1; 100], M - 100).unwrap();
    disk.close().unwrap();
    clean(&image);

    // With an L1 table of 32 MiB, the largest there may be.
    std::fs::remove_file(&image).unwrap();
    let image = created(dir.path(), "", "2P");
    let size = 2 << 50;
    let disk = Disk::open(&image, &writable()).unwrap();
    assert_eq!(disk.size(), size);
    for (byte, at) in [(1, 0), (2, size / 2 - 50), (3, size - 100)] {
        disk.write_at(&[byte; 100], at).unwrap();
    }
    disk.close().unwrap();
    clean(&image);
    qemu_io(
        &image,
        &["read -P 1 0 100", &format!("read -P 3 {} 100", size - 100)],
    );
    let (_, text) = run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "read -P 2 1125899906842574 100",
            image.to_str().unwrap(),
        ],
    );
    assert!(!text.contains("failed"), "{text}");
}

/// An L1 entry that names the L1 table as an L2 table, and an L2 entry that
/// names the L2 table as data: no endless walk, no write to either.
#[test]
fn tables_that_name_themselves() {
    for in_l1 in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let image = created(dir.path(), "", "4M");
        qemu_io(&image, &["write -P 1 0 64k"]);
        let reader = Reader::open(&image);
        let l1 = reader.header.l1_table_offset.0;
        let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        if in_l1 {
            poke(&image, l1, l1 | 1 << 63);
        } else {
            poke(&image, l2 + 8, l2 | 1 << 63);
        }
        let (theirs, ours) = both_checks(&image);
        assert_eq!(
            (theirs, ours),
            (Some(2), Some(2)),
            "in the L1 table: {in_l1}"
        );
        let table = std::fs::read(&image).unwrap();
        let disk = Disk::open(&image, &writable()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        // Whatever it reads as, it comes to an end.
        let _ = disk.read_at(&mut bytes, 64 * K);
        let error = disk.write_at(&bytes, 64 * K).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        drop(disk);
        let after = std::fs::read(&image).unwrap();
        let at = if in_l1 { l1 } else { l2 } as usize;
        assert!(after[at..at + 4096] == table[at..at + 4096]);
    }
}

/// A compressed cluster said to be where nothing can be.
#[test]
fn compressed_descriptors_that_lead_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "", "1M");
    qemu_io(&image, &["write -P 1 0 64k", "write -P 2 64k 64k"]);
    let reader = Reader::open(&image);
    let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    for descriptor in [
        // Behind the end of the file; at the last offset there is; data that
        // is no compressed stream.
        1 << 62 | 0x4000_0000_u64,
        1 << 62 | ((1 << 54) - 1),
        1 << 62 | reader.be64(qcow2_ublk::qcow2::spec::HostOffset(l2)) & 0x00ff_ffff_ffff_fe00,
    ] {
        poke(&image, l2 + 8, descriptor);
        let disk = Disk::open(&image, &chain::Options::default()).unwrap();
        let mut bytes = vec![0; 4096];
        let error = disk.read_at(&mut bytes, 64 * K).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{descriptor:#x}: {error}");
        let text = error.to_string();
        assert!(text.contains("0x"), "it says where: {text}");
        // Its neighbour is as good as ever.
        disk.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 1));
    }
}

/// Zeros without unmapping keep what is there, and map what is not as zeros.
#[test]
fn zeros_that_stay_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "", "1M");
    let disk = Disk::open(&image, &writable()).unwrap();
    disk.write_at(&[9; 65536], 0).unwrap();
    disk.write_zeroes_at(0, 192 * K, false).unwrap();
    let mut bytes = vec![1; 192 << 10];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    disk.close().unwrap();
    clean(&image);
    let map = qemu_img(&[
        "map",
        "--output=json",
        "-f",
        "qcow2",
        image.to_str().unwrap(),
    ]);
    let first = map.lines().next().unwrap();
    assert!(
        first.contains("\"zero\": true") && first.contains("\"offset\""),
        "{map}"
    );
    // Written to, it is the same host cluster again.
    let entry = |image: &Path| {
        let reader = Reader::open(image);
        format!("{:?}", reader.entry(qcow2_ublk::qcow2::GuestOffset(0)))
    };
    let zeroed = entry(&image);
    let disk = Disk::open(&image, &writable()).unwrap();
    disk.write_at(&[5; 512], 1024).unwrap();
    disk.close().unwrap();
    clean(&image);
    let host = |entry: &str| {
        entry
            .split("HostOffset(")
            .nth(1)
            .map(|rest| rest.split(')').next().unwrap().to_owned())
    };
    assert!(host(&zeroed).is_some());
    assert_eq!(host(&zeroed), host(&entry(&image)));
}

/// A million clusters, all mapped: opened, checked and used.
#[test]
fn a_million_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let path = image.to_str().unwrap();
    let made = run(
        env!("CARGO_BIN_EXE_qcow2-ublk"),
        &[
            "create",
            "-o",
            "cluster_size=512,preallocation=metadata",
            path,
            "512M",
        ],
    );
    assert_eq!(made.0, Some(0), "{}", made.1);
    let disk = Disk::open(&image, &writable()).unwrap();
    let mut state = 12345_u64;
    let mut written = std::collections::BTreeMap::new();
    for n in 0..3000_u64 {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let cluster = (state >> 33) % (1 << 20);
        disk.write_at(&n.to_le_bytes(), cluster * 512).unwrap();
        written.insert(cluster, n);
    }
    disk.close().unwrap();
    assert_eq!(both_checks(&image), (Some(0), Some(0)));
    let disk = Disk::open(&image, &chain::Options::default()).unwrap();
    for (cluster, n) in written {
        let mut bytes = [0; 8];
        disk.read_at(&mut bytes, cluster * 512).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), n, "cluster {cluster}");
    }
}

/// L2 tables many times the size of the cache, dirty and clean ones by turns.
#[test]
fn a_cache_far_too_small() {
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "cluster_size=4k", "8G");
    let options = chain::Options {
        image: ImageOptions {
            l2_cache: 64 << 10,
            ..ImageOptions::default()
        },
        ..writable()
    };
    let disk = Disk::open(&image, &options).unwrap();
    // One cluster in each of the tables, twice, and what is there in between.
    let tables = 8 * K * M / (2 * M);
    for round in 0..2_u8 {
        for n in 0..tables {
            let at = n * 2 * M + (n * 37 % 512) * 4 * K;
            disk.write_at(
                &[round.wrapping_add(n as u8); 64],
                at + u64::from(round) * 1000,
            )
            .unwrap();
            let past = n.saturating_sub(97);
            let mut bytes = [0; 64];
            disk.read_at(&mut bytes, past * 2 * M + (past * 37 % 512) * 4 * K)
                .unwrap();
            assert_eq!(bytes, [past as u8; 64], "table {past}");
        }
    }
    disk.close().unwrap();
    clean(&image);
    let disk = Disk::open(&image, &options).unwrap();
    for n in 0..tables {
        let mut bytes = [0; 1064];
        disk.read_at(&mut bytes, n * 2 * M + (n * 37 % 512) * 4 * K)
            .unwrap();
        assert_eq!(bytes[..64], [n as u8; 64]);
        assert_eq!(bytes[1000..], [1_u8.wrapping_add(n as u8); 64]);
    }
}

/// Writes of zeros with `detect-zeroes`: the image becomes what QEMU makes of
/// it, cluster by cluster.
#[test]
fn zeros_are_detected_as_qemu_does() {
    let commands = [
        "write -P 7 0 256k",
        "write -P 0 64k 64k",
        "write -P 0 130k 3k",
        "write -P 0 512k 100k",
        "write -P 8 640k 64k",
        "write -P 0 600k 104k",
    ];
    for mode in ["off", "on", "unmap"] {
        let mut maps = Vec::new();
        for ours in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let image = created(dir.path(), "", "1M");
            let path = image.to_str().unwrap();
            let options = format!(
                "driver=qcow2,detect-zeroes={mode},discard=unmap,file.driver=file,file.filename={path}"
            );
            let mut args = if ours {
                vec!["io", "--detect-zeroes", mode]
            } else {
                vec!["--image-opts"]
            };
            for command in &commands {
                args.extend(["-c", command]);
            }
            args.push(if ours { path } else { &options });
            let program = if ours {
                env!("CARGO_BIN_EXE_qcow2-ublk")
            } else {
                "qemu-io"
            };
            let (code, text) = run(program, &args);
            assert_eq!(code, Some(0), "{text}");
            clean(&image);
            let map = qemu_img(&["map", "--output=json", "-f", "qcow2", path]);
            let entries: serde_json::Value = serde_json::from_str(&map).unwrap();
            // Zeros that are said and zeros that are not there read the same.
            let mut shown = Vec::new();
            for entry in entries.as_array().unwrap() {
                let kind = (entry["zero"].as_bool(), entry["offset"].is_u64());
                if shown.last().is_none_or(|&(_, last)| last != kind) {
                    shown.push((entry["start"].as_u64().unwrap(), kind));
                }
            }
            let disk = Disk::open(&image, &chain::Options::default()).unwrap();
            let mut content = vec![0; M as usize];
            disk.read_at(&mut content, 0).unwrap();
            maps.push((shown, content));
        }
        assert_eq!(maps[0].0, maps[1].0, "{mode}");
        assert!(maps[0].1 == maps[1].1, "{mode}");
    }
}

/// Every way to open an image shows the same, and what is not to be written
/// is not.
#[test]
fn opened_in_every_way() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = created(dir.path(), "", "8M");
    qemu_io(
        &image,
        &["write -P 7 0 2M", "write -c -P 8 2M 64k", "write -z 3M 1M"],
    );
    let before = std::fs::read(&image).unwrap();
    let mut expected = vec![0; 8 << 20];
    expected[..2 << 20].fill(7);
    expected[2 << 20..(2 << 20) + (64 << 10)].fill(8);
    for cache in [CacheMode::Writeback, CacheMode::None] {
        for force_share in [false, true] {
            for (queues, l2_cache) in [(1, None), (4, Some(64 << 10))] {
                let mut options = chain::Options {
                    cache,
                    force_share,
                    ..chain::Options::default()
                };
                options.image.queues = queues;
                if let Some(bytes) = l2_cache {
                    options.image.l2_cache = bytes;
                }
                let disk = Disk::open(&image, &options).unwrap();
                let mut seen = vec![0xee; expected.len()];
                disk.read_at(&mut seen, 0).unwrap();
                assert!(seen == expected, "{options:?}");
                let refused = disk.write_at(&[1; 512], 0).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ReadOnly);
                disk.close().unwrap();
            }
        }
    }
    assert!(std::fs::read(&image).unwrap() == before);
    // What cannot be together is refused.
    let options = chain::Options {
        force_share: true,
        ..writable()
    };
    assert_eq!(
        Disk::open(&image, &options).unwrap_err().kind(),
        ErrorKind::Usage
    );
}

/// A check reads: beside other readers, of files that may not be written, and
/// whatever it finds, not a byte changes; a repair is refused there.
#[test]
fn a_check_changes_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let image = created(dir.path(), "lazy_refcounts=on", "8M");
    qemu_io(&image, &["write -P 7 0 1M"]);
    let reader = Reader::open(&image);
    let block = reader.be64(reader.header.refcount_table_offset);
    // Leaks, low counts and the dirty mark.
    poke(&image, block + 16, 0x0001_0000_0001_0002);
    poke(&image, 72, 1);
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o444)).unwrap();
    let before = std::fs::read(&image).unwrap();
    let times = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let modified = times(&image);
    let other = Disk::open(&image, &chain::Options::default()).unwrap();
    let (theirs, ours) = both_checks(&image);
    assert_eq!((theirs, ours), (Some(2), Some(2)));
    let path = image.to_str().unwrap();
    let (code, text) = run(
        env!("CARGO_BIN_EXE_qcow2-ublk"),
        &["check", "-r", "all", path],
    );
    assert!(code != Some(0), "{text}");
    drop(other);
    assert!(std::fs::read(&image).unwrap() == before);
    assert_eq!(times(&image), modified);
}

/// Refcounts that call the header, the tables and the refcounts themselves
/// free: none of them is ever given to data.
#[test]
fn metadata_that_counts_as_free_is_not_given_out() {
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=512"] {
        let dir = tempfile::tempdir().unwrap();
        let image = created(dir.path(), options, "8M");
        qemu_io(&image, &["write -P 7 0 64k"]);
        let reader = Reader::open(&image);
        let block = reader.be64(reader.header.refcount_table_offset);
        let first = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        // All up to the first L2 table, four counts to a word.
        let clusters = first >> reader.header.geometry().cluster_bits;
        for word in 0..=clusters / 4 {
            poke(&image, block + word * 8, 0);
        }
        let disk = Disk::open(&image, &writable()).unwrap();
        // They go elsewhere, or are refused.
        for at in (0..64).map(|n| M + n * 64 * K) {
            let _ = disk.write_at(&[0x5a; 4096], at);
        }
        let _ = disk.flush();
        drop(disk);
        let disk = Disk::open(&image, &chain::Options::default()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        disk.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|&b| b == 7), "{options}");
        let now = Reader::open(&image);
        assert_eq!(now.header.l1_table_offset, reader.header.l1_table_offset);
        let place = now.be64(now.header.refcount_table_offset);
        assert_eq!(place, block, "{options}");
        let l1 = now.be64(now.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        assert_eq!(l1, first, "{options}");
    }
}
