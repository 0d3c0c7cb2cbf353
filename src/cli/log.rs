//! Where log lines go: to standard error, as short as can be.

use tracing_subscriber::EnvFilter;

/// Shows warnings, or more with `-v`. `QCOW2_UBLK_LOG` overrules both, in the
/// syntax of tracing's `EnvFilter`.
pub(super) fn to_terminal(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("QCOW2_UBLK_LOG").unwrap_or_else(|_| level.into());
    // Fails when a caller of ours logs already: as well.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .try_init();
}
