//! A RAM disk: how to serve a block handler of your own through ublk.
//!
//! ```console
//! # cargo run --example ramdisk -- serve 1G
//! /dev/ublkb0
//! ```
//!
//! The disk lives in a memfd, so that the fast data path shows: where the
//! kernel gives a request's pages to the queue's ring, data moves between them
//! and the memfd in one operation, otherwise through a buffer. Failures can be
//! injected (`--fail write:2048:ENOSPC`), which makes it the device the tests
//! of the ublk front are run against.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use nix::sys::memfd::{MFdFlags, memfd_create};
use qcow2_ublk::block::{BlockHandler, Limits, Op, Payload, Request};
use qcow2_ublk::runtime::{Buf, ops, register_file};
use qcow2_ublk::ublk::{self, DataPath, Device, Ended, Handle, Options};
use qcow2_ublk::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Memory as a block handler.
struct RamDisk {
    memory: File,
    limits: Limits,
    failures: Vec<Failure>,
    seen: Seen,
}

/// What has arrived, for whoever looks at the end.
#[derive(Default)]
struct Seen {
    reads: AtomicU64,
    writes: AtomicU64,
    forced: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    zeroes: AtomicU64,
    kept: AtomicU64,
    direct: AtomicU64,
}

impl BlockHandler for RamDisk {
    fn limits(&self) -> Limits {
        self.limits.clone()
    }

    fn queue_started(&self, queue: u16) -> Result<()> {
        let told = |failure: &&Failure| failure.op == "start" && failure.sector == u64::from(queue);
        if let Some(failure) = self.failures.iter().find(told) {
            return Err(failure.error());
        }
        register_file(self.memory.as_raw_fd())
            .map_err(|error| Error::io("register the memory with the ring", error))
    }

    async fn handle(&self, _queue: u16, request: Request) -> Result<()> {
        self.seen.count(request.op);
        self.fail_if_told_to(&request).await?;
        match request.op {
            Op::Read => self.read(request.payload, request.offset).await,
            Op::Write { .. } => self.write(request.payload, request.offset).await,
            // Memory has nothing behind it.
            Op::Flush => Ok(()),
            Op::Discard | Op::WriteZeroes { .. } => self.punch(request.offset, request.len).await,
        }
    }
}

impl RamDisk {
    fn new(options: &ServeOptions) -> Result<Self> {
        let doing = |error: nix::Error| Error::io("make the memory", error.into());
        let memory = File::from(memfd_create(c"ramdisk", MFdFlags::MFD_CLOEXEC).map_err(doing)?);
        memory
            .set_len(options.size)
            .map_err(|error| Error::io("make the memory", error))?;
        if let Some(from) = &options.from {
            File::open(from)
                .and_then(|mut from| io::copy(&mut from, &mut &memory))
                .map_err(|error| Error::io("copy the content", error).path(from))?;
        }
        Ok(Self {
            memory,
            limits: Limits {
                size: options.size,
                read_only: false,
                discard_granularity: 4096,
                optimal_io: 64 << 10,
                physical_block: 4096,
                discard: true,
            },
            failures: options.fail.clone(),
            seen: Seen::default(),
        })
    }

    fn save(&self, path: &Path) -> Result<()> {
        let mut memory = &self.memory;
        let mut save = || {
            memory.seek(SeekFrom::Start(0))?;
            io::copy(&mut memory, &mut File::create(path)?)
        };
        save().map_err(|error| Error::io("save the content", error).path(path))?;
        Ok(())
    }

    /// Doubles the size.
    fn grow(&self, device: &Handle) -> Result<()> {
        let size = device.info()?.size * 2;
        self.memory
            .set_len(size)
            .map_err(|error| Error::io("grow the memory", error))?;
        device.resize(size)
    }

    async fn read(&self, payload: Payload, offset: u64) -> Result<()> {
        let fd = self.memory.as_raw_fd();
        let doing = |error| Error::io("read the memory", error).at(offset);
        let done = if payload.needs_bounce(1) {
            let mut buf = Buf::take(payload.len() as usize);
            let done = ops::read(fd, &mut buf, offset).await.map_err(doing)?;
            payload.copy_from(&buf).map_err(doing)?;
            done
        } else {
            self.seen.direct.fetch_add(1, Ordering::Relaxed);
            payload.read_from(fd, offset).await.map_err(doing)?
        };
        complete(done, payload.len(), offset)
    }

    async fn write(&self, payload: Payload, offset: u64) -> Result<()> {
        let fd = self.memory.as_raw_fd();
        let doing = |error| Error::io("write the memory", error).at(offset);
        let done = if payload.needs_bounce(1) {
            let mut buf = Buf::take(payload.len() as usize);
            payload.copy_to(&mut buf).map_err(doing)?;
            ops::write(fd, &buf, offset).await.map_err(doing)?
        } else {
            self.seen.direct.fetch_add(1, Ordering::Relaxed);
            payload.write_to(fd, offset).await.map_err(doing)?
        };
        complete(done, payload.len(), offset)
    }

    async fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let mode = nix::libc::FALLOC_FL_PUNCH_HOLE | nix::libc::FALLOC_FL_KEEP_SIZE;
        ops::fallocate(self.memory.as_raw_fd(), mode, offset, len)
            .await
            .map_err(|error| Error::io("give memory back", error).at(offset))?;
        Ok(())
    }

    async fn fail_if_told_to(&self, request: &Request) -> Result<()> {
        let word = word(request.op);
        let end = request.offset + request.len.max(1);
        for failure in &self.failures {
            let at = failure.sector * 512;
            if failure.op == word && (request.offset..end).contains(&at) {
                match failure.how {
                    How::Errno(_) => return Err(failure.error().at(at)),
                    How::Panic => panic!("told to panic"),
                    How::Hang => std::future::pending().await,
                }
            }
        }
        Ok(())
    }
}

/// A transfer moves everything or fails.
fn complete(done: u32, wanted: u64, offset: u64) -> Result<()> {
    if u64::from(done) == wanted {
        return Ok(());
    }
    let what = format!("only {done} of {wanted} bytes were transferred");
    Err(Error::new(ErrorKind::Io, what).at(offset))
}

impl Seen {
    fn count(&self, op: Op) {
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        match op {
            Op::Read => add(&self.reads),
            Op::Write { fua } => {
                if fua {
                    add(&self.forced);
                }
                add(&self.writes)
            }
            Op::Flush => add(&self.flushes),
            Op::Discard => add(&self.discards),
            Op::WriteZeroes { unmap, .. } => {
                if !unmap {
                    add(&self.kept);
                }
                add(&self.zeroes)
            }
        };
    }

    fn print(&self) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        eprintln!(
            "seen: reads={} writes={} fua={} flushes={} discards={} zeroes={} nounmap={} direct={}",
            get(&self.reads),
            get(&self.writes),
            get(&self.forced),
            get(&self.flushes),
            get(&self.discards),
            get(&self.zeroes),
            get(&self.kept),
            get(&self.direct),
        );
    }
}

fn word(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Discard => "discard",
        Op::WriteZeroes { .. } => "zero",
    }
}

/// Fail requests of one kind that cover a sector: `OP:SECTOR:HOW`. The
/// operation `start` stands for the start of a queue, by its number.
#[derive(Clone, Debug)]
struct Failure {
    op: String,
    sector: u64,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Errno(i32),
    Panic,
    Hang,
}

impl Failure {
    fn error(&self) -> Error {
        let errno = match self.how {
            How::Errno(errno) => errno,
            How::Panic | How::Hang => nix::libc::EIO,
        };
        let what = format!("told to fail a {}", self.op);
        Error::io(what, io::Error::from_raw_os_error(errno))
    }
}

impl FromStr for Failure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(op), Some(sector), Some(how), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("OP:SECTOR:HOW is wanted".to_owned());
        };
        Ok(Self {
            op: op.to_owned(),
            sector: sector.parse().map_err(|_| "no such sector")?,
            how: match how {
                "EIO" => How::Errno(nix::libc::EIO),
                "ENOSPC" => How::Errno(nix::libc::ENOSPC),
                "panic" => How::Panic,
                "hang" => How::Hang,
                _ => return Err("EIO, ENOSPC, panic or hang is wanted".to_owned()),
            },
        })
    }
}

/// A RAM disk as a block device, and what ublk devices there are.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a RAM disk until it is stopped or removed.
    Serve(ServeOptions),
    /// Remove a device, whoever serves it.
    Remove {
        /// The N of /dev/ublkbN.
        id: u32,
        /// Even if it is in use.
        #[arg(long)]
        force: bool,
    },
    /// List the ublk devices.
    List,
    /// List what the kernel's driver can do.
    Features,
}

#[derive(Args)]
struct ServeOptions {
    /// Bytes, or with K, M or G.
    #[arg(value_parser = size)]
    size: u64,
    #[arg(long)]
    id: Option<u32>,
    #[arg(long, default_value_t = 1)]
    queues: u16,
    #[arg(long, default_value_t = 128)]
    depth: u16,
    #[arg(long, default_value_t = 512)]
    logical_block: u32,
    #[arg(long)]
    read_only: bool,
    #[arg(long)]
    data_path: Option<DataPath>,
    #[arg(long)]
    max_request: Option<u32>,
    #[arg(long)]
    no_part_scan: bool,
    /// Fail requests, as OP:SECTOR:HOW; OP is read, write, flush, discard,
    /// zero or start, HOW is EIO, ENOSPC, panic or hang.
    #[arg(long)]
    fail: Vec<Failure>,
    /// Begin with the content of this file.
    #[arg(long)]
    from: Option<PathBuf>,
    /// At the end, save the content to this file.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Seconds a command of the driver may take.
    #[arg(long, default_value_t = 30)]
    time_limit: u64,
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "a size is wanted")?;
    Ok(number << shift)
}

fn serve(options: &ServeOptions) -> Result<()> {
    let disk = Arc::new(RamDisk::new(options)?);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
        .map_err(|error| Error::io("catch signals", error))?;
    let device = Device::create(
        &Options {
            id: options.id,
            queues: options.queues,
            depth: options.depth,
            logical_block: options.logical_block,
            read_only: options.read_only,
            data_path: options.data_path,
            max_request: options.max_request,
            part_scan: !options.no_part_scan,
            time_limit: Duration::from_secs(options.time_limit),
        },
        Arc::clone(&disk),
    )?;
    println!("{}", device.path().display());
    let (handle, growing) = (device.handle(), Arc::clone(&disk));
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal != SIGHUP {
                handle.stop();
            } else if let Err(error) = growing.grow(&handle) {
                tracing::error!("{error}");
            }
        }
    });
    let ended = device.wait();
    let stopped = device.stop()?;
    disk.seen.print();
    // An image would be closed here: when the device is gone, it is complete.
    if let Some(save) = &options.save {
        disk.save(save)?;
    }
    stopped.delete()?;
    match ended? {
        Ended::Asked => eprintln!("stopped on request"),
        Ended::Stopped => eprintln!("stopped by somebody else"),
    }
    Ok(())
}

fn list() -> Result<()> {
    for device in ublk::list()? {
        let pid = device
            .pid
            .map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        println!(
            "{} {} queues={} depth={} size={} pid={pid} path={}",
            device.id, device.state, device.queues, device.depth, device.size, device.data_path,
        );
    }
    Ok(())
}

fn features() -> Result<()> {
    for (name, feature) in ublk::features()?.iter_names() {
        println!("{name} (Linux {})", feature.since());
    }
    Ok(())
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let result = match Cli::parse().command {
        Command::Serve(options) => serve(&options),
        Command::Remove { id, force } => ublk::remove(id, force),
        Command::List => list(),
        Command::Features => features(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ramdisk: {error}");
            if let Some(cure) = error.cure_text() {
                eprintln!("ramdisk: {cure}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
