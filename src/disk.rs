//! The blocking face of the engine, for ordinary Rust programs.

use std::path::Path;
use std::sync::Arc;

use crate::block::Payload;
use crate::chain;
use crate::engine::{self, Engine, Housekeeper};
use crate::error::{Error, Result};
use crate::qcow2::create::CreateOptions;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::qcow2::{BitmapAction, BitmapContent, BitmapInfo, SnapshotJob};
use crate::runtime::Runtime;

/// An open virtual disk: a qcow2 image with its backing chain.
///
/// Usable from several threads at once. Calls block; they use plain system
/// calls, no io_uring. Changes are durable after [`Self::flush`] or
/// [`Self::close`]; a disk that is dropped without either loses nothing that
/// was written to the file, but what was written since the last flush may not
/// survive a power cut, and clusters reserved for later may leak.
///
/// ```no_run
/// use qcow2_ublk::{Disk, chain};
///
/// # fn main() -> qcow2_ublk::Result<()> {
/// let options = chain::Options { writable: true, ..Default::default() };
/// let disk = Disk::open("image.qcow2".as_ref(), &options)?;
/// disk.write_at(b"hello", 1 << 20)?;
/// disk.flush()?;
/// let mut word = [0; 5];
/// disk.read_at(&mut word, 1 << 20)?;
/// assert_eq!(&word, b"hello");
/// disk.close()
/// # }
/// ```
#[derive(Debug)]
pub struct Disk {
    engine: Arc<Engine>,
    housekeeper: Option<Housekeeper>,
}

impl Disk {
    /// Opens the image at `path` with everything below it.
    pub fn open(path: &Path, options: &chain::Options) -> Result<Self> {
        let chain = blocking(chain::open(path, options))?;
        let engine = Arc::new(Engine::new(chain, engine::Options::default()));
        let housekeeper = if options.writable {
            Some(Housekeeper::start(Arc::clone(&engine))?)
        } else {
            None
        };
        Ok(Self {
            engine,
            housekeeper,
        })
    }

    /// Makes an image of `options.size` bytes at `path`, and opens it for
    /// writing. A file of that name loses its content, unless somebody has it
    /// open as an image.
    ///
    /// Where `options` name a backing file, its size is not looked at; see
    /// [`chain::backing_size`].
    pub fn create(path: &Path, options: &CreateOptions) -> Result<Self> {
        blocking(chain::create(path, options))?;
        let options = chain::Options {
            writable: true,
            ..chain::Options::default()
        };
        Self::open(path, &options)
    }

    /// The engine underneath, for callers with a runtime of their own.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.engine.size()
    }

    /// Fills `buf` from byte `offset` of the disk.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        blocking(self.engine.read(0, offset, Payload::of_slice_mut(buf)))
    }

    /// Writes `bytes` at byte `offset` of the disk.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        blocking(self.engine.write(0, offset, Payload::of_slice(bytes)))
    }

    /// Writes `bytes` at byte `offset` of the disk, compressed with the image's
    /// method; see [`Engine::write_compressed`].
    pub fn write_compressed_at(&self, bytes: &[u8], offset: u64, level: Option<i32>) -> Result<()> {
        blocking(self.engine.write_compressed(0, offset, bytes, level))
    }

    /// Makes a range read as zeros; with `unmap` its space may be freed.
    pub fn write_zeroes_at(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        blocking(self.engine.write_zeroes(0, offset, len, unmap))
    }

    /// Frees the whole clusters in a range.
    pub fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        blocking(self.engine.discard(0, offset, len))
    }

    /// Makes everything written before durable.
    pub fn flush(&self) -> Result<()> {
        blocking(self.engine.flush())
    }

    /// Enlarges the disk to `size` bytes, a multiple of 512.
    pub fn grow(&self, size: u64) -> Result<()> {
        blocking(self.engine.grow(size))
    }

    /// The dirty bitmaps of the image.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        blocking(self.engine.chain().top().bitmaps())
    }

    /// The content of a dirty bitmap, also while it is recorded.
    pub fn bitmap(&self, name: &str) -> Result<BitmapContent> {
        blocking(self.engine.chain().top().bitmap(name.as_bytes()))
    }

    /// Adds, removes or changes a dirty bitmap, also while the disk is in use.
    pub fn change_bitmap(&self, name: &str, action: &BitmapAction<'_>) -> Result<()> {
        let image = self.engine.chain().top();
        blocking(image.change_bitmap(name.as_bytes(), action))
    }

    /// The snapshots of the image.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        blocking(self.engine.chain().top().snapshots())
    }

    /// Makes, deletes, applies or renames a snapshot, also while the disk is in
    /// use: requests under way come first, and others wait.
    pub fn change_snapshots(&self, job: &SnapshotJob) -> Result<()> {
        blocking(self.engine.chain().top().change_snapshots(job))
    }

    /// Makes the disk `size` bytes long, a multiple of 512. What is new reads
    /// as zeros; what lies behind the new end is lost, except in snapshots.
    ///
    /// Where the disk gets longer, no request may be under way on its last
    /// cluster.
    pub fn resize(&self, size: u64) -> Result<()> {
        if size < self.size() {
            blocking(self.engine.shrink(size))
        } else {
            self.grow(size)
        }
    }

    /// Flushes, gives back what was reserved, and closes the files.
    pub fn close(mut self) -> Result<()> {
        self.housekeeper.take();
        blocking(self.engine.close())
    }
}

/// Runs a future on this thread, with blocking operations.
pub(crate) fn blocking<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    thread_local! {
        static RUNTIME: std::io::Result<Runtime> = Runtime::inline();
    }
    RUNTIME.with(|runtime| match runtime {
        Ok(runtime) => runtime.block_on(future),
        Err(e) => Err(Error::io(
            "make an executor",
            std::io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO)),
        )),
    })
}
