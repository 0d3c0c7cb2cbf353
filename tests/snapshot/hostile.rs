//! Snapshot tables and trees that cannot be right: refused with an error that
//! says where, and nothing of the image changes.

use crate::common::check::Checked;
use crate::common::{self, lab};
use qcow2_ublk::ErrorKind;
use qcow2_ublk::qcow2::spec::Geometry;
use qcow2_ublk::qcow2::{Image, ImageOptions, NewSnapshot, Selector, SnapshotJob, info};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk};

/// An image with the snapshots "one" and "two".
fn sound(options: &str) -> sim::Image {
    let mut image = lab::created(options, 2 << 20);
    lab::with_file(&mut image, |path| {
        let name = path.to_str().unwrap();
        common::qemu_io(path, &["write -P 0x11 0 600k"]);
        common::qemu_img(&["snapshot", "-c", "one", name]);
        common::qemu_io(path, &["write -P 0x22 100k 100k"]);
        common::qemu_img(&["snapshot", "-c", "two", name]);
    });
    image
}

fn be(image: &sim::Image, offset: u64, len: u64) -> u64 {
    let bytes = image.bytes(offset, len);
    bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

fn jobs() -> [SnapshotJob; 4] {
    let one = || Selector::Name(b"one".to_vec());
    [
        SnapshotJob::Create(NewSnapshot::now("three")),
        SnapshotJob::Delete(one()),
        SnapshotJob::Apply(one()),
        SnapshotJob::Rename(one(), b"else".to_vec()),
    ]
}

/// The errors of the jobs, each of which fails and changes nothing, or
/// succeeds.
fn errors(image: &sim::Image) -> Vec<Option<qcow2_ublk::Error>> {
    let len = image.len();
    jobs()
        .iter()
        .map(|job| {
            let disk = SimDisk::with_image(image.clone());
            let storage = Storage::simulated(&disk, 1);
            let result = lab::block_on(job.run(&storage));
            let error = result.err()?;
            // What was tried may stay in free clusters; everything that is
            // in use is as it was.
            let after = disk.image();
            assert!(after.len() <= len, "{job:?}");
            assert_eq!(after.bytes(0, 4096), image.bytes(0, 4096), "{job:?}");
            Some(error)
        })
        .collect()
}

/// Every one of the jobs fails, and says where.
fn all_refuse(image: &sim::Image, text: &str) {
    for error in errors(image) {
        let error = error.expect("it is refused");
        let message = error.to_string();
        assert!(message.contains(text), "{message}");
        assert!(message.contains("at offset"), "{message}");
    }
}

#[test]
fn tables_of_snapshots() {
    let image = sound("cluster_size=4096");
    let table = be(&image, 64, 8);
    let patched = |at: u64, bytes: &[u8]| {
        let mut image = image.clone();
        image.write(at, bytes);
        image
    };
    let longest = u32::MAX.to_be_bytes();
    all_refuse(&patched(table + 36, &longest), "extra");
    all_refuse(&patched(table + 8, &longest), "L1 table too large");
    let misplaced = 0x1234u64.to_be_bytes();
    all_refuse(&patched(table, &misplaced), "L1 table offset");
    let far = (1u64 << 60).to_be_bytes();
    all_refuse(&patched(table, &far), "L1 table offset");
    // More than there are, in the header.
    all_refuse(&patched(60, &70_000u32.to_be_bytes()), "snapshots");
    all_refuse(&patched(64, &misplaced), "");
    all_refuse(&patched(64, &far), "");
    // A table with more entries than were written: the rest is what follows.
    let many = patched(60, &60_000u32.to_be_bytes());
    let storage = Storage::simulated(&SimDisk::with_image(many), 1);
    lab::watched(20, || {
        // Zeros are empty entries: nothing is wrong with them but that they
        // are many.
        let _ = lab::block_on(info::snapshots(&storage));
    });
    // A name and ID that reach beyond everything.
    let mut endless = image.clone();
    endless.write(table + 12, &[0xff; 4]);
    let storage = Storage::simulated(&SimDisk::with_image(endless), 1);
    let _ = lab::block_on(info::snapshots(&storage));
}

#[test]
fn trees_of_tables() {
    for options in ["cluster_size=4096", "cluster_size=512"] {
        let image = sound(options);
        let checked = Checked::open(&image).unwrap();
        let snapshot = &checked.snapshots()[0];
        let l1 = snapshot.l1_table_offset.0;
        let table = be(&image, l1, 8) & !(1 << 63);
        let tree_errors = |at: u64, value: u64| {
            let mut image = image.clone();
            image.write(at, &value.to_be_bytes());
            let [create, delete, apply, rename] = errors(&image).try_into().unwrap();
            // Nobody looks at another's tables.
            assert!(create.is_none() && rename.is_none());
            [delete, apply].map(|error| {
                let error = error.expect("it is refused");
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(error.to_string().contains("at offset"), "{error}");
                error.to_string()
            })
        };
        let says = |[a, b]: [String; 2], text: &str| {
            assert!(a.contains(text) && b.contains(text), "{a} {b}");
        };
        says(tree_errors(l1, table | 1), "reserved");
        says(tree_errors(l1, 1 << 50), "past the end");
        says(tree_errors(l1, table + 8), "");
        // Two parts of the disk in one table.
        if be(&image, l1 + 8, 8) != 0 {
            says(tree_errors(l1 + 8, table), "twice");
        }
    }
}

#[test]
fn clusters_that_are_not_counted() {
    let image = sound("cluster_size=4096");
    let checked = Checked::open(&image).unwrap();
    let geometry: Geometry = checked.header.geometry();
    let snapshot = &checked.snapshots()[0];
    let l2 = be(&image, snapshot.l1_table_offset.0, 8) & !(1 << 63);
    let data = be(&image, l2, 8) & 0x00ff_ffff_ffff_fe00;
    let block = be(&image, checked.header.refcount_table_offset.0, 8);
    let mut damaged = image.clone();
    damaged.write(block + 2 * (data >> geometry.cluster_bits), &[0, 0]);
    let [create, delete, apply, rename] = errors(&damaged).try_into().unwrap();
    assert!(rename.is_none());
    for error in [create, delete, apply] {
        let error = error.expect("it is refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let place = format!("(at offset {data:#x})");
        assert!(error.to_string().contains(&place), "{error}");
    }
    // A refcount table that names one block twice, and one that names none.
    let table = checked.header.refcount_table_offset.0;
    let mut doubled = image.clone();
    doubled.write(table, &[0; 8]);
    all_refuse(&doubled, "");
    let mut far = image;
    far.write(table, &(1u64 << 50).to_be_bytes());
    all_refuse(&far, "refcount table");
}

#[test]
fn a_snapshot_is_read_only_and_has_to_exist() {
    let image = sound("cluster_size=4096");
    let open = |snapshot: &str| {
        let storage = Storage::simulated(&SimDisk::with_image(image.clone()), 1);
        let options = ImageOptions {
            snapshot: Some(Selector::parse(snapshot.as_bytes())),
            ..ImageOptions::default()
        };
        lab::block_on(Image::open(storage, &options))
    };
    // A simulated disk is open for writing.
    assert_eq!(open("one").unwrap_err().kind(), ErrorKind::Usage);
    let disk = SimDisk::with_image(image.clone());
    let storage = Storage::simulated(&disk, 1);
    for job in [
        SnapshotJob::Apply(Selector::parse(b"nine")),
        SnapshotJob::Delete(Selector::parse_name(b"1")),
        SnapshotJob::Rename(Selector::parse_name(b"9"), Vec::new()),
    ] {
        let error = lab::block_on(job.run(&storage)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.cure_text().is_some());
    }
    assert!(disk.image().bytes(0, image.len()) == image.bytes(0, image.len()));
}

/// A count that would not fit is refused before anything changes.
#[test]
fn overflow_changes_nothing() {
    for (bits, most) in [("1", 0), ("2", 2)] {
        let options = format!("cluster_size=4096,refcount_bits={bits}");
        let mut image = lab::created(&options, 1 << 20);
        lab::with_file(&mut image, |path| {
            common::qemu_io(path, &["write -P 0x11 0 300k"]);
        });
        let disk = SimDisk::with_image(image);
        let storage = Storage::simulated(&disk, 1);
        let create = |name: &str| {
            let job = SnapshotJob::Create(NewSnapshot::now(name));
            lab::block_on(job.run(&storage))
        };
        for n in 0..most {
            create(&n.to_string()).unwrap();
        }
        let before = disk.image();
        let error = create("one too many").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("does not fit"), "{error}");
        assert!(error.cure_text().is_some());
        let after = disk.image();
        assert_eq!(before.len(), after.len());
        assert!(before.bytes(0, before.len()) == after.bytes(0, after.len()));
        // Applying needs no room: the active disk's references go first.
        if most > 0 {
            let job = SnapshotJob::Apply(Selector::parse(b"snapshot.id=1"));
            lab::block_on(job.run(&storage)).unwrap();
        }
        let after = disk.image();
        let found = Checked::open(&after).unwrap().check();
        assert!(found.corruptions.is_empty() && found.leaks == 0);
    }
}
