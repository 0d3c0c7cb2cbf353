//! Into the background: the program runs itself once more, as a process of its
//! own that has no threads or rings yet, and waits until that one is ready.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::{Error, ErrorKind, Result};

/// What has become of the process in the background.
#[derive(Debug)]
pub enum Started {
    /// The device can be used; this is its path.
    Ready(PathBuf),
    /// It has failed, said why on standard error, and ended with this code.
    Failed(u8),
}

/// Starts this program again with `flag` before its other arguments, and waits
/// until it says on its standard output that the device is ready, or ends.
/// Its standard input is `given`.
pub fn start(flag: &str, given: Option<&[u8]>) -> Result<Started> {
    let failed = |e| Error::io("start the background process", e);
    // Not /proc/self/exe by that name: the process would be called "exe".
    let program = std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into());
    let mut args = std::env::args_os();
    let own_name = args.next().unwrap_or_else(|| "qcow2-ublk".into());
    let mut child = Command::new(program)
        .arg0(own_name)
        .arg(flag)
        .args(args)
        .stdin(given.map_or_else(Stdio::null, |_| Stdio::piped()))
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let (Some(mut input), Some(given)) = (child.stdin.take(), given) {
        // A process that has ended already says why.
        let _ = input.write_all(given);
    }
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output)
            .read_line(&mut said)
            .map_err(failed)?;
    }
    if let Some(path) = said.strip_suffix('\n') {
        return Ok(Started::Ready(path.into()));
    }
    let status = child.wait().map_err(failed)?;
    failure(status).map(Started::Failed)
}

/// The exit code of a process that has said why it ended.
fn failure(status: ExitStatus) -> Result<u8> {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if let Some(code) = code.filter(|&code| code != 0) {
        return Ok(code);
    }
    let how = status
        .signal()
        .map_or_else(String::new, |signal| format!(" by signal {signal}"));
    Err(Error::new(
        ErrorKind::Io,
        format!("the background process ended{how} before the device was ready"),
    )
    .cure("see the system's journal or log"))
}

/// The background process, as long as somebody waits for it.
#[derive(Debug)]
pub struct Background {
    /// Opened while files can be opened.
    null: File,
}

impl Background {
    /// First of all: away from the terminal's signals.
    pub fn enter() -> Result<Self> {
        // Fails when we lead a process group already: as well.
        let _ = nix::unistd::setsid();
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|e| Error::io("open the file", e).path("/dev/null"))?;
        Ok(Self { null })
    }

    /// When the device can be used: tells the waiting one, and lets go of the
    /// terminal.
    pub fn let_go(self, device: &Path) -> Result<()> {
        let failed = |e| Error::io("tell the caller that the device is ready", e);
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", device.display()).map_err(failed)?;
        out.flush().map_err(failed)?;
        drop(out);
        nix::unistd::dup2_stdout(&self.null)
            .and_then(|()| nix::unistd::dup2_stderr(&self.null))
            .map_err(|e| failed(e.into()))
    }
}
