//! Headers and directories of every kind, also broken ones.

use super::*;

#[test]
fn the_extension_finds_its_place_in_every_header() {
    let folder = Folder::new();
    folder.create("base", "", M);
    for cluster in ["512", "4096", "65536"] {
        // The backing file's name moves on, and the extension may lie across
        // sectors.
        for length in [1, 30, 100] {
            let base = format!("{}base", "./".repeat(length));
            let options = format!("cluster_size={cluster},backing_file={base},backing_fmt=qcow2");
            let path = folder.create("a", &options, M);
            for bitmap in ["a", "b", "c"] {
                ours_ok(&["--add", name(&path), bitmap]);
                let info = qemu_img(&["info", name(&path)]);
                assert!(info.contains(&format!("backing file: {base}")), "{info}");
                assert!(info.contains(&format!("name: {bitmap}")), "{info}");
            }
            qemu_check(&path, false);
            for bitmap in ["b", "a", "c"] {
                ours_ok(&["--remove", name(&path), bitmap]);
                qemu_check(&path, false);
            }
            assert!(!qemu_img(&["info", name(&path)]).contains("bitmaps"));
            ours_ok(&["--add", name(&path), "again"]);
            qemu_io(&path, &["write 0 1k"]);
            let granularity = cluster.parse::<u64>().unwrap().max(4 * K);
            assert_eq!(ranges(&path, "again"), [(0, granularity)]);
        }
    }
    // No room: refused, and nothing has changed.
    let base = format!("{}base", "./".repeat(175));
    let options = format!("cluster_size=512,backing_file={base},backing_fmt=qcow2");
    let path = folder.create("full", &options, M);
    let before = std::fs::read(&path).unwrap();
    let (code, text) = ours(&["--add", name(&path), "b"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("no room for the bitmaps extension"), "{text}");
    assert!(std::fs::read(&path).unwrap()[..512] == before[..512]);
    qemu_check(&path, false);
}

#[test]
fn broken_directories_are_refused_and_not_written() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    ours_ok(&["--add", name(&path), "b0"]);
    qemu_io(&path, &["write 0 64k"]);
    let good = std::fs::read(&path).unwrap();
    let image = sim::Image::load(&path).unwrap();
    let checked = Checked::open(&image).unwrap();
    let directory = checked.header.bitmaps().unwrap().directory_offset.0 as usize;
    let bitmap = checked.bitmaps().remove(0);
    let table = bitmap.table_offset.0 as usize;
    let l1 = checked.header.l1_table_offset.0;
    let cases: [(&str, usize, &[u8]); 9] = [
        ("table on the L1 table", directory, &l1.to_be_bytes()),
        ("table behind the end", directory + 2, &[1]),
        ("flags", directory + 12, &[0x80]),
        ("type", directory + 16, &[2]),
        ("granularity", directory + 17, &[3]),
        ("name", directory + 18, &[0xff]),
        ("extra data", directory + 20, &[0xff]),
        ("entry's reserved bits", table + 7, &[4]),
        ("data behind the end", table, &[0, 1]),
    ];
    for (what, at, bytes) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        let options = chain::Options {
            writable: true,
            ..chain::Options::default()
        };
        let error = Disk::open(&path, &options).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(error.to_string().contains("at offset"), "{what}: {error}");
        // Readers of the disk do not mind.
        let disk = open(&path, false);
        disk.read_at(&mut [0; 512], 0).unwrap();
        disk.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == bad, "{what}: written");
    }
    // What cannot be read can be removed, where the directory is in order.
    let mut bad = good.clone();
    bad[table + 7] = 4;
    std::fs::write(&path, &bad).unwrap();
    ours_ok(&["--remove", name(&path), "b0"]);
    open(&path, true).close().unwrap();
    assert_eq!(listed(&path), serde_json::Value::Null);
}

/// A table has entries, so an empty disk has no bitmaps; one that says it has is
/// not made worse.
#[test]
fn bitmaps_of_an_empty_disk_are_only_removed() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    ours_ok(&["--add", name(&path), "b0"]);
    let mut file = std::fs::read(&path).unwrap();
    // The disk's size.
    file[24..32].fill(0);
    std::fs::write(&path, &file).unwrap();
    let (code, text) = ours(&["--clear", name(&path), "b0"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the disk has no bytes"), "{text}");
    let found = Checked::open(&sim::Image::load(&path).unwrap())
        .unwrap()
        .check();
    assert!(found.corruptions.is_empty(), "{found:?}");
    ours_ok(&["--remove", name(&path), "b0"]);
    assert_eq!(listed(&path), serde_json::Value::Null);
    qemu_check(&path, false);
}

#[test]
fn foreign_extra_data_is_kept_and_the_bitmap_left_alone() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    ours_ok(&["--add", name(&path), "b0"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let image = sim::Image::load(&path).unwrap();
    let extension = *Checked::open(&image).unwrap().header.bitmaps().unwrap();
    let at = extension.directory_offset.0 as usize;
    // Extra data "EXTRA" before the name: 24 + 5 + 2 bytes, padded to 32.
    bytes[at + 20..at + 24].copy_from_slice(&5_u32.to_be_bytes());
    bytes[at + 24..at + 32].copy_from_slice(b"EXTRAb0\0");
    let compatible = |bytes: &[u8], flags: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at + 15] = flags;
        std::fs::write(&path, bytes).unwrap();
    };
    let entry = |path: &Path| {
        let image = sim::Image::load(path).unwrap();
        Checked::open(&image).unwrap().bitmaps().remove(0)
    };
    // Disabled and not known: kept as it is.
    compatible(&bytes, 0);
    let before = entry(&path);
    let disk = open(&path, true);
    disk.write_at(&[1], 0).unwrap();
    assert_eq!(
        disk.bitmap("b0").unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    disk.close().unwrap();
    ours_ok(&["--add", name(&path), "other"]);
    assert_eq!(entry(&path), before);
    // Enabled and not known: it cannot be recorded in, and says so.
    compatible(&bytes, 2);
    let disk = open(&path, true);
    disk.write_at(&[1], 0).unwrap();
    disk.close().unwrap();
    let now = entry(&path);
    assert_eq!((now.flags.bits(), now.extra), (3, b"EXTRA".to_vec()));
    // Declared to be of no importance: recorded in, and kept.
    compatible(&bytes, 6);
    let disk = open(&path, true);
    disk.write_at(&[1], 128 * K).unwrap();
    disk.close().unwrap();
    let now = entry(&path);
    assert_eq!((now.flags.bits(), now.extra), (6, b"EXTRA".to_vec()));
    assert_eq!(ranges(&path, "b0"), [(128 * K, 64 * K)]);
}
