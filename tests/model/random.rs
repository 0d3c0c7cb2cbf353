//! Shapes drawn at random over everything that an image can have and be opened
//! with. `MODEL_SEEDS=N` runs N seeds, `MODEL_FIRST=S` begins with seed S.

use super::trial::Trial;
use super::{scratch, watched};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Says which seed it was.
struct Failing(u64);

impl Drop for Failing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let seed = self.0;
            eprintln!("seed {seed} failed; to repeat: MODEL_FIRST={seed} MODEL_SEEDS=1");
        }
    }
}

#[test]
fn everything_that_goes_together() {
    let (first, seeds) = (number("MODEL_FIRST", 1), number("MODEL_SEEDS", 60));
    for seed in first..first + seeds {
        let _failing = Failing(seed);
        watched(120, || {
            let folder = scratch();
            let trial = Trial::new(folder.path(), seed);
            eprintln!("seed {seed}: {:?}", trial.shape());
            trial.run(seed % 3 == 0);
        });
    }
}
