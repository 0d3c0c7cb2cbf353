//! A state in files, for QEMU's programs to judge.

use std::path::Path;
use std::process::{Command, Output};

use qcow2_ublk::storage::sim::Crash;

use super::judge::Found;
use super::machine::PASSPHRASE;
use super::shape::{Below, Data, Shape};
use super::{Verdict, ensure};

/// `qemu-img check` finds nothing worse than leaks, and QEMU reads what we do.
pub(crate) fn judge(shape: &Shape, crash: &Crash, found: &Found) -> Verdict {
    if shape.luks == 2 {
        // QEMU does not open these.
        return Ok(());
    }
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let folder = folder.path();
    let mut names = vec!["image"];
    if shape.data != Data::Inside {
        names.push("data");
    }
    if shape.below != Below::Nothing {
        names.push("below");
    }
    let save = |name: &str, image: &qcow2_ublk::storage::sim::Image| {
        image.save(&folder.join(name)).map_err(|e| e.to_string())
    };
    for (name, image) in names.iter().zip(&crash.images) {
        save(name, image)?;
    }
    std::fs::write(folder.join("key"), PASSPHRASE).map_err(|e| e.to_string())?;
    if found.dirty {
        let output = run(folder, shape, &["check", "-q", "-r", "all"]);
        ensure!(output.status.success(), "qemu-img check -r all: {output:?}");
    }
    let output = run(folder, shape, &["check"]);
    ensure!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check: {output:?}"
    );
    let output = run(folder, shape, &["convert", "-O", "raw"]);
    ensure!(output.status.success(), "qemu-img convert: {output:?}");
    let content = std::fs::read(folder.join("raw")).map_err(|e| e.to_string())?;
    let differs = content.chunks(512).zip(found.content.chunks(512));
    let at = differs.take_while(|(a, b)| a == b).count();
    ensure!(
        content == *found.content,
        "QEMU reads something else in sector {at}"
    );
    Ok(())
}

fn run(folder: &Path, shape: &Shape, args: &[&str]) -> Output {
    let mut command = Command::new("qemu-img");
    command.current_dir(folder).args(args);
    if shape.luks == 0 {
        command.args(["-f", "qcow2", "image"]);
    } else {
        let image = "driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=image";
        command.args(["--object", "secret,id=s,file=key", "--image-opts", image]);
    }
    if args[0] == "convert" {
        command.arg("raw");
    }
    command
        .output()
        .expect("run qemu-img, which this test needs")
}
