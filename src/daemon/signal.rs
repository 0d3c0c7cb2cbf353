//! Signals become a stop of the device.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator;

use super::Hangup;
use crate::error::{Error, Result};
use crate::ublk::Handle;

/// Caught signals that nobody has acted on yet.
#[derive(Debug)]
pub(super) struct Signals {
    caught: iterator::Signals,
    hangup: Hangup,
}

impl Signals {
    /// From now on signals do not end the process.
    pub(super) fn catch(hangup: Hangup) -> Result<Self> {
        let caught = iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
            .map_err(|e| Error::io("catch signals", e))?;
        Ok(Self { caught, hangup })
    }

    /// Stops the device at the next signal, or at one that came already.
    pub(super) fn stop_when_caught(mut self, device: Handle) -> Result<()> {
        let thread = move || {
            for signal in self.caught.forever() {
                if signal == SIGHUP && self.hangup == Hangup::Ignore {
                    tracing::info!("SIGHUP: there is nothing to read again");
                    continue;
                }
                device.stop();
            }
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(thread)
            .map_err(|e| Error::io("start the signal thread", e))?;
        Ok(())
    }
}
