//! Every model in every order; and with each mutant, to see that loom finds a
//! broken order where it matters.

use std::env;
use std::process::{Command, Stdio};

use loom_models::{Mutant, models, with};

type Model = (&'static str, fn());

const MODELS: [Model; 8] = [
    ("no_sleeper_is_forgotten", models::no_sleeper_is_forgotten),
    (
        "no_wake_up_is_lost_on_the_way",
        models::no_wake_up_is_lost_on_the_way,
    ),
    (
        "the_lock_excludes_and_passes_on",
        models::the_lock_excludes_and_passes_on,
    ),
    ("no_waiter_is_forgotten", models::no_waiter_is_forgotten),
    ("one_loads_and_all_get_it", models::one_loads_and_all_get_it),
    (
        "no_cluster_is_reused_under_a_request",
        models::no_cluster_is_reused_under_a_request,
    ),
    (
        "a_closed_gate_excludes_and_opens_again",
        models::a_closed_gate_excludes_and_opens_again,
    ),
    (
        "a_request_that_is_alone_stays_alone",
        models::a_request_that_is_alone_stays_alone,
    ),
];

/// The variable that makes [`every_order_keeps_the_promises`] run one model
/// with a mutant, and nothing else.
const ONE: &str = "LOOM_MODELS_ONE";

#[test]
fn every_order_keeps_the_promises() {
    let one = env::var(ONE).ok();
    let (mutant, only) = match one.as_deref().and_then(|one| one.split_once(' ')) {
        Some(("total-order", name)) => (Mutant::NoTotalOrder, Some(name)),
        Some(("store", name)) => (Mutant::StoreForSwap, Some(name)),
        Some(("one-generation", name)) => (Mutant::OneGeneration, Some(name)),
        _ => (Mutant::None, None),
    };
    for (name, model) in MODELS {
        if only.is_none_or(|only| only == name) {
            println!("{name}");
            with(mutant, model);
        }
    }
}

/// The names of the models that break with a mutant. Each in a process of its
/// own: loom cannot always unwind from what it finds.
fn broken_by(mutant: &str) -> Vec<&'static str> {
    let breaks = |name: &str| {
        let status = Command::new(env::current_exe().unwrap())
            .args(["--exact", "every_order_keeps_the_promises"])
            .env(ONE, format!("{mutant} {name}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        !status.unwrap().success()
    };
    MODELS
        .iter()
        .map(|&(name, _)| name)
        .filter(|name| breaks(name))
        .collect()
}

#[test]
fn a_weaker_order_is_found() {
    let found = broken_by("total-order");
    for name in [
        "no_sleeper_is_forgotten",
        "the_lock_excludes_and_passes_on",
        "no_waiter_is_forgotten",
        "no_cluster_is_reused_under_a_request",
        "a_closed_gate_excludes_and_opens_again",
        "a_request_that_is_alone_stays_alone",
    ] {
        assert!(found.contains(&name), "{name} goes unnoticed: {found:?}");
    }
}

/// A store cleared the mark of a task on its way until this model was made: a
/// wake-up could be lost.
#[test]
fn clearing_by_a_store_is_found() {
    let found = broken_by("store");
    assert!(
        found.contains(&"no_wake_up_is_lost_on_the_way"),
        "{found:?}"
    );
}

#[test]
fn reuse_after_one_generation_is_found() {
    assert_eq!(
        broken_by("one-generation"),
        ["no_cluster_is_reused_under_a_request"]
    );
}
