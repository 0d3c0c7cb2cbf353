//! How far a long command is, on standard error: standard output is for data.

use std::io::{self, Write};

/// Shows a percentage where it is wanted.
#[derive(Debug)]
pub(super) struct Progress {
    wanted: bool,
    /// Hundredths of a per cent that were shown last.
    shown: Option<u64>,
}

impl Progress {
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            wanted,
            shown: None,
        }
    }

    /// `done` of `total` is done.
    pub(super) fn show(&mut self, done: u64, total: u64) {
        if !self.wanted {
            return;
        }
        let now = (u128::from(done) * 10_000)
            .checked_div(u128::from(total))
            .unwrap_or(10_000) as u64;
        // A terminal is slow: every per cent is enough.
        let due = match self.shown {
            None => true,
            Some(shown) => now >= shown + 100 || (now == 10_000 && shown < now),
        };
        if due {
            self.shown = Some(now);
            // Nothing is lost if nobody sees it.
            let _ = write!(io::stderr(), "    ({}.{:02}/100%)\r", now / 100, now % 100);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = writeln!(io::stderr());
        }
    }
}
