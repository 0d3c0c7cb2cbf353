//! What changes the disk is recorded, and QEMU agrees.

use super::*;

#[test]
fn what_we_write_qemu_finds_dirty() {
    let folder = Folder::new();
    for (seed, cluster, size) in [
        (1, "512", M),
        (2, "4096", 4 * M + 512),
        (3, "65536", 16 * M),
        (4, "2097152", 16 * M + 1536),
    ] {
        let mut rng = Rng::new(seed);
        let path = folder.create("a", &format!("cluster_size={cluster}"), size);
        let bitmaps = [
            ("tiny", 512),
            ("small", 4096),
            ("usual", 64 * K),
            ("large", M),
        ];
        for (bitmap, granularity) in bitmaps {
            let granularity = granularity.to_string();
            qemu_img(&["bitmap", "--add", "-g", &granularity, name(&path), bitmap]);
        }
        qemu_img(&["bitmap", "--add", "--disable", name(&path), "disabled"]);
        let mut dirty = vec![false; size.div_ceil(512) as usize];
        // More than one session: what the first has stored the second loads.
        for _ in 0..3 {
            let disk = open(&path, true);
            for _ in 0..6 {
                let offset = rng.below(size);
                let len = 1 + rng.below((size - offset).min(64 * K));
                match rng.below(5) {
                    4 => disk
                        .write_compressed_at(&vec![seed as u8; len as usize], offset, None)
                        .unwrap(),
                    0 => disk.discard_at(offset, len).unwrap(),
                    1 => disk.write_zeroes_at(offset, len, true).unwrap(),
                    _ => disk
                        .write_at(&vec![seed as u8; len as usize], offset)
                        .unwrap(),
                }
                dirty[(offset / 512) as usize..(offset + len).div_ceil(512) as usize].fill(true);
            }
            disk.close().unwrap();
            qemu_check(&path, false);
        }
        for (bitmap, granularity) in bitmaps {
            let expected = rounded(&dirty, granularity, size);
            assert_eq!(
                ranges(&path, bitmap),
                expected,
                "{bitmap}, cluster {cluster}"
            );
            assert_eq!(
                qemu_ranges(&path, bitmap),
                expected,
                "{bitmap}, cluster {cluster}"
            );
        }
        assert_eq!(qemu_ranges(&path, "disabled"), []);
    }
}

#[test]
fn what_qemu_writes_we_find_dirty_and_both_go_on() {
    let folder = Folder::new();
    let path = folder.create("a", "", 8 * M);
    ours_ok(&["--add", "-g", "512", name(&path), "ours"]);
    qemu_img(&["bitmap", "--add", "-g", "2M", name(&path), "theirs"]);
    qemu_io(&path, &["write 1k 512", "discard 3M 64k", "write -z 7M 1"]);
    let disk = open(&path, true);
    disk.write_at(&[1], 512).unwrap();
    disk.close().unwrap();
    qemu_io(&path, &["write 2M 1k"]);
    let fine = [(512, 1024), (2 * M, 1024), (3 * M, 64 * K), (7 * M, 512)];
    for (bitmap, expected) in [
        ("ours", &fine[..]),
        ("theirs", &[(0, 4 * M), (6 * M, 2 * M)]),
    ] {
        assert_eq!(ranges(&path, bitmap), expected);
        assert_eq!(qemu_ranges(&path, bitmap), expected);
    }
    qemu_check(&path, false);
}

#[test]
fn tables_have_entries_of_every_kind() {
    let folder = Folder::new();
    // One entry of the table is 2 MiB of disk.
    let path = folder.create("a", "cluster_size=512", 8 * M);
    ours_ok(&["--add", "-g", "512", name(&path), "b"]);
    let disk = open(&path, true);
    disk.discard_at(2 * M, 2 * M).unwrap();
    disk.write_at(&[1; 1024], 5 * M).unwrap();
    disk.close().unwrap();
    let table = |path: &Path| {
        let image = sim::Image::load(path).unwrap();
        let checked = Checked::open(&image).unwrap();
        let bitmap = checked.bitmaps().remove(0);
        (checked.bitmap_table(&bitmap), bitmap.table_offset.0)
    };
    let (entries, at) = table(&path);
    use BitmapTableEntry::{Cluster, Ones, Zeros};
    assert!(
        matches!(entries[..], [Zeros, Ones, Cluster(_), Zeros]),
        "{entries:?}"
    );
    let expected = [(2 * M, 2 * M), (5 * M, 1024)];
    assert_eq!(qemu_ranges(&path, "b"), expected);
    // Entries of zeros may as well be ones: so says whoever wrote them.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &1_u64.to_be_bytes(), at).unwrap();
    let expected = [(0, 4 * M), (5 * M, 1024)];
    assert_eq!(ranges(&path, "b"), expected);
    assert_eq!(qemu_ranges(&path, "b"), expected);
    qemu_check(&path, false);
}

#[test]
fn a_growing_disk_takes_its_bitmaps_along() {
    let folder = Folder::new();
    for cluster in ["512", "65536"] {
        let options = format!("cluster_size={cluster}");
        let (a, b) = (
            folder.create("a", &options, 2 * M),
            folder.create("b", &options, 2 * M),
        );
        for path in [&a, &b] {
            for (bitmap, granularity) in [("fine", "512"), ("coarse", "1M")] {
                qemu_img(&["bitmap", "--add", "-g", granularity, name(path), bitmap]);
            }
            qemu_img(&[
                "bitmap",
                "--add",
                "--merge",
                "fine",
                "-g",
                "512",
                name(path),
                "off",
            ]);
            qemu_io(path, &["write 1M 512"]);
            qemu_img(&["bitmap", "--disable", name(path), "off"]);
        }
        qemu_img(&["resize", "-q", name(&b), "5636608"]);
        qemu_io(&b, &["write 5M 4k"]);
        let disk = open(&a, true);
        disk.grow(5636608).unwrap();
        disk.write_at(&[1; 4096], 5 * M).unwrap();
        disk.close().unwrap();
        for bitmap in ["fine", "coarse", "off"] {
            assert_eq!(qemu_ranges(&a, bitmap), qemu_ranges(&b, bitmap), "{bitmap}");
            assert_eq!(ranges(&b, bitmap), ranges(&a, bitmap));
        }
        assert_eq!(ranges(&a, "fine"), [(M, 512), (5 * M, 4096)]);
        assert_eq!(listed(&a), listed(&b));
        qemu_check(&a, false);
    }
}

#[test]
fn what_a_crash_leaves_is_only_good_to_be_removed() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    ours_ok(&["--add", name(&path), "b0"]);
    ours_ok(&["--add", "--disable", name(&path), "kept"]);
    let output = Command::new(env!("CARGO_BIN_EXE_qcow2-ublk"))
        .args([
            "io",
            "-c",
            "write -P 7 0 64k",
            "-c",
            "flush",
            "-c",
            "sigraise 9",
        ])
        .arg(&path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    // The kernel takes a dead program's ring apart, and its locks with it, in
    // its own time.
    while run("qemu-img", &["info", name(&path)]).0 != Some(0) {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let expected = serde_json::json!([
        {"flags": ["in-use", "auto"], "name": "b0", "granularity": 65536},
        {"flags": [], "name": "kept", "granularity": 65536},
    ]);
    assert_eq!(listed(&path), expected);
    for action in ["--clear", "--enable", "--disable"] {
        let (code, text) = ours(&[action, name(&path), "b0"]);
        assert_eq!(code, Some(1));
        let (_, theirs) = run("qemu-img", &["bitmap", action, name(&path), "b0"]);
        assert_eq!(message(&text), message(&theirs));
        assert!(text.contains("hint: remove it"), "{text}");
    }
    let (code, text) = ours(&["dump", name(&path), "b0"]);
    assert_ne!(code, Some(0), "{text}");
    let list = ours_ok(&["list", "--json", name(&path)]);
    assert!(list.contains("\"inconsistent\": true"), "{list}");
    // The disk goes on; the mark stays, also through a clean close.
    let disk = open(&path, true);
    let grown = disk.grow(2 * M).unwrap_err();
    assert!(
        grown.to_string().contains("'b0' is inconsistent"),
        "{grown}"
    );
    disk.write_at(&[1], 0).unwrap();
    disk.close().unwrap();
    assert!(listed(&path).to_string().contains("in-use"));
    ours_ok(&["--remove", "--add", name(&path), "b0"]);
    assert_eq!(ranges(&path, "b0"), []);
    // What was reserved when it died leaks.
    qemu_check(&path, true);
}
