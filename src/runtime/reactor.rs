//! Tasks, operations in flight and the ring of one thread.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};

use io_uring::{IoUring, opcode, squeue, types};

use super::inbox::Queued;
use super::restrict;
use super::wake::{Remote, TaskWaker};

/// Files a ring can have registered: the device and a chain of 64 layers.
const FILE_SLOTS: u32 = 80;
/// The task id of the future given to `block_on`.
const MAIN: u32 = 0;
/// `user_data` of the standing eventfd poll, and of what nobody waits for.
const WAKE_EVENT: u64 = u64::MAX;
const NOBODY: u64 = u64::MAX - 1;

/// Descriptors that were closed, in all threads: a ring goes on using the old
/// file under a number that may mean another one by now.
static CLOSED: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
/// Its length: one load on the way to every operation, instead of a lock.
static CLOSED_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Makes all rings forget a descriptor, before it is closed.
pub(super) fn announce_close(fd: RawFd) {
    let mut closed = CLOSED.lock().unwrap_or_else(PoisonError::into_inner);
    closed.push(fd);
    CLOSED_COUNT.store(closed.len(), Ordering::Release);
}

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    /// Absent while it is being polled, and in free slots.
    future: Option<LocalFuture>,
    waker: Arc<TaskWaker>,
    std_waker: Waker,
    live: bool,
}

#[derive(Clone, Copy)]
enum OpState {
    Free,
    /// In the ring; the task to poll when it completes.
    Waiting {
        task: u32,
    },
    /// Completed with this result, not yet taken.
    Done {
        result: i32,
    },
}

pub(super) struct Reactor {
    ring: RefCell<Option<IoUring>>,
    ops: RefCell<Vec<OpState>>,
    free_ops: RefCell<Vec<u32>>,
    tasks: RefCell<Vec<Task>>,
    free_tasks: RefCell<Vec<u32>>,
    ready: RefCell<VecDeque<u32>>,
    current: Cell<u32>,
    remote: Arc<Remote>,
    /// Raw file descriptor -> slot in the ring's file table, plus one.
    registered: RefCell<Vec<u32>>,
    free_slots: RefCell<Vec<u32>>,
    /// How many of [`CLOSED`] this reactor has taken note of.
    closed_seen: Cell<usize>,
    event_armed: Cell<bool>,
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Tasks own operations, whose drop waits for the ring: they go first.
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        // The kernel takes a ring apart some time after it is closed. Files are
        // closed when they are closed: their locks and file systems are waited for.
        if let Some(ring) = self.ring.get_mut() {
            let nothing = [-1; FILE_SLOTS as usize];
            if let Err(error) = ring.submitter().register_files_update(0, &nothing) {
                tracing::debug!("files stay open until the ring is gone: {error}");
            }
        }
    }
}

impl Reactor {
    pub(super) fn inline() -> io::Result<Self> {
        Self::new(None)
    }

    pub(super) fn with_ring(entries: u32) -> io::Result<Self> {
        // SINGLE_ISSUER | DEFER_TASKRUN since 6.1: completions are run in our
        // own io_uring_enter, not by interrupting the thread.
        let build = |defer: bool| {
            let mut builder = IoUring::builder();
            // No fork may keep what is registered with the ring alive: it can
            // be a ublk device, whose end would wait for the child.
            builder
                .setup_cqsize(entries.max(8) * 4)
                .setup_clamp()
                .setup_r_disabled()
                .dontfork();
            if defer {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_submit_all();
            }
            builder.build(entries.max(8))
        };
        let ring = build(true).or_else(|_| build(false))?;
        ring.submitter().register_files_sparse(FILE_SLOTS)?;
        restrict::enable(&ring)?;
        Self::new(Some(ring))
    }

    fn new(ring: Option<IoUring>) -> io::Result<Self> {
        let reactor = Self {
            ring: RefCell::new(ring),
            ops: RefCell::default(),
            free_ops: RefCell::default(),
            tasks: RefCell::default(),
            free_tasks: RefCell::default(),
            ready: RefCell::default(),
            current: Cell::new(MAIN),
            remote: Arc::new(Remote::new()?),
            registered: RefCell::default(),
            free_slots: RefCell::new((0..FILE_SLOTS).rev().collect()),
            closed_seen: Cell::new(CLOSED_COUNT.load(Ordering::Acquire)),
            event_armed: Cell::new(false),
        };
        reactor.new_task(None); // MAIN
        Ok(reactor)
    }

    pub(super) fn has_ring(&self) -> bool {
        self.ring.borrow().is_some()
    }

    // --- tasks ---

    fn new_task(&self, future: Option<LocalFuture>) -> u32 {
        let reused = self.free_tasks.borrow_mut().pop();
        let mut tasks = self.tasks.borrow_mut();
        let id = reused.unwrap_or(tasks.len() as u32);
        let waker = Arc::new(TaskWaker {
            remote: Arc::clone(&self.remote),
            task: id,
            queued: Queued::new(),
        });
        let task = Task {
            future,
            std_waker: Waker::from(Arc::clone(&waker)),
            waker,
            live: true,
        };
        match tasks.get_mut(id as usize) {
            Some(slot) => *slot = task,
            None => tasks.push(task),
        }
        id
    }

    pub(super) fn spawn(&self, future: LocalFuture) {
        let id = self.new_task(Some(future));
        self.ready.borrow_mut().push_back(id);
    }

    /// Polls ready tasks and the main future until the latter is complete.
    pub(super) fn run<T>(&self, mut poll_main: impl FnMut(&mut Context<'_>) -> Option<T>) -> T {
        self.ready.borrow_mut().push_back(MAIN);
        loop {
            self.remote
                .inbox()
                .drain(|task| self.ready.borrow_mut().push_back(task));
            // One round: what becomes ready meanwhile waits for the next, so
            // that a busy task cannot keep the ring from being entered.
            let round = self.ready.borrow().len();
            for _ in 0..round {
                let Some(id) = self.ready.borrow_mut().pop_front() else {
                    break;
                };
                if let Some(output) = self.poll_task(id, &mut poll_main) {
                    return output;
                }
            }
            let idle = self.ready.borrow().is_empty();
            self.turn(idle);
        }
    }

    fn poll_task<T>(
        &self,
        id: u32,
        poll_main: &mut impl FnMut(&mut Context<'_>) -> Option<T>,
    ) -> Option<T> {
        let (future, waker) = {
            let mut tasks = self.tasks.borrow_mut();
            let task = &mut tasks[id as usize];
            if !task.live {
                return None;
            }
            task.waker.queued.clear();
            (task.future.take(), task.std_waker.clone())
        };
        let outer = self.current.replace(id);
        let mut context = Context::from_waker(&waker);
        let output = if id == MAIN {
            poll_main(&mut context)
        } else {
            if let Some(mut future) = future {
                if future.as_mut().poll(&mut context).is_ready() {
                    drop(future);
                    self.tasks.borrow_mut()[id as usize].live = false;
                    self.free_tasks.borrow_mut().push(id);
                } else {
                    self.tasks.borrow_mut()[id as usize].future = Some(future);
                }
            }
            None
        };
        self.current.set(outer);
        output
    }

    // --- the ring ---

    /// Submits what is queued and reaps what is complete; sleeps when `idle`
    /// until something completes or another thread wakes us.
    fn turn(&self, idle: bool) {
        let mut guard = self.ring.borrow_mut();
        let Some(ring) = guard.as_mut() else {
            if idle && self.remote.inbox().sleep() {
                self.remote.wait_for_signal();
                self.remote.inbox().awake();
            }
            return;
        };
        if !self.event_armed.replace(true) {
            let poll = opcode::PollAdd::new(types::Fd(self.remote.event_fd()), libc::POLLIN as u32)
                .build()
                .user_data(WAKE_EVENT);
            Self::push(ring, &poll);
        }
        let sleep = idle && ring.completion().is_empty() && self.remote.inbox().sleep();
        let wanted = usize::from(sleep);
        // Errors: EINTR and EBUSY (completion queue full) mean "reap, then try
        // again", which the caller's loop does. Anything else would be a
        // broken ring; entries stay queued and the loop retries.
        let _ = ring.submit_and_wait(wanted);
        if sleep {
            self.remote.inbox().awake();
        }
        self.reap(ring);
    }

    fn reap(&self, ring: &mut IoUring) {
        let mut ready = self.ready.borrow_mut();
        let mut ops = self.ops.borrow_mut();
        for completion in ring.completion() {
            match completion.user_data() {
                WAKE_EVENT => {
                    self.event_armed.set(false);
                    self.remote.wait_for_signal();
                }
                NOBODY => {}
                slot => {
                    let slot = &mut ops[slot as usize];
                    if let OpState::Waiting { task } = *slot {
                        ready.push_back(task);
                    }
                    *slot = OpState::Done {
                        result: completion.result(),
                    };
                }
            }
        }
    }

    fn push(ring: &mut IoUring, entry: &squeue::Entry) {
        loop {
            // SAFETY: whoever made the entry keeps its buffers alive until the
            // completion: `Op` waits for it when dropped.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                return;
            }
            // Full: hand it to the kernel. EBUSY and EINTR pass.
            let _ = ring.submit();
        }
    }

    /// Queues an operation for the current task; its slot.
    pub(super) fn start(&self, entry: squeue::Entry) -> u32 {
        let slot = {
            let mut ops = self.ops.borrow_mut();
            let state = OpState::Waiting {
                task: self.current.get(),
            };
            if let Some(slot) = self.free_ops.borrow_mut().pop() {
                ops[slot as usize] = state;
                slot
            } else {
                ops.push(state);
                ops.len() as u32 - 1
            }
        };
        let mut ring = self.ring.borrow_mut();
        let ring = ring.as_mut().expect("operations start only on a ring");
        Self::push(ring, &entry.user_data(u64::from(slot)));
        slot
    }

    /// The result of a complete operation, whose slot becomes free; else the
    /// current task is the one to poll.
    pub(super) fn take(&self, slot: u32) -> Option<i32> {
        let mut ops = self.ops.borrow_mut();
        match ops[slot as usize] {
            OpState::Done { result } => {
                ops[slot as usize] = OpState::Free;
                self.free_ops.borrow_mut().push(slot);
                Some(result)
            }
            OpState::Waiting { .. } => {
                ops[slot as usize] = OpState::Waiting {
                    task: self.current.get(),
                };
                None
            }
            OpState::Free => unreachable!("an operation taken twice"),
        }
    }

    /// Cancels an operation and waits until the kernel is done with its
    /// buffers.
    pub(super) fn abandon(&self, slot: u32) {
        let mut guard = self.ring.borrow_mut();
        let Some(ring) = guard.as_mut() else { return };
        let done =
            |reactor: &Self| matches!(reactor.ops.borrow()[slot as usize], OpState::Done { .. });
        if !done(self) {
            let cancel = opcode::AsyncCancel::new(u64::from(slot))
                .build()
                .user_data(NOBODY);
            Self::push(ring, &cancel);
            while !done(self) {
                let _ = ring.submit_and_wait(1);
                self.reap(ring);
            }
        }
        drop(guard);
        self.take(slot);
    }

    // --- registration ---

    /// The ring's slot for a file, when it is registered.
    pub(super) fn file_slot(&self, fd: RawFd) -> Option<u32> {
        if CLOSED_COUNT.load(Ordering::Acquire) != self.closed_seen.get() {
            self.forget_closed();
        }
        let registered = self.registered.borrow();
        let slot = *registered.get(usize::try_from(fd).ok()?)?;
        slot.checked_sub(1)
    }

    fn forget_closed(&self) {
        let closed = CLOSED.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = self.closed_seen.replace(closed.len());
        for &fd in &closed[seen..] {
            let mut registered = self.registered.borrow_mut();
            let slot = usize::try_from(fd).ok().and_then(|i| registered.get_mut(i));
            let Some(slot) = slot.map(std::mem::take).and_then(|s| s.checked_sub(1)) else {
                continue;
            };
            let ring = self.ring.borrow();
            let ring = ring.as_ref().expect("files are registered with a ring");
            // A slot that cannot be emptied is not used again.
            if ring.submitter().register_files_update(slot, &[-1]).is_ok() {
                self.free_slots.borrow_mut().push(slot);
            }
        }
    }

    pub(super) fn register_file(&self, fd: RawFd) -> io::Result<()> {
        if !self.has_ring() || self.file_slot(fd).is_some() {
            return Ok(());
        }
        let Ok(index) = usize::try_from(fd) else {
            return Ok(());
        };
        let Some(slot) = self.free_slots.borrow_mut().pop() else {
            return Ok(());
        };
        let guard = self.ring.borrow();
        let ring = guard.as_ref().expect("looked at above");
        if let Err(e) = ring.submitter().register_files_update(slot, &[fd]) {
            self.free_slots.borrow_mut().push(slot);
            return Err(e);
        }
        let mut registered = self.registered.borrow_mut();
        if registered.len() <= index {
            registered.resize(index + 1, 0);
        }
        registered[index] = slot + 1;
        Ok(())
    }

    pub(super) fn register_buffer_slots(&self, count: u32) -> io::Result<()> {
        match self.ring.borrow().as_ref() {
            Some(ring) => ring.submitter().register_buffers_sparse(count),
            None => Ok(()),
        }
    }
}
