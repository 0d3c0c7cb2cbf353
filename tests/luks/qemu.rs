//! Images of QEMU's read and written here, and the other way round.

use std::collections::BTreeSet;
use std::fs;

use qcow2_ublk::crypto::{CipherSpec, Hash};
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::{Disk, chain};

use super::{Lab, PASSPHRASE, content, open, options, read, shows};

/// Each cipher, key length, mode, generator and hash that QEMU takes, at least
/// once: cipher, key bits, mode, hash.
const ALL: &[(&str, usize, &str, &str)] = &[
    ("aes", 128, "xts-plain64", "sha256"),
    ("aes", 192, "xts-plain64", "sha1"),
    ("aes", 256, "xts-plain64", "sha512"),
    ("aes", 256, "xts-plain", "sha224"),
    ("aes", 256, "xts-essiv:sha256", "md5"),
    ("aes", 128, "cbc-essiv:md5", "sha384"),
    ("aes", 256, "cbc-essiv:sha256", "ripemd160"),
    ("aes", 256, "cbc-plain64", "sm3"),
    ("aes", 128, "cbc-plain", "sha256"),
    ("aes", 256, "ecb-plain64", "sha256"),
    ("serpent", 128, "xts-plain64", "sha256"),
    ("serpent", 192, "xts-plain64", "sha256"),
    ("serpent", 256, "xts-plain64", "sha512"),
    ("serpent", 256, "cbc-essiv:sha256", "sha256"),
    ("serpent", 128, "ecb-plain64", "sha1"),
    ("twofish", 128, "cbc-plain64", "ripemd160"),
    ("twofish", 192, "xts-plain64", "sha256"),
    ("twofish", 256, "xts-plain64", "sha256"),
    ("twofish", 256, "cbc-essiv:sha256", "sha224"),
    ("cast5", 128, "cbc-plain64", "sha1"),
    ("cast5", 128, "cbc-essiv:md5", "sha256"),
    ("cast5", 128, "ecb-plain64", "md5"),
];

fn qemu_options(&(cipher, bits, mode, hash): &(&str, usize, &str, &str)) -> String {
    let (mode, iv) = mode.split_once('-').unwrap();
    let iv = match iv.split_once(':') {
        Some((iv, hash)) => format!("{iv},encrypt.ivgen-hash-alg={hash}"),
        None => iv.to_owned(),
    };
    format!(
        "encrypt.format=luks,encrypt.iter-time=1,encrypt.cipher-alg={cipher}-{bits},\
         encrypt.cipher-mode={mode},encrypt.hash-alg={hash},encrypt.ivgen-alg={iv}"
    )
}

#[test]
fn the_list_has_every_hash_and_generator() {
    let hashes: BTreeSet<_> = ALL.iter().map(|entry| entry.3).collect();
    assert_eq!(hashes.len(), Hash::ALL.len());
    for cipher in ["aes", "serpent", "twofish", "cast5"] {
        assert!(ALL.iter().filter(|entry| entry.0 == cipher).count() >= 3);
    }
}

#[test]
fn what_qemu_encrypts_we_read_and_write() {
    // Making one takes QEMU seconds; the other direction has them all.
    for entry in [&ALL[2], &ALL[5], &ALL[20]] {
        let lab = Lab::new();
        let path = lab.qemu_create("a.qcow2", &qemu_options(entry), "4M");
        lab.qemu_io(&path, &["write -P 0x5a 60k 200k", "write -P 0x77 3M 512"]);
        let disk = open(&path, true);
        assert_eq!(
            read(&disk, 60 << 10, 200 << 10),
            [0x5a; 200 << 10],
            "{entry:?}"
        );
        assert_eq!(read(&disk, 3 << 20, 1024)[..512], [0x77; 512]);
        assert_eq!(read(&disk, (3 << 20) + 512, 4096), [0; 4096]);
        disk.write_at(&[0x11; 300], 61_000).unwrap();
        disk.write_at(&[0x22; 100_000], 2 << 20).unwrap();
        disk.close().unwrap();
        let ours = content(&path);
        assert_eq!(ours[61_000..61_300], [0x11; 300]);
        assert!(ours == lab.qemu_content(&path), "{entry:?}");
        lab.qemu_check(&path);
        if !entry.2.starts_with("ecb") {
            assert!(!shows(&path, 0x5a) && !shows(&path, 0x22), "{entry:?}");
        }
    }
}

#[test]
fn what_we_encrypt_qemu_reads_and_writes() {
    for (index, entry) in ALL.iter().enumerate() {
        let &(cipher, bits, mode, hash) = entry;
        let lab = Lab::new();
        let path = lab.create("a.qcow2", |format, options| {
            format.spec = CipherSpec::parse(cipher, mode).unwrap();
            format.key_len = bits / 8 * if mode.starts_with("xts") { 2 } else { 1 };
            format.hash = Hash::from_name(hash).unwrap();
            options.cluster_size = [65536, 4096, 512, 2 << 20][index % 4];
            options.version = if index % 5 == 4 { 2 } else { 3 };
        });
        lab.qemu_check(&path);
        let disk = open(&path, true);
        disk.write_at(&[0x5a; 70_001], 99).unwrap();
        disk.close().unwrap();
        lab.qemu_io(
            &path,
            &[
                // What is around it is encrypted zeros, not a hole.
                "read -P 0 0 99",
                "read -P 0x5a 99 70001",
                "read -P 0 70100 20000",
                "write -P 0x33 68k 4k",
            ],
        );
        let ours = content(&path);
        assert_eq!(ours[68 << 10..72 << 10], [0x33; 4096], "{entry:?}");
        assert_eq!(ours[99..68 << 10], [0x5a; (68 << 10) - 99], "{entry:?}");
        lab.qemu_check(&path);
    }
}

/// QEMU stops with an assertion when it is to make one of these; cryptsetup
/// makes and opens them. The key material is no whole number of sectors.
#[test]
fn keys_of_192_bits_work_where_qemu_stops() {
    for (cipher, mode) in [
        ("aes", "cbc-essiv:sha256"),
        ("twofish", "cbc-plain64"),
        ("serpent", "cbc-plain64"),
    ] {
        let lab = Lab::new();
        let path = lab.create("a.qcow2", |format, _| {
            format.spec = CipherSpec::parse(cipher, mode).unwrap();
            format.key_len = 24;
        });
        let disk = open(&path, true);
        disk.write_at(&[7; 5000], 12_345).unwrap();
        disk.close().unwrap();
        assert_eq!(content(&path)[12_345..17_345], [7; 5000]);
        // The other ciphers need the kernel's device mapper.
        if cipher == "aes" {
            let (code, text) = super::keys::cryptsetup_opens(&lab, &path, PASSPHRASE);
            assert_eq!(code, Some(0), "{cipher}-{mode}: {text}");
        }
    }
}

fn failure(path: &std::path::Path, options: &chain::Options) -> qcow2_ublk::Error {
    Disk::open(path, options).expect_err("it must not open")
}

/// Wrong passphrase, damaged header, unknown cipher: three different answers.
#[test]
fn what_is_wrong_is_said() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    let none = failure(&path, &chain::Options::default());
    assert_eq!(none.kind(), ErrorKind::Permission);
    assert!(none.to_string().contains("no passphrase"), "{none}");
    for wrong in ["a secr\u{e9}t with its line end".as_bytes(), b"", b"other"] {
        let error = failure(&path, &options(true, wrong));
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.to_string().contains("opens no key slot"), "{error}");
    }
    let sound = fs::read(&path).unwrap();
    let at = sound
        .windows(6)
        .rposition(|bytes| bytes == b"LUKS\xba\xbe")
        .unwrap();
    let with = |offset: usize, bytes: &[u8]| {
        let mut file = sound.clone();
        file[at + offset..at + offset + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, file).unwrap();
        let error = failure(&path, &options(false, PASSPHRASE));
        assert!(error.to_string().contains("a.qcow2"), "{error}");
        error
    };
    let damaged = with(0, b"X");
    assert_eq!(damaged.kind(), ErrorKind::Corrupt);
    assert!(
        damaged.to_string().contains(&format!("{at:#x}")),
        "{damaged}"
    );
    let unknown = with(8, b"rot13\0");
    assert_eq!(unknown.kind(), ErrorKind::Unsupported);
    assert!(unknown.to_string().contains("rot13"), "{unknown}");
    let slow = with(212, &u32::MAX.to_be_bytes());
    assert_eq!(slow.kind(), ErrorKind::Policy);
    assert!(slow.cure_text().unwrap().contains("--key-iterations"));
    // One bit of the key material: every passphrase is wrong.
    let byte = sound[at + 4096 + 100] ^ 1;
    assert_eq!(with(4096 + 100, &[byte]).kind(), ErrorKind::Permission);
}

/// The old AES encryption: read, never written.
#[test]
fn old_aes_images_are_read() {
    for passphrase in [
        &b"short"[..],
        b"exactly 16 bytes",
        b"more than sixteen bytes",
    ] {
        let lab = Lab::new();
        fs::write(&lab.key, passphrase).unwrap();
        let path = lab.qemu_create("a.qcow2", "encrypt.format=aes", "4M");
        lab.qemu_io(&path, &["write -P 0x5a 1000 200000", "write -P 0x66 2M 1"]);
        let disk = Disk::open(&path, &options(false, passphrase)).unwrap();
        assert_eq!(read(&disk, 1000, 200_000), [0x5a; 200_000]);
        assert_eq!(read(&disk, 0, 1000), [0; 1000]);
        assert_eq!(read(&disk, (2 << 20) - 1, 3), [0, 0x66, 0]);
        disk.close().unwrap();
        let error = failure(&path, &options(true, passphrase));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("AES"), "{error}");
    }
}
