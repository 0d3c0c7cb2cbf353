//! That the race bites: with any one guard taken away it is lost. Each in a
//! process of its own, because a guard is away for all of it.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use qcow2_ublk::race::Guard;

use super::hammer::Work;
use super::sector::SECTOR;
use super::shape::Shape;
use super::{K4, K64, WORK, race_with};

/// The variable that makes [`without_a_guard`] race without one.
const WITHOUT: &str = "RACE_WITHOUT";
/// The exit code of a race that is lost.
const LOST: i32 = 101;
/// Within this time a race without a guard has been lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the lack of a guard shows.
fn shapes(guard: Guard) -> Vec<Shape> {
    let small = Shape {
        sectors: 70,
        ..Shape::of_clusters(512)
    };
    match guard {
        Guard::Inside => vec![Shape {
            sectors: 6 * K4.cluster / SECTOR,
            ..K4
        }],
        Guard::Recorded => vec![Shape { bitmap: true, ..K4 }],
        Guard::NewTables => vec![small],
        _ => vec![small, K4, K64],
    }
}

fn work(guard: Guard) -> Work {
    match guard {
        Guard::Inside => Work {
            keepers: 0,
            resizes: 15,
            ..WORK
        },
        _ => WORK,
    }
}

/// Does nothing, unless asked to by [`every_guard_is_missed`].
#[test]
fn without_a_guard() {
    let Ok(name) = std::env::var(WITHOUT) else {
        return;
    };
    let guard = Guard::ALL.iter().find(|guard| format!("{guard:?}") == name);
    let guard = *guard.expect("there is such a guard");
    guard.take_away();
    // Others may wait for who has panicked.
    std::panic::set_hook(Box::new(|_| std::process::exit(LOST)));
    match guard {
        // It takes a request that is slower than all others.
        Guard::Grace => return crate::queues::a_slow_read_never_sees_the_next_owner(),
        Guard::Alone => {
            return crate::queues::a_slow_write_does_not_come_back_where_zeros_kept_its_place();
        }
        // It takes the same place at the same offset soon.
        Guard::Inflated => return crate::queues::a_place_used_again_shows_what_is_in_it_now(),
        _ => {}
    }
    let begin = Instant::now();
    let mut seed = 0;
    while begin.elapsed() < PATIENCE {
        for shape in shapes(guard) {
            seed += 1;
            race_with(shape, work(guard), seed);
        }
    }
}

#[test]
fn every_guard_is_missed() {
    let mut unnoticed = Vec::new();
    for guard in Guard::ALL {
        let begin = Instant::now();
        // A race that is lost may also hang.
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "race::mutants::without_a_guard"])
            .env(WITHOUT, format!("{guard:?}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lost = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break !status.success();
            }
            if begin.elapsed() > PATIENCE + Duration::from_secs(30) {
                child.kill().unwrap();
                child.wait().unwrap();
                break true;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        eprintln!("{guard:?}: {lost} after {:?}", begin.elapsed());
        if !lost {
            unnoticed.push(guard);
        }
    }
    assert!(unnoticed.is_empty(), "not missed: {unnoticed:?}");
}
