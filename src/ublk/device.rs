//! The life of a device served by this process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::control::{Control, Failure, START_DEV, Watch, block_path, char_path};
use super::datapath::DataPath;
use super::info::DeviceInfo;
use super::options::Options;
use super::params::{params, sectors};
use super::queue::{self, Setup};
use super::shared::Shared;
use super::steward::Steward;
use super::uapi::ublksrv_ctrl_dev_info;
use super::{explain, halt};
use crate::block::{BlockHandler, Limits};
use crate::error::{Error, ErrorKind, Result};

/// How soon a stop is tried again while a queue has not ended.
const AGAIN: Duration = Duration::from_secs(1);

/// Why [`Device::wait`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// [`Handle::stop`] was called; the device is still served.
    Asked,
    /// Somebody else has stopped or removed the device.
    Stopped,
}

/// A served device as other threads see it: a signal handler's, a control
/// socket's.
#[derive(Clone, Debug)]
pub struct Handle {
    id: u32,
    logical_block: u32,
    limit: Duration,
    shared: Arc<Shared>,
    steward: Option<Arc<Steward>>,
}

impl Handle {
    /// Makes [`Device::wait`] return.
    pub fn stop(&self) {
        self.shared.change(|state| state.stop_asked = true);
    }

    /// Requests served so far.
    pub fn served(&self) -> u64 {
        self.shared.served()
    }

    /// The driver's record of the device.
    pub fn info(&self) -> Result<DeviceInfo> {
        DeviceInfo::read(&mut self.control()?, self.id)
    }

    /// Shows a new size to the disk's users; the handler has it already.
    pub fn resize(&self, size: u64) -> Result<()> {
        let sectors = sectors(size, self.logical_block)?;
        // Linux before 7.0 crashes when the disk is gone already.
        if self.shared.lock().ended > 0 {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("ublk device {} has been stopped", self.id),
            ));
        }
        self.control()?.update_size(self.id, sectors)
    }

    fn control(&self) -> Result<Control> {
        Control::through(self.steward.as_ref(), self.limit)
    }
}

/// A block device that this process serves. Dropping it stops and removes it.
///
/// A request that fails, fails alone, with the handler's errno. A handler
/// that panics ends the process: see the text of the module `queue`.
#[derive(Debug)]
pub struct Device {
    handle: Handle,
    path: PathBuf,
    queues: u16,
    depth: u16,
    data_path: DataPath,
    control: Control,
    threads: Vec<JoinHandle<()>>,
    /// The disk exists.
    started: bool,
    /// There is nothing more to stop.
    stopped: bool,
}

/// A device whose queues are ready and whose disk does not exist yet: nobody
/// has read or written a byte of it. Dropping it removes it.
#[derive(Debug)]
#[must_use = "the device is removed when this is dropped"]
pub struct Prepared(Device);

impl Prepared {
    /// The device that it is going to be.
    pub fn device(&self) -> &Device {
        &self.0
    }

    /// Makes the disk, and waits until its [path](Device::path) can be opened.
    pub fn start(self) -> Result<Device> {
        let mut device = self.0;
        device.start_disk()?;
        device.wait_node(device.handle.limit)?;
        Ok(device)
    }
}

impl Device {
    /// Makes the device, serves it with `handler`, and waits until
    /// [`Self::path`] can be opened.
    pub fn create<H: BlockHandler>(options: &Options, handler: Arc<H>) -> Result<Self> {
        Self::prepare(options, handler, None)?.start()
    }

    /// Makes the device and its queues, with `handler` to serve them. From
    /// then on the driver is commanded through the `steward`, if there is one:
    /// this process needs no more rights, files or rings than it has.
    pub fn prepare<H: BlockHandler>(
        options: &Options,
        handler: Arc<H>,
        steward: Option<Arc<Steward>>,
    ) -> Result<Prepared> {
        options.check()?;
        let mut control = Control::open(options.time_limit)?;
        let limits = handler.limits();
        // Refused before there is a device to remove.
        params(&limits, options.logical_block, options.read_only, 4096)?;
        let (info, data_path) = options.add(&mut control)?;
        let mut device = Self {
            handle: Handle {
                id: info.dev_id,
                logical_block: options.logical_block,
                limit: options.time_limit,
                shared: Arc::new(Shared::new(info.nr_hw_queues)),
                steward,
            },
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            path: block_path(info.dev_id),
            data_path,
            control,
            threads: Vec::new(),
            started: false,
            stopped: false,
        };
        // On failure the drop of `device` removes it.
        device.bring_up(options, &limits, &info, handler)?;
        device.control = device.handle.control()?;
        Ok(Prepared(device))
    }

    fn bring_up<H: BlockHandler>(
        &mut self,
        options: &Options,
        limits: &Limits,
        info: &ublksrv_ctrl_dev_info,
        handler: Arc<H>,
    ) -> Result<()> {
        let limit = self.handle.limit;
        let params = params(
            limits,
            options.logical_block,
            options.read_only,
            info.max_io_buf_bytes,
        )?;
        self.control.set_params(self.handle.id, &params)?;
        let node = Arc::new(open_node(&char_path(self.handle.id), limit)?);
        for queue in 0..info.nr_hw_queues {
            let setup = Setup {
                device: self.handle.id,
                queue,
                depth: info.queue_depth,
                data_path: self.data_path,
                max_request: info.max_io_buf_bytes,
                node: Arc::clone(&node),
                affinity: self.control.affinity(self.handle.id, queue)?,
            };
            let thread =
                queue::start(setup, Arc::clone(&handler), Arc::clone(&self.handle.shared))?;
            self.threads.push(thread);
        }
        // From here on only the queues hold them.
        drop((node, handler));
        self.wait_fetching(limit)
    }

    /// Waits until every queue can take requests.
    fn wait_fetching(&self, limit: Duration) -> Result<()> {
        let queues = self.handle.shared.queues();
        let id = self.handle.id;
        let ready = self.handle.shared.wait_for(limit, |state| {
            // A queue that offers its tags after the device was stopped would
            // never hear of it: wait for all of them, come what may.
            if state.fetching + state.ended < queues {
                return None;
            }
            if let Some(failure) = &state.failure {
                return Some(Err(failure.duplicate()));
            }
            if state.ended > 0 {
                return Some(Err(queue::ended_early(id)));
            }
            Some(Ok(()))
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
        let (shared, id) = (Arc::clone(&self.handle.shared), self.handle.id);
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
        let devt = self.control.params(self.handle.id)?.devt;
        let number = libc::makedev(devt.disk_major, devt.disk_minor);
        let ready = poll(limit, || {
            std::fs::metadata(&self.path)
                .is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == number)
                .then_some(())
        });
        if ready.is_some() {
            return Ok(());
        }
        let error = if self.path.exists() {
            // Whoever opens the disk for writing at the wrong moment makes it.
            Error::new(ErrorKind::Busy, "another file has the device's name").cure("delete it")
        } else {
            let seconds = limit.as_secs();
            Error::new(
                ErrorKind::Timeout,
                format!("the device node has not appeared within {seconds} seconds"),
            )
            .cure("mount devtmpfs on /dev, or run udev")
        };
        Err(error.path(&self.path))
    }

    /// The N of `/dev/ublkbN`.
    pub fn id(&self) -> u32 {
        self.handle.id
    }

    /// The disk: `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hardware queues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Requests in flight in each.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// How data moves between the kernel and us.
    pub fn data_path(&self) -> DataPath {
        self.data_path
    }

    /// The device for other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until somebody asks for a stop or the device is no more. An error
    /// means that requests may be stuck: stop the device.
    pub fn wait(&self) -> Result<Ended> {
        let queues = self.handle.shared.queues();
        self.handle.shared.wait(|state| {
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
        let trouble = self.shut_down()?;
        Ok(Stopped {
            handle: self.handle.clone(),
            trouble,
            deleted: false,
        })
    }

    fn failure(&self) -> Option<Error> {
        self.handle
            .shared
            .lock()
            .failure
            .as_ref()
            .map(Error::duplicate)
    }

    /// What could not be written back, or was still under way, is an error of
    /// its own: the device is stopped all the same.
    fn shut_down(&mut self) -> Result<Option<Error>> {
        let Handle {
            id,
            limit,
            shared,
            steward,
            ..
        } = self.handle.clone();
        let alive = shared.lock().ended == 0;
        let mut trouble = None;
        // The disk's page cache holds what buffered users have written. On a
        // device with recovery STOP_DEV would fail it, not write it.
        if self.started && alive {
            let mut served = shared.served();
            let mut watch = || progress(&mut served, shared.served());
            trouble = halt::write_back(id, limit, steward.as_ref(), &mut watch).err();
        }
        let (mut served, mut since) = (shared.served(), Instant::now());
        let mut watch = || {
            let watch = progress(&mut served, shared.served());
            if watch == Watch::Progress {
                since = Instant::now();
            } else if since.elapsed() >= limit / 2 && !shared.is_giving_up() {
                // The driver waits for requests that have no end. It would
                // wait for ever, and this process could not even be killed.
                shared.give_up();
                trouble.get_or_insert_with(|| {
                    Error::new(
                        ErrorKind::Timeout,
                        format!("ublk device {id}: requests under way had to be given up"),
                    )
                });
            }
            watch
        };
        let threads = self.threads.len();
        let mut end = None;
        let ended = loop {
            halt::stop(id, limit, steward.as_ref(), &mut watch)?;
            let ended = shared.wait_for(AGAIN, |state| (state.ended == threads).then_some(()));
            let end = *end.get_or_insert_with(|| Instant::now() + limit);
            if ended.is_some() || Instant::now() >= end {
                break ended;
            }
        };
        if ended.is_none() {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("ublk device {id}: a request is stuck in its handler"),
            ));
        }
        for thread in self.threads.drain(..) {
            // A panic there has ended the process.
            let _ = thread.join();
        }
        self.stopped = true;
        Ok(trouble)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        // Where stopping hangs in the driver, so would deleting.
        let result = self.shut_down().and_then(|trouble| {
            self.control.delete(self.handle.id)?;
            trouble.map_or(Ok(()), Err)
        });
        if let Err(error) = result {
            tracing::error!("{error}");
        }
    }
}

/// A device that is no longer served and no longer a disk. Dropping it removes
/// it.
#[derive(Debug)]
#[must_use = "the device is removed when this is dropped"]
pub struct Stopped {
    handle: Handle,
    trouble: Option<Error>,
    deleted: bool,
}

impl Stopped {
    /// Removes the device. Its number becomes free, when the last of those who
    /// had the disk open closes it.
    ///
    /// An error can also be one that stopping met on its way: something could
    /// not be written back, or a request had to be given up.
    pub fn delete(mut self) -> Result<()> {
        self.delete_once()
    }

    fn delete_once(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.deleted, true) {
            self.handle.control()?.delete(self.handle.id)?;
        }
        self.trouble.take().map_or(Ok(()), Err)
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
