//! One hardware queue: a thread, its ring, and a task for each tag that
//! fetches a request, has it handled, and commits the result with the fetch of
//! the next.
//!
//! A panic on a queue thread ends the process. Whatever invariant it broke,
//! nothing may act on that any more, and a thread less would leave requests
//! that nobody ever answers; a dead process the kernel knows how to handle: it
//! fails the device's I/O, or keeps it for the successor of a device with
//! recovery.

use std::cell::Cell;
use std::fs::File;
use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::thread::JoinHandle;

use super::datapath::DataPath;
use super::map::{Buffers, Descriptors};
use super::request::{Wanted, buffer_slot, data_position, io_command};
use super::shared::Shared;
use super::uapi::{UBLK_U_IO_COMMIT_AND_FETCH_REQ, UBLK_U_IO_FETCH_REQ};
use crate::block::{BlockHandler, Payload, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Runtime, ops, spawn, sys, yield_now};

/// How a queue is to be run.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) device: u32,
    pub(super) queue: u16,
    pub(super) depth: u16,
    pub(super) data_path: DataPath,
    pub(super) max_request: u32,
    /// `/dev/ublkcN`. The driver lets it be opened only once.
    pub(super) node: Arc<File>,
    /// The processors whose requests come here.
    pub(super) affinity: Vec<u8>,
}

/// Starts the thread of a queue.
pub(super) fn start<H: BlockHandler>(
    setup: Setup,
    handler: Arc<H>,
    shared: Arc<Shared>,
) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("ublk{}q{}", setup.device, setup.queue))
        .spawn(move || {
            let bomb = AbortOnPanic;
            // `setup` and `handler` are gone when the end is announced: who
            // waits for it may close what they refer to.
            let result = run(setup, handler, &shared);
            if let Err(error) = result {
                shared.fail(error);
            }
            shared.change(|state| state.ended += 1);
            std::mem::forget(bomb);
        })
        .map_err(|error| Error::io("start a queue thread", error))
}

/// See the module's text.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        tracing::error!("a block handler has panicked: the process ends here");
        std::process::abort();
    }
}

fn run<H: BlockHandler>(setup: Setup, handler: Arc<H>, shared: &Arc<Shared>) -> Result<()> {
    let name = format!("ublk device {} queue {}", setup.device, setup.queue);
    let doing = |what: &str| format!("{name}: {what}");
    prepare_thread(&setup.affinity);
    let fd = setup.node.as_raw_fd();
    let descriptors = Descriptors::map(fd, setup.queue, setup.depth)
        .map_err(|error| Error::io(doing("map the request descriptors"), error))?;
    let buffers = match setup.data_path {
        DataPath::Copy => Some(
            Buffers::new(setup.depth, setup.max_request)
                .map_err(|error| Error::io(doing("map the request buffers"), error))?,
        ),
        DataPath::UserCopy | DataPath::AutoBuf => None,
    };
    let queue = Rc::new(Queue {
        handler,
        shared: Arc::clone(shared),
        descriptors,
        buffers,
        failures: Cell::new(0),
        setup,
    });
    // After the queue: dropped, and so idle, before the memory is unmapped.
    let runtime = Runtime::uring(u32::from(queue.setup.depth) * 2)
        .map_err(|error| Error::io(doing("make an io_uring"), error))?;
    runtime
        .register_file(fd)
        .map_err(|error| Error::io(doing("register the device with the ring"), error))?;
    if queue.setup.data_path == DataPath::AutoBuf {
        runtime
            .register_buffer_slots(u32::from(queue.setup.depth))
            .map_err(|error| Error::io(doing("give the ring buffer slots"), error))?;
    }
    runtime.block_on(async {
        queue.handler.queue_started(queue.setup.queue)?;
        let tags: Vec<_> = (0..queue.setup.depth)
            .map(|tag| spawn(Rc::clone(&queue).serve(tag)))
            .collect();
        // One round queues the fetches, one submits them, one sees refusals.
        for _ in 0..3 {
            yield_now().await;
        }
        queue.handler.queue_ready(queue.setup.queue);
        shared.change(|state| state.fetching += 1);
        // Once a tag is offered, only the driver can take it back (when the
        // device is stopped): whatever happens, wait for that.
        for tag in tags {
            tag.await;
        }
        Ok(())
    })
}

/// What the tasks of a queue have in common.
struct Queue<H> {
    handler: Arc<H>,
    shared: Arc<Shared>,
    descriptors: Descriptors,
    /// Only in copy mode.
    buffers: Option<Buffers>,
    /// Requests that failed.
    failures: Cell<u64>,
    setup: Setup,
}

impl<H: BlockHandler> Queue<H> {
    /// Serves the requests of one tag until the device is stopped.
    async fn serve(self: Rc<Self>, tag: u16) {
        let (queue, fd) = (self.setup.queue, self.setup.node.as_raw_fd());
        // Where the driver copies the data (a member of the command), or the
        // slot it registers the pages in (the entry's `addr`).
        let (memory, slot) = match self.setup.data_path {
            DataPath::Copy => (self.buffer(tag) as u64, 0),
            DataPath::UserCopy => (0, 0),
            DataPath::AutoBuf => (0, buffer_slot(tag)),
        };
        poll_fn(|context| {
            self.shared.add_server(context.waker());
            Poll::Ready(())
        })
        .await;
        let mut command = UBLK_U_IO_FETCH_REQ;
        let mut answer = 0;
        loop {
            let bytes = io_command(queue, tag, answer, memory);
            // SAFETY: the driver writes to the tag's buffer, which outlives
            // the ring and is not touched by us until the command completes.
            let op = unsafe { ops::driver_command(fd, command, bytes, slot) };
            match op.await {
                Ok(0) => {}
                // What the driver says at the end (UBLK_IO_RES_ABORT).
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(error) => return self.lost(tag, error),
                Ok(other) => {
                    let error = format!("unknown answer {other}");
                    return self.lost(tag, std::io::Error::other(error));
                }
            }
            answer = self.handle(tag).await;
            self.shared.count(queue);
            command = UBLK_U_IO_COMMIT_AND_FETCH_REQ;
        }
    }

    /// Has a delivered request handled; the answer for the driver.
    async fn handle(&self, tag: u16) -> i32 {
        let Some(wanted) = Wanted::decode(&self.descriptors.get(tag)) else {
            return -libc::EOPNOTSUPP;
        };
        let payload = if !wanted.has_data() {
            Payload::zeros(wanted.len)
        } else if wanted.len <= u64::from(self.setup.max_request) {
            self.payload(tag, &wanted)
        } else {
            return -libc::EINVAL;
        };
        let request = Request {
            op: wanted.op,
            offset: wanted.offset,
            len: wanted.len,
            payload,
        };
        let mut handling = pin!(self.handler.handle(self.setup.queue, request));
        let result = poll_fn(|context| {
            if self.shared.is_giving_up() {
                return Poll::Ready(Err(given_up()));
            }
            handling.as_mut().poll(context)
        })
        .await;
        if let Err(error) = &result {
            self.report(&wanted, error);
        }
        wanted.answer(&result)
    }

    fn payload(&self, tag: u16, wanted: &Wanted) -> Payload {
        let Setup {
            queue, data_path, ..
        } = self.setup;
        let slot = match data_path {
            DataPath::Copy => {
                // SAFETY: the tag's own buffer, not shorter than `max_request`
                // and so `len`; the driver leaves it alone until the request
                // is committed, which is after the handler is done with it.
                return unsafe { Payload::memory(self.buffer(tag), wanted.len) };
            }
            DataPath::UserCopy => None,
            // The driver may fail to register them (no memory).
            DataPath::AutoBuf => wanted.registered.then_some(tag),
        };
        let fd = self.setup.node.as_raw_fd();
        // SAFETY: the request is committed when the handler is done with it,
        // and its pages are in the slot named in the tag's command, of the
        // ring of this thread.
        unsafe { Payload::device(fd, data_position(queue, tag), slot, wanted.len) }
    }

    fn buffer(&self, tag: u16) -> *mut u8 {
        let buffers = self.buffers.as_ref();
        buffers.expect("made with the queue in copy mode").get(tag)
    }

    /// The driver does not take a tag any more.
    fn lost(&self, tag: u16, error: std::io::Error) {
        let Setup { device, queue, .. } = self.setup;
        self.shared.fail(Error::io(
            format!("ublk device {device}: the driver refuses tag {tag} of queue {queue}"),
            error,
        ));
    }

    /// The issuer gets an errno; the rest goes to the log, which a disk full
    /// of errors must not fill.
    fn report(&self, wanted: &Wanted, error: &Error) {
        let count = self.failures.get() + 1;
        self.failures.set(count);
        if count <= 16 || count.is_power_of_two() {
            tracing::warn!(
                device = self.setup.device,
                failures = count,
                "{:?} of {} bytes at {} failed: {error}",
                wanted.op,
                wanted.len,
                wanted.offset,
            );
        }
    }
}

/// Puts the thread near its requests, and keeps it from waiting for the
/// write-back of memory to its own device. Best effort.
fn prepare_thread(affinity: &[u8]) {
    let mut allowed = vec![0_u8; affinity.len()];
    // SAFETY: reads and writes byte arrays of the length given, which is a
    // multiple of the word size; 0 is the calling thread.
    unsafe {
        let current = libc::sched_getaffinity(0, allowed.len(), allowed.as_mut_ptr().cast());
        // Stay within what taskset or a cgroup allows.
        for (byte, wanted) in allowed.iter_mut().zip(affinity) {
            *byte &= wanted;
        }
        if current == 0 && allowed.iter().any(|&byte| byte != 0) {
            libc::sched_setaffinity(0, allowed.len(), allowed.as_ptr().cast());
        }
    }
    if let Err(error) = sys::become_io_flusher() {
        tracing::debug!("PR_SET_IO_FLUSHER: {error}");
    }
}

/// The error of a request that stands in the way of stopping the device. Its
/// handler's future is dropped, once; whatever it does not like about that, a
/// request without an answer would keep the driver, and so this process, from
/// ever ending.
fn given_up() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the device is stopped, and its handler has not finished",
    )
}

/// The error of a queue that ended while it was still needed.
pub(super) fn ended_early(device: u32) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("ublk device {device}: a queue has ended before the device was started"),
    )
}
