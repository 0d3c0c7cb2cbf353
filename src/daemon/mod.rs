//! The life of the process behind a device: open the image, make the device,
//! give up what serving does not need, say so, wait, and leave everything
//! closed.

mod detach;
mod notify;
mod record;
pub mod sandbox;
mod signal;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::block::BlockHandler;
use crate::chain::{self, Chain};
use crate::config::Plan;
use crate::engine::{Engine, Housekeeper};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Runtime, sys};
use crate::storage::CacheMode;
use crate::ublk::{Device, Ended, Prepared, Steward};

pub use detach::{Background, Started, start};
pub use record::Record;

use notify::Manager;
use record::Stored;
use sandbox::{Confined, Sandbox};
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
    let confinement = Confinement::start(plan.sandbox)?;
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    let (chain, cache) = open(plan, &runtime)?;
    // The device must not keep a file system busy on which it was started.
    std::env::set_current_dir("/").map_err(|e| Error::io("go to the root directory", e))?;
    let engine = Arc::new(Engine::new(chain, plan.engine.clone()));
    Server {
        plan,
        engine,
        confinement,
        manager: Manager::connect(),
        runtime,
    }
    .run(cache, signals, ready)
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

/// How much of its rights the process gives up, and when.
struct Confinement {
    sandbox: Option<Arc<Sandbox>>,
    steward: Option<Arc<Steward>>,
}

impl Confinement {
    /// Before anything of the image is opened.
    fn start(wanted: bool) -> Result<Self> {
        if !wanted {
            tracing::warn!("no sandbox: this process keeps all its rights");
            return Ok(Self {
                sandbox: None,
                steward: None,
            });
        }
        let memory = sandbox::harden();
        let steward = Steward::start().map_err(|e| Error::io("start the steward process", e))?;
        // The folder is named in the sandbox's rules, so it has to be there.
        if let Err(error) = Record::make_folder() {
            // Whoever wants to write into it says so.
            tracing::debug!("{error}");
        }
        Ok(Self {
            sandbox: Some(Arc::new(Sandbox::new(Path::new(record::FOLDER), memory))),
            steward: Some(Arc::new(steward)),
        })
    }

    /// When everything is open that will be needed.
    fn close(&self) {
        if let Some(sandbox) = &self.sandbox {
            sandbox.enter();
            // Not in the macro: it looks at its arguments only when it logs.
            let parts = sandbox.close();
            tracing::info!("sandbox: {parts}");
        }
    }
}

/// An open image on its way to be a device, and the device.
struct Server<'a> {
    plan: &'a Plan,
    engine: Arc<Engine>,
    confinement: Confinement,
    manager: Manager,
    runtime: Runtime,
}

impl Server<'_> {
    fn run(
        self,
        cache: CacheMode,
        signals: Signals,
        ready: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let handler = Arc::new(Confined {
            handler: Arc::clone(&self.engine),
            sandbox: self.confinement.sandbox.clone(),
        });
        let steward = self.confinement.steward.clone();
        let prepared = match Device::prepare(&self.plan.device, handler, steward) {
            Ok(prepared) => prepared,
            Err(error) => return Err(self.give_up(error)),
        };
        let record = self.record(&prepared, cache);
        self.confinement.close();
        // Threads of ours, other than the queues', start in the sandbox.
        let started = self.start(prepared, signals);
        let (device, housekeeper) = match started {
            Ok(started) => started,
            Err(error) => {
                if let Some(record) = record {
                    record.remove();
                }
                return Err(self.give_up(error));
            }
        };
        let told = ready(device.path());
        if told.is_ok() {
            self.say_ready(&device);
        }
        self.serve(told, device, housekeeper, record)
    }

    /// Makes the disk.
    fn start(&self, prepared: Prepared, signals: Signals) -> Result<(Device, Option<Housekeeper>)> {
        let housekeeper = if self.plan.chain.writable {
            Some(Housekeeper::start(Arc::clone(&self.engine))?)
        } else {
            None
        };
        let device = prepared.start()?;
        signals.stop_when_caught(device.handle())?;
        Ok((device, housekeeper))
    }

    /// Nothing was written: the first error is the one that matters.
    fn give_up(&self, error: Error) -> Error {
        let _ = self.runtime.block_on(self.engine.close());
        error
    }

    fn record(&self, prepared: &Prepared, cache: CacheMode) -> Option<Stored> {
        let read_only = self.plan.device.read_only || self.engine.limits().read_only;
        Record::new(&self.plan.image, prepared.device(), cache, read_only)
            .store()
            .inspect_err(|e| tracing::warn!("`list` will not know the image: {e}"))
            .ok()
    }

    fn say_ready(&self, device: &Device) {
        let status = format!(
            "{} serves {}",
            device.path().display(),
            self.plan.image.display()
        );
        tracing::info!("{status} ({})", device.data_path());
        let states = [NotifyState::Ready, NotifyState::Status(&status)];
        self.manager.tell(&states);
    }

    fn serve(
        self,
        told: Result<()>,
        device: Device,
        housekeeper: Option<Housekeeper>,
        record: Option<Stored>,
    ) -> Result<()> {
        let waited = told.and_then(|()| device.wait());
        match &waited {
            Ok(Ended::Asked) => tracing::info!("stopping"),
            Ok(Ended::Stopped) => tracing::info!("somebody has stopped the device"),
            Err(error) => tracing::error!("stopping: {error}"),
        }
        let states = [NotifyState::Stopping, NotifyState::Status("stopping")];
        self.manager.tell(&states);

        let stopped = device.stop();
        drop(housekeeper);
        let closed = if stopped.is_ok() {
            self.runtime.block_on(self.engine.close())
        } else {
            close_in_time(&self.engine)
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
        // Nor may a lock or a file system still be held then: whoever was told of
        // the end unmounts it, or starts QEMU.
        if Arc::into_inner(self.engine).is_none() {
            tracing::debug!("somebody still has the image's files");
        }
        drop(self.runtime);
        let deleted = stopped.and_then(|stopped| stopped.delete());
        waited.map(drop).and(closed).and(deleted)
    }
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
