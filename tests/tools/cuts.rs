//! States that power cuts may leave, some of many.
#![allow(unreachable_pub, reason = "a part of a test program")]

use qcow2_ublk::storage::sim::{Crash, History, Rng, crash_images};

/// States to judge, about.
const STATES: u64 = 150;
/// Random ones for each point of the history, besides the extreme ones.
const RANDOM: usize = 4;

/// States after power cuts all through the history; the same for the same
/// seed.
pub fn sample(history: &History, seed: u64) -> impl Iterator<Item = Crash> {
    let total = history.records.len() as u64 * (3 + RANDOM as u64);
    let mut rng = Rng::new(seed);
    crash_images(history, seed, RANDOM).filter(move |_| rng.chance(STATES.min(total), total))
}
