//! Deeds that nobody who serves an image has to do.

use std::fs::{self, File};
use std::io::{self, Error};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread::available_parallelism;

use io_uring::{IoUring, opcode, types};
use nix::unistd::Pid;

use crate::worker::{self, Place};
use crate::{CONFINED, FREE, report, reports, spawn};

const NAME: &str = "deeds::a_worker_told_to_misbehave_is_refused";

/// What is refused, in the order of [`misbehave`].
const REFUSED: [&str; 16] = [
    "open to read",
    "open to write",
    "make a file",
    "list a folder",
    "rename",
    "remove elsewhere",
    "change the mode",
    "make a ring and open by it",
    "connect to a socket",
    "send to a socket of another",
    "connect by TCP",
    "listen",
    "start a process",
    "signal another process",
    "make code",
    "become another program",
];

fn misbehave(place: &Place) {
    let at = |name: &str| place.folder.join(name);
    report("open to read", File::open(at("secret")).map(drop));
    let write = File::options().write(true).open(at("secret"));
    report("open to write", write.map(drop));
    report("make a file", File::create(at("new")).map(drop));
    report("list a folder", fs::read_dir(&place.folder).map(drop));
    report("rename", fs::rename(at("old"), at("renamed")));
    report("remove elsewhere", fs::remove_file(at("secret.old")));
    let mode = fs::Permissions::from_mode(0o666);
    report("change the mode", fs::set_permissions(at("secret"), mode));
    report("make a ring and open by it", open_by_ring(place));
    report(
        "connect to a socket",
        UnixStream::connect(at("socket")).map(drop),
    );
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"x", at("datagrams")));
    report("send to a socket of another", sent.map(drop));
    let port: u16 = std::env::var("SANDBOX_TEST_PORT").unwrap().parse().unwrap();
    let connected = TcpStream::connect(("127.0.0.1", port));
    report("connect by TCP", connected.map(drop));
    report("listen", TcpListener::bind("127.0.0.1:0").map(drop));
    let started = Command::new("/bin/true").status();
    report("start a process", started.map(drop));
    let signalled = nix::sys::signal::kill(Pid::parent(), None);
    report("signal another process", signalled.map_err(Error::from));
    report("make code", make_code());
    // Allowed: what is removed when a device ends.
    report("remove a record", fs::remove_file(at("records/own.json")));
    // As the standard library asks it, of files that cannot be read now.
    let processors = available_parallelism().map(|_| ());
    report("count processors", processors);
    if std::env::var(crate::ROLE).unwrap() == CONFINED {
        let error = Command::new("/bin/true").exec();
        report("become another program", Err(error));
    } else {
        // Whoever succeeds is not here any more.
        let line = "@become another program: done\n@served: done";
        let error = Command::new("/bin/echo").arg(line).exec();
        report("become another program", Err(error));
    }
}

fn open_by_ring(place: &Place) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;

    let mut ring = IoUring::new(4)?;
    let path = place.folder.join("secret");
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
    // SAFETY: `path` lives until the completion has come.
    unsafe { ring.submission().push(&open).unwrap() };
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().unwrap().result();
    if result < 0 {
        return Err(Error::from_raw_os_error(-result));
    }
    Ok(())
}

fn make_code() -> io::Result<()> {
    // SAFETY: a new mapping, which nobody uses.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    Ok(())
}

#[test]
fn a_worker_told_to_misbehave_is_refused() {
    if let Some(place) = Place::of_worker() {
        worker::run(&place, misbehave);
    }
    for role in [FREE, CONFINED] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("records")).unwrap();
        for name in ["secret", "secret.old", "old", "records/own.json"] {
            fs::write(at(name), "nobody's business").unwrap();
        }
        let _listener = UnixListener::bind(at("socket")).unwrap();
        let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let port = ("SANDBOX_TEST_PORT", port.to_string());
        let worker = spawn(NAME, role, folder.path(), &[port]);
        let output = worker.wait_with_output().unwrap();
        let reports = reports(&output.stdout);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{role}: {}: {said}", output.status);
        for deed in REFUSED {
            let outcome = reports
                .get(deed)
                .unwrap_or_else(|| panic!("{deed}: {said}"));
            let wanted = match role {
                FREE => outcome == "done",
                _ => outcome == "errno 1" || outcome == "errno 13",
            };
            assert!(wanted, "{role}: {deed}: {outcome}");
        }
        for deed in ["remove a record", "count processors", "served"] {
            assert_eq!(
                reports.get(deed).map(String::as_str),
                Some("done"),
                "{said}"
            );
        }
        if role == CONFINED {
            let parts = reports["parts"].split("missing").next().unwrap();
            for part in [
                "no capabilities",
                "Landlock",
                "seccomp",
                "restricted io_uring",
            ] {
                assert!(parts.contains(part), "{part} is missing: {parts}");
            }
            assert!(fs::exists(at("secret.old")).unwrap() && !fs::exists(at("new")).unwrap());
        }
    }
}
