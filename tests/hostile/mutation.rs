//! Every byte of the header, and the first entries of every table, set to
//! several values: each image is opened, read, checked, mapped and written to.
//! None of it panics or hangs; what QEMU calls corrupt, we do not call sound.

use std::panic::{AssertUnwindSafe, catch_unwind};

use qcow2_ublk::qcow2::check;
use qcow2_ublk::qcow2::info::info;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk};

use super::HANGS;
use crate::common::check::Checked;
use crate::common::lab::{self, How, watched};
use crate::common::{half_random, qemu_img, qemu_io, run};

const K: u64 = 1 << 10;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Small images, one for each feature.
fn subjects() -> Vec<(&'static str, sim::Image)> {
    let created = |options: &str, work: &dyn Fn(&std::path::Path)| {
        let mut image = lab::created(options, 256 * K);
        lab::with_file(&mut image, |path| work(path));
        image
    };
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let writes = |path: &std::path::Path| {
        drop(qemu_io(
            path,
            &["write -P 1 0 20k", "write -z 4k 4k", "write -P 2 200k 4k"],
        ));
    };
    vec![
        ("plain", created("cluster_size=4k", &writes)),
        (
            "version 2",
            created("compat=0.10,cluster_size=512", &writes),
        ),
        (
            "compressed",
            lab::converted(&half_random(64 << 10, 5), &["-c", "-o", "cluster_size=4k"]),
        ),
        (
            "zstd",
            lab::converted(
                &half_random(64 << 10, 5),
                &["-c", "-o", "cluster_size=4k,compression_type=zstd"],
            ),
        ),
        (
            "subclusters",
            created("cluster_size=16k,extended_l2=on", &|path| {
                qemu_io(
                    path,
                    &["write -P 1 0 20k", "write -z 2k 1k", "write -P 2 200k 1k"],
                );
            }),
        ),
        (
            "snapshots and bitmaps",
            created("cluster_size=4k,refcount_bits=8", &|path| {
                qemu_io(path, &["write -P 1 0 20k"]);
                qemu_img(&["snapshot", "-c", "one", &text(path)]);
                qemu_img(&["bitmap", "--add", "-g", "4k", &text(path), "b"]);
                qemu_io(path, &["write -P 2 8k 8k"]);
            }),
        ),
    ]
}

/// Places of metadata: name, first byte, how many bytes.
fn places(image: &sim::Image) -> Vec<(&'static str, u64, u64)> {
    let checked = Checked::open(image).unwrap();
    let header = &checked.header;
    let word = |at: u64| u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap());
    let l2 = word(header.l1_table_offset.0) & OFFSET;
    let block = word(header.refcount_table_offset.0);
    let entry = header.geometry().l2_entry_bytes();
    let mut places = vec![
        ("header", 0, 112),
        ("header extensions", 112, 24),
        ("L1 table", header.l1_table_offset.0, 8),
        ("L2 table", l2, 3 * entry),
        ("refcount table", header.refcount_table_offset.0, 16),
        ("refcount block", block, 12),
    ];
    if header.nb_snapshots > 0 {
        let table = header.snapshots_offset.0;
        places.push(("snapshot table", table, 72));
        let l1 = word(table);
        places.push(("snapshot's L1 table", l1, 8));
        places.push(("snapshot's L2 table", word(l1) & OFFSET, 8));
    }
    if let Some(bitmaps) = header.bitmaps() {
        let directory = bitmaps.directory_offset.0;
        places.push(("bitmap directory", directory, 32));
        places.push(("bitmap table", word(directory), 8));
    }
    places
}

/// Uses an image in every way; what its check ends with.
fn use_it(image: &sim::Image) -> Option<(u64, u64, u64)> {
    lab::block_on(async {
        let disk = SimDisk::with_image(image.clone());
        let storage = Storage::simulated(&disk, 1);
        let found = check::check(&storage, &mut |_| {}).await.ok();
        let _ = info(&storage).await;
        drop(storage);
        if let Ok(engine) = lab::open(&disk, &How::default()).await {
            let size = engine.size();
            for at in (0..size.min(1 << 20)).step_by(64 << 10) {
                let _ = lab::read(&engine, 0, at, (64 * K).min(size - at)).await;
            }
            let last = size.saturating_sub(4 * K);
            let _ = lab::read(&engine, 0, last, size - last).await;
            let _ = engine.chain().map(0, size, |_| Ok(())).await;
            let bytes = [0x77; 5000];
            if size >= 8 * K {
                let _ = lab::write(&engine, 0, 2 * K, &bytes, false).await;
                let _ = lab::write(&engine, 0, last, &bytes[..512], false).await;
                let _ = engine.discard(0, 0, 4 * K).await;
            }
            let _ = engine.flush().await;
            let _ = engine.close().await;
        }
        found.map(|found| (found.corruptions, found.leaks, found.check_errors))
    })
}

/// Where we and QEMU differ on purpose.
fn is_explained(name: &str, place: &str, at: u64) -> bool {
    match place {
        // A header length that is no multiple of 8, which the format forbids
        // and QEMU takes.
        "header" if (100..104).contains(&at) => true,
        // The bitmaps' bit without their extension, which the format forbids
        // and QEMU takes.
        "header extensions" if name.contains("bitmaps") => (112..120).contains(&at),
        // The length of the end mark, which QEMU looks at. In version 2 the
        // extensions begin at byte 72.
        "header extensions" => at >= 112,
        "header" if name == "version 2" => (76..80).contains(&at),
        _ => false,
    }
}

#[test]
fn every_byte_of_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut panics = Vec::new();
    let mut differ = Vec::new();
    let mut count = 0;
    let mut compared = 0;
    let everything = std::env::var_os("HOSTILE_ALL").is_some();
    for (name, good) in subjects() {
        for (place, first, len) in places(&good) {
            for at in first..first + len {
                let old = good.bytes(at, 1)[0];
                let mut values = vec![0, 0xff, old ^ 1 << (at % 8)];
                if everything {
                    values.extend([1, 0x7f, 0x80, old ^ 0x80, old ^ 1, old ^ 0x10]);
                }
                values.sort_unstable();
                values.dedup();
                for value in values.into_iter().filter(|&value| value != old) {
                    let mut bad = good.clone();
                    bad.write(at, &[value]);
                    let what = format!("{name}, {place}, byte {at:#x}: {old:#x} -> {value:#x}");
                    let work = || watched(HANGS, || use_it(&bad));
                    let Ok(found) = catch_unwind(AssertUnwindSafe(work)) else {
                        panics.push(what);
                        continue;
                    };
                    count += 1;
                    if count % 23 != 0 {
                        continue;
                    }
                    // What QEMU finds corrupt is not sound, and the other way
                    // round.
                    bad.save(&path).unwrap();
                    let args = ["check", "-q", "-f", "qcow2", path.to_str().unwrap()];
                    let theirs = run("qemu-img", &args).0;
                    let ours = match found {
                        None => Some(1),
                        Some((0, 0, 0)) => Some(0),
                        Some((0, _, 0)) => Some(3),
                        Some((0, _, _)) => Some(1),
                        Some(_) => Some(2),
                    };
                    compared += 1;
                    // What QEMU does not open, we may look into.
                    let further = theirs == Some(1) && ours != Some(0);
                    if ours != theirs && !further && !is_explained(name, place, at) {
                        differ.push(format!("{what}: {ours:?}, QEMU {theirs:?}"));
                    }
                }
            }
        }
    }
    assert!(panics.is_empty(), "{}", panics.join("\n"));
    println!("{count} images, {compared} compared with QEMU");
    assert!(count > 2000 && compared > 80, "{count}, {compared}");
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}
