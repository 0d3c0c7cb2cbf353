//! Random work.

use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::storage::sim::Rng;

use super::op::{Action, Request, Step};
use super::shape::{Below, Data, Shape};

const NAMES: [char; 3] = ['a', 'b', 'c'];

pub(crate) fn random(shape: &Shape, rng: &mut Rng) -> Vec<Step> {
    let mut work = Work {
        rng,
        shape,
        sectors: shape.sectors,
        tasks: 0,
        centre: 0,
        snapshots: Vec::new(),
        keys: Vec::new(),
    };
    work.tasks = 1 + work.rng.below(5) as u8;
    let waves = 2 + work.rng.below(4);
    let mut steps = Vec::new();
    if work.rng.chance(1, 3) {
        // From the beginning, so that it matters to all that follows.
        let early = work.action();
        steps.push(Step::Act(early));
    }
    for _ in 0..waves {
        let wave = work.wave();
        steps.push(wave);
        for _ in 0..work.rng.below(3) {
            let action = work.action();
            steps.push(Step::Act(action));
        }
    }
    if shape.full {
        // Whatever is written from here on needs clusters.
        steps.insert(0, Step::Act(Action::Snapshot('z')));
    }
    steps
}

struct Work<'a> {
    rng: &'a mut Rng,
    shape: &'a Shape,
    /// Size of the disk.
    sectors: u64,
    tasks: u8,
    /// Where most of a wave's requests are.
    centre: u64,
    /// Names that snapshots were made under.
    snapshots: Vec<char>,
    keys: Vec<char>,
}

impl Work<'_> {
    fn wave(&mut self) -> Step {
        self.centre = self.rng.below(self.sectors);
        let count = if self.shape.full {
            30 + self.rng.below(30)
        } else {
            1 + self.rng.below(9)
        };
        let mut requests: Vec<_> = (0..count)
            .map(|_| (self.rng.below(self.tasks.into()) as u8, self.request()))
            .collect();
        if self.rng.chance(1, 5) {
            let live = Request::Live(self.live());
            let place = self.rng.below(count + 1) as usize;
            requests.insert(place, (self.rng.below(self.tasks.into()) as u8, live));
        }
        Step::Wave(requests)
    }

    /// An action that may meet requests.
    fn live(&mut self) -> Action {
        let name = NAMES[self.rng.below(3) as usize];
        match self.rng.below(12) {
            0..3 => self.grow(),
            3..6 => self.bitmap(name),
            6 => Action::Unbitmap(name),
            7..9 => Action::Enable(name),
            9 => Action::Disable(name),
            _ => Action::Clear(name),
        }
    }

    /// A new one; bitmaps that are there are found again under their names.
    fn bitmap(&mut self, name: char) -> Action {
        Action::Bitmap(name, 9 + self.rng.below(6) as u8)
    }

    /// A range near the others or anywhere, of a few sectors, a cluster or
    /// several; the ends of clusters are frequent ends.
    fn range(&mut self) -> (u64, u64) {
        let cluster = self.shape.cluster / 512;
        let last = self.sectors - 1;
        let near = self.rng.chance(2, 3);
        let mut at = if near {
            let reach = 2 * cluster + 8;
            (self.centre + self.rng.below(2 * reach)).saturating_sub(reach)
        } else {
            self.rng.below(self.sectors)
        };
        if self.rng.chance(2, 5) {
            at -= at % cluster;
        }
        let at = at.min(last);
        let len = match self.rng.below(6) {
            0 => cluster,
            1 => cluster * (1 + self.rng.below(4)),
            2 => 1 + self.rng.below(2 * cluster),
            3 => cluster - at % cluster,
            _ => 1 + self.rng.below(6),
        };
        (at, len.min(self.sectors - at))
    }

    fn request(&mut self) -> Request {
        let (at, len) = self.range();
        let fua = self.rng.chance(1, 8);
        match self.rng.below(20) {
            0..7 => Request::Write { at, len, fua },
            7..9 => Request::Nulls { at, len },
            9..12 => Request::Zero {
                at,
                len,
                unmap: self.rng.chance(1, 2),
                fua,
            },
            12..15 => Request::Discard { at, len },
            15..17 => Request::Compressed { at, len },
            17 => Request::WriteBack,
            _ => Request::Flush,
        }
    }

    fn action(&mut self) -> Action {
        let name = NAMES[self.rng.below(3) as usize];
        if self.shape.luks != 0 && self.rng.chance(1, 3) {
            return self.key(name);
        }
        match self.rng.below(36) {
            30..34 => Action::Die,
            34 => Action::Repair,
            0..3 => Action::Reopen,
            3..5 => Action::Snapshot(self.new_snapshot(name)),
            5 => Action::Unsnapshot(self.snapshot(name)),
            6..8 => Action::Apply(self.snapshot(name)),
            8 => Action::OfflineSnapshot(self.new_snapshot(name)),
            9 | 29 => Action::OfflineUnsnapshot(self.snapshot(name)),
            10 => Action::OfflineApply(self.snapshot(name)),
            11..14 => self.resize(),
            14..18 => self.bitmap(name),
            18 => Action::Unbitmap(name),
            19 => Action::Enable(name),
            20 => Action::Disable(name),
            21 => Action::Clear(name),
            22 => Action::Width(1 << self.rng.below(7)),
            23 => Action::Version(2 + self.rng.below(2) as u8),
            24 => Action::Lazy(self.rng.chance(1, 2)),
            25..27 if self.shape.below != Below::Nothing => Action::Commit,
            _ => Action::Reopen,
        }
    }

    fn new_snapshot(&mut self, name: char) -> char {
        self.snapshots.push(name);
        name
    }

    /// One that was made, where there is any: to delete or apply others is
    /// only refused.
    fn snapshot(&mut self, otherwise: char) -> char {
        match self.snapshots.len() as u64 {
            0 => otherwise,
            made => self.snapshots[self.rng.below(made) as usize],
        }
    }

    /// Another key, or one less.
    fn key(&mut self, name: char) -> Action {
        if !self.keys.is_empty() && self.rng.chance(1, 2) {
            let place = self.rng.below(self.keys.len() as u64) as usize;
            return Action::Unkey(self.keys.swap_remove(place));
        }
        self.keys.push(name);
        Action::Key(name)
    }

    fn resize(&mut self) -> Action {
        if self.rng.chance(1, 2) {
            return self.grow();
        }
        let sectors = 1 + self.rng.below(self.sectors);
        self.resize_to(sectors)
    }

    fn grow(&mut self) -> Action {
        let more = if self.rng.chance(1, 3) {
            // The L1 table grows.
            self.sectors + 2000 * self.shape.cluster.min(1024) / 1024
        } else {
            self.shape.cluster / 512 * 6
        };
        let sectors = self.sectors + 1 + self.rng.below(more);
        self.resize_to(sectors)
    }

    fn resize_to(&mut self, sectors: u64) -> Action {
        // Those that are larger take long to read.
        let sectors = sectors.min(2 * self.shape.sectors.max(1000));
        // With a data file, shrinking is refused.
        if self.shape.data == Data::Inside || sectors > self.sectors {
            self.sectors = sectors;
        }
        Action::Resize(sectors)
    }
}

/// Whether power cuts are survived by what is flushed.
pub(crate) fn survives_power_cuts(shape: &Shape) -> bool {
    shape.barrier != Barrier::None
}
