//! The on-disk types against images that QEMU made: what it writes we must
//! read, and write back as it was.

mod common;

use common::{Reader, half_random, qemu_create, qemu_img, qemu_io, run};
use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapFlags, BitmapTableEntry};
use qcow2_ublk::qcow2::spec::header::{Compatible, CryptMethod, Incompatible};
use qcow2_ublk::qcow2::spec::snapshot::{self, Snapshot};
use qcow2_ublk::qcow2::spec::{GuestOffset, L1Entry, L2Entry};

/// Creates an image in a new directory, which lives as long as the first of
/// the results.
fn create(options: &str, size: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let name = path.to_str().unwrap();
    qemu_create(name, options, size);
    (dir, path)
}

#[test]
fn headers_of_all_sorts() {
    let mut options: Vec<String> = (9..=21)
        .map(|bits| format!("cluster_size={}", 1 << bits))
        .collect();
    options.extend((0..=6).map(|order| format!("refcount_bits={}", 1 << order)));
    options.extend([
        "compat=0.10".to_owned(),
        "compat=0.10,cluster_size=512".to_owned(),
        "lazy_refcounts=on".to_owned(),
        "compression_type=zstd".to_owned(),
        "extended_l2=on".to_owned(),
    ]);
    for options in options {
        let (_dir, path) = create(&options, "64M");
        let image = Reader::open(&path);
        let header = &image.header;
        assert_eq!(header.virtual_size(), 64 << 20, "{options}");
        let encoded = header.encode().unwrap();
        assert_eq!(encoded, image.file[..encoded.len()], "{options}");
        let says = |what: &str| options.contains(what);
        assert_eq!(header.version, if says("0.10") { 2 } else { 3 });
        assert_eq!(
            header.compression_type == CompressionType::Zstd,
            says("zstd")
        );
        assert_eq!(
            header.compatible == Compatible::LAZY_REFCOUNTS,
            says("lazy")
        );
        assert_eq!(
            header.incompatible == Incompatible::EXTENDED_L2,
            says("extended")
        );
    }
}

#[test]
fn backing_file_data_file_and_encryption() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let create = |args: &[&str], name: &str| {
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend_from_slice(args);
        let path = path(name);
        all.push(&path);
        qemu_img(&all);
        let image = Reader::open(path.as_ref());
        let encoded = image.header.encode().unwrap();
        assert_eq!(encoded, image.file[..encoded.len()], "{args:?}");
        image.header
    };
    qemu_img(&["create", "-q", "-f", "raw", &path("base"), "1M"]);
    let header = create(&["-b", "base", "-F", "raw"], "overlay");
    assert_eq!(header.backing_file.as_deref(), Some("base".as_ref()));
    assert_eq!(header.backing_format(), Some("raw"));
    let header = create(
        &["-o", "compat=0.10", "-b", "base", "-F", "raw"],
        "overlay2",
    );
    assert_eq!(header.backing_file.as_deref(), Some("base".as_ref()));
    assert_eq!(header.backing_format(), Some("raw"));
    // All that follows needs a size.
    let sized = |options: &str, name: &str| {
        let path = path(name);
        let secret = "secret,id=k,data=pass";
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, &path, "1M",
        ]);
        let image = Reader::open(path.as_ref());
        let encoded = image.header.encode().unwrap();
        assert_eq!(encoded, image.file[..encoded.len()], "{options}");
        image.header
    };
    let data_file = path("data");
    let header = sized(
        &format!("data_file={data_file},data_file_raw=on"),
        "external",
    );
    assert_eq!(
        header.data_file().unwrap().to_str(),
        Some(data_file.as_str())
    );
    let options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    let header = sized(options, "luks");
    assert_eq!(header.crypt_method, CryptMethod::Luks);
    let (offset, len) = header.crypto_header().unwrap();
    assert!(offset.is_aligned(16) && len > 4096);
    let header = sized("encrypt.format=aes,encrypt.key-secret=k", "aes");
    assert_eq!(header.crypt_method, CryptMethod::Aes);
}

#[test]
fn mapping_and_refcounts() {
    for order in 0..=6u32 {
        let (_dir, path) = create(
            &format!("cluster_size=4k,refcount_bits={}", 1 << order),
            "4M",
        );
        qemu_io(
            &path,
            &[
                "write -P 7 12k 40k",
                "write -z 100k 8k",
                "write -P 8 104k 4k",
                "write -z 16k 4k",
            ],
        );
        let image = Reader::open(&path);
        let is = |kib: u64| image.entry(GuestOffset(kib << 10));
        assert_eq!(is(0), L2Entry::Unallocated);
        assert!(matches!(is(12), L2Entry::Data { copied: true, .. }));
        assert!(matches!(
            is(16),
            L2Entry::ZeroAllocated { .. } | L2Entry::Zero
        ));
        assert!(matches!(is(100), L2Entry::Zero));
        assert!(matches!(is(104), L2Entry::Data { copied: true, .. }));
        let mut expected = vec![0; 4 << 20];
        expected[12 << 10..52 << 10].fill(7);
        expected[16 << 10..20 << 10].fill(0);
        expected[104 << 10..108 << 10].fill(8);
        assert!(image.disk() == expected);
        // COPIED means a refcount of exactly 1, and the file ends in use.
        let L2Entry::Data { host, .. } = is(12) else {
            unreachable!()
        };
        assert_eq!(image.refcount(host.cluster(12)), 1);
        assert_eq!(image.refcount(0), 1);
        assert_eq!(image.refcount(image.file.len() as u64 / 4096 + 1), 0);
    }
}

#[test]
fn snapshots() {
    for compat in ["0.10", "1.1"] {
        let (_dir, path) = create(&format!("compat={compat}"), "4M");
        qemu_io(&path, &["write -P 1 0 64k"]);
        for name in ["first", "second with a longer name", "3"] {
            qemu_img(&["snapshot", "-c", name, path.to_str().unwrap()]);
        }
        let image = Reader::open(&path);
        let geometry = image.geometry();
        assert_eq!(image.header.nb_snapshots, 3);
        let mut at = image.header.snapshots_offset;
        let mut again = Vec::new();
        for (id, name) in ["first", "second with a longer name", "3"]
            .iter()
            .enumerate()
        {
            let len = snapshot::entry_len(&image.bytes(at, 40), at).unwrap();
            let bytes = image.bytes(at, len as u64);
            let (entry, parsed) = Snapshot::parse(&bytes, at, &geometry).unwrap();
            assert_eq!(parsed, len);
            assert_eq!(entry.id, (id + 1).to_string().as_bytes());
            assert_eq!(entry.name, name.as_bytes());
            assert_eq!(entry.disk_size, Some(4 << 20));
            assert!(entry.icount.is_some());
            assert!(entry.date_sec > 1_700_000_000 && !entry.lacks_required_extra(&geometry));
            let l1 = L1Entry::decode(image.be64(entry.l1_table_offset), &geometry);
            assert!(matches!(l1, Ok(L1Entry::Table { .. })));
            entry.encode(&mut again).unwrap();
            at += len as u64;
        }
        assert_eq!(
            again,
            image.bytes(image.header.snapshots_offset, again.len() as u64)
        );
        assert!(matches!(
            image.entry(GuestOffset(0)),
            L2Entry::Data { copied: false, .. }
        ));
    }
}

#[test]
fn bitmaps() {
    let (_dir, path) = create("cluster_size=64k", "256M");
    let name = path.to_str().unwrap();
    qemu_img(&["bitmap", "--add", "-g", "4k", name, "first"]);
    qemu_img(&["bitmap", "--add", "--disable", name, "second, off"]);
    qemu_io(&path, &["write 8k 4k"]);
    let image = Reader::open(&path);
    let geometry = image.geometry();
    let extension = image.header.bitmaps().unwrap();
    assert!(image.header.bitmaps_consistent());
    let directory = image.bytes(extension.directory_offset, extension.directory_size);
    let bitmaps = Bitmap::parse_directory(&directory, extension, &geometry).unwrap();
    let [first, second] = bitmaps.as_slice() else {
        panic!("{bitmaps:?}");
    };
    assert_eq!(
        (first.name.as_slice(), first.granularity_bits),
        (b"first".as_slice(), 12)
    );
    assert_eq!(
        (second.name.as_slice(), second.granularity_bits),
        (b"second, off".as_slice(), 16)
    );
    assert_eq!(
        (first.flags, second.flags),
        (BitmapFlags::AUTO, BitmapFlags::empty())
    );
    let size = image.header.virtual_size();
    for bitmap in &bitmaps {
        let entries = Bitmap::table_entries_for(bitmap.granularity_bits, size, &geometry);
        assert_eq!(u64::from(bitmap.table_size), entries);
    }
    let raw = image.be64(first.table_offset);
    let Ok(BitmapTableEntry::Cluster(bits)) = BitmapTableEntry::decode(raw, &geometry) else {
        panic!("no bits in {raw:#x}");
    };
    assert_eq!(image.bytes(bits, 4), [1 << 2, 0, 0, 0]);
    let mut again = Vec::new();
    bitmaps
        .iter()
        .for_each(|bitmap| bitmap.encode(&mut again).unwrap());
    assert_eq!(again, directory);
    let encoded = image.header.encode().unwrap();
    assert_eq!(encoded, image.file[..encoded.len()]);
}

#[test]
fn compressed_images() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let mut disk = half_random((3 << 20) + 1024, 1);
    disk[1 << 20..2 << 20].fill(0);
    disk[5000..6000].fill(3);
    std::fs::write(&raw, &disk).unwrap();
    for kind in ["zlib", "zstd"] {
        for bits in [9, 12, 16, 21] {
            let path = dir.path().join(format!("{kind}-{bits}"));
            let options = format!("compression_type={kind},cluster_size={}", 1 << bits);
            let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
            qemu_img(&[
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to,
            ]);
            let image = Reader::open(&path);
            assert!(image.disk() == disk, "{kind} {bits}");
            // Every cluster that a compressed one touches counts it once.
            let mut counts = std::collections::HashMap::new();
            let mut compressed = 0;
            for at in (0..disk.len() as u64).step_by(1 << bits) {
                if let L2Entry::Compressed(range) = image.entry(GuestOffset(at)) {
                    compressed += 1;
                    for cluster in range.clusters_touched(&image.geometry()) {
                        *counts.entry(cluster).or_insert(0) += 1;
                    }
                }
            }
            assert!(compressed > 0, "{kind} {bits}");
            for (cluster, count) in counts {
                assert_eq!(
                    image.refcount(cluster),
                    count,
                    "{kind} {bits}: cluster {cluster:#x}"
                );
            }
        }
    }
}

/// The values that we refuse, QEMU refuses too: we are not stricter than it
/// where that could hurt.
#[test]
fn qemu_refuses_what_we_refuse() {
    let (dir, path) = create("compat=1.1", "64M");
    let good = std::fs::read(&path).unwrap();
    let cases: [(usize, &[u8]); 12] = [
        (20, &[0, 0, 0, 8]),
        (20, &[0, 0, 0, 22]),
        (32, &[0, 0, 0, 2]),
        (36, &[0, 0x40, 0, 1]),
        (36, &[0, 0, 0, 0]),
        (46, &[2]),
        (54, &[1]),
        (56, &[0, 0, 0, 0]),
        (56, &[0, 0, 0, 129]),
        (60, &[0, 1, 0, 1]),
        (99, &[7]),
        (72, &[0x80]),
    ];
    for (at, patch) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let bad = dir.path().join("bad");
        std::fs::write(&bad, &bytes).unwrap();
        let (code, text) = run("qemu-img", &["info", "-f", "qcow2", bad.to_str().unwrap()]);
        assert_eq!(code, Some(1), "byte {at}: {text}");
        let ours = qcow2_ublk::qcow2::spec::Header::parse(&bytes[..65536], bytes.len() as u64);
        let ours = ours.unwrap_err();
        println!("{ours}\n    {text}");
    }
}
