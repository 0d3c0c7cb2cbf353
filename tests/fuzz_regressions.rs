//! Every input that is kept of fuzzing, through the function that the fuzzer
//! calls: those that once failed (fuzz/regressions/TARGET), those it starts
//! from (fuzz/seeds/TARGET), every base image as it is, and a few that are made
//! up at random.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use fuzz::Body;
use fuzz::common::lab::watched;
#[cfg(debug_assertions)]
use qcow2_ublk::rule::Rule;
use qcow2_ublk::storage::sim::Rng;

/// The rules of order that `operate` is sure to see broken. The others are for
/// what it does not do (a disk that shrinks, a commit), or for moments that no
/// input has met: a refcount block, a refcount table or an L1 table that is new.
#[cfg(debug_assertions)]
const NOTICED: [Rule; 15] = [
    Rule::DataBeforeMapping,
    Rule::CountBeforeMapping,
    Rule::UnmappingBeforeFree,
    Rule::UnmappingBeforeReuse,
    Rule::TableBeforeL1,
    Rule::StateBeforeSwitch,
    Rule::ZerosBeforeSize,
    Rule::MarkBeforeWrite,
    Rule::BitmapBeforeDirectory,
    Rule::DirtyBeforeLazy,
    Rule::CountsBeforeClean,
    Rule::FlushSyncs,
    Rule::FlushSyncsData,
    Rule::FuaFlushes,
    Rule::BarrierFlushes,
];

fn folder(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(kind)
        .join(target)
}

/// The files in a folder, if there is one; in their order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Nobody hangs, and a panic says which input it was.
fn run(target: &str, body: Body, input: &[u8], what: &str) {
    let ran = watched(60, || catch_unwind(AssertUnwindSafe(|| body(input))));
    if let Err(panic) = ran {
        eprintln!("{target} fails with {what}: {input:02x?}");
        std::panic::resume_unwind(panic);
    }
}

/// With the name of the target, and what is to be done for each.
fn each_target(work: impl Fn(&str, Body)) {
    let only = std::env::var("FUZZ_TARGET").ok();
    for &(target, body) in fuzz::TARGETS {
        if only.as_deref().is_none_or(|only| only == target) {
            work(target, body);
        }
    }
}

/// Also the one in `FUZZ_INPUT`, for a look at it.
#[test]
fn inputs_that_once_failed() {
    each_target(|target, body| {
        if let Some(file) = std::env::var_os("FUZZ_INPUT") {
            run(target, body, &fs::read(file).unwrap(), "the given input");
            return;
        }
        for file in files(&folder("regressions", target)) {
            let input = fs::read(&file).unwrap();
            run(target, body, &input, &file.display().to_string());
        }
    });
}

#[test]
fn inputs_that_fuzzing_starts_from() {
    each_target(|target, body| {
        for file in files(&folder("seeds", target)) {
            let input = fs::read(&file).unwrap();
            run(target, body, &input, &file.display().to_string());
        }
        for base in 0..=fuzz::bases::BASES.len() as u8 {
            for mode in 0..8 {
                run(target, body, &[mode, base], "a base");
                run(target, body, &[base, mode], "a base");
            }
        }
    });
}

#[test]
fn inputs_made_up_at_random() {
    each_target(|target, body| {
        let seed = std::env::var("FUZZ_SEED").map_or(1, |seed| seed.parse().unwrap());
        let rounds = std::env::var("FUZZ_ROUNDS").map_or(500, |rounds| rounds.parse().unwrap());
        let mut rng = Rng::new(seed);
        for round in 0..rounds {
            let mut input = vec![0; 2 + rng.below(60) as usize];
            rng.fill(&mut input);
            // Mostly one of the bases, whether that comes first or second.
            input[0] = rng.below(fuzz::bases::BASES.len() as u64 + 1) as u8;
            input[1] = rng.below(fuzz::bases::BASES.len() as u64 + 1) as u8;
            run(
                target,
                body,
                &input,
                &format!("input {round} of seed {seed}"),
            );
        }
    });
}

/// What `operate` looks at is enough to see that a rule of order is broken: by
/// some input that it starts from.
#[cfg(debug_assertions)]
#[test]
fn operate_notices_broken_rules() {
    let seeds = files(&folder("seeds", "operate"));
    let inputs: Vec<_> = seeds.iter().map(|file| fs::read(file).unwrap()).collect();
    let notices = |rule: Rule| {
        let fails = |input: &Vec<u8>| {
            // On a thread of its own: a panic leaves an executor half way.
            let input = input.clone();
            let work = move || {
                let _broken = rule.break_here();
                fuzz::operate::run(&input);
            };
            std::thread::spawn(work).join().is_err()
        };
        let found = inputs.iter().position(fails);
        println!("{rule:?}: {:?}", found.map(|n| &seeds[n]));
        found.is_some()
    };
    let missed: Vec<_> = NOTICED.into_iter().filter(|&rule| !notices(rule)).collect();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

/// The list of the targets, their programs and the manifest say the same.
#[test]
fn every_target_is_a_program() {
    let manifest = folder("Cargo.toml", "").with_file_name("Cargo.toml");
    let manifest = fs::read_to_string(manifest).unwrap();
    let programs = files(&folder("fuzz_targets", ""));
    assert_eq!(programs.len(), fuzz::TARGETS.len());
    for (target, _) in fuzz::TARGETS {
        assert!(
            manifest.contains(&format!("name = \"{target}\"")),
            "{target}"
        );
        let program = folder("fuzz_targets", &format!("{target}.rs"));
        let program = fs::read_to_string(program).unwrap();
        assert!(program.contains("qcow2_ublk_fuzz::"), "{target}");
    }
}
