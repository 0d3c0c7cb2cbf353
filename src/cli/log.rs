//! Where log lines go: those of commands to standard error, those of devices
//! to the journal or the system's log.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use tracing::Level;
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// `QCOW2_UBLK_LOG` overrules everything, in the syntax of tracing's
/// `EnvFilter`.
fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_from_env("QCOW2_UBLK_LOG").unwrap_or_else(|_| level.into())
}

fn level(verbose: u8) -> &'static str {
    match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}

/// Shows warnings on standard error, or more with `-v`.
pub(super) fn to_terminal(verbose: u8) {
    let layer = terminal(verbose);
    // Fails when a caller of ours logs already: as well.
    let _ = tracing_subscriber::registry().with(layer).try_init();
}

fn terminal<S>(verbose: u8) -> impl Layer<S> + Send + Sync
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(super::output::colour())
        .with_target(false)
        .without_time()
        .with_filter(filter(level(verbose)))
}

/// For a process that serves a device. In the foreground its lines go where
/// standard error goes: to the journal in the journal's own way, or else as to
/// a terminal. A `detached` process writes to standard error only until it
/// lets go of it, and to the journal or the system's log always.
pub(super) fn to_service(verbose: u8, detached: bool) {
    let registry = tracing_subscriber::registry();
    let service = filter(level(verbose.max(1)));
    let wants_journal = detached || stderr_is_journal();
    let journal = wants_journal
        .then(|| tracing_journald::layer().ok())
        .flatten()
        .map(|layer| layer.with_syslog_identifier("qcow2-ublk".to_owned()));
    let syslog = if detached && journal.is_none() {
        Syslog::connect().ok()
    } else {
        None
    };
    let syslog = syslog.map(|syslog| {
        tracing_subscriber::fmt::layer()
            .with_writer(syslog)
            .with_ansi(false)
            .with_target(false)
            .with_level(false)
            .without_time()
    });
    let terminal = (detached || journal.is_none()).then(|| terminal(verbose));
    let _ = registry
        .with(terminal)
        .with(journal.map(|layer| layer.with_filter(service.clone())))
        .with(syslog.map(|layer| layer.with_filter(service)))
        .try_init();
}

/// `$JOURNAL_STREAM` names the file that standard error is if it leads to the
/// journal.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    nix::sys::stat::fstat(io::stderr().as_fd())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The system's log, for hosts without journal.
#[derive(Debug)]
struct Syslog(UnixDatagram);

impl Syslog {
    fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect("/dev/log")?;
        Ok(Self(socket))
    }
}

/// One line to the system's log.
#[derive(Debug)]
struct Line<'a> {
    socket: &'a UnixDatagram,
    severity: u8,
}

impl Write for Line<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        const DAEMON: u8 = 3 << 3;
        let head = format!(
            "<{}>qcow2-ublk[{}]: ",
            DAEMON | self.severity,
            std::process::id()
        );
        let line = [head.as_bytes(), text.trim_ascii_end()].concat();
        self.socket.send(&line)?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            socket: &self.0,
            severity: 6,
        }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line<'a> {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        Line {
            socket: &self.0,
            severity,
        }
    }
}
