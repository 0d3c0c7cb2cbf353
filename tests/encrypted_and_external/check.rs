//! `check` of what is odd in such images, and of refcounts that are too low:
//! the same counts, key by key, and the same exit codes as qemu-img's.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::Lab;
use crate::common::Reader;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The L2 table of the disk's beginning.
fn l2(reader: &Reader) -> u64 {
    reader.be64(reader.header.l1_table_offset) & OFFSET
}

/// What is odd with an image: its name, its options, and the change to it.
type Odd = (&'static str, String, fn(&Reader) -> (u64, Vec<u8>));

#[test]
fn counts_are_those_of_qemu() {
    let lab = Lab::new();
    let external = format!("data_file={}", lab.file("data"));
    let luks = "encrypt.format=luks,encrypt.iter-time=1".to_owned();
    let odd: [Odd; 6] = [
        // Not in its own place: said when it is read, by QEMU and by us.
        ("moved", external.clone(), |reader| {
            (l2(reader) + 8, (1u64 << 63 | 0x2_0000).to_be_bytes().into())
        }),
        ("compressed", external, |reader| {
            (l2(reader) + 8, (1u64 << 62 | 0x5_0000).to_be_bytes().into())
        }),
        ("compressed.a", luks, |reader| {
            let entry = reader.be64(qcow2_ublk::qcow2::spec::HostOffset(l2(reader) + 8));
            let entry = entry & OFFSET | 1 << 62;
            (l2(reader) + 8, entry.to_be_bytes().into())
        }),
        ("low", String::new(), |reader| {
            (refcount(reader, 5), vec![0; 6])
        }),
        ("mixed", "refcount_bits=8".to_owned(), |reader| {
            (refcount(reader, 5), vec![0, 2, 0, 3, 0])
        }),
        ("old", "compat=0.10".to_owned(), |reader| {
            (l2(reader) + 8, (1u64 << 63 | 1 << 40).to_be_bytes().into())
        }),
    ];
    for (name, options, change) in odd {
        let mut create = vec!["create", "-q", "--key-file", "a"];
        if !options.is_empty() {
            create.extend(["-o", &options]);
        }
        lab.good(&[&create[..], &[name, "4M"]].concat());
        lab.good(&["io", "--key-file", "a", name, "-c", "write -P 1 0 512k"]);
        let (at, bytes) = change(&Reader::open(&lab.path(name)));
        let file = std::fs::OpenOptions::new();
        let file = file.clone().write(true).open(lab.path(name)).unwrap();
        file.write_all_at(&bytes, at).unwrap();
        let opts = Lab::opts(&[name]);
        let theirs = lab.only_out(
            "qemu-img",
            &["check", "--output=json", "--image-opts", &opts],
        );
        let ours = lab.only_out(super::PROGRAM, &["check", "--output=json", name]);
        assert_eq!(ours.0, theirs.0, "{name}: {ours:?} {theirs:?}");
        let [mut ours, mut theirs] = [ours.1, theirs.1].map(|text| {
            serde_json::from_str::<Value>(&text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"))
        });
        for report in [&mut ours, &mut theirs] {
            report.as_object_mut().unwrap().remove("filename");
        }
        assert_eq!(ours, theirs, "{name}");
    }
}

/// Where the refcount of a cluster is, of 8 or 16 bits.
fn refcount(reader: &Reader, cluster: u64) -> u64 {
    let block = reader.be64(reader.header.refcount_table_offset);
    block + (cluster << reader.geometry().refcount_order >> 3)
}
