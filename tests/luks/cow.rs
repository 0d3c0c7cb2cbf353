//! Clusters that are copied: what LUKS encrypts depends on where it is in the
//! file, so every copy is decrypted and encrypted anew.

use std::fs;
use std::sync::Arc;

use qcow2_ublk::crypto::{Keyring, Secret};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
use qcow2_ublk::storage::sim::Image;
use qcow2_ublk::{Disk, chain};

use super::keys::ours;
use super::{Lab, PASSPHRASE, content, open, options, read, shows};
use crate::common;

/// A cluster that a snapshot has too: the copy is not the old ciphertext.
#[test]
fn snapshot_clusters_are_encrypted_anew() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    lab.qemu_io(&path, &["write -P 0x5a 0 256k"]);
    let snapshot = |what: &str| {
        let mut args = vec!["snapshot".to_owned(), what.to_owned(), "s".to_owned()];
        args.extend([
            "--object".to_owned(),
            format!("secret,id=s,file={}", lab.key.display()),
        ]);
        args.extend(["--image-opts".to_owned(), Lab::image_opts(&path)]);
        common::qemu_img(&args);
    };
    snapshot("-c");
    let disk = open(&path, true);
    disk.write_at(&[0x11; 700], 70_000).unwrap();
    disk.write_zeroes_at(128 << 10, 64 << 10, true).unwrap();
    disk.discard_at(192 << 10, 64 << 10).unwrap();
    disk.close().unwrap();
    let now = content(&path);
    assert_eq!(now[65536..70_000], [0x5a; 70_000 - 65536]);
    assert_eq!(now[70_000..70_700], [0x11; 700]);
    assert_eq!(now[70_700..128 << 10], [0x5a; (128 << 10) - 70_700]);
    assert_eq!(now[128 << 10..256 << 10], [0; 128 << 10]);
    assert!(now == lab.qemu_content(&path));
    lab.qemu_check(&path);
    snapshot("-a");
    assert_eq!(content(&path)[..256 << 10], [0x5a; 256 << 10]);
    lab.qemu_check(&path);
}

/// A snapshot of another size: its size and its data come back.
#[test]
fn a_snapshot_of_another_size_comes_back() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    let disk = open(&path, true);
    disk.write_at(&[0x21; 9000], (4 << 20) - 9000).unwrap();
    disk.close().unwrap();
    let snapshot = |what: &str| {
        let object = format!("secret,id=s,file={}", lab.key.display());
        let opts = Lab::image_opts(&path);
        common::qemu_img(&[
            "snapshot",
            what,
            "s",
            "--object",
            &object,
            "--image-opts",
            &opts,
        ]);
    };
    snapshot("-c");
    let disk = open(&path, true);
    disk.grow(9 << 20).unwrap();
    disk.write_at(&[0x42; 3 << 20], 3 << 20).unwrap();
    disk.close().unwrap();
    assert_eq!(content(&path)[3 << 20..6 << 20], [0x42; 3 << 20]);
    snapshot("-a");
    let back = content(&path);
    assert_eq!(back.len(), 4 << 20);
    assert_eq!(back[(4 << 20) - 9000..], [0x21; 9000]);
    assert!(back == lab.qemu_content(&path));
    lab.qemu_check(&path);
}

/// Data of a plain backing file becomes ciphertext when a cluster is copied,
/// and is not lost by a partial write.
#[test]
fn what_comes_from_below_is_encrypted() {
    let lab = Lab::new();
    let base = lab.path("base.raw");
    // Longer than nothing, shorter than the disk, and no whole cluster.
    fs::write(&base, [0x5a; 100_352]).unwrap();
    let path = lab.create("a.qcow2", |_, options| {
        options.backing = Some(Backing {
            file: "base.raw".into(),
            format: Some("raw".to_owned()),
        });
    });
    let disk = open(&path, true);
    disk.write_at(&[1; 512], 98_304).unwrap();
    disk.write_at(&[2; 100], 5).unwrap();
    disk.close().unwrap();
    let now = content(&path);
    assert_eq!(now[..5], [0x5a; 5]);
    assert_eq!(now[5..105], [2; 100]);
    assert_eq!(now[105..98_304], [0x5a; 98_304 - 105]);
    assert_eq!(now[98_304..98_816], [1; 512]);
    assert_eq!(now[98_816..100_352], [0x5a; 1536]);
    assert_eq!(now[100_352..200_000], [0; 200_000 - 100_352]);
    assert!(
        !shows(&path, 0x5a),
        "plaintext of the layer below is in the file"
    );
    assert!(now == lab.qemu_content(&path));
    lab.qemu_check(&path);
}

#[derive(Debug)]
struct Two;

impl Keyring for Two {
    fn passphrase(&self, path: &std::path::Path) -> qcow2_ublk::Result<Option<Secret>> {
        let base = path.file_name().is_some_and(|name| name == "base.qcow2");
        let bytes = if base {
            b"of the base".to_vec()
        } else {
            PASSPHRASE.to_vec()
        };
        Ok(Some(Secret::new(bytes)))
    }
}

/// Each layer has a key of its own.
#[test]
fn layers_have_their_own_keys() {
    let lab = Lab::new();
    fs::write(&lab.key, "of the base").unwrap();
    let base = lab.qemu_create(
        "base.qcow2",
        "encrypt.format=luks,encrypt.iter-time=1",
        "2M",
    );
    lab.qemu_io(&base, &["write -P 0x5a 0 300k"]);
    fs::write(&lab.key, PASSPHRASE).unwrap();
    let path = lab.create("a.qcow2", |_, options| {
        options.backing = Some(Backing {
            file: "base.qcow2".into(),
            format: Some("qcow2".to_owned()),
        });
    });
    let mut how = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    how.image.keys = Some(Arc::new(Two));
    let disk = Disk::open(&path, &how).unwrap();
    disk.write_at(&[9; 10], 65_530).unwrap();
    let mut expected = vec![0x5a; 300 << 10];
    expected[65_530..65_540].fill(9);
    assert_eq!(read(&disk, 0, 300 << 10), expected);
    disk.close().unwrap();
    // With the same key for both, the lower layer is named.
    let error = Disk::open(&path, &options(false, PASSPHRASE)).unwrap_err();
    assert!(error.to_string().contains("base.qcow2"), "{error}");
    // QEMU, with both keys, sees the same.
    fs::write(lab.path("base-key"), "of the base").unwrap();
    let object = format!("secret,id=b,file={}", lab.path("base-key").display());
    let opts = format!(
        "{},backing.driver=qcow2,backing.encrypt.key-secret=b,backing.file.filename={}",
        Lab::image_opts(&path),
        base.display()
    );
    let (code, text) = common::run(
        "qemu-io",
        &[
            "--object",
            &object,
            "--object",
            &format!("secret,id=s,file={}", lab.key.display()),
            "--image-opts",
            "-c",
            "read -P 0x5a 0 65530",
            "-c",
            "read -P 9 65530 10",
            "-c",
            "read -P 0x5a 65540 200000",
            &opts,
        ],
    );
    assert!(code == Some(0) && !text.contains("failed"), "{text}");
}

/// Zero clusters, with and without a host cluster, are zeros and not decrypted
/// holes; written in part, the rest stays zeros.
#[test]
fn zero_clusters_are_not_decrypted() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    lab.qemu_io(
        &path,
        &[
            "write -P 0x5a 0 256k",
            "write -z 0 64k",
            "write -z -u 64k 64k",
            "write -z 1M 64k",
        ],
    );
    let disk = open(&path, true);
    assert_eq!(read(&disk, 0, 128 << 10), [0; 128 << 10]);
    assert_eq!(read(&disk, 1 << 20, 64 << 10), [0; 64 << 10]);
    for at in [4096, 70_000, (1 << 20) + 3] {
        disk.write_at(&[0x22; 1000], at).unwrap();
    }
    disk.write_zeroes_at(192 << 10, 64 << 10, false).unwrap();
    disk.write_zeroes_at((128 << 10) + 1, 700, true).unwrap();
    disk.close().unwrap();
    let now = content(&path);
    let mut expected = vec![0; 4 << 20];
    expected[128 << 10..192 << 10].fill(0x5a);
    expected[(128 << 10) + 1..(128 << 10) + 701].fill(0);
    for at in [4096, 70_000, (1 << 20) + 3] {
        expected[at..at + 1000].fill(0x22);
    }
    assert!(now == expected);
    assert!(now == lab.qemu_content(&path));
    lab.qemu_check(&path);
}

/// Version 2 has no zero clusters. Zeros that hide what is below would have to be
/// encrypted, and `amend` has no key.
#[test]
fn zero_clusters_do_not_become_noise_in_version_2() {
    let lab = Lab::new();
    fs::write(lab.path("base.raw"), [0x5a; 256 << 10]).unwrap();
    let path = lab.create("a.qcow2", |_, options| {
        options.backing = Some(Backing {
            file: "base.raw".into(),
            format: Some("raw".to_owned()),
        });
    });
    let file = path.to_str().unwrap();
    let amend = ["amend", "-o", "compat=0.10", file];
    let back = ["amend", "-o", "compat=1.1", file];
    // Without zero clusters nothing is in the way.
    assert_eq!(ours(&amend), (Some(0), String::new()));
    assert_eq!(ours(&back), (Some(0), String::new()));
    lab.qemu_io(&path, &["write -P 1 0 128k", "write -z 64k 64k"]);
    let mut expected = content(&path);
    assert_eq!(
        expected[64 << 10..192 << 10],
        [[0; 64 << 10], [0x5a; 64 << 10]].concat()
    );
    let before = fs::read(&path).unwrap();
    let (code, text) = ours(&amend);
    assert!(code == Some(1) && text.contains("zero clusters"), "{text}");
    assert!(text.contains("rebase -b ''"), "{text}");
    assert!(fs::read(&path).unwrap() == before);
    // As it advises.
    let key = lab.key.to_str().unwrap();
    let (code, text) = ours(&["rebase", "--key-file", key, "-b", "", file]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(ours(&amend), (Some(0), String::new()));
    assert!(content(&path) == expected);
    assert!(lab.qemu_content(&path) == expected);
    lab.qemu_check(&path);
    // And what is written there is the disk's.
    lab.qemu_io(&path, &["write -P 2 100k 1k"]);
    expected[100 << 10..101 << 10].fill(2);
    assert!(content(&path) == expected);
}

/// Data is not moved by a repair that has no key: what it would show at another
/// place is noise.
#[test]
fn a_repair_does_not_turn_data_into_noise() {
    let lab = Lab::new();
    // Two L1 entries, of 512 MiB each.
    let path = lab.create("a.qcow2", |_, options| {
        *options = CreateOptions::new(1 << 30);
    });
    lab.qemu_io(&path, &["write -P 0x5a 64k 64k"]);
    let mut image = Image::load(&path).unwrap();
    let be64 = |image: &Image, at: u64| {
        u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let l1 = be64(&image, 40);
    let data = be64(&image, be64(&image, l1) + 8);
    // The second L2 table is said to be where the data is.
    image.write(l1 + 8, &data.to_be_bytes());
    image.save(&path).unwrap();
    let file = path.to_str().unwrap();
    for _ in 0..2 {
        let (code, text) = ours(&["check", "-r", "all", file]);
        let disk = open(&path, false);
        assert!(read(&disk, 64 << 10, 64 << 10) == [0x5a; 64 << 10], "noise");
        // It says that not all is well.
        assert_eq!(code, Some(2), "{text}");
    }
}

/// QEMU can be made to write compressed clusters into an encrypted image: they
/// are plaintext there. They are read as they are, and become ciphertext when
/// they are written to.
#[test]
fn compressed_clusters_are_read_and_not_decrypted() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    let opts = format!(
        "driver=compress,file.driver=qcow2,file.encrypt.key-secret=s,file.file.driver=file,\
         file.file.filename={}",
        path.display()
    );
    let (code, text) = lab.qemu_io_with(&opts, &["write -P 0x5a 0 128k"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(content(&path)[..128 << 10], [0x5a; 128 << 10]);
    let disk = open(&path, true);
    disk.write_at(&[1; 10], 100).unwrap();
    disk.close().unwrap();
    let now = content(&path);
    assert_eq!(now[100..110], [1; 10]);
    assert_eq!(now[110..128 << 10], [0x5a; (128 << 10) - 110]);
    assert!(now == lab.qemu_content(&path));
    lab.qemu_check(&path);
}
