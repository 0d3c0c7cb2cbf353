//! The life of the process behind a device: open the image, make the device,
//! say so, wait, and leave everything closed.

mod detach;
mod record;
mod signal;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::chain::{self, Chain};
use crate::config::Plan;
use crate::engine::{Engine, Housekeeper};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Runtime, sys};
use crate::storage::CacheMode;
use crate::ublk::{Device, Ended};

pub use detach::{Started, become_daemon, let_go, start};
pub use record::Record;

use signal::Signals;

/// How long an image may take to close when its device did not stop well.
const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// What the process does with a hangup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The terminal is gone: stop.
    Stop,
    /// There is no terminal, and nothing to be read again.
    Ignore,
}

/// Serves a device until a signal or somebody's `del` stops it. `ready` is
/// called once, with the device's path, when it can be used; if it fails, the
/// device goes again.
pub fn serve(plan: &Plan, hangup: Hangup, ready: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Before any thread: each of them may hold what the device waits for.
    if let Err(error) = sys::become_io_flusher() {
        tracing::debug!("PR_SET_IO_FLUSHER: {error}");
    }
    // From here on a signal waits until there is something to stop.
    let signals = Signals::catch(hangup)?;
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    let (chain, cache) = open(plan, &runtime)?;
    // The device must not keep a file system busy on which it was started.
    std::env::set_current_dir("/").map_err(|e| Error::io("go to the root directory", e))?;
    let engine = Arc::new(Engine::new(chain, plan.engine.clone()));
    serve_engine(plan, cache, &engine, signals, ready, &runtime)
}

fn open(plan: &Plan, runtime: &Runtime) -> Result<(Chain, CacheMode)> {
    let try_open = |cache| {
        let options = chain::Options {
            cache,
            ..plan.chain.clone()
        };
        runtime.block_on(chain::open(&plan.image, &options))
    };
    match try_open(plan.chain.cache) {
        // Not every file system has direct I/O.
        Err(error) if error.kind() == ErrorKind::Unsupported && plan.cache_may_change => {
            let chain = try_open(CacheMode::Writeback)?;
            tracing::info!("{error}: the page cache is used instead");
            Ok((chain, CacheMode::Writeback))
        }
        result => Ok((result?, plan.chain.cache)),
    }
}

fn serve_engine(
    plan: &Plan,
    cache: CacheMode,
    engine: &Arc<Engine>,
    signals: Signals,
    ready: impl FnOnce(&Path) -> Result<()>,
    runtime: &Runtime,
) -> Result<()> {
    let housekeeper = if plan.chain.writable {
        Some(Housekeeper::start(Arc::clone(engine))?)
    } else {
        None
    };
    let device = match Device::create(&plan.device, Arc::clone(engine)) {
        Ok(device) => device,
        Err(error) => {
            drop(housekeeper);
            // Nothing was written: the first error is the one that matters.
            let _ = runtime.block_on(engine.close());
            return Err(error);
        }
    };
    let record =
        Record::new(&plan.image, &device, cache).and_then(|record| record.store().map(|()| record));
    let record = record
        .inspect_err(|e| tracing::warn!("`list` will not know the image: {e}"))
        .ok();
    signals.stop_when_caught(device.handle())?;

    let told = ready(device.path());
    if told.is_ok() {
        let status = format!(
            "{} serves {}",
            device.path().display(),
            plan.image.display()
        );
        tracing::info!("{status} ({})", device.data_path());
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }
    let waited = told.and_then(|()| device.wait());
    match &waited {
        Ok(Ended::Asked) => tracing::info!("stopping"),
        Ok(Ended::Stopped) => tracing::info!("somebody has stopped the device"),
        Err(error) => tracing::error!("stopping: {error}"),
    }
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);

    let stopped = device.stop();
    drop(housekeeper);
    let closed = if stopped.is_ok() {
        runtime.block_on(engine.close())
    } else {
        close_in_time(engine)
    };
    if let Err(error) = &closed {
        tracing::error!("the image may have lost what was not flushed: {error}");
    }
    let stopped = stopped.inspect_err(|error| tracing::error!("{error}"));
    // Gone means closed: the number becomes free only now, and whoever waits
    // for that finds out how it went.
    let ended = closed.as_ref().err().or_else(|| stopped.as_ref().err());
    match (record, ended) {
        (Some(record), Some(error)) => record.fail(error),
        (Some(record), None) => record.remove(),
        (None, _) => {}
    }
    let deleted = stopped.and_then(|stopped| stopped.delete());
    waited.map(drop).and(closed).and(deleted)
}

/// Closes an image of which a request may be stuck for ever.
fn close_in_time(engine: &Arc<Engine>) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    let engine = Arc::clone(engine);
    let close = move || {
        let closed = match Runtime::inline() {
            Ok(runtime) => runtime.block_on(engine.close()),
            Err(e) => Err(Error::io("make an executor", e)),
        };
        // Nobody listens when it took too long.
        let _ = sender.send(closed);
    };
    std::thread::Builder::new()
        .name("close".to_owned())
        .spawn(close)
        .map_err(|e| Error::io("start a thread", e))?;
    receiver.recv_timeout(CLOSE_LIMIT).unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "the image is not closed after {} seconds",
                CLOSE_LIMIT.as_secs()
            ),
        ))
    })
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot tell the service manager: {error}");
    }
}
