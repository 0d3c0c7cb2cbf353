//! Simulated disks, whose power can be cut and whose operations can fail,
//! stall and fall short.
//!
//! A [`SimDisk`] keeps a file in memory and hands out [`Storage`]s over it
//! that behave like a host file opened with `O_DIRECT` (or, with alignment 1,
//! through the page cache). It is what the crash tests of the engine rest on,
//! and it is there for the tests of whoever embeds the library.
//!
//! ```
//! use qcow2_ublk::runtime::Runtime;
//! use qcow2_ublk::storage::Storage;
//! use qcow2_ublk::storage::sim::{SimDisk, crash_images};
//!
//! let disk = SimDisk::new();
//! let file = Storage::simulated(&disk, 512);
//! Runtime::inline()?.block_on(async {
//!     file.write(0, &[1; 512]).await?;
//!     file.sync().await?;
//!     file.write(0, &[2; 512]).await
//! })?;
//! for crash in crash_images(&disk.history(), 7, 10) {
//!     let survived = crash.images[0].bytes(0, 1)[0];
//!     match crash.point {
//!         0..2 => assert!(survived <= 1),
//!         2 => assert_eq!(survived, 1),
//!         _ => assert!(survived == 1 || survived == 2),
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Operations
//!
//! Every operation gets a number when it is started, reads included. It is
//! performed, and enters the [`History`], at one moment: at once, or later
//! when a [`Hold`] or [`SimDisk::shuffle`] delays it. [`SimDisk::inject`]
//! decides about its fate when it starts. Limits of the simulation: operations
//! never take effect in part unless told to ([`Fault`]), and there are no
//! locks and no policy.
//!
//! # Power cuts
//!
//! [`crash_images`] goes through a history and gives what the disks may hold
//! when the power fails after each of its steps. The rules are in
//! [`crash_images`]'s own documentation.

mod crash;
mod disk;
mod history;
mod hold;
mod image;
mod machine;
mod rng;
#[cfg(test)]
mod tests;

pub use crash::{Crash, CrashImages, Fate, crash_image, crash_images};
pub use disk::{Fault, SimDisk, SimKind, SimRequest};
pub use history::{Change, History, Record};
pub use hold::Hold;
pub use image::Image;
pub(super) use machine::{SimBackend, SimOp};
pub use rng::Rng;

#[cfg(doc)]
use super::Storage;
