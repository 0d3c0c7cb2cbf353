//! Asking for a passphrase at the terminal, without showing it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};

const INTERRUPT: u8 = 3;
const END: u8 = 4;
const BACKSPACE: [u8; 2] = [8, 127];
const CLEAR: u8 = 21;

/// The terminal as it was, put back whatever happens.
struct Restored<'a> {
    terminal: &'a File,
    before: Termios,
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, SetArg::TCSAFLUSH, &self.before);
        let _ = (&mut &*self.terminal).write_all(b"\n");
    }
}

/// Asks for `what`; the line end is not part of the answer.
pub(super) fn ask(what: &str) -> Result<Secret> {
    let failed = |e| Error::io("ask for the passphrase at the terminal", e);
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .map_err(failed)?;
    let before = tcgetattr(&terminal).map_err(|e| failed(e.into()))?;
    let mut silent = before.clone();
    // Byte by byte, so that an interrupt is ours to handle: a signal would
    // leave the terminal silent.
    silent
        .local_flags
        .remove(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG);
    // Before anybody is asked to type: what comes earlier would be shown.
    tcsetattr(&terminal, SetArg::TCSAFLUSH, &silent).map_err(|e| failed(e.into()))?;
    let _restored = Restored {
        terminal: &terminal,
        before,
    };
    (&mut &terminal)
        .write_all(format!("{what}: ").as_bytes())
        .map_err(failed)?;
    let mut typed = Zeroizing::new(Vec::with_capacity(1024));
    let mut byte = Zeroizing::new([0]);
    loop {
        let read = (&mut &terminal).read(&mut byte[..]).map_err(failed)?;
        match byte[0] {
            _ if read == 0 => break,
            b'\n' | b'\r' | END => break,
            INTERRUPT => return Err(Error::new(ErrorKind::Usage, "interrupted")),
            CLEAR => typed.clear(),
            other if BACKSPACE.contains(&other) => {
                typed.pop();
            }
            other if typed.len() < typed.capacity() => typed.push(other),
            _ => return Err(Error::new(ErrorKind::Usage, "the passphrase is too long")),
        }
    }
    if typed.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "the passphrase is empty"));
    }
    Ok(Secret::new(std::mem::take(&mut *typed)))
}
