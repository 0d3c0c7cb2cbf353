//! A process that keeps the right to command the driver, for a server that
//! gives it up.
//!
//! Every command on a device needs CAP_SYS_ADMIN at the time it is given; the
//! process that looks at a stranger's image should not have it. So the server
//! starts this process before it has opened anything, and has it give the few
//! commands that a running device still needs: start it, ask about it, change
//! its size, write its page cache back, stop it, remove it. The steward serves
//! one device, the one it is asked about first. It holds no image, no key and
//! no memory of requests; it ends with the server.
//!
//! Each order is carried out by a child of its own: those that wait for the
//! server's answers (see [`super::apart`]) must not keep the next one waiting.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::apart;
use super::control::{Control, Failure, Order, Watch};
use super::halt;

/// How often the watch is asked.
const SLICE: Duration = Duration::from_millis(100);
/// Longer than any command's data.
const MAX_DATA: usize = 4096;
/// The code of "write the page cache back", which is no command's.
pub(super) const WRITE_BACK: u32 = 0;

/// The server's end.
#[derive(Debug)]
pub struct Steward {
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    socket: UnixStream,
    /// Orders given.
    count: u32,
}

/// What goes over the line before the data, in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    /// The order's number; its answer has the same.
    number: u32,
    /// The command's code; of an answer, the driver's result.
    code: u32,
    id: u32,
    data: u64,
    /// Bytes of a path at the start of what follows.
    path_len: u32,
    /// Bytes that follow.
    len: u32,
}

impl Head {
    const LEN: usize = 28;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.number.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.code.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.id.to_ne_bytes());
        bytes[12..20].copy_from_slice(&self.data.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.path_len.to_ne_bytes());
        bytes[24..].copy_from_slice(&self.len.to_ne_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut data = [0; 8];
        data.copy_from_slice(&bytes[12..20]);
        Self {
            number: word(0),
            code: word(4),
            id: word(8),
            data: u64::from_ne_bytes(data),
            path_len: word(20),
            len: word(24),
        }
    }
}

impl Steward {
    /// Starts the process. To be called before anything is opened and any
    /// thread started: it has what memory there is now.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(SLICE))?;
        apart::fork(theirs.as_raw_fd(), || serve(theirs))?;
        Ok(Self {
            line: Mutex::new(Line {
                socket: ours,
                count: 0,
            }),
        })
    }

    /// Has an order carried out, and waits for its result while `watch` allows
    /// and `limit` lasts; an order that is not waited for any more goes on.
    /// What the driver stores is in `memory` then.
    pub(super) fn run(
        &self,
        order: Order,
        memory: &mut [u8],
        limit: Duration,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<i32, Failure> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.count += 1;
        let head = Head {
            number: line.count,
            code: order.code,
            id: order.id,
            data: order.data,
            path_len: u32::from(order.path_len),
            len: memory.len() as u32,
        };
        let message = [&head.to_bytes(), &*memory].concat();
        line.socket.write_all(&message).map_err(Failure::Ring)?;
        let mut since = Instant::now();
        loop {
            match line.answer() {
                // Others are those of orders that nobody has waited for.
                Ok((answer, data)) if answer.number == head.number => {
                    if data.len() == memory.len() {
                        memory.copy_from_slice(&data);
                    }
                    return Ok(answer.code as i32);
                }
                Ok(_) => continue,
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(Failure::Ring(error)),
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
}

impl Line {
    /// The next answer. Each is sent in one piece, so that none is seen in
    /// part when the time is over.
    fn answer(&mut self) -> io::Result<(Head, Vec<u8>)> {
        receive(&mut self.socket)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn receive(socket: &mut UnixStream) -> io::Result<(Head, Vec<u8>)> {
    let mut head = [0; Head::LEN];
    socket.read_exact(&mut head)?;
    let head = Head::from_bytes(&head);
    let len = head.len as usize;
    if len > MAX_DATA || head.path_len as usize > len {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut data = vec![0; len];
    socket.read_exact(&mut data)?;
    Ok((head, data))
}

/// The steward's life.
fn serve(mut socket: UnixStream) {
    // SAFETY: no handler. The kernel takes ended children away by itself.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let _ = nix::sys::prctl::set_name(c"ublk-steward");
    let _ = std::env::set_current_dir("/");
    let mut device = None;
    // The line ends with the server.
    while let Ok((head, mut data)) = receive(&mut socket) {
        let own = *device.get_or_insert(head.id) == head.id;
        let mut answer = move |socket: &mut UnixStream| {
            let code = if own {
                carry_out(head, &mut data)
            } else {
                -libc::EPERM
            };
            let head = Head {
                code: code as u32,
                ..head
            };
            let _ = socket.write_all(&[&head.to_bytes(), &*data].concat());
        };
        let fd = socket.as_raw_fd();
        let line = &mut socket;
        if !own {
            answer(line);
        } else if apart::fork(fd, || answer(line)).is_err() {
            return;
        }
    }
}

/// In the child: a negative errno, or the driver's result.
fn carry_out(head: Head, data: &mut [u8]) -> i32 {
    if head.code == WRITE_BACK {
        return -halt::write_back_here(head.id);
    }
    let order = Order {
        code: head.code,
        id: head.id,
        data: head.data,
        path_len: head.path_len as u16,
    };
    if !order.is_for_stewards() {
        return -libc::EPERM;
    }
    // The limit is the waiting process's.
    let mut control = match Control::open(Duration::MAX) {
        Ok(control) => control,
        Err(error) => return -error.errno(),
    };
    match control.give(order, data.to_vec(), &mut || Watch::Waiting) {
        Ok((result, memory)) => {
            data.copy_from_slice(&memory);
            result
        }
        Err(Failure::Errno(errno)) => -errno,
        Err(_) => -libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steward_serves_one_device_and_few_commands() {
        let steward = Steward::start().unwrap();
        let order = |id, code| Order {
            code,
            id,
            data: 0,
            path_len: 0,
        };
        let run = |order| {
            let limit = Duration::from_secs(20);
            steward.run(order, &mut [0; 8], limit, &mut || Watch::Waiting)
        };
        let add = super::super::control::ADD_DEV.code;
        assert_eq!(run(order(70_000, add)).unwrap(), -libc::EPERM);
        // There is no such disk: nothing to write back.
        assert_eq!(run(order(70_000, WRITE_BACK)).unwrap(), -libc::ENOENT);
        assert_eq!(run(order(70_001, WRITE_BACK)).unwrap(), -libc::EPERM);
    }

    #[test]
    fn heads_survive_the_line() {
        let head = Head {
            number: 1,
            code: 2,
            id: 3,
            data: 4 << 40,
            path_len: 5,
            len: 6,
        };
        assert_eq!(Head::from_bytes(&head.to_bytes()), head);
    }
}
