//! Chains and files: what a name in an image may and may not lead to. That a
//! file was left alone is the kernel's word, not ours: it tells of every open.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use qcow2_ublk::chain::{self, Policy};
use qcow2_ublk::{Disk, ErrorKind};

use super::craft::*;
use super::{bounded, open, options, whole};
use crate::common::lab::watched;

/// Tells whether a file was opened.
struct Watch(Inotify);

impl Watch {
    fn new(path: &Path) -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap();
        inotify.add_watch(path, AddWatchFlags::IN_OPEN).unwrap();
        Self(inotify)
    }

    fn was_opened(&self) -> bool {
        match self.0.read_events() {
            Ok(events) => !events.is_empty(),
            Err(Errno::EAGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A folder for images, with a file next to it that is none of their business.
struct Lab {
    _dir: tempfile::TempDir,
    images: PathBuf,
    secret: PathBuf,
    watch: Watch,
}

const SECRET: &[u8] = b"root:$6$TOPSECRET:::";

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, SECRET.repeat(1000)).unwrap();
        let watch = Watch::new(&secret);
        fs::File::open(&secret).unwrap();
        assert!(watch.was_opened(), "the watch works");
        assert!(!watch.was_opened());
        Self {
            _dir: dir,
            images,
            secret,
            watch,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// Names that lead to the secret, or would with another program.
    fn names(&self) -> Vec<Vec<u8>> {
        let secret = self.secret.to_str().unwrap();
        symlink(&self.secret, self.path("link")).unwrap();
        symlink(self.images.parent().unwrap(), self.path("folder")).unwrap();
        fs::create_dir(self.path("below")).unwrap();
        let device = self.secret.to_str().unwrap().replacen('/', "//", 1);
        let json = format!("json:{{\"driver\":\"file\",\"filename\":\"{secret}\"}}");
        [
            secret,
            "../secret",
            "below/../../secret",
            "./././../secret",
            "link",
            "folder/secret",
            &device,
            &format!("/proc/self/root{secret}"),
            &format!("/proc/self/cwd/{secret}"),
            &json,
            &json.replace("json:", "json: "),
            &format!("file:{secret}"),
            &format!("file://{secret}"),
            &format!("raw:{secret}"),
            &format!("host_device:{secret}"),
            &format!("fat:{secret}"),
            &format!("blkdebug::{secret}"),
            &format!("nbd:unix:{secret}"),
            "nbd://localhost/",
            "https://localhost/secret",
            "fd:0",
            "fd:/proc/self/fd/0",
            "exec:cat ../secret",
            "|cat ../secret",
            "",
        ]
        .into_iter()
        .map(|name| name.as_bytes().to_vec())
        .collect()
    }
}

/// Everything one can do with an image, on an image that names `secret` in
/// every way there is: as backing file and as data file.
#[test]
fn names_lead_nowhere_else() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let image = path.to_str().unwrap();
    let copy = lab.path("copy");
    let copy = copy.to_str().unwrap();
    let verbs: &[&[&str]] = &[
        &["info", image],
        &["info", "--backing-chain", image],
        &["check", image],
        &["check", "-r", "all", image],
        &["map", image],
        &["measure", "-O", "qcow2", image],
        &["convert", "-O", "raw", image, copy],
        &["compare", image, image],
        &["snapshot", "-l", image],
        &["snapshot", "-c", "one", image],
        &["bitmap", "list", image],
        &["bitmap", "--add", image, "b"],
        &["amend", "-o", "lazy_refcounts=on", image],
        &["resize", image, "+64k"],
        &["commit", image],
        &["rebase", "-b", "", image],
        &["io", "-c", "read 0 64k", image],
        &["io", "-c", "write 4k 4k", image],
        &["create", "-b", image, "-F", "qcow2", copy],
    ];
    let everything = std::env::var_os("HOSTILE_ALL").is_some();
    for name in lab.names() {
        for (kind, format) in [("backing", "raw"), ("backing", "qcow2"), ("data", "")] {
            // Every verb for the plain ways out, the most telling for others.
            let telling = ["info", "map", "convert", "io"];
            let all = everything || lab.secret.as_os_str().as_bytes() == name || name == b"link";
            for args in verbs
                .iter()
                .filter(|args| all || telling.contains(&args[0]))
            {
                let mut craft = Craft::new(16);
                // Nothing of its own at 64k, and all of it elsewhere.
                craft.put64(craft.at(4), 0).count(5, 0);
                if kind == "data" {
                    if name.is_empty() {
                        continue;
                    }
                    craft.extension(DATA_FILE, &name).put64(INCOMPATIBLE, 4);
                } else {
                    craft.backing(&name, format);
                }
                craft.save(&path);
                let output = bounded(super::LIMIT, args);
                let what = format!("{kind} {}: {args:?}", String::from_utf8_lossy(&name));
                assert!(!lab.watch.was_opened(), "{what}: opened the secret");
                let text = [output.stdout, output.stderr].concat();
                let leak = text.windows(9).any(|bytes| bytes == b"TOPSECRET");
                assert!(!leak, "{what}: shows the secret");
                if let Ok(copied) = fs::read(copy) {
                    assert!(
                        !copied.windows(9).any(|bytes| bytes == b"TOPSECRET"),
                        "{what}"
                    );
                    fs::remove_file(copy).unwrap();
                }
                // What needs the file says which, and what to do.
                let needs = matches!(args[0], "map" | "convert" | "compare" | "io" | "measure");
                if needs && !name.is_empty() {
                    assert!(!output.status.success(), "{what}");
                    let text = String::from_utf8_lossy(&text).into_owned();
                    assert!(text.contains("a.qcow2"), "{what}: {text}");
                    assert!(
                        text.contains("hint:") || text.contains("No such file"),
                        "{what}: {text}"
                    );
                }
            }
        }
    }
    // With permission it is opened: the watch would have seen it.
    let mut craft = Craft::new(16);
    craft.backing(b"../secret", "raw");
    craft.save(&path);
    bounded(
        super::LIMIT,
        &["io", "--trust-chain", "-r", "-c", "read 0 4k", image],
    );
    assert!(lab.watch.was_opened());
}

/// A link that changes its target all the time is followed only where it may
/// lead.
#[test]
fn links_that_change_meanwhile() {
    let lab = Lab::new();
    let good = lab.path("good");
    fs::write(&good, [1; 1 << 16]).unwrap();
    let path = lab.path("a.qcow2");
    Craft::new(16).backing(b"link", "raw").save(&path);
    let link = lab.path("link");
    symlink("good", &link).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let next = lab.path("next");
            while !stop.load(Ordering::Relaxed) {
                for target in ["../secret", "good"] {
                    symlink(target, &next).unwrap();
                    fs::rename(&next, &link).unwrap();
                }
            }
        });
        let (mut opened, mut refused) = (0, 0);
        for _ in 0..20_000 {
            match open(&path, false) {
                Ok(_) => opened += 1,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Policy, "{error}");
                    refused += 1;
                }
            }
            if opened > 50 && refused > 50 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(opened > 50 && refused > 50, "{opened}, {refused}");
    });
    assert!(!lab.watch.was_opened());
}

fn trusting(writable: bool) -> chain::Options {
    chain::Options {
        policy: Policy {
            trust_chain: true,
            ..Policy::default()
        },
        ..options(writable)
    }
}

/// Chains that come back to where they began, by whatever name.
#[test]
fn loops_by_every_name() {
    let lab = Lab::new();
    let (a, b) = (lab.path("a.qcow2"), lab.path("b.qcow2"));
    fs::create_dir(lab.path("below")).unwrap();
    let names: [&[u8]; 6] = [
        b"a.qcow2",
        b"./below/../a.qcow2",
        b"symbolic",
        b"below/symbolic",
        b"hard",
        b"b.qcow2",
    ];
    Craft::new(16).save(&a);
    symlink("a.qcow2", lab.path("symbolic")).unwrap();
    symlink("../a.qcow2", lab.path("below/symbolic")).unwrap();
    for name in names {
        // To itself, and by way of another image.
        for through in [false, true] {
            Craft::new(16)
                .backing(if through { b"b.qcow2" } else { name }, "qcow2")
                .save(&a);
            Craft::new(12).backing(name, "qcow2").save(&b);
            let _ = fs::remove_file(lab.path("hard"));
            fs::hard_link(&a, lab.path("hard")).unwrap();
            for options in [options(false), options(true), trusting(true)] {
                let opened = watched(super::HANGS, || Disk::open(&a, &options));
                let error = opened.map(drop).unwrap_err();
                let said = whole(&error);
                if error.kind() == ErrorKind::Busy {
                    // Open for writing above, so that it cannot be read below.
                    assert!(options.writable, "{said}");
                    continue;
                }
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{said}");
                assert!(said.contains("is a loop"), "{said}");
                assert!(said.contains("rebase -u"), "{said}");
            }
        }
    }
}

/// An image that is its own data file, by whatever name.
#[test]
fn an_image_is_not_its_own_data_file() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    symlink("a.qcow2", lab.path("symbolic")).unwrap();
    for name in ["a.qcow2", "symbolic", "hard", "./a.qcow2"] {
        let mut craft = Craft::new(16);
        craft
            .extension(DATA_FILE, name.as_bytes())
            .put64(INCOMPATIBLE, 4);
        craft.save(&path);
        let before = fs::read(&path).unwrap();
        let _ = fs::remove_file(lab.path("hard"));
        fs::hard_link(&path, lab.path("hard")).unwrap();
        for writable in [false, true] {
            let error = open(&path, writable).map(drop).unwrap_err();
            let said = whole(&error);
            // Or its lock is in the way.
            let busy = writable && error.kind() == ErrorKind::Busy;
            assert!(
                busy || said.contains("its own external data file"),
                "{said}"
            );
        }
        assert!(fs::read(&path).unwrap() == before);
    }
}

/// Directories, devices, FIFOs and sockets are no images, wherever they are
/// named; none of them keeps us waiting.
#[test]
fn things_that_are_no_files() {
    let lab = Lab::new();
    let fifo = lab.path("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    fs::create_dir(lab.path("directory")).unwrap();
    let _socket = UnixListener::bind(lab.path("socket")).unwrap();
    let things = [
        ("fifo", "a FIFO"),
        ("directory", "directory"),
        ("socket", "socket"),
        ("/dev/null", "a character device"),
        ("/dev/zero", "a character device"),
        ("/dev/tty", "a character device"),
        ("/proc/self/fd/0", ""),
        ("/proc/self/mem", ""),
    ];
    let path = lab.path("a.qcow2");
    for (name, what) in things {
        let direct = lab.images.join(name);
        let opened = watched(super::HANGS, || open(&direct, false));
        let said = whole(&opened.map(drop).unwrap_err());
        assert!(said.contains(what), "{name}: {said}");
        for kind in ["raw", "qcow2", "data"] {
            let mut craft = Craft::new(16);
            if kind == "data" {
                craft
                    .extension(DATA_FILE, name.as_bytes())
                    .put64(INCOMPATIBLE, 4);
            } else {
                craft.backing(name.as_bytes(), kind);
            }
            craft.save(&path);
            for options in [trusting(false), options(false)] {
                let opened = watched(super::HANGS, || Disk::open(&path, &options));
                let Err(error) = opened else {
                    // What claims to be a file with nothing in it.
                    assert!(name.starts_with("/proc") && kind != "qcow2", "{name}");
                    continue;
                };
                let said = whole(&error);
                let named = said.contains(what) || said.contains("device or address");
                assert!(named || error.kind() == ErrorKind::Policy, "{name}: {said}");
                assert!(said.contains(name), "{name}: {said}");
            }
        }
    }
}

/// A raw backing file that looks like an image is read as it is: what a guest
/// wrote there names no files.
#[test]
fn what_looks_like_an_image_is_not_followed() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let raw = lab.path("raw");
    let mut inner = Craft::new(16);
    inner.backing(lab.secret.as_os_str().as_bytes(), "raw");
    inner.save(&raw);
    let expected = fs::read(&raw).unwrap();
    let mut craft = Craft::new(16);
    craft
        .put64(craft.at(4), 0)
        .backing(b"raw", "raw")
        .save(&path);
    let disk = open(&path, false).unwrap();
    let mut bytes = vec![0; expected.len()];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected);
    drop(disk);
    // Nor is a format guessed that nobody has said.
    let mut craft = Craft::new(16);
    craft.put64(craft.at(4), 0).backing(b"raw", "").save(&path);
    let said = whole(&open(&path, false).map(drop).unwrap_err());
    assert!(said.contains("--backing-format"), "{said}");
    // Nor one that we do not know.
    for format in ["vmdk", "luks", "host_cdrom", "nbd", "../raw"] {
        craft = Craft::new(16);
        craft.backing(b"raw", format).save(&path);
        let said = whole(&open(&path, false).map(drop).unwrap_err());
        assert!(said.contains("neither qcow2 nor raw"), "{format}: {said}");
    }
    assert!(!lab.watch.was_opened());
}

/// Files that become shorter or longer while they are in use.
#[test]
fn files_that_shrink_and_grow_while_open() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let base = lab.path("base");
    for keep in [
        0,
        100,
        1 << 16,
        3 << 16,
        5 << 16,
        (5 << 16) + 1000,
        40 << 16,
    ] {
        for writable in [false, true] {
            fs::write(&base, [9; 1 << 20]).unwrap();
            Craft::new(16).backing(b"base", "raw").save(&path);
            let disk = open(&path, writable).unwrap();
            let cut = |path: &Path| {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.set_len(keep).unwrap();
            };
            cut(&path);
            cut(&base);
            let work = || {
                let mut bytes = vec![1; 1 << 19];
                if disk.read_at(&mut bytes, 0).is_ok() {
                    let (own, below) = bytes.split_at(1 << 16);
                    assert!(own.iter().all(|byte| [0, 0x5a].contains(byte)), "{keep}");
                    assert!(below.iter().all(|byte| [0, 9].contains(byte)), "{keep}");
                }
                if writable {
                    let _ = disk.write_at(&[7; 1 << 17], 1 << 16);
                    let _ = disk.discard_at(0, 1 << 16);
                    let _ = disk.flush();
                    let _ = disk.close();
                }
            };
            watched(super::HANGS, work);
            let _ = qcow2_ublk::report::check(&path, false, |_| {});
        }
    }
}
