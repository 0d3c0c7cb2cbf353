//! Key slots: ours, QEMU's and cryptsetup's.

use std::fs;
use std::path::Path;

use qcow2_ublk::Disk;
use qcow2_ublk::error::ErrorKind;
use qcow2_ublk::qcow2::spec::Header;
use qcow2_ublk::qcow2::spec::header::Prefix;

use super::{Lab, PASSPHRASE, options};
use crate::common::{self, run};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

pub(super) fn ours(args: &[&str]) -> (Option<i32>, String) {
    run(PROGRAM, args)
}

/// Where the LUKS region is.
pub(super) fn region(path: &Path) -> (usize, usize) {
    let file = fs::read(path).unwrap();
    let prefix = Prefix::parse(&file).unwrap();
    let header = Header::parse(&file[..prefix.cluster_size()], file.len() as u64).unwrap();
    let (offset, len) = header.crypto_header().unwrap();
    (offset.0 as usize, len as usize)
}

/// The LUKS region as a file of its own, for cryptsetup.
pub(super) fn extract(lab: &Lab, path: &Path) -> std::path::PathBuf {
    let (offset, len) = region(path);
    let mut file = fs::read(path).unwrap();
    file.resize(file.len().max(offset + len), 0);
    let header = lab.path("header");
    fs::write(&header, &file[offset..offset + len]).unwrap();
    header
}

pub(super) fn put_back(path: &Path, header: &Path) {
    let (offset, len) = region(path);
    let header = fs::read(header).unwrap();
    let mut file = fs::read(path).unwrap();
    file.resize(file.len().max(offset + len), 0);
    file[offset..offset + len].copy_from_slice(&header[..len]);
    fs::write(path, file).unwrap();
}

/// Whether cryptsetup finds a slot for the passphrase.
pub(super) fn cryptsetup_opens(lab: &Lab, path: &Path, passphrase: &[u8]) -> (Option<i32>, String) {
    let header = extract(lab, path);
    let key = lab.path("try");
    fs::write(&key, passphrase).unwrap();
    let (header, key) = (header.to_str().unwrap(), key.to_str().unwrap());
    let args = [
        "open",
        "--test-passphrase",
        "--batch-mode",
        "--key-file",
        key,
        "--header",
        header,
        header,
    ];
    run("cryptsetup", &args)
}

pub(super) fn opens(path: &Path, passphrase: &[u8]) -> bool {
    match Disk::open(path, &options(false, passphrase)) {
        Ok(disk) => disk.close().map(|()| true).unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
            false
        }
    }
}

fn qemu_opens(lab: &Lab, path: &Path, passphrase: &[u8]) -> bool {
    fs::write(&lab.key, passphrase).unwrap();
    let (code, text) = lab.qemu_io_with(&Lab::image_opts(path), &["read -P 0x5a 0 512"]);
    fs::write(&lab.key, PASSPHRASE).unwrap();
    assert!(
        code == Some(0) || text.contains("Invalid password"),
        "{text}"
    );
    code == Some(0)
}

/// An image with something in it.
fn image(lab: &Lab) -> std::path::PathBuf {
    let path = lab.create("a.qcow2", |_, _| {});
    let disk = super::open(&path, true);
    disk.write_at(&[0x5a; 4096], 0).unwrap();
    disk.close().unwrap();
    path
}

#[test]
fn keys_come_and_go_for_qemu_and_cryptsetup_too() {
    let lab = Lab::new();
    let path = image(&lab);
    let (file, key) = (path.to_str().unwrap(), lab.key.to_str().unwrap());
    let second = lab.path("second");
    fs::write(&second, "second").unwrap();
    let second = second.to_str().unwrap();
    let add = [
        "key",
        "add",
        file,
        "--key-file",
        key,
        "--new-key-file",
        second,
        "--iter-time",
        "1",
    ];
    assert_eq!(ours(&add), (Some(0), "1\n".to_owned()));
    for passphrase in [PASSPHRASE, b"second"] {
        assert!(opens(&path, passphrase) && qemu_opens(&lab, &path, passphrase));
        assert_eq!(cryptsetup_opens(&lab, &path, passphrase).0, Some(0));
    }
    let (code, text) = ours(&["key", "list", file]);
    assert_eq!(code, Some(0));
    assert!(text.starts_with("0: pbkdf2-sha256, "), "{text}");
    assert!(
        text.contains("\n1: pbkdf2-sha256, ") && text.ends_with("\n7: free\n"),
        "{text}"
    );

    // By passphrase.
    assert_eq!(ours(&["key", "remove", file, "--key-file", key]).0, Some(0));
    for passphrase in [PASSPHRASE, b"second"] {
        let expected = passphrase == b"second";
        assert_eq!(opens(&path, passphrase), expected);
        assert_eq!(qemu_opens(&lab, &path, passphrase), expected);
        assert_eq!(
            cryptsetup_opens(&lab, &path, passphrase).0 == Some(0),
            expected
        );
    }
    // The last one stays, unless it is forced.
    let last = ["key", "remove", file, "--slot", "1"];
    let (code, text) = ours(&last);
    assert!(
        code == Some(1) && text.contains("is the last") && text.contains("--force"),
        "{text}"
    );
    assert!(opens(&path, b"second"));
    let (code, text) = ours(&["key", "remove", file, "--slot", "5"]);
    assert!(
        code == Some(4) && text.contains("key slot 5 holds no key"),
        "{text}"
    );
    assert_eq!(ours(&[&last[..], &["--force"]].concat()).0, Some(0));
    assert!(!opens(&path, b"second"));
    let header = extract(&lab, &path);
    let dump = run("cryptsetup", &["luksDump", header.to_str().unwrap()]);
    assert!(
        dump.0 == Some(0) && !dump.1.contains("ENABLED"),
        "{}",
        dump.1
    );
}

/// What cryptsetup and QEMU do to a header of ours, and we to theirs.
#[test]
fn others_may_change_the_header() {
    let lab = Lab::new();
    let path = image(&lab);
    let header = extract(&lab, &path);
    let header_name = header.to_str().unwrap();
    let dump = run("cryptsetup", &["luksDump", header_name]);
    assert!(dump.0 == Some(0), "{}", dump.1);
    for expected in [
        "xts-plain64",
        "sha256",
        "Key Slot 0: ENABLED",
        "Key Slot 7: DISABLED",
    ] {
        assert!(dump.1.contains(expected), "{}", dump.1);
    }
    let third = lab.path("third");
    fs::write(&third, "third").unwrap();
    let (key, third) = (lab.key.to_str().unwrap(), third.to_str().unwrap());
    let added = run(
        "cryptsetup",
        &[
            "luksAddKey",
            "--batch-mode",
            "--pbkdf-force-iterations",
            "1000",
            "--key-file",
            key,
            header_name,
            third,
        ],
    );
    assert_eq!(added.0, Some(0), "{}", added.1);
    put_back(&path, &header);
    assert!(opens(&path, b"third") && qemu_opens(&lab, &path, b"third"));

    // QEMU adds a key and takes the first away.
    let objects = [
        format!("secret,id=s,file={key}"),
        format!("secret,id=n,file={}", {
            let f = lab.path("fourth");
            fs::write(&f, "fourth").unwrap();
            f.display().to_string()
        }),
    ];
    let opts = Lab::image_opts(&path);
    common::qemu_img(&[
        "amend",
        "--object",
        &objects[0],
        "--object",
        &objects[1],
        "--image-opts",
        &opts,
        "-o",
        "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1",
    ]);
    assert!(opens(&path, b"fourth"));
    common::qemu_img(&[
        "amend",
        "--object",
        &objects[0],
        "--object",
        &objects[1],
        "--image-opts",
        &opts,
        "-o",
        "encrypt.state=inactive,encrypt.old-secret=s",
    ]);
    assert!(!opens(&path, PASSPHRASE));
    assert!(opens(&path, b"third") && opens(&path, b"fourth"));
    assert_eq!(
        super::read(
            &Disk::open(&path, &options(false, b"third")).unwrap(),
            0,
            4096
        ),
        [0x5a; 4096]
    );
}

/// A header made by cryptsetup, in an image made here.
#[test]
fn a_header_of_cryptsetups_opens() {
    let lab = Lab::new();
    for (cipher, bits, hash) in [
        ("aes-xts-plain64", "512", "sha256"),
        ("aes-cbc-essiv:sha256", "256", "sha1"),
        ("aes-xts-plain64", "256", "sha512"),
        ("aes-cbc-plain64", "192", "ripemd160"),
    ] {
        let header = lab.path("made");
        fs::write(&header, vec![0; 4 << 20]).unwrap();
        let (name, key) = (header.to_str().unwrap(), lab.key.to_str().unwrap());
        let made = run(
            "cryptsetup",
            &[
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks1",
                "--cipher",
                cipher,
                "--key-size",
                bits,
                "--hash",
                hash,
                "--pbkdf-force-iterations",
                "1000",
                "--key-file",
                key,
                name,
            ],
        );
        assert_eq!(made.0, Some(0), "{cipher}: {}", made.1);
        let luks: Vec<u8> = fs::read(&header).unwrap()[..2_068_480].to_vec();
        let mut options = qcow2_ublk::qcow2::create::CreateOptions::new(1 << 20);
        options.luks = Some(luks.into());
        let path = lab.path("b.qcow2");
        common::lab::block_on(qcow2_ublk::chain::create(&path, &options)).unwrap();
        let disk = super::open(&path, true);
        disk.write_at(&[0x5a; 5000], 0).unwrap();
        disk.close().unwrap();
        if bits != "192" {
            assert!(qemu_opens(&lab, &path, PASSPHRASE), "{cipher}");
        }
        assert_eq!(super::content(&path)[..5000], [0x5a; 5000]);
    }
}
