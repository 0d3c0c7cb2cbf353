//! qcow2 images, with their whole backing chain, as block devices.

pub mod block;
pub mod chain;
pub mod cli;
pub mod codec;
pub mod config;
pub mod daemon;
mod disk;
pub mod engine;
pub mod error;
pub mod qcow2;
pub mod report;
pub mod runtime;
pub mod storage;
pub mod ublk;

pub use disk::Disk;
pub use error::{Error, ErrorKind, Result};
