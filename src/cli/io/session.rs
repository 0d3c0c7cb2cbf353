//! Runs commands, one after the other or several in flight.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::command::{Command, Content, Expected, HELP, Operation, What};
use super::report;
use crate::block::{BlockHandler, Op, Payload, Request};
use crate::cli::output;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result, errno_text};
use crate::qcow2::create::Preallocation;
use crate::report::LayerInfo;
use crate::runtime::{self, Buf, JoinHandle, ops};

/// What comes after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Command,
    Quit,
}

/// Commands on an engine.
#[derive(Debug)]
pub(super) struct Session {
    engine: Arc<Engine>,
    in_flight: Vec<JoinHandle<()>>,
    failed: Rc<Cell<bool>>,
}

impl Session {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self {
            engine,
            in_flight: Vec::new(),
            failed: Rc::default(),
        }
    }

    /// True when a command has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// Runs one command. Its failure is reported; an error means that there
    /// is nobody to report to.
    pub(super) async fn run(&mut self, line: &str) -> Result<Next> {
        let command = match Command::parse(line) {
            Ok(command) => command,
            Err(text) => {
                self.failed.set(true);
                output::report(&Error::new(ErrorKind::Usage, text));
                return Ok(Next::Command);
            }
        };
        match command {
            Command::Operation(operation) => self.operation(operation).await?,
            Command::Flush => {
                let flushed = self.engine.flush().await;
                self.note("flush", flushed)?;
            }
            Command::WaitForAll => self.wait_for_all().await,
            Command::Truncate(size, space) => {
                let result = self.truncate(size, space).await;
                self.note_in_full(result);
            }
            Command::Alloc { offset, len } => {
                let shown = self.alloc(offset, len).await;
                self.show("alloc", shown)?;
            }
            Command::Map => {
                let shown = self.map().await;
                self.show("map", shown)?;
            }
            Command::Info => {
                let shown = self.info().await;
                self.show("info", shown)?;
            }
            Command::Length => {
                let size = report::quantity(self.engine.size() as f64);
                output::print(&format!("{size}\n"))?;
            }
            Command::Sleep(time) => ops::sleep(time).await,
            Command::Abort => std::process::abort(),
            Command::Raise(number) => {
                let raised = nix::sys::signal::Signal::try_from(number)
                    .and_then(nix::sys::signal::raise)
                    .map_err(|e| Error::io("raise the signal", e.into()));
                self.note("sigraise", raised)?;
            }
            Command::Help => output::print(HELP)?,
            Command::Quit => return Ok(Next::Quit),
            Command::Nothing => {}
        }
        Ok(Next::Command)
    }

    /// Waits until nothing is in flight.
    pub(super) async fn wait_for_all(&mut self) {
        for handle in self.in_flight.drain(..) {
            handle.await;
        }
    }

    fn note(&self, name: &str, result: Result<()>) -> Result<()> {
        note(&self.failed, name, result)
    }

    /// Reports a failure that qemu-io tells on standard error alone.
    fn note_in_full(&self, result: Result<()>) {
        if let Err(error) = result {
            self.failed.set(true);
            output::report(&error);
        }
    }

    fn show(&self, name: &str, shown: Result<String>) -> Result<()> {
        match shown {
            Ok(text) => output::print(&text),
            Err(error) => self.note(name, Err(error)),
        }
    }

    async fn truncate(&mut self, size: u64, space: Preallocation) -> Result<()> {
        // This wants the disk's end for itself.
        self.wait_for_all().await;
        if size >= self.engine.size() {
            return self.engine.grow_preallocated(size, space).await;
        }
        if space != Preallocation::Off {
            let what = "Preallocation can't be used for shrinking an image";
            return Err(Error::new(ErrorKind::Usage, what));
        }
        self.engine.shrink(size).await
    }

    async fn alloc(&self, offset: u64, len: u64) -> Result<String> {
        let image = self.engine.chain().top();
        let len = len.min(image.size().saturating_sub(offset));
        let (mut sum, mut done) = (0, 0);
        while done < len {
            let (own, part) = image.holds(offset + done, len - done).await?;
            sum += if own { part } else { 0 };
            done += part;
        }
        Ok(report::allocated(sum, len, offset))
    }

    async fn map(&self) -> Result<String> {
        let image = self.engine.chain().top();
        let (mut text, mut at, size) = (String::new(), 0, image.size());
        while at < size {
            let (own, mut len) = image.holds(at, size - at).await?;
            while at + len < size {
                let (next, more) = image.holds(at + len, size - at - len).await?;
                if next != own {
                    break;
                }
                len += more;
            }
            text += &report::part(at, len, own);
            at += len;
        }
        Ok(text)
    }

    async fn info(&self) -> Result<String> {
        let image = self.engine.chain().top();
        let geometry = image.geometry();
        // VM states are behind what the L1 table has for the disk.
        let l2_tables = geometry.l1_entries_for(image.size());
        let vm_state = l2_tables * geometry.l1_entry_span();
        let layer = LayerInfo::of(image.storage(), false).await?;
        Ok(format!(
            "format name: qcow2\ncluster size: {}\nvm state offset: {}\n{}",
            report::quantity(image.cluster_size() as f64),
            report::quantity(vm_state as f64),
            crate::cli::info::specific(&layer),
        ))
    }

    async fn operation(&mut self, operation: Operation) -> Result<()> {
        let engine = Arc::clone(&self.engine);
        let failed = Rc::clone(&self.failed);
        if !operation.in_flight {
            return perform(&engine, &operation, &failed).await;
        }
        self.in_flight.retain(|handle| !handle.is_finished());
        self.in_flight.push(runtime::spawn(async move {
            if perform(&engine, &operation, &failed).await.is_err() {
                failed.set(true);
            }
        }));
        // Lets it begin, whatever the next command is.
        runtime::yield_now().await;
        Ok(())
    }
}

/// Reports a failure: in qemu-io's form to whoever compares, and in full on
/// standard error.
fn note(failed: &Cell<bool>, name: &str, result: Result<()>) -> Result<()> {
    let Err(error) = result else {
        return Ok(());
    };
    failed.set(true);
    // QEMU knows of no other errno for a range outside the disk.
    let errno = match error.kind() {
        ErrorKind::OutOfBounds => libc::EIO,
        _ => error.errno(),
    };
    output::print(&format!("{name} failed: {}\n", errno_text(errno)))?;
    output::report(&error);
    Ok(())
}

async fn perform(engine: &Engine, operation: &Operation, failed: &Cell<bool>) -> Result<()> {
    match attempt(engine, operation, failed).await {
        Ok(text) => output::print(&text),
        Err(error) => note(failed, &operation.name, Err(error)),
    }
}

/// Does it; what there is to say about it.
async fn attempt(engine: &Engine, operation: &Operation, failed: &Cell<bool>) -> Result<String> {
    let Operation {
        what, offset, len, ..
    } = operation;
    let mut buf = None;
    let op = match what {
        What::Read { .. } => {
            buf = Some(buffer(*len)?);
            Op::Read
        }
        What::Discard => Op::Discard,
        What::Write { content, fua, .. } => {
            let fua = *fua;
            match content {
                Content::Zeros {
                    unmap,
                    whole_clusters,
                } => {
                    if *whole_clusters {
                        check_whole_clusters(engine, *offset, *len)?;
                    }
                    Op::WriteZeroes { unmap: *unmap, fua }
                }
                Content::Pattern(pattern) => {
                    let mut bytes = buffer(*len)?;
                    bytes.fill(*pattern);
                    buf = Some(bytes);
                    Op::Write { fua }
                }
                Content::File(path) => {
                    let mut bytes = buffer(*len)?;
                    fill_from(path, &mut bytes)?;
                    buf = Some(bytes);
                    Op::Write { fua }
                }
            }
        }
    };
    let payload = match &buf {
        Some(buf) => Payload::of_buf(buf),
        None => Payload::zeros(*len),
    };
    let begun = Instant::now();
    let request = Request {
        op,
        offset: *offset,
        len: *len,
        payload,
    };
    match (what, &buf) {
        (
            What::Write {
                compress: true,
                fua,
                ..
            },
            Some(bytes),
        ) => {
            engine.write_compressed(0, *offset, bytes, None).await?;
            if *fua {
                engine.flush().await?;
            }
        }
        _ => engine.handle(0, request).await?,
    }
    let took = begun.elapsed();

    let mut text = String::new();
    if let (What::Read { expected, dump }, Some(bytes)) = (what, &buf) {
        if let Some(expected) = expected.filter(|expected| !found(expected, bytes)) {
            failed.set(true);
            text += &format!(
                "Pattern verification failed at offset {}, {} bytes\n",
                offset + expected.offset,
                expected.len
            );
        }
        if *dump && !operation.manner.quiet {
            text += &report::dump(bytes, *offset);
        }
    }
    let verb = match what {
        What::Read { .. } => "read",
        What::Write { .. } => "wrote",
        What::Discard => "discard",
    };
    text += &report::operation(verb, *offset, *len, took, operation.manner);
    Ok(text)
}

fn buffer(len: u64) -> Result<Buf> {
    let len = usize::try_from(len)
        .map_err(|_| Error::new(ErrorKind::Usage, "the address space is too small"))?;
    Ok(Buf::take(len))
}

fn found(expected: &Expected, bytes: &[u8]) -> bool {
    // Inside, as the parser has checked.
    let start = expected.offset as usize;
    let part = &bytes[start..start + expected.len as usize];
    part.iter().all(|&byte| byte == expected.pattern)
}

fn fill_from(path: &Path, bytes: &mut [u8]) -> Result<()> {
    let content = std::fs::read(path).map_err(|e| Error::io("read the file", e).path(path))?;
    if content.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "the file is empty").path(path));
    }
    for part in bytes.chunks_mut(content.len()) {
        part.copy_from_slice(&content[..part.len()]);
    }
    Ok(())
}

/// Without fallback, only what the image can express is zeroed.
fn check_whole_clusters(engine: &Engine, offset: u64, len: u64) -> Result<()> {
    let cluster = engine.chain().top().cluster_size();
    let end = offset.saturating_add(len);
    if offset.is_multiple_of(cluster) && (end.is_multiple_of(cluster) || end == engine.size()) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("only whole clusters of {cluster} bytes can be zeroed without writing zeros"),
    ))
}
