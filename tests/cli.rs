//! The program from outside: what it prints where, its exit codes, and that
//! `create`, `io` and `bench` behave as QEMU's tools do.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// A directory with images, in which programs run.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.0.path());
        for name in ["NOTIFY_SOCKET", "JOURNAL_STREAM", "QCOW2_UBLK_LOG"] {
            command.env_remove(name);
        }
        command
    }

    fn output(&self, program: &str, args: &[&str], input: &str) -> Output {
        let mut child = self
            .command(program, args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {program}, which this test needs: {e}"));
        // One that has failed does not read.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Runs our program: exit code, standard output, standard error.
    fn ours(&self, args: &[&str]) -> (i32, String, String) {
        texts(&self.output(PROGRAM, args, ""))
    }

    /// Runs our program, which must succeed silently on standard error.
    fn good(&self, args: &[&str]) -> String {
        let (code, out, err) = self.ours(args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
        out
    }

    /// Runs our program, which must fail with `code` and say one sentence on
    /// standard error only.
    fn bad(&self, code: i32, args: &[&str]) -> String {
        let (seen, out, err) = self.ours(args);
        assert_eq!((seen, out.as_str()), (code, ""), "{args:?}: {err}");
        let mut lines = err.lines();
        let first = lines.next().unwrap_or_default();
        assert!(first.starts_with("qcow2-ublk: "), "{args:?}: {err}");
        assert!(
            lines.all(|line| line.starts_with("hint: ")),
            "{args:?}: {err}"
        );
        err
    }

    fn qemu(&self, args: &[&str]) -> String {
        let (code, out, err) = texts(&self.output(args[0], &args[1..], ""));
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        out
    }

    /// What `qemu-img info` says about an image, but for its name and where
    /// things are in the file.
    fn info(&self, name: &str) -> Value {
        let text = self.qemu(&["qemu-img", "info", "--output=json", name]);
        let mut info: Value = serde_json::from_str(&text).unwrap();
        for key in ["filename", "actual-size", "children"] {
            info.as_object_mut().unwrap().remove(key);
        }
        info
    }
}

fn texts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let code = output.status.code();
    let code = code.unwrap_or_else(|| -output.status.signal().unwrap());
    (code, text(&output.stdout), text(&output.stderr))
}

#[test]
fn mistakes_are_one_sentence_with_a_hint() {
    let place = Place::new();
    let err = place.bad(1, &["creat", "a"]);
    assert!(err.contains("'creat'") && err.contains("'create'"), "{err}");
    let err = place.bad(1, &[]);
    assert!(
        err.contains("add, del, list") && err.contains("--help"),
        "{err}"
    );
    assert!(place.bad(1, &["create", "a", "1Q"]).contains("1Q"));
    assert!(
        place
            .bad(1, &["add", "--cache", "unsafe", "a"])
            .contains("unsafe")
    );
    assert!(place.bad(1, &["del"]).contains("<DEVICE>"));
    assert!(place.bad(1, &["del", "/dev/sda"]).contains("/dev/sda"));
    let help = place.good(&["--help"]);
    for verb in [
        "add", "del", "list", "create", "io", "bench", "attach", "detach",
    ] {
        assert!(help.contains(verb), "{verb}");
    }
    assert!(!help.contains("detached"));
    assert!(place.good(&["--version"]).starts_with("qcow2-ublk "));
}

#[test]
fn create_makes_what_qemu_img_makes() {
    let cases: &[&[&str]] = &[
        &["1G"],
        &["0"],
        &["100000"],
        &["1.5T"],
        &["1G", "-o", "cluster_size=512"],
        &["64M", "-o", "cluster_size=4k,refcount_bits=1"],
        &["1T", "-o", "cluster_size=2M,refcount_bits=64"],
        &["1G", "-o", "compat=0.10"],
        &[
            "1G",
            "-o",
            "compat=v3,compression_type=zstd,lazy_refcounts=on",
        ],
        &["-o", "size=7M,preallocation=off"],
        &["-b", "base.raw", "-F", "raw"],
        &["-b", "base.qcow2", "-F", "qcow2", "-o", "cluster_size=512"],
        &["-o", "backing_file=base.qcow2,backing_fmt=qcow2"],
        &["3M", "-b", "base.qcow2", "-F", "qcow2"],
        &["3M", "-u", "-b", "absent", "-F", "qcow2"],
    ];
    let place = Place::new();
    fs::write(place.path("base.raw"), vec![1; 1_000_000]).unwrap();
    place.qemu(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "base.qcow2",
        "5M",
    ]);
    for case in cases {
        let (sizes, options): (Vec<&str>, Vec<&str>) = match case[0].starts_with('-') {
            true => (vec![], case.to_vec()),
            false => (vec![case[0]], case[1..].to_vec()),
        };
        let args = [&["create"][..], &options, &["ours.qcow2"], &sizes].concat();
        assert_eq!(place.good(&args), "");
        let create = ["qemu-img", "create", "-q", "-f", "qcow2"];
        place.qemu(&[&create[..], &options, &["theirs.qcow2"], &sizes].concat());
        assert_eq!(
            place.info("ours.qcow2"),
            place.info("theirs.qcow2"),
            "{case:?}"
        );
        if !case.contains(&"-u") {
            place.qemu(&["qemu-img", "check", "-q", "ours.qcow2"]);
            place.qemu(&["qemu-img", "compare", "-q", "ours.qcow2", "theirs.qcow2"]);
        }
    }
}

#[test]
fn create_refuses_what_it_cannot_do_by_name() {
    let place = Place::new();
    let cases: &[(&[&str], &str)] = &[
        (&["1G", "-o", "extended_l2=on,cluster_size=8k"], "16384"),
        (&["1G", "-o", "preallocation=some"], "preallocation"),
        (&["1G", "-o", "data_file_raw=on"], "requires data-file"),
        (&["1G", "-o", "clutser_size=4k"], "clutser_size"),
        (&["1G", "-o", "cluster_size=3k"], "power of two"),
        (
            &["1G", "-o", "compat=0.10,lazy_refcounts=on"],
            "compatibility level",
        ),
        (&["1G", "-o", "compat=2"], "'2'"),
        (&["3E"], "too large"),
        (&[], "size is missing"),
        (&["-u", "-b", "x", "-F", "raw"], "size is missing"),
        (&["1G", "-b", "x"], "never guessed"),
        (&["1G", "-F", "raw"], "no backing file"),
        (&["-b", "json:{}", "-F", "raw"], "json:"),
        (&["1G", "-b", "x", "-F", "vmdk"], "vmdk"),
    ];
    for (options, word) in cases {
        let err = place.bad(1, &[&["create", "new.qcow2"], *options].concat());
        assert!(err.contains(word), "{options:?}: {err}");
    }
    let err = place.bad(4, &["create", "new.qcow2", "-b", "absent", "-F", "raw"]);
    assert!(err.contains("absent: "), "{err}");
    assert!(
        !place.path("new.qcow2").exists(),
        "a failed attempt left a file"
    );
    // An image over itself would be empty.
    place.good(&["create", "a.qcow2", "1M"]);
    let before = fs::read(place.path("a.qcow2")).unwrap();
    let err = place.bad(1, &["create", "-b", "a.qcow2", "-F", "qcow2", "a.qcow2"]);
    assert!(err.contains("its own backing file"), "{err}");
    assert_eq!(fs::read(place.path("a.qcow2")).unwrap(), before);
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tries until it is so.
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let place = Place::new();
    place.qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let before = fs::read(place.path("a.qcow2")).unwrap();
    let start = || {
        let user = place
            .command("qemu-io", &["-f", "qcow2", "a.qcow2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io is needed");
        Running(user)
    };
    let mut user = start();
    // Reading fails as long as it is being written to. A reader that is there
    // at the moment when qemu-io opens the image makes it fail instead.
    wait_for("qemu-io does not lock the image", || {
        if user.0.try_wait().unwrap().is_some() {
            user = start();
        }
        place.ours(&["io", "-r", "-c", "read -q 0 4k", "a.qcow2"]).0 != 0
    });
    let err = place.bad(5, &["create", "a.qcow2", "1G"]);
    assert!(err.contains("locked by qemu-io (pid "), "{err}");
    assert_eq!(fs::read(place.path("a.qcow2")).unwrap(), before);
    place.bad(5, &["io", "-c", "read 0 4k", "a.qcow2"]);
    place.bad(5, &["bench", "-w", "-c", "1", "a.qcow2"]);
    let err = place.bad(5, &["add", "--foreground", "a.qcow2"]);
    assert!(err.contains("locked by qemu-io (pid "), "{err}");
    let read = ["io", "-r", "-U", "-c", "read -P 0 0 4k", "a.qcow2"];
    assert!(place.good(&read).starts_with("read 4096/4096"));
    drop(user);
    place.good(&["create", "a.qcow2", "1G"]);
}

/// The output without times and rates.
fn timeless(text: &str) -> String {
    let cut = |line: &str| match line.split_once(" ops; ") {
        Some((head, _)) => format!("{head} ops\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(cut).collect()
}

#[test]
fn io_prints_what_qemu_io_prints() {
    let commands = [
        "write -P 0xaa 4k 64k",
        "read -P 0xaa 4k 64k",
        "read -P 0xaa -s 4k -l 1k 0 8k",
        "read -P 0 0 5k",
        "read -P 7 -s 100 -l 50 0 4k",
        "read -v 4080 40",
        "write -P 0x41 4090 20",
        "read -v 4080 40",
        "aio_write -P 3 0 4k",
        "aio_flush",
        "aio_read -P 3 0 1k",
        "aio_flush",
        "flush",
        "writev -P 9 1M 1k 3k",
        "readv -P 9 1M 4k",
        "discard 64k 64k",
        "discard 1000 300",
        "discard 0 0",
        "read -P 0 64k 4k",
        "write -z 0 64k",
        "write -z -u 128k 64k",
        "write -f 200k 512",
        "write -q 0 4k",
        "read -q 0 4k",
        "write 0 1000000",
        "write -n -z 0 1k",
        "length",
        "info",
        "truncate 5M",
        "info",
        "length",
        "read -P 0 4M 1M",
        "read 6M 4k",
        "write 6M 4k",
        "write -c -P 8 3M 64k",
        "read -P 8 3M 64k",
        "alloc 0",
        "alloc 0 4M",
        "alloc 100 64k",
        "alloc 4M 2M",
        "alloc 9M 1k",
        "map",
        "truncate -m full 6M",
        "map",
        "truncate 1M",
        "length",
        "truncate -m falloc 512k",
        "truncate -m most 2M",
        "alloc",
        "map 1",
        "truncate 1000",
        "truncate 2M",
        "read -P 0 1M 1M",
        "map",
        "write -z 5M 512",
        "sleep 1",
    ];
    let place = Place::new();
    let args: Vec<&str> = commands
        .iter()
        .flat_map(|command| ["-c", command])
        .collect();
    for backing in [false, true] {
        place.qemu(&[
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "base.qcow2",
            "2M",
        ]);
        place.qemu(&[
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            "write -q -P 5 0 2M",
            "base.qcow2",
        ]);
        let over = ["-b", "base.qcow2", "-F", "qcow2"];
        for name in ["ours.qcow2", "theirs.qcow2"] {
            let options = if backing { &over[..] } else { &[] };
            let create = ["qemu-img", "create", "-q", "-f", "qcow2"];
            place.qemu(&[&create, options, &[name, "4M"]].concat());
        }
        let ours = place.output(PROGRAM, &[&["io"], &args[..], &["ours.qcow2"]].concat(), "");
        let theirs = [&["-f", "qcow2"], &args[..], &["theirs.qcow2"]].concat();
        let theirs = place.output("qemu-io", &theirs, "");
        let (code, text, _) = texts(&ours);
        let (their_code, their_text, _) = texts(&theirs);
        assert_eq!(timeless(&text), timeless(&their_text));
        assert_eq!((code, their_code), (1, 1));
        place.qemu(&["qemu-img", "check", "-q", "ours.qcow2"]);
        place.qemu(&["qemu-img", "compare", "-q", "ours.qcow2", "theirs.qcow2"]);
    }
}

#[test]
fn io_reads_commands_from_standard_input() {
    let place = Place::new();
    place.good(&["create", "a.qcow2", "4M"]);
    let input =
        "write -P 7 0 4k\n\n  aio_write -P 8 4k 4k\naio_flush\nread -P 8 4k 4k\nquit\nfoo\n";
    let (code, out, err) = texts(&place.output(PROGRAM, &["io", "a.qcow2"], input));
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        timeless(&out),
        "wrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops\n\
         wrote 4096/4096 bytes at offset 4096\n4 KiB, 1 ops\n\
         read 4096/4096 bytes at offset 4096\n4 KiB, 1 ops\n"
    );
    // A mistake is named, does not end the session, and is not forgotten.
    let output = place.output(PROGRAM, &["io", "a.qcow2"], "foo\nread -P 7 0 1\n");
    let (code, out, err) = texts(&output);
    assert_eq!(
        (code, err.as_str()),
        (1, "qcow2-ublk: command \"foo\" not found\n")
    );
    assert!(out.starts_with("read 1/1 bytes"));
    assert!(
        place
            .good(&["io", "-c", "help", "a.qcow2"])
            .contains("aio_write")
    );
}

#[test]
fn io_can_fail_and_die() {
    let place = Place::new();
    place.good(&["create", "a.qcow2", "4M"]);
    // What was written in flight counts as well.
    for command in [
        "read -P 1 0 4k",
        "aio_read -P 1 0 4k",
        "read 4M 1",
        "flush x",
    ] {
        let (code, ..) = place.ours(&["io", "-c", command, "a.qcow2"]);
        assert_eq!(code, 1, "{command}");
    }
    let (code, out, _) = place.ours(&["io", "-r", "-c", "write 0 4k", "a.qcow2"]);
    assert_eq!(
        (code, out.starts_with("write failed: ")),
        (1, true),
        "{out}"
    );
    for (command, signal) in [("abort", libc::SIGABRT), ("sigraise 9", libc::SIGKILL)] {
        let args = [
            "io",
            "-c",
            "write -q -P 4 0 64k",
            "-c",
            "flush",
            "-c",
            command,
        ];
        let (code, ..) = place.ours(&[&args[..], &["a.qcow2"]].concat());
        assert_eq!(code, -signal, "{command}");
        // Nobody holds the image, and what was flushed is there.
        place.good(&["io", "-c", "read -q -P 4 0 64k", "a.qcow2"]);
    }
    // Direct I/O sees the same, where the file system has it.
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let home = Place(home);
    home.good(&["create", "a.qcow2", "4M"]);
    let args = ["io", "--cache", "none", "-c", "write -q -P 6 100 1000"];
    home.good(&[&args[..], &["-c", "read -q -P 6 100 1000", "a.qcow2"]].concat());
    home.qemu(&[
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "read -P 6 100 1000",
        "a.qcow2",
    ]);
}

#[test]
fn bench_announces_what_qemu_img_bench_does() {
    let cases: &[&[&str]] = &[
        &["-c", "100", "-d", "8"],
        &[
            "-c",
            "70",
            "-w",
            "-s",
            "64k",
            "-S",
            "128k",
            "-o",
            "4k",
            "--pattern=7",
        ],
        &["-c", "100", "-w", "-d", "4", "--flush-interval=10"],
        &[
            "-c",
            "100",
            "-w",
            "-d",
            "4",
            "--flush-interval=10",
            "--no-drain",
        ],
    ];
    let place = Place::new();
    for case in cases {
        for name in ["ours.qcow2", "theirs.qcow2"] {
            place.qemu(&["qemu-img", "create", "-q", "-f", "qcow2", name, "16M"]);
        }
        let ours = place.good(&[&["bench"], *case, &["ours.qcow2"]].concat());
        let theirs = place.qemu(
            &[
                &["qemu-img", "bench", "-f", "qcow2"],
                *case,
                &["theirs.qcow2"],
            ]
            .concat(),
        );
        let untimed = |text: &str| {
            let (head, time) = text.split_once("Run completed in ").unwrap();
            let seconds = time.strip_suffix(" seconds.\n").unwrap();
            assert!(
                seconds.parse::<f64>().is_ok() && seconds.contains('.'),
                "{text}"
            );
            head.to_owned()
        };
        assert_eq!(untimed(&ours), untimed(&theirs));
        place.qemu(&["qemu-img", "check", "-q", "ours.qcow2"]);
        place.qemu(&["qemu-img", "compare", "-q", "ours.qcow2", "theirs.qcow2"]);
    }
    let threads = [
        "bench",
        "-w",
        "-c",
        "500",
        "--threads",
        "2",
        "--flush-interval",
        "100",
    ];
    place.good(&[&threads[..], &["--pattern", "9", "-s", "8k", "ours.qcow2"]].concat());
    place.qemu(&["qemu-img", "check", "-q", "ours.qcow2"]);
    place.qemu(&[
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "read -P 9 0 4000k",
        "ours.qcow2",
    ]);
    assert!(place.bad(1, &["bench", "-n", "ours.qcow2"]).contains("-n"));
    assert!(
        place
            .bad(1, &["bench", "-o", "16M", "ours.qcow2"])
            .contains("not inside")
    );
}

#[test]
fn settings_are_refused_with_their_line() {
    let place = Place::new();
    let file = |text: &str| fs::write(place.path("c.toml"), text).unwrap();
    let add = ["add", "--foreground", "--config", "c.toml"];
    file("image = \"a.qcow2\"\n\n# more\nquues = 2\n");
    let err = place.bad(1, &add);
    assert!(
        err.contains("c.toml: line 4: ") && err.contains("`quues`"),
        "{err}"
    );
    file("image = \"a.qcow2\"\ncache = \"unsafe\"\n");
    let err = place.bad(1, &add);
    assert!(err.contains("line 2: ") && err.contains("unsafe"), "{err}");
    file("queues = 2\n");
    assert!(place.bad(1, &add).contains("the image is missing"));
    file("image = \"a.qcow2\"\nlogical-block-size = 1000\n");
    assert!(place.bad(1, &add).contains("1000"));
    // The image is looked for beside the file.
    fs::create_dir(place.path("sub")).unwrap();
    fs::write(place.path("sub/d.toml"), "image = \"absent.qcow2\"\n").unwrap();
    let err = place.bad(4, &["add", "--config", "sub/d.toml"]);
    assert!(err.contains("/sub/absent.qcow2: "), "{err}");
    // The command line beats it.
    let err = place.bad(4, &["add", "--config", "sub/d.toml", "other.qcow2"]);
    assert!(err.contains("/other.qcow2: "), "{err}");
    let err = place.bad(4, &["add", "--config", "nobody-has-this"]);
    assert!(
        err.contains("/etc/qcow2-ublk/nobody-has-this.toml: "),
        "{err}"
    );
}

#[test]
fn the_example_of_the_settings_is_right() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/qcow2-ublk.toml.example");
    let text = fs::read_to_string(&example).unwrap();
    // With every line in force.
    let mut all = String::new();
    for line in text.lines() {
        match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') && !rest.is_empty() => all += rest,
            _ => all += line,
        }
        all.push('\n');
    }
    for key in [
        "number",
        "queues",
        "depth",
        "discard",
        "part-scan",
        "backing-format",
    ] {
        assert!(all.contains(&format!("\n{key} = ")), "{key}");
    }
    let place = Place::new();
    // The passphrase comes from one place.
    let without = |key: &str| -> String {
        let lines = all.lines().filter(|line| !line.starts_with(key));
        lines.map(|line| format!("{line}\n")).collect()
    };
    for text in [text, without("key-file"), without("key-credential")] {
        fs::write(place.path("e.toml"), text).unwrap();
        let settings = qcow2_ublk::config::Settings::read(&place.path("e.toml")).unwrap();
        settings.plan(qcow2_ublk::config::Ask::Nobody).unwrap();
    }
}

/// `add` fails in the background as it does in the foreground: one sentence,
/// the code, nothing on standard output, and an image that is closed.
#[test]
fn add_reports_failures_of_the_background_process() {
    let place = Place::new();
    fs::write(
        place.path("text"),
        "not an image, but long enough to be one",
    )
    .unwrap();
    let err = place.bad(1, &["add", "text"]);
    assert!(err.contains("/text: "), "{err}");
    let err = place.bad(4, &["add", "absent.qcow2"]);
    assert!(err.contains("/absent.qcow2: "), "{err}");
    assert!(place.bad(1, &["add", "-q", "0", "text"]).contains("text"));
    assert!(place.bad(1, &["add", "-n", "-1", "text"]).contains("-1"));
}

/// Where there is no driver the commands that need it say so; where there is
/// one, they work.
#[test]
fn a_missing_driver_is_named_with_its_cure() {
    let place = Place::new();
    place.good(&["create", "a.qcow2", "1M"]);
    if Path::new("/dev/ublk-control").exists() {
        let list: Value = serde_json::from_str(&place.good(&["list", "-J"])).unwrap();
        assert!(list["devices"].is_array());
        let features: Value = serde_json::from_str(&place.good(&["features", "-J"])).unwrap();
        assert!(features["data-path"].is_string());
        return;
    }
    let commands: &[&[&str]] = &[
        &["add", "a.qcow2"],
        &["add", "--foreground", "a.qcow2"],
        &["list"],
        &["list", "--json"],
        &["features"],
        &["del", "--all"],
        &["detach", "/dev/ublkb0"],
    ];
    for args in commands {
        let (code, out, err) = place.ours(args);
        assert_eq!((code, out.as_str()), (4, ""), "{args:?}: {err}");
        assert!(err.contains("no ublk driver"), "{args:?}: {err}");
        assert!(err.contains("modprobe ublk_drv"), "{args:?}: {err}");
        assert_eq!(err.matches("qcow2-ublk: ").count(), 1, "{args:?}: {err}");
    }
    place.qemu(&["qemu-img", "check", "-q", "a.qcow2"]);
}
