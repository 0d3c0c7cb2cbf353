//! A small single-threaded executor around one io_uring: every queue thread
//! has one. Knows nothing of images or devices.
//!
//! - A thread runs one [`Runtime`]. Futures live on that thread ([`spawn`])
//!   and wait for operations on its ring ([`ops`]) or for other threads
//!   ([`sync`]).
//! - All ready tasks are polled before the ring is entered, so that one
//!   `io_uring_enter` submits and reaps a whole batch.
//! - Without a ring ([`Runtime::inline`]) operations are plain system calls
//!   made at once. Commands, the library's blocking face and hosts that forbid
//!   io_uring use the same engine that way.
//! - This module and `ublk` are the only places with `unsafe` code.

pub mod buf;
mod inbox;
pub mod locked;
pub mod ops;
pub mod payload;
pub mod pool;
pub(crate) mod primitives;
mod reactor;
mod restrict;
pub mod sync;
pub mod sys;
mod wake;

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

pub use buf::Buf;
pub use payload::Payload;

use reactor::Reactor;

/// The executor of the current thread.
pub struct Runtime {
    reactor: Rc<Reactor>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime")
            .field("ring", &self.reactor.has_ring())
            .finish()
    }
}

impl Runtime {
    /// A runtime with an io_uring of at least `entries` submission entries.
    ///
    /// Fails where the kernel or the container's policy has no io_uring.
    pub fn uring(entries: u32) -> io::Result<Self> {
        Ok(Self {
            reactor: Rc::new(Reactor::with_ring(entries)?),
        })
    }

    /// A runtime whose operations are blocking system calls.
    pub fn inline() -> io::Result<Self> {
        Ok(Self {
            reactor: Rc::new(Reactor::inline()?),
        })
    }

    /// io_uring where there is one, else blocking system calls.
    pub fn best(entries: u32) -> io::Result<Self> {
        Self::uring(entries).or_else(|_| Self::inline())
    }

    /// True when operations go through an io_uring.
    pub fn has_ring(&self) -> bool {
        self.reactor.has_ring()
    }

    /// Runs `future`, and everything it spawns, until `future` is complete.
    ///
    /// Spawned tasks that are not complete by then stay, and go on in the next
    /// call.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _entered = Entered::new(&self.reactor);
        let mut future = pin!(future);
        self.reactor.run(
            |context: &mut Context<'_>| match future.as_mut().poll(context) {
                Poll::Ready(output) => Some(output),
                Poll::Pending => None,
            },
        )
    }

    /// Registers a file with the ring, so that operations on it skip the
    /// kernel's file table. Without effect on a runtime without ring.
    ///
    /// The ring keeps the file open. Whoever closes the descriptor calls
    /// [`closing_file`] first.
    pub fn register_file(&self, fd: RawFd) -> io::Result<()> {
        self.reactor.register_file(fd)
    }

    /// Gives the ring `count` empty fixed-buffer slots (ublk AUTO_BUF_REG).
    pub fn register_buffer_slots(&self, count: u32) -> io::Result<()> {
        self.reactor.register_buffer_slots(count)
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

/// Marks the reactor as the thread's current one, for the length of a call.
struct Entered {
    outer: Option<Rc<Reactor>>,
}

impl Entered {
    fn new(reactor: &Rc<Reactor>) -> Self {
        Self {
            outer: CURRENT.with(|current| current.replace(Some(Rc::clone(reactor)))),
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with(|current| *current.borrow_mut() = self.outer.take());
    }
}

/// Calls `f` with the thread's reactor.
///
/// # Panics
/// Outside [`Runtime::block_on`].
fn with_current<R>(f: impl FnOnce(&Rc<Reactor>) -> R) -> R {
    CURRENT.with(|current| {
        let current = current.borrow();
        f(current
            .as_ref()
            .expect("an operation outside Runtime::block_on"))
    })
}

/// Registers a file with the current thread's ring; see
/// [`Runtime::register_file`].
pub fn register_file(fd: RawFd) -> io::Result<()> {
    with_current(|reactor| reactor.register_file(fd))
}

/// Makes the rings of all threads forget a registered file; to be called
/// before its descriptor is closed, for its number may be given to another
/// file at once.
///
/// The current thread's ring lets go of it now. Another thread's ring keeps
/// the file itself open, and with it the locks on it, until that thread's next
/// operation.
pub fn closing_file(fd: RawFd) {
    reactor::announce_close(fd);
    // A thread's locals may be gone when the last files are closed.
    let _ = CURRENT.try_with(|current| {
        if let Some(reactor) = current.borrow().as_ref() {
            reactor.file_slot(fd);
        }
    });
}

/// Starts a task on the current thread's runtime.
///
/// # Panics
/// Outside [`Runtime::block_on`].
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let slot = Rc::new(RefCell::new(JoinSlot {
        output: None,
        waiter: None,
    }));
    let filled = Rc::clone(&slot);
    with_current(|reactor| {
        reactor.spawn(Box::pin(async move {
            let output = future.await;
            let mut slot = filled.borrow_mut();
            slot.output = Some(output);
            if let Some(waiter) = slot.waiter.take() {
                waiter.wake();
            }
        }));
    });
    JoinHandle { slot }
}

struct JoinSlot<T> {
    output: Option<T>,
    waiter: Option<std::task::Waker>,
}

/// Waits for a spawned task. Dropping it leaves the task running.
pub struct JoinHandle<T> {
    slot: Rc<RefCell<JoinSlot<T>>>,
}

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinHandle")
    }
}

impl<T> JoinHandle<T> {
    /// True when the task is complete.
    pub fn is_finished(&self) -> bool {
        self.slot.borrow().output.is_some()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.slot.borrow_mut();
        match slot.output.take() {
            Some(output) => Poll::Ready(output),
            None => {
                slot.waiter = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Lets the other ready tasks run first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            Poll::Ready(())
        } else {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn runtimes() -> Vec<Runtime> {
        vec![Runtime::uring(8).unwrap(), Runtime::inline().unwrap()]
    }

    fn scratch(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn many_tasks_write_and_read_back() {
        for runtime in runtimes() {
            let file = scratch(1 << 20);
            let fd = file.as_raw_fd();
            runtime.register_file(fd).unwrap();
            runtime.block_on(async {
                let handles: Vec<_> = (0..200_u64)
                    .map(|i| {
                        spawn(async move {
                            let mut buf = Buf::take(4096);
                            buf.fill(i as u8);
                            assert_eq!(ops::write(fd, &buf, i * 4096).await.unwrap(), 4096);
                            buf.fill(0xee);
                            assert_eq!(ops::read(fd, &mut buf, i * 4096).await.unwrap(), 4096);
                            assert!(buf.iter().all(|&b| b == i as u8));
                        })
                    })
                    .collect();
                for handle in handles {
                    handle.await;
                }
                ops::fsync(fd, true).await.unwrap();
            });
        }
    }

    #[test]
    fn read_past_the_end_is_short_and_errors_are_errnos() {
        for runtime in runtimes() {
            let file = scratch(100);
            runtime.block_on(async {
                let mut buf = Buf::take(4096);
                assert_eq!(ops::read(file.as_raw_fd(), &mut buf, 0).await.unwrap(), 100);
                let error = ops::read(-1, &mut buf, 0).await.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EBADF));
            });
        }
    }

    #[test]
    fn a_reused_descriptor_is_another_file() {
        use std::io::Read;

        let runtime = Runtime::uring(8).unwrap();
        let mut first = tempfile::tempfile().unwrap();
        let second = tempfile::tempfile().unwrap();
        let fd = nix::unistd::dup(&first).unwrap();
        runtime.register_file(fd.as_raw_fd()).unwrap();
        closing_file(fd.as_raw_fd());
        let mut fd = fd;
        nix::unistd::dup2(&second, &mut fd).unwrap();
        runtime.block_on(async {
            ops::write(fd.as_raw_fd(), b"new", 0).await.unwrap();
        });
        let mut bytes = Vec::new();
        first.read_to_end(&mut bytes).unwrap();
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_runtime_that_is_gone_holds_no_file() {
        use nix::fcntl::{Flock, FlockArg};

        let path = tempfile::NamedTempFile::new().unwrap();
        let lock = || {
            let file = File::open(path.path()).unwrap();
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)
        };
        for round in 0..50 {
            let runtime = Runtime::uring(8).unwrap();
            let held = lock().unwrap_or_else(|errno| panic!("round {round}: {errno}"));
            let fd = held.as_raw_fd();
            runtime.register_file(fd).unwrap();
            let mut buf = Buf::take(512);
            runtime
                .block_on(async { ops::read(fd, &mut buf, 0).await })
                .unwrap();
            // Not unlocked: the lock goes with the last that has the file open.
            std::mem::forget(held);
            closing_file(fd);
            nix::unistd::close(fd).unwrap();
            drop(runtime);
        }
    }

    #[test]
    fn another_thread_wakes_a_sleeping_one() {
        for runtime in runtimes() {
            let list = Arc::new(sync::WaitList::default());
            let flag = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let (list2, flag2) = (Arc::clone(&list), Arc::clone(&flag));
            let waker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                flag2.store(true, std::sync::atomic::Ordering::SeqCst);
                list2.notify_all();
            });
            let start = Instant::now();
            runtime.block_on(
                list.wait_until(|| flag.load(std::sync::atomic::Ordering::SeqCst).then_some(())),
            );
            assert!(start.elapsed() < Duration::from_secs(5));
            waker.join().unwrap();
        }
    }

    #[test]
    fn mutex_excludes_across_threads_and_tasks() {
        let mutex = Arc::new(sync::Mutex::new(0_u64));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let mutex = Arc::clone(&mutex);
                scope.spawn(move || {
                    Runtime::best(8).unwrap().block_on(async {
                        let tasks: Vec<_> = (0..8)
                            .map(|_| {
                                let mutex = Arc::clone(&mutex);
                                spawn(async move {
                                    for _ in 0..200 {
                                        let mut guard = mutex.lock().await;
                                        let seen = *guard;
                                        yield_now().await;
                                        *guard = seen + 1;
                                    }
                                })
                            })
                            .collect();
                        for task in tasks {
                            task.await;
                        }
                    });
                });
            }
        });
        let total = Runtime::inline()
            .unwrap()
            .block_on(async { *mutex.lock().await });
        assert_eq!(total, 2 * 8 * 200);
    }

    #[test]
    fn pool_results_come_back_to_the_task() {
        for runtime in runtimes() {
            let sum: u64 = runtime.block_on(async {
                let mut sum = 0;
                for i in 0..20_u64 {
                    sum += pool::run(move || i * i).await;
                }
                sum
            });
            assert_eq!(sum, (0..20).map(|i| i * i).sum::<u64>());
        }
    }
}
