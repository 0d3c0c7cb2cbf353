//! A case: an image, what is done to it in which order, and perhaps where the
//! power is cut. Its text is all that it takes to have it again.

use std::fmt;

use qcow2_ublk::storage::sim::{Fate, Rng};

use super::op::{Step, parse_steps};
use super::shape::Shape;
use super::workload;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) shape: Shape,
    /// Seed of the order in which operations on the disks complete.
    pub(crate) order: u64,
    pub(crate) steps: Vec<Step>,
    pub(crate) cut: Option<Cut>,
}

/// One power cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Records that have happened.
    pub(crate) point: usize,
    /// What became of those not durable; the others survive.
    pub(crate) fates: Vec<(usize, Fate)>,
}

impl Case {
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let order = 1 + rng.below(1 << 32);
        let steps = workload::random(&shape, &mut rng);
        Self {
            shape,
            order,
            steps,
            cut: None,
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('|');
        let shape = Shape::parse(parts.next()?)?;
        let order = parts.next()?.trim().parse().ok()?;
        let steps = parse_steps(parts.next()?)?;
        let cut = match parts.next() {
            None => None,
            Some(cut) => Some(Cut::parse(cut)?),
        };
        Some(Self {
            shape,
            order,
            steps,
            cut,
        })
    }

    /// How much there is to it.
    pub(crate) fn weight(&self) -> usize {
        let weight = |step: &Step| match step {
            Step::Wave(requests) => requests.len(),
            Step::Act(_) => 1,
        };
        self.steps.iter().map(weight).sum()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} | {} |", self.shape, self.order)?;
        for step in &self.steps {
            write!(f, " {step}")?;
        }
        match &self.cut {
            None => Ok(()),
            Some(cut) => write!(f, " | {cut}"),
        }
    }
}

/// The point, and the records: `x` is lost, `l` left its length, `tN` is torn.
impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.point)?;
        for (record, fate) in &self.fates {
            match fate {
                Fate::Survives => {}
                Fate::Lost => write!(f, " {record}x")?,
                Fate::LostButLength => write!(f, " {record}l")?,
                Fate::Torn(seed) => write!(f, " {record}t{seed}")?,
            }
        }
        Ok(())
    }
}

impl Cut {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let point = words.next()?.parse().ok()?;
        let fates: Option<Vec<_>> = words
            .map(|word| {
                let split = word.find(|c: char| !c.is_ascii_digit())?;
                let (record, fate) = word.split_at(split);
                let fate = match fate.split_at(1) {
                    ("x", "") => Fate::Lost,
                    ("l", "") => Fate::LostButLength,
                    ("t", seed) => Fate::Torn(seed.parse().ok()?),
                    _ => return None,
                };
                Some((record.parse().ok()?, fate))
            })
            .collect();
        Some(Self {
            point,
            fates: fates?,
        })
    }
}

#[test]
fn every_case_is_its_text() {
    for seed in 0..500 {
        let mut case = Case::random(seed);
        case.cut = (seed % 2 == 0).then(|| Cut {
            point: 12,
            fates: vec![
                (1, Fate::Lost),
                (2, Fate::Torn(99)),
                (3, Fate::LostButLength),
            ],
        });
        assert_eq!(Case::parse(&case.to_string()), Some(case));
    }
}
