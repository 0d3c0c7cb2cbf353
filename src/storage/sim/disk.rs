//! The simulated disk itself.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use super::super::backend::Allocation;
use super::hold::Gate;
use super::{Change, History, Hold, Image, Record, Rng};
use crate::runtime::{Payload, yield_now};

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

type Rule = Box<dyn FnMut(&SimRequest) -> Option<Fault> + Send>;
type Chooser = Box<dyn FnMut(&SimRequest) -> bool + Send>;

struct Disk {
    image: Image,
    start: Image,
    capacity: u64,
}

impl Disk {
    fn new(image: Image) -> Self {
        Self {
            start: image.clone(),
            image,
            capacity: u64::MAX,
        }
    }
}

#[derive(Default)]
struct Machine {
    disks: Vec<Disk>,
    records: Vec<Record>,
    operations: u64,
    rules: Vec<Rule>,
    holds: Vec<(Chooser, Arc<Gate>)>,
    shuffle: Option<Rng>,
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
        SimBackend {
            disk: self.clone(),
            alignment: u64::from(alignment),
        }
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk as one [`Storage`](super::super::Storage) sees it.
pub(in super::super) struct SimBackend {
    disk: SimDisk,
    alignment: u64,
}

/// A simulated operation under way.
pub(in super::super) struct SimOp(State);

enum State {
    Ready(io::Result<u32>),
    Later(Pin<Box<dyn Future<Output = io::Result<u32>>>>),
    Taken,
}

impl Future for SimOp {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::Later(future) = &mut self.0 {
            return future.as_mut().poll(context);
        }
        match std::mem::replace(&mut self.0, State::Taken) {
            State::Ready(result) => Poll::Ready(result),
            _ => unreachable!("an operation polled after completion"),
        }
    }
}

#[derive(Clone, Copy)]
enum Action {
    Read(Payload),
    Write(Payload),
    Allocate(Allocation),
    SetLen,
    Sync,
}

impl SimBackend {
    pub(in super::super) fn current_len(&self) -> u64 {
        self.disk.len()
    }

    pub(in super::super) fn read(&self, payload: &Payload, offset: u64) -> SimOp {
        let action = Action::Read(*payload);
        self.start(SimKind::Read, action, offset, payload.len())
    }

    pub(in super::super) fn write(&self, payload: &Payload, offset: u64) -> SimOp {
        let action = Action::Write(*payload);
        self.start(SimKind::Write, action, offset, payload.len())
    }

    pub(in super::super) fn allocate(&self, what: Allocation, offset: u64, len: u64) -> SimOp {
        let kind = match what {
            Allocation::ZeroRange => SimKind::Zero,
            Allocation::PunchHole => SimKind::Punch,
        };
        self.start(kind, Action::Allocate(what), offset, len)
    }

    pub(in super::super) fn set_len(&self, len: u64) -> SimOp {
        self.start(SimKind::SetLen, Action::SetLen, len, 0)
    }

    pub(in super::super) fn sync(&self) -> SimOp {
        self.start(SimKind::Sync, Action::Sync, 0, 0)
    }

    fn start(&self, kind: SimKind, action: Action, offset: u64, len: u64) -> SimOp {
        let mut machine = self.disk.machine();
        let request = SimRequest {
            number: machine.operations,
            disk: self.disk.index,
            kind,
            offset,
            len,
        };
        machine.operations += 1;
        let fault = machine.rules.iter_mut().find_map(|rule| rule(&request));
        let gate = machine
            .holds
            .iter_mut()
            .find_map(|(choose, gate)| (!gate.is_open() && choose(&request)).then(|| gate.clone()));
        let turns = machine.shuffle.as_mut().map_or(0, |rng| rng.below(6));
        let alignment = self.alignment;
        if gate.is_none() && turns == 0 {
            return SimOp(State::Ready(
                machine.perform(&request, action, alignment, fault),
            ));
        }
        drop(machine);
        let disk = self.disk.clone();
        SimOp(State::Later(Box::pin(async move {
            if let Some(gate) = gate {
                let ticket = gate.arrive();
                gate.pass(ticket).await;
            }
            for _ in 0..turns {
                yield_now().await;
            }
            disk.machine().perform(&request, action, alignment, fault)
        })))
    }
}

fn fails(errno: i32) -> io::Result<u32> {
    Err(io::Error::from_raw_os_error(errno))
}

impl Machine {
    /// Does it, with the result of the system call.
    fn perform(
        &mut self,
        request: &SimRequest,
        action: Action,
        alignment: u64,
        fault: Option<Fault>,
    ) -> io::Result<u32> {
        let SimRequest { offset, len, .. } = *request;
        if let Some(Fault::Errno(errno)) = fault {
            if matches!(action, Action::Sync) {
                self.record(request, Change::FailedSync);
            }
            return fails(errno);
        }
        let moves = matches!(action, Action::Read(_) | Action::Write(_));
        if moves && !(offset | len).is_multiple_of(alignment) {
            return fails(libc::EINVAL);
        }
        let len = match fault {
            Some(Fault::Short(limit) | Fault::Partial { stored: limit, .. }) if moves => {
                len.min(limit)
            }
            _ => len,
        };
        let disk = &mut self.disks[request.disk];
        match action {
            Action::Read(payload) => {
                let len = len.min(disk.image.len().saturating_sub(offset));
                payload
                    .slice(0, len)
                    .copy_from(&disk.image.bytes(offset, len))?;
                Ok(len as u32)
            }
            Action::Write(payload) => {
                let room = disk.image.room(offset, len, disk.capacity);
                if room == 0 && len > 0 {
                    return fails(libc::ENOSPC);
                }
                let mut bytes = vec![0; room as usize];
                payload.slice(0, room).copy_to(&mut bytes)?;
                disk.image.write(offset, &bytes);
                let bytes = bytes.into();
                self.record(request, Change::Write { offset, bytes });
                match fault {
                    Some(Fault::Partial { errno, .. }) => fails(errno),
                    _ => Ok(room as u32),
                }
            }
            Action::Allocate(Allocation::ZeroRange) => {
                disk.image.punch(offset, len);
                let end = disk.image.len().max(offset + len);
                disk.image.set_len(end);
                self.record(request, Change::Zero { offset, len });
                Ok(0)
            }
            Action::Allocate(Allocation::PunchHole) => {
                disk.image.punch(offset, len);
                self.record(request, Change::Punch { offset, len });
                Ok(0)
            }
            Action::SetLen => {
                disk.image.set_len(offset);
                self.record(request, Change::SetLen(offset));
                Ok(0)
            }
            Action::Sync => {
                self.record(request, Change::Sync);
                Ok(0)
            }
        }
    }

    fn record(&mut self, request: &SimRequest, change: Change) {
        let image = &self.disks[request.disk].image;
        let record = Record::new(request.disk, change, image);
        self.records.push(record);
    }
}
