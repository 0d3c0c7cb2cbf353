//! The search: cases from seeds, power cuts at every point of each.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::sys::resource::{UsageWho, getrusage};
use qcow2_ublk::storage::sim::{Change, Crash, Record, Rng, crash_image, crash_images};

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
    /// States that were judged.
    pub(crate) states: u64,
    /// Those that were asked for and had been judged before.
    pub(crate) same: u64,
    pub(crate) qemu: u64,
    pub(crate) features: BTreeSet<String>,
    /// Features that a case had together.
    pub(crate) pairs: BTreeSet<(String, String)>,
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
        pairs: pairs(&ran.features),
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
    // Large disks take long to read, and encrypted ones to open.
    let slow = if case.shape.luks == 0 { 1 } else { 10 };
    let states = (effort.states / (slow + case.shape.sectors / 1500)).max(1);
    let mut rng = Rng::new(effort.seed);
    let mut all = crash_images(&history, effort.seed, random);
    loop {
        let next = all.choose(|point, fates| {
            // Where something has just become durable: nothing that comes
            // later may be needed.
            let flushed = ran.log.flushes.iter().any(|f| f.complete == point);
            let decisive = point > 0 && changes_header(&history.records[point - 1]);
            // Without barriers only the process may die.
            (survives || fates.is_empty())
                && (decisive
                    || rng.chance(states.min(total.max(1)), total.max(1))
                    || flushed && rng.chance(1, 4))
        });
        let Some(crash) = next else { break };
        if !judge.is_new(&crash) {
            seen.same += 1;
            continue;
        }
        let with_qemu = rng.chance(1, effort.qemu) && case.shape.luks != 2;
        judge_one(&case.shape, &mut judge, &crash, rng.next_u64(), with_qemu)?;
        seen.states += 1;
        seen.qemu += u64::from(with_qemu);
    }
    Ok(seen)
}

fn pairs(features: &BTreeSet<String>) -> BTreeSet<(String, String)> {
    let behind = |first: &String| {
        let first = first.clone();
        let others = features.range(first.clone()..).skip(1);
        others.map(move |other| (first.clone(), other.clone()))
    };
    features.iter().flat_map(behind).collect()
}

/// True for a change to the sector in which an image says what counts.
fn changes_header(record: &Record) -> bool {
    record.disk == 0 && matches!(record.change, Change::Write { offset: 0..512, .. })
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

/// How much is searched.
#[derive(Clone, Copy)]
enum Bound {
    Cases(u64),
    /// Until so many states were judged.
    States(u64),
}

/// Searches cases from `seed` on, on all processors; the features that none of
/// them had.
fn explore(bound: Bound, seed: u64, effort: Effort) -> Vec<&'static str> {
    let total = Mutex::new(Seen::default());
    let total = || total.lock().unwrap_or_else(PoisonError::into_inner);
    let next = AtomicU64::new(seed);
    let failed = AtomicBool::new(false);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            if matches!(bound, Bound::States(states) if total().states >= states) {
                break;
            }
            let number = next.fetch_add(1, Ordering::Relaxed);
            if matches!(bound, Bound::Cases(cases) if number >= seed + cases) {
                break;
            }
            let case = Case::random(number);
            let effort = Effort {
                seed: number,
                ..effort
            };
            match search(&case, effort) {
                Ok(seen) => total().add(seen),
                // The first failure is enough.
                Err(failure) if !failed.swap(true, Ordering::Relaxed) => {
                    shrink::report(number, &case, failure, effort)
                }
                Err(_) => {}
            }
            let cases = number + 1 - seed;
            if cases.is_multiple_of(1000) {
                eprintln!("{} states of {cases} cases so far", total().states);
            }
        }
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    let cases = match bound {
        Bound::Cases(cases) => cases,
        Bound::States(_) => next.load(Ordering::Relaxed) - seed,
    };
    let seen = std::mem::take(&mut *total());
    seen.report(seed, cases)
}

impl Seen {
    fn add(&mut self, more: Self) {
        self.states += more.states;
        self.same += more.same;
        self.qemu += more.qemu;
        self.features.extend(more.features);
        self.pairs.extend(more.pairs);
    }

    /// Says what there was in `cases` cases; the features that are missing.
    fn report(&self, seed: u64, cases: u64) -> Vec<&'static str> {
        let known: BTreeSet<&str> = features::ALL.iter().copied().collect();
        let found: BTreeSet<&str> = self.features.iter().map(String::as_str).collect();
        let seconds = cpu_seconds();
        println!(
            "{} different states of {cases} cases (seeds {seed} to {}), and {} that were the \
             same as one of them, {:.0} different ones per second of {seconds:.0} of processor \
             time, {} of {} features and {} pairs of them, {} states judged by QEMU too",
            self.states,
            seed + cases - 1,
            self.same,
            self.states as f64 / seconds,
            found.intersection(&known).count(),
            known.len(),
            self.pairs.len(),
            self.qemu,
        );
        let strange: Vec<_> = found.difference(&known).collect();
        assert!(
            strange.is_empty(),
            "features without a place in the list: {strange:?}"
        );
        let all = features::ALL.iter().copied();
        all.filter(|name| !self.features.contains(*name)).collect()
    }
}

/// Processor time that this process has used.
fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the kernel tells");
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
        .sum()
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
        if let Ok(ran) = run(&case) {
            eprintln!("{}", describe(&ran));
        }
        match search(&case, effort) {
            Ok(seen) => println!("{} states are sound", seen.states),
            Err(failure) => {
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
                states: 12,
                qemu: 400,
                seed,
            };
            let missed = explore(Bound::Cases(400), seed, effort);
            assert!(missed.is_empty(), "not covered: {missed:?}");
        }),
        states => {
            let effort = Effort {
                random: 12,
                states: 900,
                qemu: 2000,
                seed,
            };
            let missed = explore(Bound::States(states), seed, effort);
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
