//! The search bites: each rule of order is broken in turn, and power cuts are
//! found that harm; with the rule kept, the same cases are sound.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::rule::Rule;

use super::case::Case;
use super::common::lab::watched;
use super::explore::{Effort, search};
use super::op::parse_steps;
use super::shape::Shape;

/// States judged for a field at most, whether or not the rule is broken.
const STATES: u64 = 3000;

/// Kinds of cases in each of which the rule matters: words of a shape, and
/// steps.
fn fields(rule: Rule) -> &'static [(&'static str, &'static str)] {
    match rule {
        Rule::DataBeforeMapping => &[
            ("v3 c=4096 s=200", WRITES),
            ("v3 c=4096 s=200 luks=1", WRITES),
            ("v3 c=16384 s=400 ext", WRITES),
            ("v3 c=4096 s=200", COMPRESSED),
        ],
        Rule::CountBeforeMapping => &[
            ("v3 c=4096 s=200", WRITES),
            ("v3 c=16384 s=400 ext", WRITES),
            ("v3 c=4096 s=200", COMPRESSED),
        ],
        Rule::FlushSyncs => &[("v3 c=4096 s=200", WRITES), ("v3 c=4096 s=200", COMPRESSED)],
        Rule::FuaFlushes => &[("v3 c=4096 s=200", WRITES)],
        Rule::UnmappingBeforeFree => &[
            ("v3 c=4096 s=200", "[0w0+80] [0f] [0d0+80] [0f]"),
            ("v3 c=4096 s=200", "[0c0+80] [0f] [0d0+80] [0f]"),
        ],
        // A hole in plain data shows what the discard would.
        Rule::UnmappingBeforePunch => &[
            ("v3 c=4096 s=200", "[0c0+80] [0f] [0d0+80] [0f]"),
            ("v3 c=4096 s=200 luks=1", "[0w0+80] [0f] [0d0+80] [0f]"),
        ],
        // Reopened, nothing is reserved: the next write takes clusters.
        Rule::UnmappingBeforeReuse => &[
            ("v3 c=4096 s=300", "[0w0+200] reopen [0d0+200 0w200+90]"),
            ("v3 c=4096 s=300", "[0w0+200] reopen [0d0+200 0c200+90]"),
        ],
        Rule::TableBeforeL1 => &[("v3 c=512 s=300", "[0w0+3 0w70+3 0w140+3 0w200+3]")],
        Rule::BlockBeforeTable => &[("v3 c=512 s=300 r=64", "[0w0+80 0f 0w100+90 0f]")],
        Rule::TableBeforeHeader => &[(
            "v3 c=512 s=3750 r=64 fill=1 full",
            "snap=z [0w0+200 0w300+200 0w700+200]",
        )],
        Rule::L1BeforeHeader => &[("v3 c=512 s=100 fill=3", "resize=9000 [0w8000+9]")],
        Rule::StateBeforeSwitch => &[
            ("v3 c=4096 s=200 fill=3", "snap=a [0w0+40 0f] apply=a"),
            (
                "v3 c=4096 s=200 fill=3",
                "off-snap=a [0w0+40 0f] off-unsnap=a",
            ),
            ("v3 c=4096 s=200 fill=3", "[0w0+40 0f] width=64"),
            ("v3 c=4096 s=200 fill=3", "[0z0+40u 0f] version=2"),
        ],
        Rule::SwitchBeforePunch => &[
            ("v3 c=4096 s=200 fill=3", "snap=a [0w0+80 0f] unsnap=a"),
            (
                "v3 c=4096 s=200 fill=3",
                "off-snap=a [0w0+80 0f] off-unsnap=a",
            ),
            ("v3 c=4096 s=200 fill=3", "[0w0+40 0f] width=64"),
        ],
        Rule::EntryBeforeCut => &[("v3 c=512 s=300 r=64", "[0w0+250 0f] resize=10 reopen")],
        Rule::ZerosBeforeSize => &[("v3 c=4096 s=100 over-raw", "resize=20 resize=90")],
        Rule::SizeBeforeUnmapping => &[("v3 c=4096 s=200 fill=3", "[0w0+200] resize=40")],
        // Shrinking goes on with what needs syncs of its own.
        Rule::SizeSyncs => &[("v3 c=4096 s=200", "[0w0+40 0f] resize=300")],
        // In place: whatever is allocated waits for a sync by itself.
        Rule::MarkBeforeWrite => &[(
            "v3 c=4096 s=200 fill=3 full",
            "bitmap=a12 reopen [0w0+20 0f]",
        )],
        // One that records is marked by the first change already.
        Rule::MarkBeforeSize => &[(
            "v3 c=512 s=5000",
            "bitmap=a9 [0w0+30 0f] disable=a resize=3000",
        )],
        Rule::BitmapBeforeDirectory => &[("v3 c=4096 s=200", "bitmap=a9 [0w0+20 0w50+3] reopen")],
        Rule::DirtyBeforeLazy => &[("v3 c=4096 s=200 lazy", "[0w0+20 0w50+3 0f]")],
        Rule::CountsBeforeClean => &[("v3 c=4096 s=200 lazy", "[0w0+20 0w50+3] reopen")],
        Rule::FlushSyncsData => &[
            ("v3 c=4096 s=200 data", "[0w0+20 0f 0w0+8 0f]"),
            ("v3 c=4096 s=200 raw", "[0w0+20 0f 0w0+8 0f]"),
        ],
        Rule::BarrierFlushes => &[
            ("v3 c=4096 s=200 barrier-full", "[0w0+20 1w50+9]"),
            ("v3 c=4096 s=200 barrier-full", "[0c0+16 1c48+8]"),
            ("v3 c=4096 s=200 barrier-metadata", "[0w0+20 1w50+9]"),
        ],
        Rule::BaseBeforeEmpty => &[
            ("v3 c=4096 s=200 over-raw", "[0w0+40] commit"),
            ("v3 c=4096 s=200 over-qcow2", "[0w0+40] commit"),
        ],
        Rule::KeyBeforeSlot => &[
            ("v3 c=4096 s=130 luks=1", "key=a unkey=a"),
            ("v3 c=4096 s=130 luks=2", "key=a unkey=a"),
        ],
    }
}

const WRITES: &str = "[0w0+9F 1w40+8 0f 1w90+4F 0w120+8 1f]";
const COMPRESSED: &str = "[0c0+8 1c40+8 0f 1c88+8 0c120+8 1f]";

/// A rule and the place of one of its fields.
type Place = (Rule, usize);

fn places() -> Vec<Place> {
    let of = |rule: Rule| (0..fields(rule).len()).map(move |field| (rule, field));
    Rule::ALL.into_iter().flat_map(of).collect()
}

/// Cases of the field, in different orders.
fn cases((rule, field): Place) -> impl Iterator<Item = (u64, Case)> {
    let (shape, steps) = fields(rule)[field];
    let shape = Shape::parse(shape).expect("a shape");
    let steps = parse_steps(steps).expect("steps");
    assert_ne!(shape.barrier, Barrier::None, "nothing is promised then");
    (1..).map(move |seed| {
        let case = Case {
            shape: shape.clone(),
            order: Case::random(seed).order | 2,
            steps: steps.clone(),
            cut: None,
        };
        (seed, case)
    })
}

/// Judges states of such cases until one is wrong; how many were sound, and
/// what was wrong with that one.
fn hunt(place: Place) -> (u64, Option<String>) {
    let mut states = 0;
    for (seed, case) in cases(place) {
        let effort = Effort {
            random: 6,
            states: 300,
            qemu: u64::MAX,
            seed,
        };
        match search(&case, effort) {
            Ok(seen) => states += seen.states.max(1),
            Err(failure) => return (states, Some(failure.reason)),
        }
        if states >= STATES {
            break;
        }
    }
    (states, None)
}

/// Does something for every field, on all processors.
fn everywhere(work: impl Fn(Place) + Sync) {
    let places = places();
    let next = AtomicUsize::new(0);
    let one_after_the_other = || {
        while let Some(&place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(place);
        }
    };
    watched(900, || {
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(one_after_the_other);
            }
        });
    });
}

#[test]
fn the_search_finds_every_broken_rule() {
    let missed = Mutex::new(Vec::new());
    everywhere(|place| {
        let (states, found) = {
            let _broken = place.0.break_here();
            hunt(place)
        };
        match found {
            Some(reason) => println!("{place:?}: after {states} states: {reason}"),
            None => missed.lock().unwrap().push(place),
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// The same cases, as far as the search for broken rules looks at most for
/// the one of them that takes longest.
#[test]
fn with_the_rules_kept_the_same_cases_are_sound() {
    everywhere(|place| {
        for (seed, case) in cases(place).take(3) {
            let effort = Effort {
                random: 6,
                states: 60,
                qemu: u64::MAX,
                seed,
            };
            if let Err(failure) = search(&case, effort) {
                panic!("{place:?}, seed {seed}: {}\n{case}", failure.reason);
            }
        }
    });
}
