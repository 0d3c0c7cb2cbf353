//! Chains of files that strangers have written: whatever they name, nothing is
//! opened outside the folder they are in; no loop without end; what can be
//! opened can be read.
//!
//! These are files of the host, in a folder that is made for them and goes when
//! they do: names, links and folders are what it is about.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use qcow2_ublk::chain::{self, Chain, Policy};
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
use qcow2_ublk::storage::sim::Image;

use super::common::{self, lab};
use super::input::Input;
use super::recipe;

/// Files of a chain at most.
const FILES: usize = 5;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    // In memory, where there is such a place: a disk is slow.
    let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let scratch = scratch.expect("a folder");
    let inside = scratch.path().join("inside");
    let outside = scratch.path().join("outside");
    fs::create_dir_all(inside.join("below")).expect("a folder");
    fs::create_dir(&outside).expect("a folder");
    fs::write(outside.join("secret"), [0x5e; 4096]).expect("a file");
    fs::write(inside.join("raw"), [0x11; 3000]).expect("a file");
    let allowed = input.u8();
    for n in 0..=usize::from(input.u8()) % FILES {
        file(&mut input, &inside.join(format!("f{n}")));
    }
    let policy = Policy {
        trust_chain: false,
        allow_paths: match allowed & 3 {
            1 => vec![inside.join("below")],
            _ => Vec::new(),
        },
    };
    let options = chain::Options {
        policy,
        writable: allowed & 4 != 0,
        no_backing: allowed & 24 == 24,
        backing_format: (allowed & 32 != 0).then(|| "raw".to_owned()),
        ..chain::Options::default()
    };
    common::block_on(async {
        match chain::open(&inside.join("f0"), &options).await {
            Ok(chain) => used(chain, &inside, options.writable).await,
            Err(error) => assert!(error.to_string().len() > 8),
        }
    });
    // Nobody has written there.
    assert_eq!(
        fs::read(outside.join("secret")).expect("it is there"),
        [0x5e; 4096]
    );
}

async fn used(chain: Chain, inside: &Path, writable: bool) {
    assert!(chain.layers().len() <= 64);
    // The kernel says which files are open, not the names that led to them.
    for fd in chain.fds() {
        let file = fs::read_link(format!("/proc/self/fd/{fd}")).expect("an open file");
        assert!(file.starts_with(inside), "{} is open", file.display());
    }
    let engine = Engine::new(chain, engine::Options::default());
    let len = engine.size().min(64 << 10);
    if let Ok(seen) = lab::read(&engine, 0, 0, len).await {
        assert!(
            !seen.windows(16).any(|w| w == [0x5e; 16]),
            "a secret is shown"
        );
    }
    if writable {
        let _ = lab::write(&engine, 0, 0, &vec![0xc4; len.min(4096) as usize], false).await;
        let _ = engine.close().await;
    }
}

/// One file: an image that names another, damaged or not, or something else.
fn file(input: &mut Input<'_>, path: &Path) {
    let what = input.u8();
    let name = name(input, path);
    match what % 8 {
        0..5 => {
            let format = ["raw", "qcow2", "file", "vmdk"][usize::from(what >> 6)];
            let backing = Backing {
                file: name.clone(),
                format: Some(format.to_owned()),
            };
            let options = CreateOptions {
                cluster_size: 4096,
                backing: (what & 8 == 0).then_some(backing),
                data_file: (what & 24 == 24).then_some(name),
                ..CreateOptions::new(32 << 10)
            };
            let Ok(new) = options.build() else {
                return;
            };
            let mut image = Image::new();
            for (at, bytes) in &new.chunks {
                image.write(at.0, bytes);
            }
            image.set_len(new.file_len);
            // Some bytes of the header changed.
            for _ in 0..what >> 5 & 1 {
                let at = u64::from(input.u16() % 1024);
                image.write(at, input.bytes(4));
            }
            image.save(path).expect("a file");
        }
        5 => {
            let len = usize::from(input.u8());
            let mut image = Input(input.bytes(len));
            let image = recipe::image(&mut image);
            if image.len() <= 1 << 30 {
                image.save(path).expect("a file");
            }
        }
        6 => {
            // A link that leads anywhere.
            if !name.as_bytes().contains(&0) && !name.is_empty() {
                let _ = symlink(&name, path);
            }
        }
        _ => {
            let len = usize::from(input.u8());
            fs::write(path, input.bytes(len)).expect("a file");
        }
    }
}

/// What an image may name: its neighbours, itself, what is elsewhere.
fn name(input: &mut Input<'_>, path: &Path) -> OsString {
    let inside = path.parent().expect("a folder");
    let outside = inside.with_file_name("outside");
    let n = input.u8();
    let known = |name: PathBuf| name.into_os_string();
    match n % 16 {
        0..5 => OsString::from(format!("f{}", n % 16)),
        5 => "raw".into(),
        6 => "../outside/secret".into(),
        7 => known(outside.join("secret")),
        8 => known(inside.join("raw")),
        9 => "below/../raw".into(),
        10 => "below".into(),
        11 => ".".into(),
        12 => "/proc/self/fd/0".into(),
        13 => "json:{\"file.filename\":\"/etc/passwd\"}".into(),
        14 => known(inside.join("below/../../outside/secret")),
        _ => {
            let len = usize::from(input.u8() % 40);
            OsString::from_vec(input.bytes(len).to_vec())
        }
    }
}
