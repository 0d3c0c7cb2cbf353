//! qcow2 images, with their whole backing chain, as Linux block devices, and
//! as disks that a program reads and writes.
//!
//! # A disk in a file
//!
//! [`Disk`] is the face for ordinary programs: blocking calls, any offset and
//! length, usable from several threads.
//!
//! ```
//! use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
//! use qcow2_ublk::{Disk, chain};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! let base = Disk::create(&folder.join("base.qcow2"), &CreateOptions::new(1 << 30))?;
//! base.write_at(b"from the base", 4096)?;
//! base.close()?;
//!
//! // An image over another stores only what differs.
//! let over = CreateOptions {
//!     backing: Some(Backing {
//!         file: "base.qcow2".into(),
//!         format: Some("qcow2".to_owned()),
//!     }),
//!     ..CreateOptions::new(1 << 30)
//! };
//! let disk = Disk::create(&folder.join("over.qcow2"), &over)?;
//! disk.write_at(b"over", 4096)?;
//! disk.flush()?; // durable from here on
//!
//! let mut seen = [0; 13];
//! disk.read_at(&mut seen, 4096)?;
//! assert_eq!(&seen, b"over the base");
//! disk.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is opened
//!
//! Images name other files, and an image may be a stranger's. Unless
//! [`chain::Policy`] allows more, only files in the image's own folder are
//! opened, and no file's format is ever guessed. Errors say which file, where
//! in it, and what can be done: [`Error`].
//!
//! QEMU's image locks are taken on every file, so that neither QEMU nor we
//! write to what the other one uses.
//!
//! # A block device
//!
//! [`ublk::Device`] serves any [`block::BlockHandler`] as `/dev/ublkbN`. The
//! [`engine::Engine`] is one:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use qcow2_ublk::engine::{self, Engine};
//! use qcow2_ublk::runtime::Runtime;
//! use qcow2_ublk::ublk::{self, Device};
//! use qcow2_ublk::{Error, chain};
//!
//! # fn main() -> qcow2_ublk::Result<()> {
//! let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
//! let options = chain::Options { writable: true, ..Default::default() };
//! let chain = runtime.block_on(chain::open("image.qcow2".as_ref(), &options))?;
//! let engine = Arc::new(Engine::new(chain, engine::Options::default()));
//! let device = Device::create(&ublk::Options::default(), Arc::clone(&engine))?;
//! println!("{}", device.path().display());
//! device.wait()?;
//! let stopped = device.stop()?;
//! runtime.block_on(engine.close())?;
//! stopped.delete()
//! # }
//! ```
//!
//! # Inside
//!
//! Each module knows only those further right:
//! `cli`, `daemon`, {[`ublk`], [`engine`]}, [`chain`], [`qcow2`],
//! {[`codec`], [`storage`]}, [`runtime`]. Futures run on the small executor of
//! [`runtime`], with io_uring or with plain system calls. [`qcow2`] says where
//! bytes are, and only [`engine`] reads and writes those of the guest.

pub mod block;
pub mod chain;
pub mod cli;
pub mod codec;
pub mod config;
pub mod convert;
pub mod crypto;
pub mod daemon;
mod disk;
pub mod engine;
pub mod error;
pub mod offline;
pub mod qcow2;
#[doc(hidden)]
pub mod race;
pub mod report;
#[doc(hidden)]
pub mod rule;
pub mod runtime;
pub mod storage;
pub mod ublk;

pub use disk::Disk;
pub use error::{Error, ErrorKind, Result};
