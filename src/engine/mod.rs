//! Guest requests: the only place where guest data is read and written.
//!
//! Mappings come from the layers as data ([`crate::chain`]); the engine turns
//! them into transfers, starts all transfers of a request before it waits for
//! the first, and copies only what has to be copied.

mod cipher;
mod commit;
mod compressed;
mod data;
mod detect;
mod flight;
mod housekeeper;
mod parts;
mod ranges;
mod rate;
mod read;
mod rebase;
mod resize;
mod snapshot;
mod write;
mod zero;

use crate::block::{BlockHandler, Limits, Op, Payload, Request};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Image, Presence};
use crate::race::Guard;
use crate::rule::Rule;
use crate::runtime;

pub use commit::Commit;
pub(crate) use compressed::is_zero;
pub use detect::DetectZeroes;
pub use housekeeper::Housekeeper;
use ranges::Ranges;
pub use rate::Rate;
pub use rebase::Progress;
pub use resize::RawDisk;
pub use snapshot::SnapshotReader;

/// How an engine treats requests.
#[derive(Clone, Debug)]
pub struct Options {
    /// Discards free space (`unmap`) or are ignored.
    pub discard: bool,
    /// Requests are multiples of this many bytes (the device's logical block
    /// size, or 1): below the storage's own unit, writes exclude each other.
    pub request_unit: u32,
    /// What becomes of writes of zeros.
    pub detect_zeroes: DetectZeroes,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            discard: true,
            request_unit: 1,
            detect_zeroes: DetectZeroes::Off,
        }
    }
}

/// A chain of images that serves requests, from any number of threads.
#[derive(Debug)]
pub struct Engine {
    chain: Chain,
    options: Options,
    /// Guest clusters whose mapping is being changed.
    ranges: Ranges,
}

impl Engine {
    /// An engine over an opened chain.
    pub fn new(chain: Chain, options: Options) -> Self {
        Self {
            chain,
            options,
            ranges: Ranges::default(),
        }
    }

    /// The layers.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    fn top(&self) -> &Image {
        self.chain.top()
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.top().size()
    }

    /// Refuses a range that is not inside the virtual disk.
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfBounds,
            format!("{len} bytes at {offset} are not inside the disk of {size} bytes"),
        )
        .path(self.top().path()))
    }

    /// Reads `payload.len()` bytes at `offset`. `queue` spreads the bookkeeping
    /// over queues; any number will do.
    pub async fn read(&self, queue: u16, offset: u64, payload: Payload) -> Result<()> {
        // Lower layers are never written, so one presence covers them all.
        let _presence = self.top().enter(usize::from(queue)).await;
        self.check_range(offset, payload.len())?;
        self.read_layers(0, offset, payload).await
    }

    /// Writes `payload.len()` bytes at `offset`.
    pub async fn write(&self, queue: u16, offset: u64, payload: Payload) -> Result<()> {
        let writing = self.begin_write(queue, offset, payload.len()).await?;
        let slot = writing.slot;
        let result = match self.zeros_found(&payload) {
            Ok(None) => self.write_range(slot, offset, payload).await,
            Ok(Some(unmap)) => self.zero_range(slot, offset, payload.len(), unmap).await,
            Err(error) => Err(error),
        };
        self.settle(writing, result).await
    }

    /// Makes the range read as zeros; with `unmap`, host space may be freed.
    pub async fn write_zeroes(&self, queue: u16, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let writing = self.begin_write(queue, offset, len).await?;
        let result = self.zero_range(writing.slot, offset, len, unmap).await;
        self.settle(writing, result).await
    }

    /// Gives up the range's clusters; the parts of clusters at its ends keep
    /// their content.
    pub async fn discard(&self, queue: u16, offset: u64, len: u64) -> Result<()> {
        if !self.options.discard {
            return self.check_range(offset, len);
        }
        let writing = self.begin_write(queue, offset, len).await?;
        let result = self.discard_range(writing.slot, offset, len).await;
        self.settle(writing, result).await
    }

    /// Makes everything completed before durable.
    pub async fn flush(&self) -> Result<()> {
        if self.top().writable() {
            self.top().flush().await
        } else {
            Ok(())
        }
    }

    /// Writes back what is dirty, as a flush does, if anything is: called now
    /// and then, so that little is lost with the power and frees come through.
    pub async fn write_back(&self) -> Result<()> {
        if self.top().has_dirty_metadata() {
            self.top().flush().await
        } else {
            Ok(())
        }
    }

    /// Makes everything durable and leaves the image as if never opened. No
    /// request is under way, and none may come.
    pub async fn close(&self) -> Result<()> {
        self.top().close().await
    }

    /// Ends a change: it is as durable as the image promises, or the failure is
    /// looked into.
    #[inline]
    async fn settle(&self, writing: Writing<'_>, result: Result<()>) -> Result<()> {
        let before = writing.before;
        drop(writing);
        match result {
            Ok(()) => self.top().acknowledge(before).await,
            Err(error) => {
                self.top().judge(&error).await;
                Err(error)
            }
        }
    }

    /// Lets a change of `len` bytes from `offset` begin: every change of the
    /// disk that the guest asks for goes through here.
    async fn begin_write(&self, queue: u16, offset: u64, len: u64) -> Result<Writing<'_>> {
        self.check_range(offset, len)?;
        self.prepare().await?;
        let image = self.top();
        let slot = usize::from(queue);
        let presence = image.enter(slot).await;
        // While it waited, the disk may have got smaller.
        if !Guard::Inside.is_away() {
            self.check_range(offset, len)?;
        }
        Ok(Writing {
            image,
            slot,
            range: (offset, len),
            before: image.changes(),
            _presence: presence,
        })
    }

    async fn prepare(&self) -> Result<()> {
        let image = self.top();
        image.check_writable()?;
        image.prepare_for_writing().await?;
        if image.is_crowded() {
            image.flush().await?;
        }
        Ok(())
    }
}

/// A change of the disk under way. It is recorded in the dirty bitmaps when it
/// is over, however it ended: what failed may have changed something too.
#[derive(Debug)]
#[must_use]
struct Writing<'a> {
    image: &'a Image,
    slot: usize,
    range: (u64, u64),
    /// Changes of the image's mappings when it began.
    before: u64,
    _presence: Presence<'a>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !Guard::Recorded.is_away() {
            self.image.record(self.range.0, self.range.1);
        }
    }
}

impl BlockHandler for Engine {
    fn limits(&self) -> Limits {
        let image = self.top();
        let cluster_size = image.cluster_size() as u32;
        Limits {
            size: self.size(),
            read_only: !image.writable(),
            discard_granularity: cluster_size,
            optimal_io: cluster_size,
            physical_block: image
                .data()
                .alignment()
                .max(4096)
                .min(cluster_size.max(512)),
            discard: self.options.discard,
        }
    }

    fn queue_started(&self, _queue: u16) -> Result<()> {
        for fd in self.chain.fds() {
            runtime::register_file(fd)
                .map_err(|e| Error::io("register the image with io_uring", e))?;
        }
        Ok(())
    }

    async fn handle(&self, queue: u16, request: Request) -> Result<()> {
        let Request {
            op,
            offset,
            len,
            payload,
        } = request;
        match op {
            Op::Read => self.read(queue, offset, payload).await,
            Op::Write { fua } => {
                self.write(queue, offset, payload).await?;
                if fua && !Rule::FuaFlushes.is_broken() {
                    self.flush().await
                } else {
                    Ok(())
                }
            }
            Op::Flush => self.flush().await,
            Op::Discard => self.discard(queue, offset, len).await,
            Op::WriteZeroes { unmap, fua } => {
                self.write_zeroes(queue, offset, len, unmap).await?;
                if fua && !Rule::FuaFlushes.is_broken() {
                    self.flush().await
                } else {
                    Ok(())
                }
            }
        }
    }
}
