//! Writes back what is dirty now and then, whether or not anybody flushes.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Engine;
use crate::error::{Error, Result};
use crate::runtime::Runtime;

/// How long a change may stay in memory only.
const INTERVAL: Duration = Duration::from_secs(5);

/// A thread that writes an engine's metadata back every few seconds. It works
/// with plain system calls, beside the queues; dropping it stops it.
#[derive(Debug)]
pub struct Housekeeper {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Housekeeper {
    /// Starts the thread.
    pub fn start(engine: Arc<Engine>) -> Result<Self> {
        let runtime_failed = |e| Error::io("start the housekeeping thread", e);
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("housekeeper".to_owned())
            .spawn(move || {
                let Ok(runtime) = Runtime::inline() else {
                    tracing::error!("no housekeeping: only flushes write metadata back");
                    return;
                };
                let (flag, changed) = &*stopped;
                let mut stop = flag.lock().unwrap_or_else(PoisonError::into_inner);
                while !*stop {
                    let waited = changed.wait_timeout(stop, INTERVAL);
                    stop = waited.unwrap_or_else(PoisonError::into_inner).0;
                    if *stop {
                        break;
                    }
                    drop(stop);
                    // The failure is also the next flush's, which reports it
                    // to whoever relies on it.
                    if let Err(error) = runtime.block_on(engine.write_back()) {
                        tracing::error!("cannot write metadata back: {error}");
                    }
                    stop = flag.lock().unwrap_or_else(PoisonError::into_inner);
                }
            })
            .map_err(runtime_failed)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
