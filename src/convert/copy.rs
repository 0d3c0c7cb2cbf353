//! The copying: one thread goes along the map of the source, others read and
//! compress, and the first one writes what they bring, in the disk's order. So
//! the result does not depend on who was quicker.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::chunk::{Action, Chunk, Job, Kind, Maker};
use super::target::{Before, Target};
use super::{Options, Source};
use crate::disk::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::CompressionType;

/// Bytes of a job, or a cluster if that is more.
const JOB: u64 = 1 << 20;
/// And where it is compressed, so that it is spread well.
const COMPRESSED_JOB: u64 = 256 << 10;

/// How long nobody looks whether the copy is to end.
const NAP: Duration = Duration::from_millis(100);

/// What a worker brings: the number of the job, and what became of it.
type Done = (u64, Result<Chunk>);

struct Copy<'a> {
    source: &'a Source,
    target: &'a Target,
    options: &'a Options<'a>,
    maker: Maker<'a>,
    /// Buffers for jobs to come.
    spare: Mutex<Vec<Vec<u8>>>,
    /// Nobody waits for the workers any more.
    over: AtomicBool,
}

pub(super) fn copy(
    source: &Source,
    target: &Target,
    options: &Options<'_>,
    progress: impl FnMut(u64, u64),
) -> Result<()> {
    let compress = match (options.compress, target.engine()) {
        (Some(level), Some(engine)) => {
            let image = engine.chain().top();
            image.check_compressible()?;
            let kind = image.compression();
            Some((kind, level.unwrap_or_else(|| dense_level(kind))))
        }
        _ => None,
    };
    let copy = Copy {
        source,
        target,
        options,
        maker: Maker {
            source,
            target,
            compress,
            sparse: options.sparse,
        },
        spare: Mutex::default(),
        over: AtomicBool::new(false),
    };
    let workers = options.workers.max(1);
    let (jobs, taken) = mpsc::channel();
    let (bring, brought) = mpsc::channel();
    let taken = Mutex::new(taken);
    std::thread::scope(|scope| {
        for number in 0..workers {
            let bring = bring.clone();
            let (copy, taken) = (&copy, &taken);
            std::thread::Builder::new()
                .name(format!("convert-{number}"))
                .spawn_scoped(scope, move || copy.work(taken, &bring))
                .map_err(|e| Error::io("start a thread", e))?;
        }
        drop(bring);
        // Dropping the sender ends the workers.
        let driven = copy.drive(jobs, &brought, workers as u64, progress);
        copy.over.store(true, Ordering::Relaxed);
        driven
    })
}

/// The level at which a copy is not larger than the one that qemu-img makes:
/// what is compressed once and for all is worth the highest level of deflate.
fn dense_level(kind: CompressionType) -> i32 {
    match kind {
        CompressionType::Deflate => 9,
        CompressionType::Zstd => kind.default_level(),
    }
}

impl Copy<'_> {
    /// A worker: jobs until there are no more.
    fn work(&self, jobs: &Mutex<Receiver<(u64, Job)>>, bring: &Sender<Done>) {
        loop {
            let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((number, job)) = next else { return };
            let buf = self.spare_buffer();
            let made = catch_unwind(AssertUnwindSafe(|| {
                blocking(async {
                    let mut chunk = self.maker.make(job, buf).await?;
                    if self.options.out_of_order && self.maker.compress.is_none() {
                        self.store(&chunk).await?;
                        chunk.actions.clear();
                    }
                    Ok(chunk)
                })
            }));
            match made {
                Ok(result) => {
                    if bring.send((number, result)).is_err() {
                        return;
                    }
                }
                Err(panic) => {
                    let error = Error::new(ErrorKind::Io, "a thread of the copy panicked");
                    let _ = bring.send((number, Err(error)));
                    resume_unwind(panic);
                }
            }
        }
    }

    fn spare_buffer(&self) -> Vec<u8> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_default()
    }

    /// Hands out jobs and stores what comes back, in order.
    fn drive(
        &self,
        jobs: Sender<(u64, Job)>,
        brought: &Receiver<Done>,
        workers: u64,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<()> {
        let size = self.source.size();
        // Enough to keep everybody busy while one is slow, and no more.
        let most = 4 * workers + 4;
        let mut waiting: BTreeMap<u64, Chunk> = BTreeMap::new();
        let (mut handed_out, mut stored, mut at) = (0, 0, 0);
        progress(0, size);
        loop {
            while handed_out - stored < most && at < size {
                self.check_cancelled()?;
                let step = blocking(self.plan(at, size))?;
                match step {
                    Step::Skip(len) => at += len,
                    Step::Zero(len) => {
                        let actions = vec![Action::Zero { at, len }];
                        let chunk = Chunk {
                            at,
                            actions,
                            ..Chunk::default()
                        };
                        waiting.insert(handed_out, chunk);
                        handed_out += 1;
                        at += len;
                    }
                    Step::Data(len) => {
                        // The workers are there as long as we are.
                        let _ = jobs.send((handed_out, Job { at, len }));
                        handed_out += 1;
                        at += len;
                    }
                }
            }
            if handed_out == stored {
                progress(size, size);
                return Ok(());
            }
            while !waiting.contains_key(&stored) {
                let Ok((number, result)) = brought.recv() else {
                    return Err(Error::new(
                        ErrorKind::Io,
                        "the threads of the copy are gone",
                    ));
                };
                waiting.insert(number, result?);
            }
            while let Some(chunk) = waiting.remove(&stored) {
                self.check_cancelled()?;
                blocking(self.store(&chunk))?;
                stored += 1;
                progress(chunk.at + chunk.buf.len() as u64, size);
                if !chunk.buf.is_empty() {
                    let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
                    spare.push(chunk.buf);
                }
            }
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.options.cancel.load(Ordering::Relaxed) {
            let what = match self.target.before {
                Before::Unknown => "interrupted: only a part of it is written",
                _ => "interrupted",
            };
            return Err(Error::new(ErrorKind::Io, what).path(&self.options.path));
        }
        Ok(())
    }

    /// What to do from `at` on.
    async fn plan(&self, at: u64, size: u64) -> Result<Step> {
        let cluster_size = self.target.cluster_size();
        let entry = self.source.extent(at, size - at).await?;
        let end = at + entry.len;
        let whole = if end == size {
            entry.len
        } else {
            entry.len / cluster_size * cluster_size
        };
        Ok(match self.maker.kind(&entry) {
            Kind::Skip if whole > 0 => Step::Skip(whole),
            Kind::Zero if whole > 0 => Step::Zero(whole),
            _ => {
                let job = if self.maker.compress.is_some() {
                    COMPRESSED_JOB
                } else {
                    JOB
                };
                let len = entry
                    .len
                    .next_multiple_of(cluster_size)
                    .min(job.max(cluster_size))
                    .min(size - at);
                Step::Data(len)
            }
        })
    }

    /// Waits until a chunk may be written.
    fn hold_back(&self, chunk: &Chunk) -> Result<()> {
        let Some(rate) = &self.options.rate else {
            return Ok(());
        };
        let mut left = rate.wait_for(chunk.stored_bytes());
        while !left.is_zero() && !self.over.load(Ordering::Relaxed) {
            self.check_cancelled()?;
            let nap = left.min(NAP);
            std::thread::sleep(nap);
            left -= nap;
        }
        Ok(())
    }

    async fn store(&self, chunk: &Chunk) -> Result<()> {
        self.hold_back(chunk)?;
        for action in &chunk.actions {
            match action {
                Action::Write(range) => {
                    let at = chunk.at + range.start as u64;
                    self.target.write(at, &chunk.buf[range.clone()]).await?;
                }
                Action::Zero { at, len } => self.target.write_zeroes(*at, *len).await?,
                Action::Stream { at, bytes } => {
                    let engine = self.target.engine().expect("only images are compressed");
                    engine.write_stream(0, *at, bytes).await?;
                }
            }
        }
        Ok(())
    }
}

/// What to do next.
enum Step {
    Skip(u64),
    Zero(u64),
    Data(u64),
}
