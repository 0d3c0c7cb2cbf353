//! LUKS version 2. QEMU does not open it: the oracle is cryptsetup, and the
//! volume key that it tells.

use std::fs;
use std::path::{Path, PathBuf};

use aes::Aes256;
use cipher::KeyInit;
use qcow2_ublk::Disk;
use qcow2_ublk::crypto::{CipherSpec, Hash};
use qcow2_ublk::crypto::{luks1, luks2};
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::qcow2::spec::{GuestOffset, L2Entry};
use xts_mode::{Xts128, get_tweak_default};

use super::keys::{cryptsetup_opens, extract, opens, ours, put_back};
use super::{Lab, PASSPHRASE, QUICK, content, open, options, read, shows};
use crate::common::{self, Reader, run};

/// An image with a header that cryptsetup has made.
fn by_cryptsetup(lab: &Lab, sector: &str, pbkdf: &[&str]) -> PathBuf {
    let (header, dummy) = (lab.path("made"), lab.path("dummy"));
    fs::write(&header, vec![0; 2 << 20]).unwrap();
    fs::write(&dummy, vec![0; 1 << 20]).unwrap();
    let mut args = vec![
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks2",
        "--sector-size",
        sector,
        "--luks2-metadata-size",
        "16k",
        "--luks2-keyslots-size",
        "1m",
        "--key-size",
        "512",
        "--cipher",
        "aes-xts-plain64",
        "--offset",
        "0",
        "--key-file",
        lab.key.to_str().unwrap(),
        "--header",
        header.to_str().unwrap(),
        dummy.to_str().unwrap(),
    ];
    args.extend(pbkdf);
    let made = run("cryptsetup", &args);
    assert_eq!(made.0, Some(0), "{}", made.1);
    let path = lab.path("a.qcow2");
    let mut options = CreateOptions::new(4 << 20);
    options.luks = Some(fs::read(&header).unwrap()[..1_081_344].into());
    common::lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
    path
}

/// The volume key, as cryptsetup tells it.
fn volume_key(lab: &Lab, path: &Path) -> Vec<u8> {
    let header = extract(lab, path);
    let file = lab.path("volume-key");
    let told = run(
        "cryptsetup",
        &[
            "luksDump",
            "--batch-mode",
            "--dump-volume-key",
            "--key-file",
            lab.key.to_str().unwrap(),
            "--volume-key-file",
            file.to_str().unwrap(),
            header.to_str().unwrap(),
        ],
    );
    assert_eq!(told.0, Some(0), "{}", told.1);
    fs::read(file).unwrap()
}

/// A data cluster as the volume key decrypts it; `sector` bytes are encrypted
/// as one, and counted in units of 512.
fn decrypted(path: &Path, guest: u64, key: &[u8], sector: usize) -> Vec<u8> {
    let reader = Reader::open(path);
    let L2Entry::Data { host, .. } = reader.entry(GuestOffset(guest)) else {
        panic!("no data at {guest}");
    };
    let mut cluster = reader.bytes(host, reader.header.cluster_size());
    let cipher = |key| Aes256::new_from_slice(key).unwrap();
    let xts = Xts128::new(cipher(&key[..32]), cipher(&key[32..]));
    for (nth, bytes) in cluster.chunks_mut(sector).enumerate() {
        let number = host.0 / 512 + (nth * sector / 512) as u64;
        xts.decrypt_sector(bytes, get_tweak_default(number.into()));
    }
    cluster
}

const ARGON2ID: &[&str] = &[
    "--pbkdf",
    "argon2id",
    "--pbkdf-memory",
    "64",
    "--pbkdf-force-iterations",
    "4",
    "--pbkdf-parallel",
    "2",
];

#[test]
fn what_cryptsetup_made_is_read_and_written() {
    let pbkdf2: &[&str] = &[
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--hash",
        "sha512",
    ];
    let argon2i: &[&str] = &[
        "--pbkdf",
        "argon2i",
        "--pbkdf-memory",
        "64",
        "--pbkdf-force-iterations",
        "4",
        "--pbkdf-parallel",
        "1",
    ];
    for (sector, pbkdf) in [
        ("512", ARGON2ID),
        ("4096", argon2i),
        ("512", pbkdf2),
        ("4096", pbkdf2),
    ] {
        let lab = Lab::new();
        let path = by_cryptsetup(&lab, sector, pbkdf);
        let disk = open(&path, true);
        disk.write_at(&[0x5a; 100_000], 777).unwrap();
        disk.write_at(&[0x22; 300], 5000).unwrap();
        disk.write_at(&[0x33; 9000], (1 << 20) + 100).unwrap();
        disk.close().unwrap();
        let mut expected = vec![0; 4 << 20];
        expected[777..100_777].fill(0x5a);
        expected[5000..5300].fill(0x22);
        expected[(1 << 20) + 100..][..9000].fill(0x33);
        assert!(content(&path) == expected, "{sector} {pbkdf:?}");
        let key = volume_key(&lab, &path);
        for guest in [0, 65536, 1 << 20] {
            let cluster = decrypted(&path, guest, &key, sector.parse().unwrap());
            assert!(
                cluster == expected[guest as usize..][..65536],
                "{sector} at {guest}"
            );
        }
        assert!(!shows(&path, 0x5a));
        assert!(!opens(&path, b"other"));
        let (code, text) = lab.qemu_io_with(&Lab::image_opts(&path), &["read 0 512"]);
        assert!(
            code == Some(1) && text.contains("LUKS version 2 is not supported"),
            "{text}"
        );
        let checked = ours(&["check", path.to_str().unwrap()]);
        assert_eq!(checked.0, Some(0), "{}", checked.1);
    }
}

#[test]
fn what_we_made_cryptsetup_opens() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let (file, key) = (path.to_str().unwrap(), lab.key.to_str().unwrap());
    let (code, text) = ours(&[
        "create",
        "--luks2",
        "-o",
        "encrypt.format=luks,encrypt.iter-time=1",
        "--key-file",
        key,
        file,
        "4M",
    ]);
    assert_eq!((code, text.as_str()), (Some(0), ""));
    assert_eq!(cryptsetup_opens(&lab, &path, PASSPHRASE).0, Some(0));
    let disk = open(&path, true);
    disk.write_at(&[0x5a; 65536], 0).unwrap();
    disk.close().unwrap();
    assert!(decrypted(&path, 0, &volume_key(&lab, &path), 512) == [0x5a; 65536]);

    let second = lab.path("second");
    fs::write(&second, "second").unwrap();
    let add = [
        "key",
        "add",
        file,
        "--key-file",
        key,
        "--new-key-file",
        second.to_str().unwrap(),
        "--iter-time",
        "1",
    ];
    assert_eq!(ours(&add), (Some(0), "1\n".to_owned()));
    assert_eq!(cryptsetup_opens(&lab, &path, b"second").0, Some(0));
    assert!(opens(&path, b"second"));
    // And one of cryptsetup's.
    let header = extract(&lab, &path);
    let third = lab.path("third");
    fs::write(&third, "third").unwrap();
    let mut args = vec![
        "luksAddKey",
        "--batch-mode",
        "--key-file",
        key,
        header.to_str().unwrap(),
        third.to_str().unwrap(),
    ];
    args.extend(ARGON2ID);
    let added = run("cryptsetup", &args);
    assert_eq!(added.0, Some(0), "{}", added.1);
    put_back(&path, &header);
    assert!(opens(&path, b"third"));
    assert_eq!(ours(&["key", "remove", file, "--key-file", key]).0, Some(0));
    assert!(!opens(&path, PASSPHRASE) && opens(&path, b"third") && opens(&path, b"second"));
    assert_ne!(cryptsetup_opens(&lab, &path, PASSPHRASE).0, Some(0));
    assert_eq!(cryptsetup_opens(&lab, &path, b"third").0, Some(0));
    let (code, text) = ours(&["key", "list", file]);
    assert!(
        code == Some(0) && text.starts_with("1: argon2id, 4 passes over "),
        "{text}"
    );
    let (code, text) = ours(&["info", file]);
    assert!(code == Some(0) && text.contains("encrypted: yes"), "{text}");
}

/// Cryptsetup repairs what we leave: either copy is enough for both.
#[test]
fn one_damaged_copy_is_no_harm() {
    let lab = Lab::new();
    let path = by_cryptsetup(&lab, "512", ARGON2ID);
    let (offset, _) = super::keys::region(&path);
    for damage in [0, 4100, 16384 + 20] {
        let sound = fs::read(&path).unwrap();
        let mut file = sound.clone();
        file[offset + damage] ^= 0xff;
        fs::write(&path, &file).unwrap();
        assert!(opens(&path, PASSPHRASE), "byte {damage}");
        fs::write(&path, &sound).unwrap();
    }
}

/// Sectors of 4096 bytes: writes of any offset and length.
#[test]
fn large_sectors_take_small_writes() {
    let lab = Lab::new();
    let path = by_cryptsetup(&lab, "4096", ARGON2ID);
    let mut model = vec![0; 4 << 20];
    let disk = open(&path, true);
    let mut state = 7_u64;
    for round in 0..200 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let at = (state >> 20) as usize % (300 << 10);
        let len = (1 + (state >> 45) as usize % 9000).min((4 << 20) - at);
        disk.write_at(&vec![round; len], at as u64).unwrap();
        model[at..at + len].fill(round);
    }
    assert!(read(&disk, 0, 4 << 20) == model);
    disk.close().unwrap();
    assert!(content(&path) == model);
}

/// Clusters, and subclusters, are whole sectors.
#[test]
fn sectors_larger_than_clusters_are_refused() {
    let lab = Lab::new();
    let by = by_cryptsetup(&lab, "4096", ARGON2ID);
    let header = extract(&lab, &by);
    let path = lab.path("b.qcow2");
    let mut small = CreateOptions::new(1 << 20);
    small.luks = Some(fs::read(header).unwrap().into());
    small.cluster_size = 2048;
    common::lab::block_on(qcow2_ublk::chain::create(&path, &small)).unwrap();
    let error = Disk::open(&path, &options(true, PASSPHRASE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("4096"), "{error}");
}

#[test]
fn other_ciphers_work_too() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let format = luks1::Format {
        spec: CipherSpec::parse("serpent", "cbc-essiv:sha256").unwrap(),
        key_len: 32,
        hash: Hash::Sha512,
        effort: QUICK,
    };
    let mut options = CreateOptions::new(1 << 20);
    options.luks = Some(luks2::make(&format, PASSPHRASE).unwrap().into());
    common::lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
    let disk = open(&path, true);
    disk.write_at(&[1; 5000], 3).unwrap();
    disk.close().unwrap();
    assert_eq!(content(&path)[3..5003], [1; 5000]);
}
