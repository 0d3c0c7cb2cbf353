//! An image's disk from an ordinary program: copies a part of it to standard
//! output, or writes standard input into it.
//!
//! ```console
//! $ cargo run --example disk -- read image.qcow2 0 512 | hexdump -C
//! $ echo hello | cargo run --example disk -- write image.qcow2 1048576
//! ```

use std::io::{self, Read, Write};
use std::process::ExitCode;

use qcow2_ublk::{Disk, Error, ErrorKind, Result, chain};

/// Bytes that are held in memory.
const PART: u64 = 1 << 20;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["read", image] => read(image, 0, None),
        ["read", image, offset, len] => {
            number(offset).and_then(|offset| read(image, offset, Some(number(len)?)))
        }
        ["write", image, offset] => number(offset).and_then(|offset| write(image, offset)),
        _ => {
            eprintln!("usage: disk read IMAGE [OFFSET LENGTH] | disk write IMAGE OFFSET");
            return ExitCode::FAILURE;
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("disk: {error}");
            if let Some(cure) = error.cure_text() {
                eprintln!("hint: {cure}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn read(image: &str, offset: u64, len: Option<u64>) -> Result<()> {
    let disk = Disk::open(image.as_ref(), &chain::Options::default())?;
    let len = len.unwrap_or_else(|| disk.size().saturating_sub(offset));
    let mut part = vec![0; PART.min(len) as usize];
    let mut out = io::stdout().lock();
    let mut done = 0;
    while done < len {
        let now = PART.min(len - done) as usize;
        disk.read_at(&mut part[..now], offset + done)?;
        out.write_all(&part[..now])
            .map_err(|e| Error::io("write to standard output", e))?;
        done += now as u64;
    }
    disk.close()
}

fn write(image: &str, mut offset: u64) -> Result<()> {
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let disk = Disk::open(image.as_ref(), &options)?;
    let mut part = vec![0; PART as usize];
    loop {
        let now = io::stdin()
            .lock()
            .read(&mut part)
            .map_err(|e| Error::io("read standard input", e))?;
        if now == 0 {
            break;
        }
        disk.write_at(&part[..now], offset)?;
        offset += now as u64;
    }
    // Everything is in the image, durably, when this returns.
    disk.close()
}

fn number(text: &str) -> Result<u64> {
    text.parse()
        .map_err(|_| Error::new(ErrorKind::Usage, format!("{text:?} is not a number")))
}
