//! External data files, with QEMU both ways: where the data is, what a raw
//! one holds, which one is opened, and who may open it meanwhile.

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::lab::{self, How, qemu_check};
use common::turns::Turn;
use common::{Reader, half_random, qemu_img, qemu_io, run};
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::qcow2::spec::{GuestOffset, HostOffset, L2Entry};
use qcow2_ublk::runtime::{spawn, yield_now};
use qcow2_ublk::storage::sim::{self, Rng, SimDisk, SimKind};
use qcow2_ublk::{Disk, ErrorKind, chain};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with the image `a.qcow2`, whose data is in `data`.
struct Place(tempfile::TempDir);

impl Place {
    /// The data file's whole name is recorded: for QEMU, other names are
    /// relative to where it runs, and for us to the image.
    fn new(options: &str, size: &str) -> Self {
        let place = Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let options = format!("data_file={}{options}", name(&place.path("data")));
        place.ours(&["create", "-o", &options, "a.qcow2", size]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("a.qcow2")
    }

    fn data(&self) -> Vec<u8> {
        std::fs::read(self.path("data")).unwrap()
    }

    /// Our program, in the folder.
    #[track_caller]
    fn ours(&self, args: &[&str]) -> String {
        let (good, text) = self.try_program(OURS, args);
        assert!(good, "{args:?}: {text}");
        text
    }

    fn try_program(&self, program: &str, args: &[&str]) -> (bool, String) {
        let output = std::process::Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.success(), text)
    }
}

fn writable() -> chain::Options {
    chain::Options {
        writable: true,
        ..chain::Options::default()
    }
}

/// Opens the image, works on it, and closes it; QEMU finds it clean.
fn work(path: &Path, work: impl FnOnce(&Disk)) {
    let disk = Disk::open(path, &writable()).unwrap();
    work(&disk);
    disk.close().unwrap();
    qemu_check(path, false);
}

fn fill(disk: &Disk, at: u64, len: u64, byte: u8) {
    disk.write_at(&vec![byte; len as usize], at).unwrap();
}

#[track_caller]
fn assert_same(seen: &[u8], model: &[u8], what: &str) {
    assert_eq!(seen.len(), model.len(), "{what}: the length");
    if let Some(at) = seen.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{what}: {:#x} at {at:#x}, not {:#x}", seen[at], model[at]);
    }
}

/// What everybody reads: we, and QEMU.
#[track_caller]
fn assert_content(path: &Path, model: &[u8], what: &str) {
    let disk = Disk::open(path, &chain::Options::default()).unwrap();
    let mut seen = vec![0xee; model.len()];
    disk.read_at(&mut seen, 0).unwrap();
    assert_same(&seen, model, what);
    drop(disk);
    let flat = path.with_extension("flat");
    std::fs::write(&flat, model).unwrap();
    let args = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
    qemu_img(&[args.as_slice(), &[name(path), name(&flat)]].concat());
}

/// Row 17: guest 0 is host 0, where the partition table is; everything else
/// is in its place too, and the image holds none of it.
#[test]
fn row_17_data_is_where_it_is_on_the_disk() {
    let place = Place::new("", "4M");
    let image = place.image();
    let mut model = vec![0; 4 << 20];
    work(&image, |disk| {
        fill(disk, 0, 64 * K, 1);
        fill(disk, M + 512, 512, 2);
    });
    model[..64 << 10].fill(1);
    model[(1 << 20) + 512..(1 << 20) + 1024].fill(2);
    assert_content(&image, &model, "ours");
    assert_same(&place.data(), &model, "the data file");
    assert!(image.metadata().unwrap().len() < 512 * K, "only metadata");
    let reader = Reader::open(&image);
    for at in [0, M] {
        let host = HostOffset(at);
        let entry = reader.entry(GuestOffset(at));
        assert_eq!(entry, L2Entry::Data { host, copied: true });
    }

    qemu_io(
        &image,
        &["write -P 3 32k 64k", "write -z -u 1M 64k", "discard 0 64k"],
    );
    model[64 << 10..96 << 10].fill(3);
    model[..64 << 10].fill(0);
    model[1 << 20..(1 << 20) + (64 << 10)].fill(0);
    assert_content(&image, &model, "QEMU's");

    // Zeros and holes of ours give the file's space back.
    work(&image, |disk| {
        fill(disk, 0, M, 4);
        disk.discard_at(0, 512 * K).unwrap();
        disk.write_zeroes_at(512 * K, 128 * K, false).unwrap();
    });
    model[..1 << 20].fill(4);
    model[..640 << 10].fill(0);
    assert_content(&image, &model, "discarded");
    assert!(place.data()[..512 << 10].iter().all(|&b| b == 0));
}

/// A raw data file is the disk at every moment that nobody writes: all of it
/// is mapped, zeros are zeros in it, and who writes to it changes the disk.
#[test]
fn a_raw_data_file_is_the_disk() {
    for options in [",data_file_raw=on", ",data_file_raw=on,extended_l2=on"] {
        let place = Place::new(options, "3M");
        let image = place.image();
        qemu_check(&image, false);
        assert_eq!(place.data().len(), 3 << 20);
        let mut model = half_random(3 << 20, 7);
        work(&image, |disk| {
            disk.write_at(&model, 0).unwrap();
            disk.discard_at(64 * K, 128 * K).unwrap();
            disk.write_zeroes_at(M, 64 * K, true).unwrap();
            disk.write_zeroes_at(M + 64 * K, 70 * K, false).unwrap();
            disk.write_zeroes_at(2 * M + 100, 1000, true).unwrap();
        });
        model[64 << 10..192 << 10].fill(0);
        model[1 << 20..(1 << 20) + (134 << 10)].fill(0);
        model[(2 << 20) + 100..(2 << 20) + 1100].fill(0);
        assert_content(&image, &model, options);
        assert_same(&place.data(), &model, options);
        qemu_io(
            &image,
            &["write -z -u 0 64k", "discard 256k 64k", "write -P 9 1M 1k"],
        );
        model[..64 << 10].fill(0);
        model[256 << 10..320 << 10].fill(0);
        model[1 << 20..(1 << 20) + 1024].fill(9);
        work(&image, |disk| fill(disk, 3 * K, K, 5));
        model[3 << 10..4 << 10].fill(5);
        assert_same(&place.data(), &model, "after QEMU");

        // Somebody who knows nothing of the image: all is mapped where
        // nobody unmapped it.
        let data = std::fs::OpenOptions::new();
        let data = data.clone().write(true).open(place.path("data")).unwrap();
        data.write_all_at(&[6; 4096], 2 << 20).unwrap();
        model[2 << 20..(2 << 20) + 4096].fill(6);
        assert_content(&image, &model, "written from outside");

        // What a file that is longer holds behind the disk does not appear
        // when the disk grows.
        data.write_all_at(&[8; 100 << 10], 3 << 20).unwrap();
        work(&image, |disk| disk.grow(5 * M).unwrap());
        model.resize(5 << 20, 0);
        assert_content(&image, &model, "grown");
        assert_same(&place.data(), &model, "the grown file");
        assert!(Reader::open(&image).header.data_file_is_raw());
    }
}

/// The data file ends where it ends: behind are zeros, and writes lengthen it.
#[test]
fn a_short_data_file_reads_as_zeros_and_grows() {
    let place = Place::new("", "4M");
    let image = place.image();
    work(&image, |disk| fill(disk, 0, 4 * M, 1));
    let data = std::fs::OpenOptions::new();
    let data = data.clone().write(true).open(place.path("data")).unwrap();
    data.set_len(M + 100).unwrap();
    let mut model = vec![1; (1 << 20) + 100];
    model.resize(4 << 20, 0);
    assert_content(&image, &model, "truncated");
    work(&image, |disk| fill(disk, 2 * M, 64 * K, 2));
    model[2 << 20..(2 << 20) + (64 << 10)].fill(2);
    assert_content(&image, &model, "written behind the end");
    assert_eq!(place.data().len(), (2 << 20) + (64 << 10));

    // A disk that does not end with a cluster, and then grows: what the file
    // has behind the old end does not show.
    let place = Place::new("", "1000448");
    let image = place.image();
    let mut model = vec![7; 1_000_448];
    work(&image, |disk| fill(disk, 0, 1_000_448, 7));
    let mut bytes = place.data();
    assert_same(&bytes, &model, "ends with the disk");
    bytes.resize(2 << 20, 0xdd);
    std::fs::write(place.path("data"), &bytes).unwrap();
    work(&image, |disk| disk.grow(2 * M).unwrap());
    model.resize(2 << 20, 0);
    assert_content(&image, &model, "grown");
}

/// Errors name the image and the file, whatever is wrong with it.
#[test]
fn a_data_file_that_cannot_be_had() {
    let refused = |image: &Path, options: &chain::Options, kind: Option<ErrorKind>, says: &str| {
        let error = Disk::open(image, options).unwrap_err();
        let text = format!("{error} {}", error.cure_text().unwrap_or_default());
        assert!(text.contains(says), "{text}");
        assert!(text.contains("a.qcow2"), "{text}");
        if let Some(kind) = kind {
            assert_eq!(error.kind(), kind, "{text}");
        }
    };
    let trusting = chain::Options {
        policy: chain::Policy {
            trust_chain: true,
            ..chain::Policy::default()
        },
        ..writable()
    };
    // Missing.
    let place = Place::new("", "1M");
    std::fs::remove_file(place.path("data")).unwrap();
    refused(&place.image(), &writable(), None, "data");
    // Without the right to write it: what root may not either.
    let image = place.image();
    let recorded = |name: &str| {
        let mut bytes = std::fs::read(&image).unwrap();
        let at = bytes.windows(4).position(|w| w == b"DATA").unwrap();
        // In place of this and the next extension, which is longer.
        bytes[at + 4..at + 8].copy_from_slice(&(name.len() as u32).to_be_bytes());
        let end = at + 8 + name.len().next_multiple_of(8);
        bytes[at + 8..end + 16].fill(0);
        bytes[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(&image, bytes).unwrap();
    };
    recorded("/sys/kernel/uevent_seqnum");
    refused(&image, &trusting, None, "ermission denied");
    // Outside of the folder, without a word from the user; no protocols; not
    // the image itself; not a folder.
    refused(&image, &writable(), Some(ErrorKind::Policy), "--allow-path");
    for (name, says) in [
        ("json:{\"file\":1}", "json"),
        ("nbd://localhost/x", "protocol"),
        ("../a", "outside its folder"),
        ("a.qcow2", "own external data file"),
        (".", "which the image refers to"),
    ] {
        recorded(name);
        let kind = name.contains(':').then_some(ErrorKind::Policy);
        let error = Disk::open(&image, &chain::Options::default()).unwrap_err();
        assert!(kind.is_none_or(|kind| error.kind() == kind), "{error}");
        let text = error.to_string();
        assert!(text.contains(says), "{name}: {text}");
    }
    // A link out of the folder.
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), place.path("data")).unwrap();
    recorded("data");
    refused(&image, &writable(), Some(ErrorKind::Policy), "data");
    Disk::open(&image, &trusting).unwrap();
}

/// An entry that does not map a cluster to its own place is an error, and so
/// are compressed clusters; nothing is written there.
#[test]
fn entries_that_cannot_be_right() {
    let place = Place::new("", "1M");
    let image = place.image();
    qemu_io(&image, &["write -P 1 0 192k"]);
    let reader = Reader::open(&image);
    let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    for (raw, says) in [
        (1 << 63 | 0x2_0000_u64, "not to the same place"),
        (1 << 62 | 0x5_0000, "compressed"),
    ] {
        file.write_all_at(&raw.to_be_bytes(), l2 + 8).unwrap();
        let disk = Disk::open(&image, &writable()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        for error in [
            disk.read_at(&mut bytes, 64 * K).unwrap_err(),
            disk.write_at(&bytes, 64 * K).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let text = error.to_string();
            assert!(text.contains(says), "{text}");
            assert!(text.contains(&format!("{:#x}", l2 + 8)), "{text}");
        }
        disk.read_at(&mut bytes, 128 * K).unwrap();
        assert!(bytes.iter().all(|&b| b == 1));
        drop(disk);
        // The write has marked the image corrupt: nobody writes to it now.
        let error = Disk::open(&image, &writable()).unwrap_err();
        assert!(error.to_string().contains("marked corrupt"), "{error}");
        file.write_all_at(&reader.file[72..80], 72).unwrap();
    }
    let disk = Disk::open(&image, &writable()).unwrap();
    let error = disk.write_compressed_at(&[0; 65536], 0, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("data file"), "{error}");
}

/// The data file is locked as the image is: neither QEMU nor we write to it
/// while the other does.
#[test]
fn the_data_file_is_locked() {
    let place = Place::new("", "1M");
    let (image, data) = (place.image(), place.path("data"));
    let raw_write = ["-f", "raw", "-c", "write 0 512", name(&data)];
    let disk = Disk::open(&image, &writable()).unwrap();
    let (code, text) = run("qemu-io", &raw_write);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("lock"), "{text}");
    disk.close().unwrap();
    let (code, text) = run("qemu-io", &raw_write);
    assert_eq!(code, Some(0), "{text}");
    // A second image with the same data file: one writer at a time.
    std::fs::copy(&image, place.path("b.qcow2")).unwrap();
    let disk = Disk::open(&image, &writable()).unwrap();
    let error = Disk::open(&place.path("b.qcow2"), &writable()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    disk.close().unwrap();
    let readers = [&image, &place.path("b.qcow2")]
        .map(|image| Disk::open(image, &chain::Options::default()).unwrap());
    drop(readers);
}

/// Over a backing file, and as one.
#[test]
fn in_a_chain() {
    let place = Place::new("", "2M");
    let base = place.image();
    let mut model = half_random(1 << 20, 3);
    work(&base, |disk| disk.write_at(&model, 0).unwrap());
    model.resize(2 << 20, 0);
    let data = place.path("top-data");
    let options = format!(
        "data_file={},backing_file=a.qcow2,backing_fmt=qcow2",
        name(&data)
    );
    place.ours(&["create", "-o", &options, "top.qcow2"]);
    let top = place.path("top.qcow2");
    assert_content(&top, &model, "empty");
    work(&top, |disk| {
        fill(disk, 100, 1000, 1);
        disk.discard_at(512 * K, 64 * K).unwrap();
        disk.write_zeroes_at(700 * K, 100 * K, false).unwrap();
    });
    model[100..1100].fill(1);
    model[512 << 10..576 << 10].fill(0);
    model[700 << 10..800 << 10].fill(0);
    assert_content(&top, &model, "written");
    let info = place.ours(&["info", "top.qcow2"]);
    assert!(
        info.contains(&format!("data file: {}", name(&data))),
        "{info}"
    );
}

/// QEMU and we take turns at random work; after each turn both read, check
/// and map it alike.
#[test]
fn taking_turns_with_qemu() {
    for (seed, options) in [
        (1, ""),
        (2, ",cluster_size=4k"),
        (3, ",data_file_raw=on"),
        (4, ",extended_l2=on"),
        (5, ",extended_l2=on,data_file_raw=on,cluster_size=16k"),
    ] {
        let size = 4 * M;
        let place = Place::new(options, "4M");
        let path = place.image();
        let mut model = vec![0; size as usize];
        let mut rng = Rng::new(seed);
        for turn in 0..6 {
            let work_done = Turn::random(&mut rng, size);
            work_done.on_model(&mut model);
            if turn % 2 == 0 {
                work_done.by_qemu(&path);
            } else {
                work(&path, |disk| work_done.by_us(disk));
            }
            let what = format!("{options}, turn {turn}");
            assert_content(&path, &model, &what);
            if options.contains("raw") {
                assert_same(&place.data(), &model, &what);
            }
            for args in [["map", "--output=json"], ["check", "--output=json"]] {
                let args = [args.as_slice(), &["-f", "qcow2", "a.qcow2"]].concat();
                let [theirs, ours] = ["qemu-img", OURS].map(|program| {
                    let (good, text) = place.try_program(program, &args);
                    assert!(good, "{what}: {program} {args:?}: {text}");
                    serde_json::from_str::<serde_json::Value>(&text).unwrap()
                });
                assert_eq!(ours, theirs, "{what}: {args:?}");
            }
            let args = ["map", "-f", "qcow2", "a.qcow2"];
            let theirs = place.try_program("qemu-img", &args);
            assert_eq!(place.try_program(OURS, &args), theirs, "{what}");
        }
    }
}

/// What our `create` makes is what QEMU makes; what cannot go together is
/// refused in its words.
#[test]
fn create_as_qemu_does() {
    let place = Place::new("", "1M");
    let options = "data_file=data2,cluster_size=32k";
    place.ours(&["create", "-o", options, "ours", "10G"]);
    let args = [
        "create", "-q", "-f", "qcow2", "-o", options, "theirs", "10G",
    ];
    assert!(place.try_program("qemu-img", &args).0);
    let [mut ours, theirs] =
        ["ours", "theirs"].map(|name| std::fs::read(place.path(name)).unwrap());
    ours.truncate(theirs.len());
    assert!(ours == theirs);
    for (options, says) in [
        ("data_file_raw=on", "data-file-raw requires data-file"),
        (
            "data_file=x,compat=0.10",
            "External data files are only supported with",
        ),
        (
            "data_file=x,data_file_raw=on,backing_file=a.qcow2,backing_fmt=qcow2",
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        ("data_file=new", "cannot be its own data file"),
        ("data_file=nbd://x", "protocol"),
    ] {
        let args = ["create", "-o", options, "new", "1M"];
        let (good, text) = place.try_program(OURS, &args);
        assert!(!good && text.contains(says), "{options}: {text}");
        assert!(!place.path("new").exists() && !place.path("x").exists());
    }
}

/// The first cluster of a data file, zeroed and kept, is no reason to leave
/// leaks alone.
#[test]
fn leaks_are_repaired_where_the_first_cluster_is_kept() {
    let place = Place::new("", "1M");
    let image = place.image();
    qemu_io(&image, &["write -P 7 0 128k", "write -z 0 64k"]);
    let reader = Reader::open(&image);
    assert_eq!(
        reader.entry(GuestOffset(0)),
        L2Entry::ZeroAllocated {
            host: HostOffset(0),
            copied: true
        }
    );
    // A cluster more, that nobody refers to.
    let len = reader.file.len() as u64;
    assert!(len.is_multiple_of(64 * K));
    let block = reader.be64(reader.header.refcount_table_offset);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(len + 64 * K).unwrap();
    let place_of_count = block + len / (64 * K) * 2;
    file.write_all_at(&[0, 1], place_of_count).unwrap();
    let (good, text) = place.try_program(OURS, &["check", "a.qcow2"]);
    assert!(!good && text.contains("1 leaked clusters"), "{text}");
    place.ours(&["check", "-r", "leaks", "a.qcow2"]);
    qemu_check(&image, false);
    let model = [vec![0; 64 << 10], vec![7; 64 << 10], vec![0; 896 << 10]].concat();
    assert_content(&image, &model, "after the repair");
}

/// Zeroing whole clusters of a raw data file, while somebody writes to a part
/// of a block of it: what was in the rest of the block does not come back.
#[test]
fn zeroing_a_raw_data_file_waits_for_writers_of_parts_of_a_block() {
    let options = CreateOptions {
        data_file: Some("data".into()),
        data_file_raw: true,
        ..CreateOptions::new(M)
    };
    let new = options.build().unwrap();
    let mut image = sim::Image::new();
    for (offset, bytes) in &new.chunks {
        image.write(offset.0, bytes);
    }
    image.set_len(new.file_len.next_multiple_of(64 * K));
    let mut data = sim::Image::new();
    data.set_len(M);
    let disk = SimDisk::with_image(image);
    let how = How {
        data: Some(disk.beside(data)),
        alignment: 4096,
        ..How::default()
    };
    lab::block_on(async {
        let engine = Arc::new(lab::open(&disk, &how).await.unwrap());
        lab::write(&engine, 0, 0, &[7; 128 << 10], false)
            .await
            .unwrap();
        let hold = disk.hold(|request| request.kind == SimKind::Write);
        let (writer, zeroer) = (Arc::clone(&engine), Arc::clone(&engine));
        let write = spawn(async move { lab::write(&writer, 0, 64 * K, &[8; 512], false).await });
        hold.wait_for(1).await;
        let zero = spawn(async move { zeroer.write_zeroes(0, 64 * K, 64 * K, false).await });
        for _ in 0..50 {
            yield_now().await;
        }
        hold.release();
        write.await.unwrap();
        zero.await.unwrap();
        let shown = lab::read(&engine, 0, 0, 128 * K).await.unwrap();
        assert_same(&shown[..64 << 10], &[7; 64 << 10], "before it");
        let rest = &shown[(64 << 10) + 512..];
        assert_same(rest, &vec![0; rest.len()], "behind what was written");
        engine.close().await.unwrap();
    });
}
