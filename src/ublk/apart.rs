//! Calls that wait for our own answers are made by another process.
//!
//! Writing back the disk and STOP_DEV wait, unkillably, for requests that this
//! process has to serve. Were they made here, and were we killed meanwhile
//! (the service manager loses patience, memory runs out), the waiting thread
//! would keep our memory and files from being released, the driver would wait
//! for that release before it fails the requests, and the thread would wait
//! for the requests: the device, and the process, would be there until the
//! machine is restarted. Seen on Linux 6.12 and 7.3. A child that holds
//! nothing of ours leaves us free to die at any time.
//!
//! So that the child does hold nothing, what refers to the character device is
//! mapped with `MADV_DONTFORK` (the descriptors, and the rings, whose file
//! tables have it), and the child begins by closing every file.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::control::{Failure, Watch};

/// How often the watch is asked.
const SLICE: Duration = Duration::from_millis(100);
/// How long an ending child is waited for.
const BURIAL: Duration = Duration::from_secs(1);

/// Runs `job` in a child process and returns what it does: an errno, or 0. It
/// inherits the memory but no file, and goes on when the wait for it ends.
///
/// `job` may allocate: the C libraries keep their allocator usable in the child
/// of a process with threads. It must not take a lock that another thread of
/// the parent could have held; so it does not log.
pub(super) fn run(
    limit: Duration,
    watch: &mut dyn FnMut() -> Watch,
    job: impl FnOnce() -> i32,
) -> Result<i32, Failure> {
    let (reader, mut writer) = io::pipe().map_err(Failure::Ring)?;
    let child = fork(writer.as_raw_fd(), || {
        let _ = writer.write_all(&job().to_ne_bytes());
    })
    .map_err(Failure::Ring)?;
    drop(writer);
    let result = wait(reader, limit, watch);
    if result.is_ok() {
        bury(child);
    }
    result
}

/// Starts a child process that has no file but `keep`, is not disturbed by
/// signals, does `work` and ends. Its process id.
///
/// What [`run`] says of jobs holds for `work`.
pub(super) fn fork(keep: RawFd, work: impl FnOnce()) -> io::Result<libc::pid_t> {
    // SAFETY: all zeros is a signal set; both are live.
    let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // SAFETY: live signal sets.
    unsafe {
        libc::sigfillset(&raw mut all);
        // The child must not run handlers that use files it has not.
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    // SAFETY: the child runs `child`, which does not return, and what that
    // calls needs no other thread (see `run`).
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child(keep, work);
    }
    let error = io::Error::last_os_error();
    // SAFETY: a live signal set.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
    }
    if pid < 0 { Err(error) } else { Ok(pid) }
}

fn child(keep: RawFd, work: impl FnOnce()) -> ! {
    close_all_but(keep);
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    // SAFETY: ends the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

fn close_all_but(keep: RawFd) {
    let keep = keep as libc::c_uint;
    let close = |first: libc::c_uint, last: libc::c_uint| {
        if first <= last {
            // SAFETY: closes files of the child, which uses none of them.
            // Since Linux 5.9.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    };
    if keep > 0 {
        close(0, keep - 1);
    }
    close(keep + 1, libc::c_uint::MAX);
}

fn wait(
    mut reader: PipeReader,
    limit: Duration,
    watch: &mut dyn FnMut() -> Watch,
) -> Result<i32, Failure> {
    let mut since = Instant::now();
    loop {
        let slice = limit.saturating_sub(since.elapsed()).min(SLICE);
        let mut ready = libc::pollfd {
            fd: reader.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one live entry.
        let count = unsafe { libc::poll(&raw mut ready, 1, slice.as_millis() as i32) };
        if count > 0 {
            let mut result = [0; 4];
            return match reader.read_exact(&mut result) {
                Ok(()) => Ok(i32::from_ne_bytes(result)),
                // Killed.
                Err(error) => Err(Failure::Ring(error)),
            };
        }
        match watch() {
            Watch::Waiting => {}
            Watch::Progress => since = Instant::now(),
            Watch::GiveUp => return Err(Failure::GivenUp),
        }
        if since.elapsed() >= limit {
            return Err(Failure::TimedOut(limit));
        }
    }
}

/// Takes the ended child's record from the kernel. One that closes the disk
/// may have to write back first: it is left to whoever inherits it.
fn bury(child: libc::pid_t) {
    let end = Instant::now() + BURIAL;
    loop {
        // SAFETY: no status is asked for.
        let result = unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) };
        if result != 0 || Instant::now() >= end {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_job_has_our_memory_and_no_file_of_ours() {
        let file = File::open("/dev/null").unwrap();
        let fd = file.as_raw_fd();
        let memory = vec![41; 1 << 20];
        let result = run(Duration::from_secs(10), &mut || Watch::Waiting, move || {
            // SAFETY: no pointers.
            let closed = unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0;
            i32::from(closed) + memory[memory.len() - 1]
        });
        assert_eq!(result.unwrap(), 42);
        drop(file);
    }

    #[test]
    fn a_job_without_end_is_left_behind() {
        let start = Instant::now();
        let result = run(Duration::from_millis(200), &mut || Watch::Waiting, || {
            std::thread::sleep(Duration::from_secs(3));
            0
        });
        assert!(matches!(result, Err(Failure::TimedOut(_))));
        assert!(start.elapsed() < Duration::from_secs(2));
        let mut looks = 0;
        let mut give_up_soon = || {
            looks += 1;
            if looks > 2 {
                Watch::GiveUp
            } else {
                Watch::Progress
            }
        };
        let result = run(Duration::from_millis(150), &mut give_up_soon, || {
            std::thread::sleep(Duration::from_secs(3));
            0
        });
        assert!(matches!(result, Err(Failure::GivenUp)));
        let died = run(
            Duration::from_secs(10),
            &mut || Watch::Waiting,
            // SAFETY: ends the child only.
            || unsafe { libc::_exit(1) },
        );
        assert!(matches!(died, Err(Failure::Ring(_))));
    }
}
