//! Encrypted images, with QEMU and cryptsetup as oracles.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod cow;
mod keys;
mod luks2;
mod model;
mod prompt;
mod qemu;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::run;
use qcow2_ublk::crypto::{Effort, Keyring, Secret, luks1};
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::{Disk, chain};

/// The passphrase, with a line end that belongs to it.
const PASSPHRASE: &[u8] = "a secr\u{e9}t with its line end\n".as_bytes();

/// A folder with a key file.
struct Lab {
    folder: tempfile::TempDir,
    key: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        fs::write(&key, PASSPHRASE).unwrap();
        Self { folder, key }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `--object secret,id=s,file=KEY`.
    fn secret(&self) -> [OsString; 2] {
        let object = format!("secret,id=s,file={}", self.key.display());
        ["--object".into(), object.into()]
    }

    /// Makes an image with qemu-img; `options` besides those for the secret.
    fn qemu_create(&self, name: &str, options: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        let mut args: Vec<OsString> = vec!["create".into(), "-q".into()];
        args.extend(self.secret());
        let options = format!("encrypt.key-secret=s,{options}");
        args.extend(["-f", "qcow2", "-o", &options].map(OsString::from));
        args.extend([path.clone().into_os_string(), size.into()]);
        common::qemu_img(&args);
        path
    }

    /// The image as QEMU's `--image-opts` name it.
    fn image_opts(path: &Path) -> String {
        format!(
            "driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={}",
            path.display()
        )
    }

    /// Runs qemu-io; its exit code and what it says.
    fn qemu_io_with(&self, opts: &str, commands: &[&str]) -> (Option<i32>, String) {
        let mut args: Vec<OsString> = self.secret().into();
        args.push("--image-opts".into());
        for command in commands {
            args.extend(["-c".into(), command.into()]);
        }
        args.push(opts.into());
        run("qemu-io", &args)
    }

    /// Runs commands of qemu-io, all of which succeed.
    fn qemu_io(&self, path: &Path, commands: &[&str]) {
        let (code, text) = self.qemu_io_with(&Self::image_opts(path), commands);
        assert!(code == Some(0) && !text.contains("failed"), "{text}");
    }

    /// The whole disk as QEMU sees it.
    fn qemu_content(&self, path: &Path) -> Vec<u8> {
        let raw = self.path("content.raw");
        let mut args: Vec<OsString> = vec!["convert".into()];
        args.extend(self.secret());
        args.extend(["--image-opts", &Self::image_opts(path), "-O", "raw"].map(OsString::from));
        args.push(raw.clone().into_os_string());
        common::qemu_img(&args);
        fs::read(raw).unwrap()
    }

    /// `qemu-img check` finds nothing.
    fn qemu_check(&self, path: &Path) {
        let mut args: Vec<OsString> = vec!["check".into()];
        args.extend(self.secret());
        args.extend(["--image-opts".into(), Self::image_opts(path).into()]);
        common::qemu_img(&args);
    }

    /// Makes an image with our own hands.
    fn create(
        &self,
        name: &str,
        change: impl FnOnce(&mut luks1::Format, &mut CreateOptions),
    ) -> PathBuf {
        let path = self.path(name);
        let mut format = luks1::Format {
            effort: QUICK,
            ..luks1::Format::default()
        };
        let mut options = CreateOptions::new(4 << 20);
        change(&mut format, &mut options);
        options.luks = Some(format.make(PASSPHRASE).unwrap().into());
        common::lab::block_on(chain::create(&path, &options)).unwrap();
        path
    }
}

const QUICK: Effort = Effort(Duration::from_millis(1));

fn keyring(passphrase: &[u8]) -> Option<Arc<dyn Keyring>> {
    Some(Arc::new(Secret::new(passphrase.to_vec())))
}

fn options(writable: bool, passphrase: &[u8]) -> chain::Options {
    let mut options = chain::Options {
        writable,
        ..chain::Options::default()
    };
    options.image.keys = keyring(passphrase);
    options
}

fn open(path: &Path, writable: bool) -> Disk {
    Disk::open(path, &options(writable, PASSPHRASE)).unwrap()
}

fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    disk.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// The whole disk as we see it.
fn content(path: &Path) -> Vec<u8> {
    let disk = open(path, false);
    let bytes = read(&disk, 0, disk.size() as usize);
    disk.close().unwrap();
    bytes
}

/// True when the file has 32 equal bytes of `pattern` in a row.
fn shows(path: &Path, pattern: u8) -> bool {
    let file = fs::read(path).unwrap();
    file.windows(32).any(|bytes| bytes == [pattern; 32])
}
