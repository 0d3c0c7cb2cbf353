//! The life of a device served by this process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::control::{Control, Failure, START_DEV, TIME_LIMIT, Watch, block_path, char_path};
use super::datapath::DataPath;
use super::info::DeviceInfo;
use super::options::Options;
use super::params::{params, sectors};
use super::queue::{self, Setup};
use super::shared::Shared;
use super::uapi::ublksrv_ctrl_dev_info;
use super::{explain, sync};
use crate::block::{BlockHandler, Limits};
use crate::error::{Error, ErrorKind, Result};

/// Why [`Device::wait`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// [`StopHandle::stop`] was called; the device is still served.
    Asked,
    /// Somebody else has stopped or removed the device.
    Stopped,
}

/// Asks for a device to be stopped, from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<Shared>);

impl StopHandle {
    /// Makes [`Device::wait`] return.
    pub fn stop(&self) {
        self.0.change(|state| state.stop_asked = true);
    }
}

/// A block device that this process serves. Dropping it stops and removes it.
///
/// A request that fails, fails alone, with the handler's errno. A handler
/// that panics ends the process: see the text of the module `queue`.
#[derive(Debug)]
pub struct Device {
    id: u32,
    path: PathBuf,
    data_path: DataPath,
    logical_block: u32,
    control: Control,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The disk exists.
    started: bool,
    /// There is nothing more to stop.
    stopped: bool,
}

impl Device {
    /// Makes the device, serves it with `handler`, and waits until
    /// [`Self::path`] can be opened.
    pub fn create<H: BlockHandler>(options: &Options, handler: Arc<H>) -> Result<Self> {
        options.check()?;
        let mut control = Control::open(options.time_limit)?;
        let limits = handler.limits();
        // Refused before there is a device to remove.
        params(&limits, options.logical_block, options.read_only, 4096)?;
        let (info, data_path) = options.add(&mut control)?;
        let mut device = Self {
            id: info.dev_id,
            path: block_path(info.dev_id),
            data_path,
            logical_block: options.logical_block,
            control,
            shared: Arc::new(Shared::new(info.nr_hw_queues)),
            threads: Vec::new(),
            started: false,
            stopped: false,
        };
        // On failure the drop of `device` removes it.
        device.bring_up(options, &limits, &info, handler)?;
        Ok(device)
    }

    fn bring_up<H: BlockHandler>(
        &mut self,
        options: &Options,
        limits: &Limits,
        info: &ublksrv_ctrl_dev_info,
        handler: Arc<H>,
    ) -> Result<()> {
        let limit = options.time_limit;
        let params = params(
            limits,
            options.logical_block,
            options.read_only,
            info.max_io_buf_bytes,
        )?;
        self.control.set_params(self.id, &params)?;
        let node = Arc::new(open_node(&char_path(self.id), limit)?);
        for queue in 0..info.nr_hw_queues {
            let setup = Setup {
                device: self.id,
                queue,
                depth: info.queue_depth,
                data_path: self.data_path,
                max_request: info.max_io_buf_bytes,
                node: Arc::clone(&node),
                affinity: self.control.affinity(self.id, queue)?,
            };
            let thread = queue::start(setup, Arc::clone(&handler), Arc::clone(&self.shared))?;
            self.threads.push(thread);
        }
        // From here on only the queues hold them.
        drop((node, handler));
        self.wait_fetching(limit)?;
        self.start_disk()?;
        self.wait_node(limit)
    }

    /// Waits until every queue can take requests.
    fn wait_fetching(&self, limit: Duration) -> Result<()> {
        let queues = self.shared.queues();
        let id = self.id;
        let ready = self.shared.wait_for(limit, |state| {
            if let Some(failure) = &state.failure {
                return Some(Err(failure.duplicate()));
            }
            if state.ended > 0 {
                return Some(Err(queue::ended_early(id)));
            }
            (state.fetching == queues).then_some(Ok(()))
        });
        ready.unwrap_or_else(|| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "ublk device {id}: its queues are not ready after {} seconds",
                    limit.as_secs()
                ),
            ))
        })
    }

    /// The queues are being served meanwhile: the kernel reads partition
    /// tables during the command.
    fn start_disk(&mut self) -> Result<()> {
        let (shared, id) = (Arc::clone(&self.shared), self.id);
        let mut served = shared.served();
        let mut watch = || {
            let state = shared.lock();
            if state.ended > 0 || state.failure.is_some() {
                return Watch::GiveUp;
            }
            progress(&mut served, shared.served())
        };
        match self.control.start(id, &mut watch) {
            Ok(()) => {
                self.started = true;
                Ok(())
            }
            Err(Failure::GivenUp) => Err(self.failure().unwrap_or_else(|| queue::ended_early(id))),
            Err(failure) => Err(explain::command(START_DEV, Some(id), failure)),
        }
    }

    /// Waits for devtmpfs or udev to make the disk's node.
    fn wait_node(&mut self, limit: Duration) -> Result<()> {
        let devt = self.control.params(self.id)?.devt;
        let number = libc::makedev(devt.disk_major, devt.disk_minor);
        let ready = poll(limit, || {
            std::fs::metadata(&self.path)
                .is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == number)
                .then_some(())
        });
        ready.ok_or_else(|| {
            Error::new(
                ErrorKind::Timeout,
                format!(
                    "the device node has not appeared within {} seconds",
                    limit.as_secs()
                ),
            )
            .path(&self.path)
            .cure("mount devtmpfs on /dev, or run udev")
        })
    }

    /// The N of `/dev/ublkbN`.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The disk: `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How data moves between the kernel and us.
    pub fn data_path(&self) -> DataPath {
        self.data_path
    }

    /// Requests served so far.
    pub fn served(&self) -> u64 {
        self.shared.served()
    }

    /// The driver's record of the device.
    pub fn info(&mut self) -> Result<DeviceInfo> {
        DeviceInfo::read(&mut self.control, self.id)
    }

    /// Shows a new size to the disk's users; the handler has it already.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        let sectors = sectors(size, self.logical_block)?;
        // Linux before 7.0 crashes when the disk is gone already.
        if self.shared.lock().ended > 0 {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("ublk device {} has been stopped", self.id),
            ));
        }
        self.control.update_size(self.id, sectors)
    }

    /// Something that asks for a stop, from a signal handler's thread, say.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.shared))
    }

    /// Waits until somebody asks for a stop or the device is no more. An error
    /// means that requests may be stuck: stop the device.
    pub fn wait(&self) -> Result<Ended> {
        let queues = self.shared.queues();
        self.shared.wait(|state| {
            if let Some(failure) = state.failure.take() {
                return Some(Err(failure));
            }
            if state.ended == queues {
                return Some(Ok(Ended::Stopped));
            }
            state.stop_asked.then_some(Ok(Ended::Asked))
        })
    }

    /// Stops the device: what its users have written but not flushed is
    /// written back, then the disk goes away. When this returns, no request is
    /// under way, and no queue has the handler any more.
    ///
    /// The device's number stays taken until the result is dropped or
    /// [deleted](Stopped::delete): close the image first, so that a device that
    /// is gone means an image that is closed.
    pub fn stop(mut self) -> Result<Stopped> {
        let stopped = Stopped {
            id: self.id,
            control: Control::open(TIME_LIMIT).ok(),
        };
        match self.shut_down() {
            Ok(()) => Ok(stopped),
            Err(error) if self.stopped => {
                drop(stopped);
                Err(error)
            }
            Err(error) => {
                // The driver is stuck: another command would be, too.
                std::mem::forget(stopped);
                Err(error)
            }
        }
    }

    fn failure(&self) -> Option<Error> {
        self.shared.lock().failure.as_ref().map(Error::duplicate)
    }

    fn shut_down(&mut self) -> Result<()> {
        let alive = self.shared.lock().ended == 0;
        // The disk's page cache holds what buffered users have written. On a
        // device with recovery STOP_DEV would fail it, not write it.
        let synced = if self.started && alive {
            sync::disk(self.id, TIME_LIMIT)
        } else {
            Ok(())
        };
        let shared = Arc::clone(&self.shared);
        let mut served = shared.served();
        let mut watch = || progress(&mut served, shared.served());
        match self.control.stop(self.id, &mut watch) {
            // Somebody was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => result?,
        }
        let threads = self.threads.len();
        let ended = shared.wait_for(TIME_LIMIT, |state| (state.ended == threads).then_some(()));
        if ended.is_none() {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("ublk device {}: a request is stuck in its handler", self.id),
            ));
        }
        for thread in self.threads.drain(..) {
            // A panic there has ended the process.
            let _ = thread.join();
        }
        self.stopped = true;
        synced
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        let result = match self.shut_down() {
            Err(error) if !self.stopped => Err(error),
            result => self.control.delete(self.id).and(result),
        };
        if let Err(error) = result
            && error.kind() != ErrorKind::NotFound
        {
            tracing::error!("{error}");
        }
    }
}

/// A device that is no longer served and no longer a disk. Dropping it removes
/// it.
#[derive(Debug)]
#[must_use = "the device is removed when this is dropped"]
pub struct Stopped {
    id: u32,
    control: Option<Control>,
}

impl Stopped {
    /// Removes the device; its number becomes free.
    pub fn delete(mut self) -> Result<()> {
        self.delete_once()
    }

    fn delete_once(&mut self) -> Result<()> {
        let Some(mut control) = self.control.take() else {
            return Ok(());
        };
        match control.delete(self.id) {
            // Somebody was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = self.delete_once() {
            tracing::error!("{error}");
        }
    }
}

/// Opens the character device, which devtmpfs makes at once and udev soon.
fn open_node(path: &Path, limit: Duration) -> Result<File> {
    let open = || OpenOptions::new().read(true).write(true).open(path);
    let opened = poll(limit, || match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        result => Some(result),
    });
    opened
        .unwrap_or_else(open)
        .map_err(|error| Error::io("open the device", error).path(path))
}

/// Tries until `attempt` gives something or the time is over.
pub(super) fn poll<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(value) = attempt() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Whether requests have been served since the last look.
fn progress(last: &mut u64, now: u64) -> Watch {
    if std::mem::replace(last, now) == now {
        Watch::Waiting
    } else {
        Watch::Progress
    }
}
