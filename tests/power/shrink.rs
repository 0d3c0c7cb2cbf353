//! Makes a failing case as small as it can be, and says how to have it again.

use qcow2_ublk::storage::sim::Fate;

use super::case::Case;
use super::explore::{Effort, Failure, search};
use super::op::Step;

/// How often a smaller case is tried at most.
const TRIES: u32 = 600;

struct Shrinker {
    case: Case,
    failure: Failure,
    effort: Effort,
    tries: u32,
}

/// What stays the same when a case gets smaller: not numbers and names.
fn kind(reason: &str) -> String {
    let first = reason.split("; or: ").next().unwrap_or_default();
    let words = first.split_whitespace();
    words
        .filter(|word| word.chars().all(|c| c.is_ascii_lowercase()))
        .take(6)
        .collect()
}

impl Shrinker {
    /// Takes the smaller case if it fails too.
    fn take(&mut self, smaller: Case) -> bool {
        if self.tries == 0 {
            return false;
        }
        self.tries -= 1;
        match search(&smaller, self.effort) {
            Ok(_) => false,
            Err(failure) if kind(&failure.reason) != kind(&self.failure.reason) => false,
            Err(failure) => {
                self.case = smaller;
                self.failure = failure;
                true
            }
        }
    }

    /// Drops steps and requests, from the end: what comes later needs what was
    /// before.
    fn drop_steps(&mut self) {
        for index in (0..self.case.steps.len()).rev() {
            let mut smaller = self.case.clone();
            smaller.steps.remove(index);
            if self.take(smaller) {
                continue;
            }
            let Step::Wave(requests) = &self.case.steps[index] else {
                continue;
            };
            for place in (0..requests.len()).rev() {
                let mut smaller = self.case.clone();
                if let Step::Wave(requests) = &mut smaller.steps[index] {
                    requests.remove(place);
                }
                self.take(smaller);
            }
        }
    }

    /// One task, no delays.
    fn calm(&mut self) {
        let mut smaller = self.case.clone();
        for step in &mut smaller.steps {
            if let Step::Wave(requests) = step {
                requests.iter_mut().for_each(|(task, _)| *task = 0);
            }
        }
        if smaller != self.case {
            self.take(smaller);
        }
        if self.case.order > 1 {
            let mut smaller = self.case.clone();
            smaller.order = 1;
            self.take(smaller);
        }
    }

    fn simplify_shape(&mut self) {
        loop {
            let simpler = self.case.shape.simpler();
            let taken = simpler.into_iter().any(|shape| {
                let smaller = Case {
                    shape,
                    ..self.case.clone()
                };
                self.take(smaller)
            });
            if !taken {
                return;
            }
        }
    }

    /// As few records lost as it takes, and whole ones.
    fn spare_records(&mut self) {
        let Some(cut) = self.failure.cut.clone() else {
            return;
        };
        self.case.cut = Some(cut.clone());
        let again = self.case.clone();
        if !self.take(again) {
            // What is done with the state afterwards decides too.
            self.case.cut = None;
            self.failure.cut = Some(cut);
            return;
        }
        for index in (0..cut.fates.len()).rev() {
            let mut smaller = self.case.clone();
            let fates = &mut smaller.cut.as_mut().expect("it was set").fates;
            fates.remove(index);
            if self.take(smaller) {
                continue;
            }
            let mut smaller = self.case.clone();
            let fates = &mut smaller.cut.as_mut().expect("it was set").fates;
            if matches!(fates[index].1, Fate::Torn(_) | Fate::LostButLength) {
                fates[index].1 = Fate::Lost;
                self.take(smaller);
            }
        }
    }
}

/// The smallest case like this one that was found, and what is wrong with it.
pub(crate) fn shrunk(case: &Case, failure: Failure, effort: Effort) -> (Case, Failure) {
    let mut shrinker = Shrinker {
        case: case.clone(),
        failure,
        // All states: a smaller case has fewer.
        effort: Effort {
            states: 2000,
            qemu: effort.qemu.max(1 << 40),
            ..effort
        },
        tries: TRIES,
    };
    loop {
        let weight = (shrinker.case.weight(), shrinker.case.to_string().len());
        shrinker.drop_steps();
        shrinker.calm();
        shrinker.simplify_shape();
        let now = (shrinker.case.weight(), shrinker.case.to_string().len());
        if now >= weight || shrinker.tries == 0 {
            break;
        }
    }
    shrinker.tries = TRIES;
    shrinker.spare_records();
    (shrinker.case, shrinker.failure)
}

/// Says what failed and how to have it again.
///
/// # Panics
///
/// Always: that is what it is for.
pub(crate) fn report(seed: u64, case: &Case, failure: Failure, effort: Effort) -> ! {
    eprintln!("seed {seed} fails: {}\n  {case}", failure.reason);
    if let Some(cut) = &failure.cut {
        eprintln!("  power cut {cut}");
    }
    eprintln!("looking for a smaller case ...");
    let (case, failure) = shrunk(case, failure, effort);
    panic!("{}\nagain: scripts/power --case '{case}'\n", failure.reason);
}
