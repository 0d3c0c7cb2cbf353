//! P6: an error of the host becomes an errno for the request it hit; nothing
//! is dropped because its write failed; a failed fsync stays. Every operation
//! of some work fails once, in every way there is and on every file there is;
//! and when the fault is gone, everything that was acknowledged is there.
//!
//! `FAULT_SEEDS=N` repeats the random work with N seeds, each with all faults
//! at each operation, where one seed and some of them are the rule.

#[path = "../common/mod.rs"]
mod common;

mod jobs;
mod lasting;
mod model;
mod requests;
mod rows;
mod run;
mod trial;
mod work;

use qcow2_ublk::storage::sim::{Fault, SimKind};

/// Runs with how many seeds.
fn seeds() -> u64 {
    let seeds = std::env::var("FAULT_SEEDS");
    seeds.map_or(1, |n| n.parse().expect("FAULT_SEEDS is a number"))
}

fn errno(fault: Fault) -> i32 {
    match fault {
        Fault::Errno(errno) | Fault::Partial { errno, .. } => errno,
        _ => 0,
    }
}

/// Nobody is to notice it.
fn is_harmless(fault: Fault) -> bool {
    matches!(fault, Fault::Short(_))
        || [libc::EINTR, libc::EAGAIN, libc::EOPNOTSUPP].contains(&errno(fault))
}

/// What can go wrong with operation number `number`, of this kind.
fn faults(kind: SimKind, number: u64) -> Vec<Fault> {
    let eio = Fault::Errno(libc::EIO);
    let full = Fault::Errno(libc::ENOSPC);
    let again = [libc::EINTR, libc::EAGAIN].map(Fault::Errno);
    let short = [1, 700].map(Fault::Short);
    let partial = [512, 1 << 20].map(|stored| Fault::Partial {
        stored,
        errno: libc::EIO,
    });
    let all = seeds() > 1;
    // One of two, in turns.
    let some = |faults: [Fault; 2]| {
        let one = faults[number as usize % 2];
        if all { faults.to_vec() } else { vec![one] }
    };
    match kind {
        SimKind::Read => [vec![eio], some(again), some(short)].concat(),
        SimKind::Write => [vec![eio, full], some(partial), some(again), some(short)].concat(),
        SimKind::Zero | SimKind::Punch => {
            let unable = Fault::Errno(libc::EOPNOTSUPP);
            [vec![eio, full, unable], some(again)].concat()
        }
        SimKind::SetLen => [vec![eio, full], some(again)].concat(),
        // A sync that says anything else has failed.
        _ => vec![eio, full, Fault::Errno(libc::EINTR)],
    }
}
