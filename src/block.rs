//! The neutral vocabulary between a block front (ublk, a command, a library
//! caller) and the engine. Knows neither.

use std::future::Future;

use crate::error::Result;
pub use crate::runtime::payload::Payload;

/// What a request asks for. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the payload.
    Read,
    /// Store the payload; with `fua`, durable on completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make everything completed before durable.
    Flush,
    /// The range may be forgotten; it reads as zeros (or as before, where
    /// only part of a cluster is covered) afterwards.
    Discard,
    /// The range reads as zeros afterwards; with `unmap`, space may be freed.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
        /// Durable on completion.
        fua: bool,
    },
}

/// One block request.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First byte, in the virtual disk.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// The data of reads and writes: `len` bytes long. `Payload::zeros` for
    /// other operations.
    pub payload: Payload,
}

/// What a device over this handler may promise, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Virtual size.
    pub size: u64,
    /// No write is accepted.
    pub read_only: bool,
    /// Smallest unit of a discard that frees space: the cluster size.
    pub discard_granularity: u32,
    /// The cluster size, as the optimal I/O size.
    pub optimal_io: u32,
    /// Unit that storage writes without read-modify-write.
    pub physical_block: u32,
    /// Discards reach the image.
    pub discard: bool,
}

/// Serves block requests, from several queues at once.
///
/// The futures run on the queue's own thread inside its [`crate::runtime`],
/// and are never dropped before they are complete.
pub trait BlockHandler: Send + Sync + 'static {
    /// The limits; constant but for a resize.
    fn limits(&self) -> Limits;

    /// Runs once on each queue's thread before its first request: register
    /// files with the thread's ring, and so on.
    fn queue_started(&self, queue: u16) -> Result<()>;

    /// Runs once on each queue's thread when it has asked for its first
    /// requests, which do not come before all queues have: give up the rights
    /// that asking took.
    fn queue_ready(&self, _queue: u16) {}

    /// Serves one request completely or fails it as a whole.
    fn handle(&self, queue: u16, request: Request) -> impl Future<Output = Result<()>>;
}
