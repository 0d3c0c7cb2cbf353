//! P1 and P2 explored: random images, random work on them, and the power cut
//! at every point of it. See docs/testing/power.md.
//!
//! `POWER_STATES=N` judges so many states, `POWER_SEED=N` begins with another
//! seed, `POWER_CASE='...'` repeats one case as a failure prints it;
//! `scripts/power` does it with the release profile.

#[path = "../common/mod.rs"]
mod common;

mod actions;
mod bitmaps;
mod case;
mod explore;
mod features;
mod judge;
mod live;
mod machine;
mod model;
#[cfg(debug_assertions)]
mod mutants;
mod op;
mod qemu;
mod run;
mod shape;
mod shrink;
mod task;
mod workload;

/// Why a state is wrong.
pub(crate) type Verdict<T = ()> = Result<T, String>;

/// Gives a reason up unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}
pub(crate) use ensure;
