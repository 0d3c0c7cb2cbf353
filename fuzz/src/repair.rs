//! `check --repair`: afterwards all is well or we have said that it is not;
//! what could be read still can, and is the same; a repair that the power cut
//! off can be begun anew.

use qcow2_ublk::qcow2::check::{Repair, Repaired};
use qcow2_ublk::storage::sim::{Image, SimDisk, crash_images};

use super::input::Input;
use super::view::{View, header_of};
use super::{common, images, recipe};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.u8();
    let what = if mode & 1 == 0 {
        Repair::All
    } else {
        Repair::Leaks
    };
    // Where the power goes, and how; one time in some.
    let cut = (mode & 6 == 2).then(|| (input.u8(), input.u8()));
    let image = recipe::image(&mut input);
    let before = Shown::of(&image);
    let disk = SimDisk::with_image(image);
    let done = match common::block_on(images::repair(&disk, what)) {
        Ok(done) => done,
        Err(error) => return super::header::is_said_well(&error),
    };
    before.is_kept_by(&disk.image(), "repaired");
    judge(&disk, what, &done);
    let Some((point, seed)) = cut else {
        return;
    };
    let history = disk.history();
    let point = usize::from(point) % (history.records.len() + 1);
    let crashes = crash_images(&history, seed.into(), 1).from_point(point);
    for crash in crashes.take_while(|crash| crash.point == point) {
        let left = &crash.images[0];
        before.is_kept_by(left, "cut off");
        let disk = SimDisk::with_image(left.clone());
        let done = common::block_on(images::repair(&disk, what)).expect("as the first time");
        before.is_kept_by(&disk.image(), "cut off and repaired");
        judge(&disk, what, &done);
    }
}

fn is_sound(done: &Repaired) -> bool {
    done.report.corruptions == 0 && done.report.check_errors == 0
}

/// The report is true, and there is nothing more to do.
fn judge(disk: &SimDisk, what: Repair, done: &Repaired) {
    let (report, _) = common::block_on(images::check(disk)).expect("it was checked before");
    assert_eq!(report, done.report, "what is left");
    if is_sound(done) && what == Repair::All {
        assert_eq!(done.report.leaks, 0, "nothing is in the way of that");
    }
    if header_of(&disk.image()).is_none() {
        return;
    }
    let again = SimDisk::with_image(disk.image());
    let second = common::block_on(images::repair(&again, what)).expect("as the first time");
    let nothing = Repaired {
        corruptions_fixed: 0,
        leaks_fixed: 0,
        report: done.report,
    };
    assert_eq!(second, nothing, "a second repair finds nothing to do");
}

/// What the image showed, where nothing else interferes.
struct Shown {
    clusters: Vec<Option<Vec<u8>>>,
}

impl Shown {
    fn of(image: &Image) -> Self {
        let Some(view) = View::open(image) else {
            return Self {
                clusters: Vec::new(),
            };
        };
        let mut clusters = view.content();
        for (shown, entangled) in clusters.iter_mut().zip(view.entangled()) {
            if entangled {
                *shown = None;
            }
        }
        Self { clusters }
    }

    fn is_kept_by(&self, image: &Image, when: &str) {
        if self.clusters.is_empty() {
            return;
        }
        let view = View::open(image).unwrap_or_else(|| panic!("{when}: no header"));
        for (n, old) in self.clusters.iter().enumerate() {
            if let Some(old) = old {
                let new = view.cluster(n as u64);
                assert!(
                    new.as_ref() == Some(old),
                    "{when}: guest cluster {n} has changed: {:?}",
                    view.entry(n as u64)
                );
            }
        }
    }
}
