//! Power cuts on a real disk: writes to a device while dm-log-writes records
//! what reaches the disk below, and judges afterwards what a power cut would
//! have left there at every moment.
//!
//! ```console
//! # powercut record DEVICE DM-NAME JOURNAL ROUNDS SEED
//! # powercut replay LOG JOURNAL START FOLDER POINTS SEED
//! # powercut extract LOG START FILE ENTRIES
//! # powercut judge IMAGE LOG JOURNAL ENTRIES
//! ```
//!
//! `record` works on DEVICE, which an image on the recorded disk DM-NAME
//! serves, and notes in JOURNAL what was acknowledged when. `replay` takes the
//! disk as it was before, START, through the LOG, stops at POINTS of its
//! flushes at most, and judges the image that is there: by `qcow2-ublk check`,
//! by `qemu-img check` and by content. `extract` writes what the disk holds
//! after so many entries to FILE, for file systems to be mounted, and `judge`
//! judges an image found there. Used by `tests/guest/powercut.sh`.

mod journal;
mod judge;
mod log;
mod record;
mod replay;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("powercut: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Outcome<()> {
    let path = Path::new;
    match *args {
        ["record", device, name, journal, rounds, seed] => {
            let work = record::Work {
                device: path(device),
                recorder: name,
                rounds: rounds.parse()?,
                seed: seed.parse()?,
            };
            work.run()?.save(path(journal))
        }
        ["replay", log, journal, start, folder, points, seed] => {
            let replay = replay::Replay {
                log: log::Log::read(path(log))?,
                journal: journal::Journal::load(path(journal))?,
                folder: path(folder),
                points: points.parse()?,
            };
            replay.run(path(start), seed.parse()?)
        }
        ["extract", log, start, file, entries] => {
            let log = log::Log::read(path(log))?;
            let mut disk = qcow2_ublk::storage::sim::Image::load(path(start))?;
            let wanted = entries.parse::<usize>()?.min(log.entries.len());
            log.entries[..wanted]
                .iter()
                .for_each(|e| e.apply(&mut disk));
            println!("{} entries, {} marks", wanted, log.marks(wanted));
            Ok(disk.save(path(file))?)
        }
        ["judge", image, log, journal, entries] => {
            let log = log::Log::read(path(log))?;
            let journal = journal::Journal::load(path(journal))?;
            let entries = entries.parse::<usize>()?.min(log.entries.len());
            judge::image(path(image), true)?;
            let marks = log.marks(entries);
            judge::content(path(image), &journal, marks..marks)
        }
        ["count", log] => {
            println!("{}", log::Log::read(path(log))?.entries.len());
            Ok(())
        }
        _ => Err("see the head of examples/powercut/main.rs".into()),
    }
}
