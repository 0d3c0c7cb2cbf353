//! What is opened, by whom, and what is refused.

use super::*;

#[test]
fn row_21_chain_loops_are_refused_at_once() {
    let folder = Folder::new();
    for (top, below) in [
        ("l1", "l2"),
        ("l2", "l1"),
        ("self", "self"),
        ("above", "l1"),
    ] {
        let path = folder.path(top);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "1M"]].concat());
    }
    // By another name too.
    std::fs::hard_link(folder.path("self"), folder.path("other")).unwrap();
    for top in ["l1", "self", "other", "above"] {
        for options in [chain::Options::default(), writable()] {
            // Our own write lock may be in the way of the second opening.
            let error = Disk::open(&folder.path(top), &options).unwrap_err();
            let kind = error.kind();
            assert!(
                kind == ErrorKind::Corrupt || options.writable && kind == ErrorKind::Busy,
                "{top}: {error}"
            );
        }
    }
}

#[test]
fn row_22_a_raw_backing_file_is_never_probed() {
    let folder = Folder::new();
    let inner = folder.create("base", "", M);
    qemu_io(&inner, &["write -P 0x66 0 1M"]);
    let bytes = std::fs::read(&inner).unwrap();
    let path = folder.overlay("top", "base", "raw", "", 4 * M);
    let disk = open_rw(&path);
    assert!(
        read(&disk, 0, bytes.len() as u64) == bytes,
        "it was interpreted"
    );
    write(&disk, 512, 512, 1);
    close_and_compare(disk, &path);

    // No recorded format: refused, unless the user gives it.
    let path = folder.create("unsaid", "", 4 * M);
    qemu_img(&["rebase", "-u", "-F", "raw", "-b", "base", name(&path)]);
    let mut header = peek(&path, 0, 512);
    let at = header
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .expect("the format's extension");
    header[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x79]);
    poke(&path, 0, &header);
    refused(&path, &chain::Options::default(), ErrorKind::Policy);
    for (format, expected) in [("raw", bytes[0]), ("qcow2", 0x66)] {
        let options = chain::Options {
            backing_format: Some(format.to_owned()),
            ..chain::Options::default()
        };
        let disk = Disk::open(&path, &options).unwrap();
        assert_reads(&disk, 0, 1, expected);
    }
}

#[test]
fn sixty_four_layers_and_not_one_more() {
    let folder = Folder::new();
    let bottom = folder.create("0", "cluster_size=4096", 256 * K);
    qemu_io(&bottom, &["write -P 0x40 0 256k"]);
    for n in 1..65_u64 {
        let below = (n - 1).to_string();
        let layer = folder.overlay(
            &n.to_string(),
            &below,
            "qcow2",
            ",cluster_size=4096",
            256 * K,
        );
        if n % 16 == 0 && n < 64 {
            let command = format!("write -P {} {} 4k", 0x40 + n, n * 4096);
            let (code, text) = run("qemu-io", &["-f", "qcow2", "-c", &command, name(&layer)]);
            assert_eq!(code, Some(0), "{text}");
        }
    }
    let path = folder.path("63");
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 16 * 4096, 0x40);
    assert_reads(&disk, 16 * 4096, 4096, 0x50);
    assert_reads(&disk, 48 * 4096, 4096, 0x70);
    write(&disk, 20 * 4096 + 512, 512, 1);
    close_and_compare(disk, &path);
    refused(
        &folder.path("64"),
        &chain::Options::default(),
        ErrorKind::Unsupported,
    );
}

#[test]
fn protocol_names_are_refused_and_nothing_is_opened() {
    for backing in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/hostname\"}",
        "nbd://127.0.0.1:1/x",
        "file:base",
        "fat:rw:/tmp",
    ] {
        let folder = Folder::new();
        folder.raw("base", &[1; 512]);
        let path = folder.path("a");
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "1M"]].concat());
        refused(&path, &chain::Options::default(), ErrorKind::Policy);
        refused(&path, &writable(), ErrorKind::Policy);
    }
}

#[test]
fn backing_files_are_opened_only_where_the_policy_allows() {
    let (folder, outside) = (Folder::new(), Folder::new());
    let secret = outside.raw("secret", &[0x5e; 65536]);
    std::os::unix::fs::symlink(&secret, folder.path("link")).unwrap();
    let make = |top: &str, backing: &str| {
        let path = folder.path(top);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing,
        ];
        qemu_img(&[args.as_slice(), &[name(&path), "64k"]].concat());
        path
    };
    let up = format!(
        "../{}/secret",
        outside.0.path().file_name().unwrap().to_str().unwrap()
    );
    let with = |trust_chain, allow_paths: &[&Path]| chain::Options {
        policy: chain::Policy {
            trust_chain,
            allow_paths: allow_paths.iter().map(|p| p.to_path_buf()).collect(),
        },
        ..chain::Options::default()
    };
    for (top, backing) in [("a", name(&secret)), ("b", up.as_str()), ("c", "link")] {
        let path = make(top, backing);
        refused(&path, &chain::Options::default(), ErrorKind::Policy);
        let disk = Disk::open(&path, &with(true, &[])).unwrap();
        assert_reads(&disk, 0, 64 * K, 0x5e);
        if top != "c" {
            let disk = Disk::open(&path, &with(false, &[outside.0.path()])).unwrap();
            assert_reads(&disk, 0, 64 * K, 0x5e);
        }
        refused(&path, &with(false, &[Path::new("/usr")]), ErrorKind::Policy);
    }
}

#[test]
fn locks_keep_qemu_and_us_apart() {
    let folder = Folder::new();
    folder.create("base", "", M);
    let path = folder.overlay("top", "base", "qcow2", "", M);
    let qemu = |args: &[&str]| run("qemu-io", args).0 == Some(0);
    let write_top = ["-f", "qcow2", "-c", "write 0 512", name(&path)];
    let read_top = ["-r", "-f", "qcow2", "-c", "read 0 512", name(&path)];
    let base = folder.path("base");
    let write_base = ["-f", "qcow2", "-c", "write 0 512", name(&base)];

    let disk = open_rw(&path);
    assert!(!qemu(&write_top), "QEMU wrote beside us");
    assert!(!qemu(&read_top));
    assert!(!qemu(&write_base), "QEMU wrote below us");
    refused(&path, &writable(), ErrorKind::Busy);
    refused(&path, &chain::Options::default(), ErrorKind::Busy);
    let shared = chain::Options {
        force_share: true,
        ..chain::Options::default()
    };
    Disk::open(&path, &shared).unwrap();
    disk.close().unwrap();

    let disk = open_ro(&path);
    assert!(qemu(&read_top), "readers go together");
    assert!(!qemu(&write_top));
    disk.close().unwrap();
    assert!(qemu(&write_top) && qemu(&write_base), "given up at close");

    for (flags, blocks_readers) in [(vec![], true), (vec!["-r"], false)] {
        let spawn = || {
            Command::new("qemu-io")
                .args(&flags)
                .args(["-f", "qcow2", name(&path)])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .expect("run qemu-io")
        };
        let mut other = spawn();
        // It has the image open when it has its locks. If we have them at that
        // very moment, it gives up.
        let start = Instant::now();
        while Disk::open(&path, &writable()).is_ok() {
            if other.try_wait().unwrap().is_some() {
                other = spawn();
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "QEMU took no locks"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        refused(&path, &writable(), ErrorKind::Busy);
        let reader = Disk::open(&path, &chain::Options::default());
        assert_eq!(reader.is_err(), blocks_readers, "{flags:?}");
        drop(other.stdin.take());
        other.wait().unwrap();
    }
    close_and_compare(open_rw(&path), &path);
}

#[test]
fn a_file_shorter_than_its_metadata_says() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_io(&path, &["write -P 0x21 0 128k"]);
    let len = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(len - 40 * K).unwrap();
    drop(file);
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 88 * K, 0x21);
    assert_reads(&disk, 88 * K, M - 88 * K, 0);
    write(&disk, 120 * K, 4 * K, 3);
    assert_reads(&disk, 88 * K, 32 * K, 0);
    assert_reads(&disk, 124 * K, 4 * K, 0);
    write(&disk, 512 * K, 64 * K, 4);
    close_and_compare(disk, &path);
}

#[test]
fn direct_io_with_clusters_of_every_size() {
    for cluster in ["512", "1024", "4096", "65536", "2M"] {
        let folder = Folder::new();
        folder.raw("base", &vec![0x77; 300 * 1024 + 512]);
        let options = format!(",cluster_size={cluster}");
        let path = folder.overlay("top", "base", "raw", &options, 8 * M);
        let options = chain::Options {
            cache: CacheMode::None,
            ..writable()
        };
        let disk = Disk::open(&path, &options).unwrap();
        assert_reads(&disk, 0, 300 * K + 512, 0x77);
        assert_reads(&disk, 300 * K + 512, 100 * K, 0);
        write(&disk, 1000, 10, 1);
        write(&disk, 300 * K, 4 * K, 2);
        write(&disk, 3 * M + 512, 2 * M, 3);
        disk.write_zeroes_at(4 * M, 100 * K + 512, true).unwrap();
        disk.discard_at(3 * M, 512 * K).unwrap();
        write(&disk, 3 * M + 1, 1, 9);
        disk.grow(8 * M + 512).unwrap();
        write(&disk, 8 * M, 512, 4);
        let content = close_and_compare(disk, &path);
        assert_eq!(content[1000..1010], [1; 10]);
        assert_eq!(content[999], 0x77);
        assert_eq!(content[1010], 0x77);
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    let before = std::fs::read(&path).unwrap();
    let disk = open_ro(&path);
    let results = [
        disk.write_at(&[1; 512], 0),
        disk.write_zeroes_at(0, 64 * K, true),
        disk.discard_at(0, 64 * K),
        disk.grow(2 * M),
    ];
    for result in results {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}
