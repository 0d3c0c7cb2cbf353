//! How far a long command is, on standard error: standard output is for data.

use std::io::{self, Write};

/// How much is said while an image is worked on, and which format it has.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Telling {
    /// Show how far it is, on standard error
    #[arg(short, long)]
    progress: bool,

    /// Say nothing
    #[arg(short, long, conflicts_with = "progress")]
    quiet: bool,

    /// Format of the image
    #[arg(short, long, hide = true, value_parser = ["qcow2"])]
    format: Option<String>,
}

impl Telling {
    pub(super) fn progress(&self) -> Progress {
        Progress::new(self.progress)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }
}

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
