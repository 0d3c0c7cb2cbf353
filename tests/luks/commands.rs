//! The commands: `create -o encrypt.*`, `info`, `map`, `check`, `io`.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::keys::ours;
use super::{Lab, content};
use crate::common::{self, run};

/// Options with qemu-img's names make what they say; `info` says it as
/// qemu-img does.
#[test]
fn create_takes_qemu_imgs_options() {
    let lab = Lab::new();
    for (options, cipher) in [
        ("encrypt.iter-time=1", "aes-256"),
        (
            "encrypt.iter-time=1,encrypt.cipher-alg=serpent-128,encrypt.cipher-mode=cbc,\
             encrypt.ivgen-alg=essiv,encrypt.hash-alg=sha512",
            "serpent-128",
        ),
        (
            "encrypt.iter-time=1,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,\
             encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=md5,cluster_size=4k",
            "aes-128",
        ),
    ] {
        let path = lab.path("a.qcow2");
        let (file, key) = (path.to_str().unwrap(), lab.key.to_str().unwrap());
        let options = format!("encrypt.format=luks,{options}");
        let (code, text) = ours(&["create", "-o", &options, "--key-file", key, file, "4M"]);
        assert_eq!((code, text.as_str()), (Some(0), ""));
        lab.qemu_io(&path, &["write -P 0x5a 0 100k"]);
        let json = |program: &str, args: &[&str]| -> Value {
            let (code, text) = run(program, args);
            assert_eq!(code, Some(0), "{text}");
            serde_json::from_str(&text).unwrap()
        };
        let exe = env!("CARGO_BIN_EXE_qcow2-ublk");
        let ours = json(exe, &["info", "--output=json", file]);
        let theirs = json("qemu-img", &["info", "--output=json", file]);
        let encrypt = |info: &Value| info["format-specific"]["data"]["encrypt"].clone();
        assert_eq!(encrypt(&ours), encrypt(&theirs));
        assert_eq!(encrypt(&ours)["cipher-alg"], cipher);
        assert_eq!(ours["encrypted"], true);
        let ours = json(exe, &["map", "--output=json", "--key-file", key, file]);
        let object = format!("secret,id=s,file={key}");
        let opts = Lab::image_opts(&path);
        let args = [
            "map",
            "--output=json",
            "--object",
            &object,
            "--image-opts",
            &opts,
        ];
        assert_eq!(ours, json("qemu-img", &args));
        let (code, text) = run(exe, &["check", file]);
        assert!(code == Some(0) && text.contains("No errors"), "{text}");
        lab.qemu_check(&path);
    }
}

#[test]
fn wrong_options_are_named() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let (file, key) = (path.to_str().unwrap(), lab.key.to_str().unwrap());
    for (options, says) in [
        ("encrypt.format=rot13", "does not accept value 'rot13'"),
        ("encrypt.format=aes", "weak"),
        ("encryption=on", "weak"),
        (
            "encrypt.format=luks,encrypt.cipher-alg=aes-512",
            "'aes-512'",
        ),
        ("encrypt.format=luks,encrypt.cipher-mode=ctr", "'ctr'"),
        ("encrypt.format=luks,encrypt.ivgen-alg=benbi", "'benbi'"),
        ("encrypt.format=luks,encrypt.hash-alg=crc32", "'crc32'"),
        ("encrypt.format=luks,encrypt.iter-time=0", "'0'"),
        ("encrypt.format=luks,encrypt.key-secret=s", "--key-file"),
        ("encrypt.format=luks,encrypt.shape=round", "encrypt.shape"),
        ("encrypt.hash-alg=sha1", "encrypt.format=luks"),
        (
            "encrypt.format=luks,encrypt.cipher-alg=cast5-128",
            "cast5-xts",
        ),
        (
            "encrypt.format=luks,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1",
            "160 bits",
        ),
    ] {
        let (code, text) = ours(&["create", "-o", options, "--key-file", key, file, "4M"]);
        assert!(code == Some(1) && text.contains(says), "{options}: {text}");
        assert!(!path.exists(), "{options}");
    }
    let (code, text) = ours(&["create", "-o", "encrypt.format=luks", file, "4M"]);
    assert!(code == Some(1) && text.contains("--key-file"), "{text}");
    fs::write(lab.path("empty"), "").unwrap();
    let empty = lab.path("empty");
    let (code, text) = ours(&[
        "create",
        "-o",
        "encrypt.format=luks",
        "--key-file",
        empty.to_str().unwrap(),
        file,
        "4M",
    ]);
    assert!(code == Some(1) && text.contains("empty"), "{text}");
}

/// `io` with every source of a passphrase.
#[test]
fn passphrases_come_from_files_descriptors_and_credentials() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", |_, _| {});
    let file = path.to_str().unwrap();
    let exe = env!("CARGO_BIN_EXE_qcow2-ublk");
    let key = lab.key.to_str().unwrap();
    let write = ["-c", "write -P 0x5a 1000 9000"];
    let (code, text) = ours(&[&["io", file, "--key-file", key][..], &write].concat());
    assert_eq!(code, Some(0), "{text}");
    let for_it = format!("a.qcow2={key}");
    let (code, text) = ours(&[
        "io",
        file,
        "--key-file",
        &for_it,
        "-c",
        "read -P 0x5a 1000 9000",
    ]);
    assert!(code == Some(0) && !text.contains("failed"), "{text}");
    let read = "read -P 0x5a 1000 9000";
    let shell = format!("exec {exe} io {file} --key-fd 7 -c '{read}' 7<{key}");
    let (code, text) = run("sh", &["-c", &shell]);
    assert!(code == Some(0) && !text.contains("failed"), "{text}");
    let output = Command::new(exe)
        .args(["io", file, "--key-credential", "key", "-c", read])
        .env("CREDENTIALS_DIRECTORY", lab.folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let (code, text) = ours(&["io", file, "-c", read]);
    assert!(code == Some(2) && text.contains("--key-file"), "{text}");
    let (code, text) = ours(&["io", file, "--key-file", "/dev/null", "-c", read]);
    assert!(code == Some(1) && text.contains("empty"), "{text}");
    assert_eq!(content(&path)[1000..10_000], [0x5a; 9000]);
    let (code, text) = ours(&["info", file]);
    assert!(code == Some(0) && text.contains("encrypted: yes"), "{text}");
    let theirs = common::qemu_img(&["info", file]);
    let section = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| *line != "    encrypt:");
        lines
            .skip(1)
            .take_while(|line| line.starts_with("        "))
            .map(str::to_owned)
            .collect()
    };
    let (mut ours, mut theirs) = (section(&text), section(&theirs));
    assert!(ours.len() > 30, "{text}");
    // qemu-img lists them in no order.
    ours.sort();
    theirs.sort();
    assert_eq!(ours, theirs);
}
