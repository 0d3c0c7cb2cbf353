//! `bench`: many equal requests, as fast as they go, with qemu-img bench's
//! options and output.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::image::{GuardArgs, PolicyArgs, SnapshotArg};
use super::{done, output, size};
use crate::block::{BlockHandler, Op, Payload, Request};
use crate::chain;
use crate::config::CacheSetting;
use crate::engine::{Engine, Housekeeper};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Image, ImageOptions};
use crate::runtime::{self, Buf, Runtime};
use crate::storage::CacheMode;

/// Send many equal requests to an image and take the time
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    image: PathBuf,

    /// Number of requests
    #[arg(short, long, value_name = "N", default_value_t = 75_000, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,

    /// Requests in flight
    #[arg(short, long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    depth: u32,

    /// Queues, each with a thread; the requests in flight are spread over them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,

    /// Write instead of read
    #[arg(short, long)]
    write: bool,

    /// Bytes of a request
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4096", value_parser = size::parse)]
    buffer_size: u64,

    /// Bytes from one request's beginning to the next one's [default: those of
    /// a request]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size::parse)]
    step_size: Option<u64>,

    /// Where the first request begins
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// The byte that is written
    #[arg(long, value_name = "BYTE", default_value_t = 0, requires = "write")]
    pattern: u8,

    /// Flush after this many requests
    #[arg(long, value_name = "N", requires = "write", value_parser = clap::value_parser!(u64).range(1..))]
    flush_interval: Option<u64>,

    /// Do not wait for what is in flight before a flush
    #[arg(long, requires = "flush_interval")]
    no_drain: bool,

    /// Direct I/O or the host's page cache
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: CacheSetting,

    /// Ignore that others write to the image; only for reading
    #[arg(short = 'U', long, conflicts_with = "write")]
    force_share: bool,

    /// Show at the end what the caches of the image's tables have done
    #[arg(long, conflicts_with = "quiet")]
    stats: bool,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// Refused: there is only io_uring
    #[arg(short, long, hide = true)]
    native: bool,

    /// Format of the image
    #[arg(short, long, hide = true, value_parser = ["qcow2"])]
    format: Option<String>,

    #[command(flatten)]
    snapshot: SnapshotArg,

    #[command(flatten)]
    guards: GuardArgs,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// What all threads share.
#[derive(Debug)]
struct Run {
    args: Args,
    engine: Arc<Engine>,
    step: u64,
    /// The next request's number.
    next: AtomicU64,
    /// Where the threads meet, around each flush.
    meeting: Barrier,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
}

/// Runs the requests.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.native {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "-n (Linux native AIO) is not supported: the engine uses io_uring",
        ));
    }
    let usual = args.policy.chain_options()?;
    let options = chain::Options {
        writable: args.write,
        cache: CacheMode::from(args.cache),
        force_share: args.force_share,
        snapshot: args.snapshot.selector(),
        image: ImageOptions {
            queues: usize::from(args.threads),
            ..args.guards.apply(usual.image.clone())
        },
        ..usual
    };
    let main = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    let chain = main.block_on(chain::open(&args.image, &options))?;
    let engine = Arc::new(Engine::new(chain, args.guards.engine_options()));
    check(args, engine.size()).map_err(|e| e.path(&args.image))?;
    let housekeeper = if args.write {
        Some(Housekeeper::start(Arc::clone(&engine))?)
    } else {
        None
    };

    let run = Arc::new(Run {
        args: args.clone(),
        engine: Arc::clone(&engine),
        step: args
            .step_size
            .filter(|&step| step > 0)
            .unwrap_or(args.buffer_size),
        next: AtomicU64::new(0),
        meeting: Barrier::new(usize::from(args.threads)),
        failure: Mutex::default(),
        failed: AtomicBool::new(false),
    });
    announce(&run)?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for queue in 0..args.threads {
            let run = &run;
            scope.spawn(move || run.thread(queue));
        }
    });
    let took = begun.elapsed();
    drop(housekeeper);
    let closed = main.block_on(engine.close());
    if let Some(error) = run.failure().take() {
        return Err(error);
    }
    closed?;
    if !args.quiet {
        output::print(&format!(
            "Run completed in {:.3} seconds.\n",
            took.as_secs_f64()
        ))?;
    }
    if args.stats {
        output::print(&stats(engine.chain().top()))?;
    }
    done()
}

/// What the caches have done, a line for each.
fn stats(image: &Image) -> String {
    [
        ("L2", image.l2_cache_stats()),
        ("Refcount", image.refcount_cache_stats()),
    ]
    .map(|(name, stats)| {
        format!(
            "{name} cache: {} hits, {} misses, {} evictions, {} of {} bytes\n",
            stats.hits, stats.misses, stats.evictions, stats.bytes, stats.capacity
        )
    })
    .concat()
}

fn check(args: &Args, size: u64) -> Result<()> {
    let end = args.offset.checked_add(args.buffer_size);
    if args.buffer_size > 0 && args.buffer_size < 1 << 31 && end.is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::OutOfBounds,
        format!(
            "a request of {} bytes at {} is not inside the disk of {size} bytes",
            args.buffer_size, args.offset
        ),
    ))
}

fn announce(run: &Run) -> Result<()> {
    let args = &run.args;
    if args.quiet {
        return Ok(());
    }
    let kind = if args.write { "write" } else { "read" };
    let mut text = format!(
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step \
         size {})\n",
        args.count, args.buffer_size, args.depth, args.offset, run.step
    );
    if let Some(interval) = args.flush_interval {
        text += &format!("Sending flush every {interval} requests\n");
    }
    output::print(&text)
}

impl Run {
    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first failure is the one to report.
    fn fail(&self, error: Error) {
        self.failed.store(true, Ordering::Relaxed);
        self.failure().get_or_insert(error);
    }

    /// This queue's share of the requests in flight.
    fn share(&self, queue: u16) -> u32 {
        let threads = u32::from(self.args.threads);
        let extra = u32::from(u32::from(queue) < self.args.depth % threads);
        (self.args.depth / threads + extra).max(1)
    }

    fn thread(self: &Arc<Self>, queue: u16) {
        let share = self.share(queue);
        // A request of many clusters is several operations.
        let runtime = Runtime::uring(share.saturating_mul(4).clamp(64, 4096))
            .map_err(|e| Error::io("make an io_uring", e))
            .and_then(|runtime| {
                runtime.block_on(async { self.engine.queue_started(queue) })?;
                Ok(runtime)
            });
        let runtime = runtime.map_err(|error| self.fail(error)).ok();
        let drained = self.args.flush_interval.filter(|_| !self.args.no_drain);
        let part = drained.unwrap_or(self.args.count);
        let mut end = 0;
        while end < self.args.count {
            end = end.saturating_add(part).min(self.args.count);
            if let Some(runtime) = &runtime {
                runtime.block_on(self.requests_until(queue, share, end));
            }
            if drained.is_none() {
                continue;
            }
            // All requests before the flush are complete, and none after it
            // begins before it is.
            if self.meeting.wait().is_leader() {
                // The workers have taken one number too many each.
                self.next.store(end, Ordering::Relaxed);
                let flush = self.engine.flush();
                if let Some(Err(error)) = runtime.as_ref().map(|runtime| runtime.block_on(flush)) {
                    self.fail(error);
                }
            }
            self.meeting.wait();
        }
    }

    /// Keeps the queue's share of requests in flight until number `end`.
    async fn requests_until(self: &Arc<Self>, queue: u16, share: u32, end: u64) {
        let workers: Vec<_> = (0..share)
            .map(|_| runtime::spawn(Arc::clone(self).worker(queue, end)))
            .collect();
        for worker in workers {
            worker.await;
        }
    }

    /// One of the requests in flight, again and again.
    async fn worker(self: Arc<Self>, queue: u16, end: u64) {
        let args = &self.args;
        let mut buf = Buf::take(args.buffer_size as usize);
        buf.fill(args.pattern);
        let size = self.engine.size();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= end || self.failed.load(Ordering::Relaxed) {
                return;
            }
            let at = u128::from(args.offset) + u128::from(number) * u128::from(self.step);
            let at = (at % u128::from(size)) as u64;
            let request = Request {
                op: if args.write {
                    Op::Write { fua: false }
                } else {
                    Op::Read
                },
                // What would not fit begins anew.
                offset: if at + args.buffer_size > size { 0 } else { at },
                len: args.buffer_size,
                payload: Payload::of_buf(&buf),
            };
            let mut result = self.engine.handle(queue, request).await;
            let is_last = |interval| (number + 1).is_multiple_of(interval);
            if result.is_ok() && args.no_drain && args.flush_interval.is_some_and(is_last) {
                result = self.engine.flush().await;
            }
            if let Err(error) = result {
                self.fail(error);
                return;
            }
        }
    }
}
