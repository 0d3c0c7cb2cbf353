//! Reading and writing: the future behind every byte that moves.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::Storage;
use super::backend::{RawOp, Retries};
use crate::error::{Error, Result};
use crate::runtime::buf::ZEROS_LEN;
use crate::runtime::{Buf, Payload};

/// The most one operation moves.
const LARGEST_DIRECT: u64 = 1 << 30;
/// The most that goes through a bounce buffer at a time.
const LARGEST_BOUNCE: u64 = 1 << 20;

/// A read or write under way; made by [`Storage::start_read`] and
/// [`Storage::start_write`].
///
/// It goes in steps, nearly always one. Each begins where the last stopped
/// and is of the simplest kind that fits. Dropping it waits until the kernel
/// no longer uses the payload.
#[must_use = "a transfer dropped at once is cancelled"]
#[derive(Debug)]
pub struct Transfer<'a> {
    storage: &'a Storage,
    payload: Payload,
    offset: u64,
    done: u64,
    direction: Direction,
    /// Operations in a row that moved nothing.
    stalls: u32,
    /// Those that asked to be tried again.
    retries: Retries,
    step: Step<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

enum Step<'a> {
    /// Straight between the file and the payload's memory.
    Direct(RawOp),
    /// Through a buffer that holds the aligned range around the bytes wanted,
    /// which are `len` bytes from byte `skip` of it on.
    Bounce {
        // Dropped before the buffer it uses.
        op: RawOp,
        buf: Buf,
        skip: u64,
        len: u64,
    },
    /// Read, change and write back an aligned range, `len` bytes of which are
    /// ours.
    Merge {
        change: Pin<Box<dyn Future<Output = Result<()>> + 'a>>,
        len: u64,
    },
    Refused(Option<Error>),
    Complete,
}

impl std::fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Direct(_) => "Direct",
            Self::Bounce { .. } => "Bounce",
            Self::Merge { .. } => "Merge",
            Self::Refused(_) => "Refused",
            Self::Complete => "Complete",
        })
    }
}

impl<'a> Transfer<'a> {
    pub(super) fn read(storage: &'a Storage, offset: u64, payload: &Payload) -> Self {
        let allowed = storage.check_range(offset, payload.len());
        Self::begin(storage, offset, payload, Direction::Read, allowed)
    }

    pub(super) fn write(storage: &'a Storage, offset: u64, payload: &Payload) -> Self {
        let allowed = storage
            .check_writable()
            .and_then(|()| storage.check_range(offset, payload.len()));
        Self::begin(storage, offset, payload, Direction::Write, allowed)
    }

    fn begin(
        storage: &'a Storage,
        offset: u64,
        payload: &Payload,
        direction: Direction,
        allowed: Result<()>,
    ) -> Self {
        let mut transfer = Self {
            storage,
            payload: *payload,
            offset,
            done: 0,
            direction,
            stalls: 0,
            retries: Retries::default(),
            step: Step::Complete,
        };
        match allowed {
            Ok(()) => {
                if let Err(e) = transfer.next_step() {
                    transfer.step = Step::Refused(Some(e));
                }
            }
            Err(e) => transfer.step = Step::Refused(Some(e)),
        }
        transfer
    }

    /// Where the next byte goes.
    fn position(&self) -> u64 {
        self.offset + self.done
    }

    /// The unit of offsets and lengths without detour.
    fn unit(&self) -> u64 {
        self.storage.alignment().into()
    }

    fn is_complete(&self) -> bool {
        self.done == self.payload.len()
    }

    /// Starts on what is not done yet.
    fn next_step(&mut self) -> Result<()> {
        let rest = self.payload.len() - self.done;
        if rest == 0 {
            self.step = Step::Complete;
            return Ok(());
        }
        let storage = self.storage;
        let position = self.position();
        let unit = self.unit();
        let aligned = (position | rest) & (unit - 1) == 0;
        if aligned {
            let largest = if self.payload.is_zeros() {
                ZEROS_LEN as u64
            } else {
                LARGEST_DIRECT
            };
            let len = rest.min(largest);
            let part = self.payload.slice(self.done, len);
            if !part.needs_bounce(storage.alignment.memory as usize) {
                let op = match self.direction {
                    Direction::Read => storage.backend.read(&part, position),
                    Direction::Write => storage.backend.write(&part, position),
                };
                self.step = Step::Direct(op);
                return Ok(());
            }
        }
        let window = Window::around(position, rest, unit);
        let part = self.payload.slice(self.done, window.len);
        self.step = match self.direction {
            Direction::Read => {
                let buf = Buf::take(window.whole as usize);
                Step::Bounce {
                    op: storage.backend.read(&Payload::of_buf(&buf), window.start),
                    buf,
                    skip: window.skip,
                    len: window.len,
                }
            }
            Direction::Write if aligned => {
                let mut buf = Buf::take(window.whole as usize);
                part.copy_to(&mut buf)
                    .map_err(|e| self.error_at(position, e))?;
                Step::Bounce {
                    op: storage.backend.write(&Payload::of_buf(&buf), window.start),
                    buf,
                    skip: 0,
                    len: window.len,
                }
            }
            Direction::Write => Step::Merge {
                change: Box::pin(merge(storage, window, part)),
                len: window.len,
            },
        };
        Ok(())
    }

    /// Takes the result of the step's operation, which asked for bytes from
    /// `start` of the file on and `wanted` of them, and goes on.
    fn advance(&mut self, start: u64, result: io::Result<u32>) -> Result<()> {
        let moved = match result {
            Ok(n) => u64::from(n),
            Err(e) if self.retries.allow(&e) => return self.next_step(),
            Err(e) => return Err(self.error_at(self.position(), e)),
        };
        let stopped = start + moved;
        let progress = match &self.step {
            // Part of a unit is written again with the rest of it, for a
            // direct write has to begin at its start.
            _ if self.direction == Direction::Write => moved & !(self.unit() - 1),
            Step::Direct(_) => moved,
            Step::Bounce { buf, skip, len, .. } => {
                let bytes = moved.saturating_sub(*skip).min(*len);
                if bytes > 0 {
                    self.payload
                        .slice(self.done, bytes)
                        .copy_from(&buf[*skip as usize..(*skip + bytes) as usize])
                        .map_err(|e| self.error_at(self.position(), e))?;
                }
                bytes
            }
            _ => unreachable!("only steps of one operation have its result"),
        };
        self.done += progress;
        self.stalls = if progress > 0 { 0 } else { self.stalls + 1 };
        self.retries = Retries::default();
        match self.direction {
            Direction::Write => {
                self.storage.grown_to(stopped);
                if moved == 0 || self.stalls > 1 {
                    return Err(self.error_at(self.position(), no_progress()));
                }
            }
            Direction::Read => {
                if !self.is_complete() && self.at_end(stopped)? {
                    let rest = self.payload.len() - self.done;
                    self.payload
                        .slice(self.done, rest)
                        .fill_zeros()
                        .map_err(|e| self.error_at(self.position(), e))?;
                    self.done += rest;
                } else if self.stalls > 1 {
                    return Err(self.error_at(self.position(), no_progress()));
                }
            }
        }
        self.next_step()
    }

    /// A read stopped here: true at the end of the file. Both the length that
    /// we know and the file's own have to agree, for others may be growing the
    /// file, and a file that was cut short under us is an error.
    fn at_end(&self, stopped: u64) -> Result<bool> {
        if stopped < self.storage.len() {
            return Ok(false);
        }
        let len = self
            .storage
            .backend
            .current_len()
            .map_err(|e| self.error_at(stopped, e))?;
        Ok(stopped >= len)
    }

    fn error_at(&self, position: u64, error: io::Error) -> Error {
        let doing = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        Error::io(doing, error)
            .path(&self.storage.path)
            .at(position)
    }

    fn poll_step(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let position = self.position();
        let (start, result) = match &mut self.step {
            Step::Direct(op) => (position, ready!(Pin::new(op).poll(context))),
            Step::Bounce { op, skip, .. } => (position - *skip, ready!(Pin::new(op).poll(context))),
            Step::Merge { change, len } => {
                let len = *len;
                ready!(change.as_mut().poll(context))?;
                self.done += len;
                return Poll::Ready(self.next_step());
            }
            Step::Refused(error) => {
                let error = error.take();
                return Poll::Ready(Err(error.expect("a transfer polled after completion")));
            }
            Step::Complete => return Poll::Ready(Ok(())),
        };
        Poll::Ready(self.advance(start, result))
    }
}

impl Future for Transfer<'_> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            if let Err(e) = ready!(this.poll_step(context)) {
                this.step = Step::Complete;
                return Poll::Ready(Err(e));
            }
            if matches!(this.step, Step::Complete) {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// An operation inside the file that moves nothing would be repeated for ever.
fn no_progress() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

/// An aligned range of the file around some bytes.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: u64,
    whole: u64,
    /// The bytes wanted: `len` from byte `skip` on.
    skip: u64,
    len: u64,
}

impl Window {
    /// The window around the first of `rest` bytes at `position`, all of them
    /// if they are not too many.
    fn around(position: u64, rest: u64, unit: u64) -> Self {
        let start = position / unit * unit;
        let skip = position - start;
        let whole = (skip + rest)
            .next_multiple_of(unit)
            .min(LARGEST_BOUNCE.max(unit));
        Self {
            start,
            whole,
            skip,
            len: rest.min(whole - skip),
        }
    }
}

/// Replaces the bytes wanted of a window by `part`.
async fn merge(storage: &Storage, window: Window, part: Payload) -> Result<()> {
    let unit = u64::from(storage.alignment.offset);
    let mut buf = Buf::take(window.whole as usize);
    {
        let whole = Payload::of_buf(&buf);
        let last = window.whole - unit;
        // Both edges at once; the transfers end before `buf` does.
        let covered = window.skip + window.len;
        let head = (window.skip > 0 || covered < unit)
            .then(|| storage.start_read(window.start, &whole.slice(0, unit)));
        let tail = (last > 0 && covered < window.whole)
            .then(|| storage.start_read(window.start + last, &whole.slice(last, unit)));
        if let Some(head) = head {
            head.await?;
        }
        if let Some(tail) = tail {
            tail.await?;
        }
    }
    let ours = window.skip as usize..(window.skip + window.len) as usize;
    part.copy_to(&mut buf[ours]).map_err(|e| {
        Error::io("copy the data to be written", e)
            .path(&storage.path)
            .at(window.start + window.skip)
    })?;
    storage
        .start_write(window.start, &Payload::of_buf(&buf))
        .await
}
