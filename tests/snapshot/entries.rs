//! What an entry of the snapshot table has besides tables: kept through every
//! operation on others.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{self, lab, qemu_img, qemu_io};
use qcow2_ublk::qcow2::spec::snapshot::Snapshot;
use qcow2_ublk::qcow2::{NewSnapshot, Selector, SnapshotJob};
use qcow2_ublk::{offline, report};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(path: &Path, job: &SnapshotJob) {
    offline::snapshot(path, job).unwrap();
    lab::qemu_check(path, false);
}

#[test]
fn what_is_unknown_in_an_entry_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_io(&path, &["write -P 1 0 1M"]);
    qemu_img(&["snapshot", "-c", "odd", text(&path)]);
    let mut odd = report::snapshots(&path, false).unwrap().remove(0);
    odd.unknown_extra = (1..=13).collect();
    odd.vm_clock_nsec = 12_345_678_901;
    odd.icount = Some(77);
    odd.vm_state_size = 5 << 32;
    let mut entry = Vec::new();
    odd.encode(&mut entry).unwrap();
    let mut file = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(file[64..72].try_into().unwrap()) as usize;
    file.resize(file.len().max(table + entry.len()), 0);
    file[table..][..entry.len()].copy_from_slice(&entry);
    std::fs::write(&path, &file).unwrap();
    lab::qemu_check(&path, false);
    let seen = || -> Snapshot {
        let mut all = report::snapshots(&path, false).unwrap();
        let index = Selector::Id(b"1".to_vec()).require(&all).unwrap();
        all.remove(index)
    };
    assert_eq!(seen(), odd);
    run(&path, &SnapshotJob::Create(NewSnapshot::now("next")));
    assert_eq!(seen(), odd);
    let next = || Selector::Name(b"next".to_vec());
    run(&path, &SnapshotJob::Apply(next()));
    run(&path, &SnapshotJob::Apply(Selector::Id(b"1".to_vec())));
    run(&path, &SnapshotJob::Rename(next(), b"last".to_vec()));
    let last = Selector::Name(b"last".to_vec());
    run(&path, &SnapshotJob::Delete(last));
    assert_eq!(seen(), odd);
    let renamed = SnapshotJob::Rename(Selector::Id(b"1".to_vec()), b"another name".to_vec());
    run(&path, &renamed);
    odd.name = b"another name".to_vec();
    assert_eq!(seen(), odd);
}

/// Lets QEMU's monitor do something with an image; what it says.
fn monitor(path: &Path, command: &str) -> String {
    let drive = format!("file={},if=none,id=d,format=qcow2", text(path));
    let args = [
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "stdio",
        "-drive",
        &drive,
    ];
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run qemu-system-x86_64, which this test needs");
    let mut input = qemu.stdin.take().unwrap();
    input
        .write_all(format!("{command}\nquit\n").as_bytes())
        .unwrap();
    let output = qemu.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// A machine's state, which lies past the end of the disk, goes with its
/// snapshot.
#[test]
fn vm_state_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    qemu_io(&path, &["write -P 1 0 1M"]);
    lab::watched(120, || monitor(&path, "savevm vm"));
    let saved = report::snapshots(&path, false).unwrap().remove(0);
    assert!(saved.vm_state_size > 0);
    run(&path, &SnapshotJob::Create(NewSnapshot::now("plain")));
    qemu_io(&path, &["write -P 2 0 4M"]);
    run(
        &path,
        &SnapshotJob::Apply(Selector::Name(b"plain".to_vec())),
    );
    run(
        &path,
        &SnapshotJob::Delete(Selector::Name(b"plain".to_vec())),
    );
    let kept = report::snapshots(&path, false).unwrap().remove(0);
    assert_eq!(kept, saved);
    for _ in 0..2 {
        let said = lab::watched(120, || monitor(&path, "loadvm vm"));
        assert!(!said.contains("Error"), "{said}");
        lab::qemu_check(&path, false);
        qemu_io(&path, &["read -P 1 0 1M", "write -P 3 0 2M"]);
        run(&path, &SnapshotJob::Apply(Selector::Name(b"vm".to_vec())));
        qemu_io(&path, &["read -P 1 0 1M"]);
    }
    // The disk does not show it.
    let (code, _) = common::run("qemu-io", &["-r", "-c", "read 4M 512", text(&path)]);
    assert_eq!(code, Some(1));
}
