//! Copies: the content, and where it is.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::common::lab::qemu_check;
use super::common::{Reader, half_random, qemu_img, qemu_io};
use super::{Folder, PROGRAM, allocated, assert_same, chain, disk, len, ours, well, write_sparse};
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};

#[test]
fn round_trips_in_every_shape() {
    let folder = Folder::new();
    let raw = folder.file("in.raw");
    write_sparse(Path::new(&raw), &disk((3 << 20) + 1536, 1));
    let (out, back, theirs) = (folder.file("out"), folder.file("back"), folder.file("qemu"));
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "compat=0.10",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "extended_l2=on,cluster_size=16k",
    ] {
        for more in [
            &[][..],
            &["-c"],
            &["-W", "-m", "4"],
            &["-m", "1"],
            &["-S", "0"],
        ] {
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
            args.extend(more);
            args.extend([raw.as_str(), &out]);
            well(&args);
            qemu_check(Path::new(&out), false);
            assert_same(("raw", &raw), ("qcow2", &out));
            assert_eq!(
                qemu_img(&["info", &out]).contains("compression type: zstd"),
                options.contains("zstd")
            );
            // And back, as they and as we read it.
            well(&["convert", "-O", "raw", &out, &back]);
            assert!(std::fs::read(&back).unwrap() == std::fs::read(&raw).unwrap());
            if more.contains(&"-W") {
                continue;
            }
            qemu_img(&["convert", "-O", "raw", &out, &back]);
            assert!(std::fs::read(&back).unwrap() == std::fs::read(&raw).unwrap());
            // Not larger than theirs, but for the clusters in hand at the end.
            args[0] = "convert";
            let last = args.len() - 1;
            args[last] = &theirs;
            qemu_img(&args);
            let slack = (256 << 10) + Reader::open(Path::new(&out)).header.cluster_size();
            assert!(
                len(&out) <= len(&theirs) + slack,
                "{options} {more:?}: {} bytes, theirs {}",
                len(&out),
                len(&theirs)
            );
        }
    }
}

#[test]
fn raw_output_is_sparse_unless_it_is_not_to_be() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("in.raw"), folder.file("out"));
    let mut bytes = vec![0; 8 << 20];
    bytes[5 << 20..(5 << 20) + 4096].fill(7);
    std::fs::write(&raw, &bytes).unwrap();
    let base = ["convert", "-f", "raw", "-O", "raw"];
    for (more, sparse) in [
        (&[][..], true),
        (&["-S", "64k"], true),
        (&["-S", "0"], false),
        (&["-o", "preallocation=falloc"], false),
        (&["-o", "preallocation=full"], false),
    ] {
        well(&[&base, more, &[&raw, &out]].concat());
        assert!(std::fs::read(&out).unwrap() == bytes, "{more:?}");
        assert_eq!(allocated(&out) < 1 << 20, sparse, "{more:?}");
    }
}

#[test]
fn the_result_is_the_same_each_time() {
    let folder = Folder::new();
    let raw = folder.file("in.raw");
    write_sparse(Path::new(&raw), &disk(8 << 20, 5));
    for more in [&["-c"][..], &["-c", "-W"], &[]] {
        let mut first: Option<Vec<u8>> = None;
        for workers in ["1", "2", "7", "16"] {
            let out = folder.file("out");
            let base = ["convert", "-f", "raw", "-O", "qcow2", "-m", workers];
            well(&[&base, more, &[&raw, &out]].concat());
            let bytes = std::fs::read(&out).unwrap();
            let first = first.get_or_insert_with(|| bytes.clone());
            assert!(*first == bytes, "{more:?} with {workers} workers");
        }
    }
}

/// A chain of three: raw, compressed, and one with zeros and discards on top.
#[test]
fn chains_become_one_file() {
    let folder = Folder::new();
    let top = chain(&folder);
    let (out, raw) = (folder.file("out"), folder.file("raw"));
    for more in [&[][..], &["-c"], &["-o", "cluster_size=2M"]] {
        well(&[&["convert", "-O", "qcow2"], more, &[&top, &out]].concat());
        qemu_check(Path::new(&out), false);
        assert_same(("qcow2", &top), ("qcow2", &out));
        assert!(!qemu_img(&["info", &out]).contains("backing file"));
    }
    well(&["convert", &top, &raw]);
    assert_same(("qcow2", &top), ("raw", &raw));
}

#[test]
fn over_a_backing_file_only_the_difference_is_stored() {
    let folder = Folder::new();
    let top = chain(&folder);
    std::fs::copy(folder.path("base"), folder.path("other")).unwrap();
    let zeros = folder.path("zeros");
    std::fs::File::create(zeros)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    let longer = folder.path("longer");
    std::fs::write(longer, half_random(5 << 20, 3)).unwrap();
    let out = folder.file("out");
    // The input's own backing file; the file below that; a copy of it; files
    // that have nothing to do with it.
    for (backing, format, small) in [
        ("mid", "qcow2", true),
        ("base", "raw", true),
        ("other", "raw", true),
        ("zeros", "raw", false),
        ("longer", "raw", false),
    ] {
        for more in [&[][..], &["-c"], &["-o", "cluster_size=4k"]] {
            let args = ["convert", "-O", "qcow2", "-B", backing, "-F", format];
            well(&[&args, more, &[&top, &out]].concat());
            qemu_check(Path::new(&out), false);
            assert_same(("qcow2", &top), ("qcow2", &out));
            let info = qemu_img(&["info", &out]);
            assert!(info.contains(&format!("backing file: {backing}")), "{info}");
            if small {
                assert!(len(&out) < 2 << 20, "{backing} {more:?}: {}", len(&out));
            }
        }
    }
    // Without a change there is nothing to store.
    let args = [
        "convert", "-f", "raw", "-O", "qcow2", "-B", "other", "-F", "raw",
    ];
    well(&[&args[..], &[&folder.file("base"), &out]].concat());
    let map = qemu_img(&["map", "--output", "json", &out]);
    assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
}

#[test]
fn compressed_sources_and_targets() {
    let folder = Folder::new();
    let (raw, theirs, ours) = (
        folder.file("raw"),
        folder.file("theirs"),
        folder.file("ours"),
    );
    write_sparse(Path::new(&raw), &disk(4 << 20, 9));
    for kind in ["zlib", "zstd"] {
        for cluster in ["512", "64k", "2M"] {
            let options = format!("compression_type={kind},cluster_size={cluster}");
            let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            qemu_img(&[&args[..], &[&raw, &theirs]].concat());
            well(&[
                "convert", "-c", "-O", "qcow2", "-o", &options, &theirs, &ours,
            ]);
            qemu_check(Path::new(&ours), false);
            assert_same(("raw", &raw), ("qcow2", &ours));
            let image = Reader::open(Path::new(&ours));
            let size = image.header.cluster_size();
            let compressed = (0..(4 << 20) / size)
                .filter(|n| matches!(image.entry(GuestOffset(n * size)), L2Entry::Compressed(_)))
                .count() as u64;
            assert!(compressed * 3 > (4 << 20) / size, "{options}: {compressed}");
        }
    }
    // The level is ours to choose.
    let sizes: Vec<u64> = ["1", "9"]
        .iter()
        .map(|level| {
            let args = ["convert", "-c", "--compression-level", level, "-f", "raw"];
            well(&[&args[..], &["-O", "qcow2", &raw, &ours]].concat());
            assert_same(("raw", &raw), ("qcow2", &ours));
            allocated(&ours)
        })
        .collect();
    assert!(sizes[1] < sizes[0], "{sizes:?}");
}

#[test]
fn an_existing_output_is_written_over() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    let bytes = disk(2 << 20, 30);
    write_sparse(Path::new(&raw), &bytes);
    // What it held before must not show, nor what is below it.
    let base = folder.file("base");
    std::fs::write(&base, vec![0xee; 3 << 20]).unwrap();
    for compat in ["0.10", "1.1"] {
        for more in [&[][..], &["-c"], &["-W"], &["-S", "0"]] {
            let options = format!("compat={compat}");
            let args = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw"];
            qemu_img(&[&args[..], &["-o", &options, &out, "3M"]].concat());
            qemu_io(Path::new(&out), &["write -P 7 0 1M"]);
            let args = ["convert", "-n", "-f", "raw", "-O", "qcow2"];
            well(&[&args, more, &[&raw, &out]].concat());
            qemu_check(Path::new(&out), false);
            let back = folder.file("back");
            qemu_img(&["convert", "-O", "raw", &out, &back]);
            let seen = std::fs::read(&back).unwrap();
            assert!(seen[..2 << 20] == bytes, "{compat} {more:?}");
            assert!(seen[2 << 20..].iter().all(|&b| b == 0xee), "past the input");
        }
    }
    for more in [&[][..], &["-W"], &["-S", "0"]] {
        std::fs::write(&out, vec![0xee; 3 << 20]).unwrap();
        let args = ["convert", "-n", "-f", "raw", "-O", "raw"];
        well(&[&args, more, &[&raw, &out]].concat());
        let seen = std::fs::read(&out).unwrap();
        assert!(seen[..2 << 20] == bytes && seen[2 << 20..] == [0xee; 1 << 20]);
    }
    // A file that is there keeps its permissions.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&out, std::fs::Permissions::from_mode(0o640)).unwrap();
    well(&["convert", "-f", "raw", "-O", "qcow2", &raw, &out]);
    assert_same(("raw", &raw), ("qcow2", &out));
    assert_eq!(std::fs::metadata(&out).unwrap().mode() & 0o777, 0o640);
    let size = ["convert", "-n", "-f", "raw", &folder.file("base"), &raw];
    let (code, text) = ours(&size);
    assert!(
        code == Some(1) && text.contains("output file is smaller than input file"),
        "{text}"
    );
    assert!(std::fs::read(&raw).unwrap() == bytes);
}

#[test]
fn progress_goes_to_standard_error() {
    let folder = Folder::new();
    let (raw, out) = (folder.file("raw"), folder.file("out"));
    std::fs::write(&raw, half_random(4 << 20, 2)).unwrap();
    let output = std::process::Command::new(PROGRAM)
        .args(["convert", "-p", "-f", "raw", "-O", "qcow2", &raw, &out])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("    (0.00/100%)\r"), "{text}");
    assert!(text.ends_with("    (100.00/100%)\r\n"), "{text}");
}

#[test]
fn snapshots_are_copied_in_place_of_the_active_disk() {
    let folder = Folder::new();
    let top = chain(&folder);
    let (out, theirs) = (folder.file("out"), folder.file("theirs"));
    qemu_img(&["snapshot", "-c", "first", &top]);
    qemu_io(Path::new(&top), &["write -P 0x44 0 1M"]);
    qemu_img(&["snapshot", "-c", "second", &top]);
    qemu_io(Path::new(&top), &["write -P 0x55 64k 2M"]);
    for which in ["first", "2", "snapshot.name=second", "snapshot.id=1"] {
        qemu_img(&["convert", "-l", which, "-O", "raw", &top, &theirs]);
        for more in [
            &["-O", "raw"][..],
            &["-O", "qcow2", "-c"],
            &["-O", "qcow2", "-B", "mid", "-F", "qcow2"],
            &["-O", "qcow2", "-B", "top", "-F", "qcow2"],
        ] {
            well(&[&["convert", "-l", which], more, &[&top, &out]].concat());
            let format = more[1];
            assert_same(("raw", &theirs), (format, &out));
        }
        let args = [
            "measure", "-l", which, "-O", "qcow2", "--output", "json", &top,
        ];
        assert_eq!(well(&args), qemu_img(&args));
    }
    let (code, text) = super::ours(&["convert", "-l", "third", &top, &out]);
    assert!(code > Some(0) && text.contains("third"), "{text}");
    let (code, text) = super::ours(&["convert", "-f", "raw", "-l", "first", &theirs, &out]);
    assert!(code == Some(1) && text.contains("no snapshots"), "{text}");
}
