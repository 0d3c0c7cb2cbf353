//! What the ordinary tests have for images on simulated disks.

use std::ffi::OsStr;

use qcow2_ublk::Result;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::runtime::Runtime;

#[path = "../../tests/common/check.rs"]
pub mod check;
#[path = "../../tests/common/lab.rs"]
pub mod lab;

/// The lab can have images made by QEMU; nothing here asks it to.
fn qemu_img<S: AsRef<OsStr>>(_: &[S]) {
    unreachable!("no program is run by a fuzz target");
}

/// Runs a future on this thread's own executor. Not inside of another.
pub fn block_on<F: Future>(future: F) -> F::Output {
    thread_local! {
        static RUNTIME: Runtime = Runtime::inline().expect("an executor");
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// All that the disk shows.
pub async fn read_all(engine: &Engine) -> Result<Vec<u8>> {
    lab::read(engine, 0, 0, engine.size()).await
}
