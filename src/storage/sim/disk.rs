//! The simulated disk itself.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hold::Gate;
use super::machine::{Disk, Machine, SimBackend};
use super::{History, Hold, Image, Rng};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SimKind {
    /// Reads bytes.
    Read,
    /// Stores bytes.
    Write,
    /// Zeroes a range.
    Zero,
    /// Gives the space of a range back.
    Punch,
    /// Sets the length, which is in `offset`.
    SetLen,
    /// Makes changes durable.
    Sync,
}

/// An operation about to be started.
#[derive(Clone, Copy, Debug)]
pub struct SimRequest {
    /// Its number, counting those on all disks of the machine.
    pub number: u64,
    /// Which of the disks.
    pub disk: usize,
    /// What it does.
    pub kind: SimKind,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It fails with this errno and has no effect.
    Errno(i32),
    /// A read or write moves this many bytes at most and reports success.
    Short(u64),
    /// A write stores this many bytes at most and fails with this errno.
    Partial {
        /// Number of bytes stored.
        stored: u64,
        /// What it fails with.
        errno: i32,
    },
}

/// A simulated disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    machine: Arc<Mutex<Machine>>,
    index: usize,
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimDisk({}, {:?})", self.index, self.image())
    }
}

impl SimDisk {
    /// An empty disk, alone in its machine.
    pub fn new() -> Self {
        Self::with_image(Image::new())
    }

    /// A disk with these contents, which are durable.
    pub fn with_image(image: Image) -> Self {
        Self {
            machine: Arc::new(Mutex::new(Machine {
                disks: vec![Disk::new(image)],
                ..Machine::default()
            })),
            index: 0,
        }
    }

    /// Another disk in the same machine: it shares the count of operations,
    /// the faults and the history, and loses power at the same moment.
    #[must_use]
    pub fn beside(&self, image: Image) -> Self {
        let mut machine = self.machine();
        machine.disks.push(Disk::new(image));
        Self {
            machine: Arc::clone(&self.machine),
            index: machine.disks.len() - 1,
        }
    }

    /// What it holds now, durable or not.
    pub fn image(&self) -> Image {
        self.machine().disks[self.index].image.clone()
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.machine().disks[self.index].image.len()
    }

    /// True when it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was done to all disks of the machine.
    pub fn history(&self) -> History {
        let machine = self.machine();
        History {
            start: machine.disks.iter().map(|d| d.start.clone()).collect(),
            records: machine.records.clone(),
        }
    }

    /// How many records the history has.
    pub fn recorded(&self) -> usize {
        self.machine().records.len()
    }

    /// Begins a new history: what all disks of the machine hold now is
    /// durable.
    pub fn forget(&self) {
        let mut machine = self.machine();
        machine.records.clear();
        for disk in &mut machine.disks {
            disk.start = disk.image.clone();
        }
    }

    /// How many operations have been started on the machine: the number that
    /// the next one gets.
    pub fn operations(&self) -> u64 {
        self.machine().operations
    }

    /// Lets `rule` decide about the fate of every operation from now on. The
    /// first rule that gives a fault has its way.
    ///
    /// A rule is called with the machine locked, and must not use its disks.
    pub fn inject(&self, rule: impl FnMut(&SimRequest) -> Option<Fault> + Send + 'static) {
        self.machine().rules.push(Box::new(rule));
    }

    /// Makes the `n`th operation from now (0 is the next) fail with `errno`.
    pub fn fail_nth(&self, n: u64, errno: i32) {
        let number = self.operations() + n;
        self.inject(move |request| (request.number == number).then_some(Fault::Errno(errno)));
    }

    /// Forgets all rules of [`Self::inject`] and [`Self::fail_nth`].
    pub fn clear_faults(&self) {
        self.machine().rules.clear();
    }

    /// Holds back, from now on, the operations that `choose` picks: they take
    /// effect only when the [`Hold`] lets them go. `choose` must not use the
    /// machine's disks.
    pub fn hold(&self, choose: impl FnMut(&SimRequest) -> bool + Send + 'static) -> Hold {
        let gate = Arc::new(Gate::default());
        let mut machine = self.machine();
        machine.holds.retain(|(_, gate)| !gate.is_open());
        machine.holds.push((Box::new(choose), Arc::clone(&gate)));
        Hold { gate }
    }

    /// Delays every operation from now on by a random number of turns of the
    /// executor, so that tasks interleave, and operations started together
    /// take effect in any order. `None` ends it.
    pub fn shuffle(&self, seed: Option<u64>) {
        self.machine().shuffle = seed.map(Rng::new);
    }

    /// Limits the space this disk's file may take, in bytes: writes that need
    /// more fall short or fail with `ENOSPC`.
    pub fn set_capacity(&self, capacity: u64) {
        self.machine().disks[self.index].capacity = capacity;
    }

    pub(in super::super) fn name(&self) -> String {
        format!("simulated disk {}", self.index)
    }

    pub(in super::super) fn identity(&self) -> (u64, u64) {
        // No host device has this number. The machine's address tells machines
        // apart.
        let machine = Arc::as_ptr(&self.machine).cast::<u8>() as u64;
        (u64::MAX, machine + self.index as u64)
    }

    pub(in super::super) fn backend(&self, alignment: u32) -> SimBackend {
        SimBackend::new(self.clone(), alignment)
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
