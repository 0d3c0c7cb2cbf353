//! What the ordinary tests have for images on simulated disks.

use std::ffi::OsStr;

#[path = "../../tests/common/check.rs"]
pub mod check;
#[path = "../../tests/common/lab.rs"]
pub mod lab;

/// The lab can have images made by QEMU; nothing here asks it to.
fn qemu_img<S: AsRef<OsStr>>(_: &[S]) {
    unreachable!("no program is run by a fuzz target");
}
