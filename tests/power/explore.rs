//! The search: cases from seeds, power cuts at every point of each.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use qcow2_ublk::storage::sim::{Crash, Rng, crash_image, crash_images};

use super::case::{Case, Cut};
use super::common::lab::watched;
use super::judge::Judge;
use super::run::{Ran, run};
use super::shape::Shape;
use super::{Verdict, features, qemu, shrink, workload};

/// How thoroughly a case is searched.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    /// Random states for each point, besides three certain ones.
    pub(crate) random: usize,
    /// States judged, about; all of them if there are no more.
    pub(crate) states: u64,
    /// One in so many is judged by QEMU too.
    pub(crate) qemu: u64,
    pub(crate) seed: u64,
}

/// What a search of one case saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) states: u64,
    pub(crate) qemu: u64,
    pub(crate) features: BTreeSet<String>,
}

/// A case with what is wrong.
pub(crate) struct Failure {
    pub(crate) reason: String,
    /// None when it failed while it ran.
    pub(crate) cut: Option<Cut>,
}

/// Runs a case and judges states of its power cuts.
pub(crate) fn search(case: &Case, effort: Effort) -> Result<Seen, Failure> {
    let ran = caught(|| run(case)).map_err(|reason| Failure { reason, cut: None })?;
    let history = ran.disks.image.history();
    let mut judge = Judge::new(case, &ran);
    let mut seen = Seen {
        features: ran.features.clone(),
        ..Seen::default()
    };
    if let Some(cut) = &case.cut {
        let point = cut.point.min(history.records.len());
        let crash = crash_image(&history, point, &cut.fates);
        judge_one(&case.shape, &mut judge, &crash, effort.seed, true)?;
        seen.states = 1;
        return Ok(seen);
    }
    let survives = workload::survives_power_cuts(&case.shape);
    let random = if survives { effort.random } else { 0 };
    let total = history.records.len() as u64 * (3 + random as u64);
    // Large disks take long to read.
    let states = (effort.states / (1 + case.shape.sectors / 1500)).max(1);
    let mut rng = Rng::new(effort.seed);
    for crash in crash_images(&history, effort.seed, random) {
        // Without barriers only the process may die.
        if !survives && !crash.fates.is_empty() {
            continue;
        }
        // Where something has just become durable, always: nothing that comes
        // later may be needed.
        let flushed = ran.log.flushes.iter().any(|f| f.complete == crash.point);
        let ask = rng.chance(states.min(total.max(1)), total.max(1));
        let ask = ask || flushed && rng.chance(1, 4);
        if !ask {
            continue;
        }
        let with_qemu = rng.chance(1, effort.qemu) && case.shape.luks != 2;
        judge_one(&case.shape, &mut judge, &crash, rng.next_u64(), with_qemu)?;
        seen.states += 1;
        seen.qemu += u64::from(with_qemu);
    }
    Ok(seen)
}

fn judge_one(
    shape: &Shape,
    judge: &mut Judge<'_>,
    crash: &Crash,
    seed: u64,
    with_qemu: bool,
) -> Result<(), Failure> {
    let verdict = caught(|| {
        let found = judge.judge(crash, seed)?;
        if with_qemu {
            qemu::judge(shape, crash, &found)?;
        }
        Ok(())
    });
    verdict.map_err(|reason| Failure {
        reason,
        cut: Some(Cut {
            point: crash.point,
            fates: crash.fates.clone(),
        }),
    })
}

/// A panic is a reason too.
fn caught<T>(work: impl FnOnce() -> Verdict<T>) -> Verdict<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("of some kind")))
    })
}

/// What a history did, for who looks into a failure.
pub(crate) fn describe(ran: &Ran) -> String {
    ran.disks.image.history().to_string()
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

/// Searches cases from `seed` on until `states` were judged; the features that
/// none of them had.
fn explore(states: u64, seed: u64, effort: Effort) -> Vec<&'static str> {
    let began = Instant::now();
    let mut seen = Seen::default();
    let mut cases = 0;
    while seen.states < states {
        let number = seed + cases;
        let case = Case::random(number);
        let effort = Effort {
            seed: number,
            ..effort
        };
        match search(&case, effort) {
            Ok(more) => {
                seen.states += more.states;
                seen.qemu += more.qemu;
                seen.features.extend(more.features);
            }
            Err(failure) => shrink::report(number, &case, failure, effort),
        }
        cases += 1;
        if cases % 1000 == 0 {
            eprintln!("{} states of {cases} cases so far", seen.states);
        }
    }
    let known: BTreeSet<&str> = features::ALL.iter().copied().collect();
    let found: BTreeSet<&str> = seen.features.iter().map(String::as_str).collect();
    println!(
        "{} states of {cases} cases (seeds {seed} to {}), {:.0} states per second, {} of {} \
         features, {} states judged by QEMU too",
        seen.states,
        seed + cases - 1,
        seen.states as f64 / began.elapsed().as_secs_f64(),
        found.intersection(&known).count(),
        known.len(),
        seen.qemu,
    );
    let strange: Vec<_> = found.difference(&known).collect();
    assert!(
        strange.is_empty(),
        "features without a place in the list: {strange:?}"
    );
    let all = features::ALL.iter().copied();
    all.filter(|name| !seen.features.contains(*name)).collect()
}

/// A bounded search; a long one, or one case again, if the environment says
/// so.
#[test]
fn power_cuts_are_survived() {
    if let Ok(text) = std::env::var("POWER_CASE") {
        let case = Case::parse(&text).expect("POWER_CASE is a case");
        let effort = Effort {
            random: 20,
            states: u64::MAX,
            qemu: 200,
            seed: 1,
        };
        match search(&case, effort) {
            Ok(seen) => println!("{} states are sound", seen.states),
            Err(failure) => {
                if let Ok(ran) = run(&case) {
                    eprintln!("{}", describe(&ran));
                }
                let cut = failure
                    .cut
                    .map_or_else(String::new, |cut| format!(" | {cut}"));
                panic!("{}{cut}", failure.reason);
            }
        }
        return;
    }
    let seed = number("POWER_SEED", 1);
    match number("POWER_STATES", 0) {
        0 => watched(900, || {
            let effort = Effort {
                random: 4,
                states: 9,
                qemu: 300,
                seed,
            };
            let missed = explore(2500, seed, effort);
            assert!(missed.is_empty(), "not covered: {missed:?}");
        }),
        states => {
            let effort = Effort {
                random: 6,
                states: 400,
                qemu: 2000,
                seed,
            };
            let missed = explore(states, seed, effort);
            println!("not covered: {missed:?}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 1..40 {
        let case = Case::random(seed);
        let histories = [(); 2].map(|()| describe(&run(&case).unwrap()));
        assert!(histories[0] == histories[1], "seed {seed}: {case}");
        assert!(!histories[0].is_empty() || case.weight() < 4, "seed {seed}");
    }
}
