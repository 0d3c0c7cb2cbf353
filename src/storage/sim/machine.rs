//! What the disks of a machine do with operations.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::super::backend::Allocation;
use super::hold::Gate;
use super::{Change, Fault, Image, Record, Rng, SimDisk, SimKind, SimRequest};
use crate::runtime::{Payload, yield_now};

type Rule = Box<dyn FnMut(&SimRequest) -> Option<Fault> + Send>;
type Chooser = Box<dyn FnMut(&SimRequest) -> bool + Send>;

pub(super) struct Disk {
    pub(super) image: Image,
    /// What it held when the history began.
    pub(super) start: Image,
    /// The space that the file may take, in bytes.
    pub(super) capacity: u64,
}

impl Disk {
    pub(super) fn new(image: Image) -> Self {
        Self {
            start: image.clone(),
            image,
            capacity: u64::MAX,
        }
    }
}

#[derive(Default)]
pub(super) struct Machine {
    pub(super) disks: Vec<Disk>,
    pub(super) records: Vec<Record>,
    pub(super) operations: u64,
    pub(super) rules: Vec<Rule>,
    pub(super) holds: Vec<(Chooser, Arc<Gate>)>,
    pub(super) shuffle: Option<Rng>,
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
    pub(super) fn new(disk: SimDisk, alignment: u32) -> Self {
        Self {
            disk,
            alignment: alignment.into(),
        }
    }

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
            disk: self.disk.index(),
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
            // An interrupted sync leaves everything as dirty as it was.
            if matches!(action, Action::Sync) && errno != libc::EINTR {
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
                for (at, piece) in disk.image.pieces(offset, len) {
                    let part = payload.slice(at as u64, piece.len() as u64);
                    part.copy_from(piece)?;
                }
                Ok(len as u32)
            }
            Action::Write(payload) => {
                let room = disk.image.room(offset, len, disk.capacity);
                if room == 0 && len > 0 {
                    return fails(libc::ENOSPC);
                }
                let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, room as usize).collect();
                let place = Arc::get_mut(&mut bytes).expect("nobody else has it yet");
                payload.slice(0, room).copy_to(place)?;
                disk.image.write(offset, &bytes);
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
