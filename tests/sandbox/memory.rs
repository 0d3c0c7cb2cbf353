//! Another process of the same user looks into the worker's memory.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut};

use nix::sys::prctl::set_dumpable;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Gid, Pid, Uid, setgid, setuid};
use qcow2_ublk::daemon::sandbox::harden;

use crate::{CONFINED, FREE, ROLE, report, reports, spawn};

const NAME: &str = "memory::nobody_looks_into_the_workers_memory";
const SECRET: &[u8] = b"what the guest has written";
/// The third role: who looks.
const PEEK: &str = "peek";

/// Root may look everywhere: be somebody else.
fn become_nobody() {
    if Uid::effective().is_root() {
        setgid(Gid::from_raw(65534)).unwrap();
        setuid(Uid::from_raw(65534)).unwrap();
    }
}

fn worker(role: &str) -> ! {
    become_nobody();
    // As in a process that has never been anybody else.
    set_dumpable(true).unwrap();
    // SAFETY: no pointers. Where only parents may look, everybody may.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    if role == CONFINED {
        harden();
    }
    let secret = SECRET.to_vec();
    println!("\n@secret: {}", secret.as_ptr() as usize);
    // Until the one who asks goes.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    drop(secret);
    std::process::exit(0);
}

fn peek() -> ! {
    let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let (pid, address) = (number("PEEK_PID"), number("PEEK_ADDRESS"));
    become_nobody();
    let mut seen = vec![0; SECRET.len()];
    let there = [RemoteIoVec {
        base: address,
        len: seen.len(),
    }];
    let read = process_vm_readv(
        Pid::from_raw(pid as i32),
        &mut [IoSliceMut::new(&mut seen)],
        &there,
    );
    report("read", read.map(drop).map_err(Into::into));
    let same = seen == SECRET;
    println!("\n@seen: {same}");
    report("open", File::open(format!("/proc/{pid}/mem")).map(drop));
    std::process::exit(0);
}

#[test]
fn nobody_looks_into_the_workers_memory() {
    match std::env::var(ROLE) {
        Ok(role) if role == PEEK => peek(),
        Ok(role) => worker(&role),
        Err(_) => {}
    }
    let folder = tempfile::tempdir().unwrap();
    for role in [FREE, CONFINED] {
        let mut worker = spawn(NAME, role, folder.path(), &[]);
        let mut output = BufReader::new(worker.stdout.take().unwrap());
        let address = loop {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "{role}");
            if let Some(address) = line.trim_end().strip_prefix("@secret: ") {
                break address.to_owned();
            }
        };
        let of_worker = [
            ("PEEK_PID", worker.id().to_string()),
            ("PEEK_ADDRESS", address),
        ];
        let peek = spawn(NAME, PEEK, folder.path(), &of_worker);
        let reports = reports(&peek.wait_with_output().unwrap().stdout);
        drop(worker.stdin.take());
        assert!(worker.wait().unwrap().success());
        match role {
            FREE => {
                assert_eq!(reports["read"], "done");
                assert_eq!(reports["seen"], "true");
                assert_eq!(reports["open"], "done");
            }
            _ => {
                assert_eq!(reports["read"], "errno 1");
                assert_eq!(reports["seen"], "false");
                assert_eq!(reports["open"], "errno 13");
            }
        }
    }
}
