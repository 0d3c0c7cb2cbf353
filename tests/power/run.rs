//! Does what a case says on simulated disks, and notes what it did.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use qcow2_ublk::block::{BlockHandler, Op, Payload, Request as Asked};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::runtime::spawn;
use qcow2_ublk::{Error, Result};

use super::case::Case;
use super::common::lab;
use super::features;
use super::machine::{self, Disks, is_refusal};
use super::model::{Bitmap, Change, Closed, Flush, Log, Value, World, stamp};
use super::op::{Request, Step};
use super::shape::Below;
use super::{Verdict, ensure};

/// A history that was made.
pub(crate) struct Ran {
    pub(crate) disks: Disks,
    pub(crate) log: Log,
    pub(crate) features: BTreeSet<String>,
    /// The layer below was written to.
    pub(crate) committed: bool,
}

/// Runs a case to its end. What is wrong already while it runs is an error.
pub(crate) fn run(case: &Case) -> Verdict<Ran> {
    let failed = |e: Error| format!("the image cannot be made: {e}");
    let disks = machine::make(&case.shape).map_err(failed)?;
    machine::block_on(async {
        let mut session = Session::begin(case, disks).await?;
        for (number, step) in case.steps.iter().enumerate() {
            let done = match step {
                Step::Wave(requests) => session.wave(requests).await,
                Step::Act(action) => session.act(*action).await,
            };
            done.map_err(|e| format!("step {number} ({step}): {e}"))?;
        }
        if case.order.is_multiple_of(2) && session.engine.is_some() {
            session.close().await?;
        }
        Ok(session.end())
    })
}

/// A case while it runs.
pub(crate) struct Session<'a> {
    pub(crate) case: &'a Case,
    pub(crate) disks: Disks,
    pub(crate) log: Rc<RefCell<Log>>,
    /// None while the image is closed.
    pub(crate) engine: Option<Arc<Engine>>,
    pub(crate) features: Rc<RefCell<BTreeSet<String>>>,
    /// The bitmaps; worlds have copies of them.
    pub(crate) bitmaps: Rc<RefCell<BTreeMap<char, Bitmap>>>,
    pub(crate) committed: bool,
    touched: Rc<RefCell<BTreeSet<u64>>>,
}

pub(crate) fn text(error: Error) -> String {
    error.to_string()
}

impl<'a> Session<'a> {
    async fn begin(case: &'a Case, disks: Disks) -> Verdict<Self> {
        let mut session = Self {
            case,
            disks,
            log: Rc::default(),
            engine: None,
            features: Rc::new(RefCell::new(features::of_shape(&case.shape))),
            bitmaps: Rc::default(),
            committed: false,
            touched: Rc::default(),
        };
        session
            .disks
            .image
            .shuffle((case.order > 1).then_some(case.order));
        session.open().await?;
        let content = machine::read_all(session.engine()).await.map_err(text)?;
        let sectors = content.len() / 512;
        session.disks.image.forget();
        {
            let mut log = session.log.borrow_mut();
            let number = log.add_content(Rc::new(content));
            log.worlds.push(World {
                started: 0,
                complete: 0,
                sectors: Rc::new(vec![(Value::Content(number), 0); sectors]),
                snapshots: Rc::default(),
                bitmaps: Rc::default(),
            });
        }
        Ok(session)
    }

    fn end(mut self) -> Ran {
        // As a power cut does: nothing is given back.
        self.engine = None;
        let log = Rc::try_unwrap(self.log).map(RefCell::into_inner);
        Ran {
            disks: self.disks,
            log: log.ok().expect("no task is left"),
            features: self.features.take(),
            committed: self.committed,
        }
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        self.engine.as_ref().expect("the image is open")
    }

    pub(crate) fn recorded(&self) -> usize {
        self.disks.image.recorded()
    }

    pub(crate) async fn open(&mut self) -> Verdict {
        let opened = machine::open(&self.disks, &self.case.shape).await;
        self.engine = Some(Arc::new(opened.map_err(|e| format!("cannot open: {e}"))?));
        Ok(())
    }

    /// Closes the image: all of it is durable then, and bitmaps are exact.
    pub(crate) async fn close(&mut self) -> Verdict {
        let begun = self.log.borrow_mut().tick();
        let engine = self.engine.take().expect("the image is open");
        engine
            .close()
            .await
            .map_err(|e| format!("cannot close: {e}"))?;
        let complete = self.recorded();
        let exact = self.bitmaps.borrow();
        let exact = exact.iter().map(|(&name, b)| (name, b.dirty.clone()));
        let mut log = self.log.borrow_mut();
        log.flushes.push(Flush { begun, complete });
        log.closes.push(Closed {
            complete,
            until: complete,
            exact: exact.collect(),
        });
        Ok(())
    }

    /// A whole wave of requests, and what the disk shows after it.
    async fn wave(&mut self, requests: &[(u8, Request)]) -> Verdict {
        if self.engine.is_none() {
            self.open().await?;
        }
        let mut queues: BTreeMap<u8, Vec<Request>> = BTreeMap::new();
        for &(task, request) in requests {
            queues.entry(task).or_default().push(request);
        }
        if queues.len() > 1 {
            self.features
                .borrow_mut()
                .insert("several tasks".to_owned());
        }
        let tasks: Vec<_> = queues
            .into_iter()
            .map(|(number, requests)| {
                let task = Task {
                    engine: Arc::clone(self.engine()),
                    disks: self.disks.clone(),
                    log: Rc::clone(&self.log),
                    features: Rc::clone(&self.features),
                    bitmaps: Rc::clone(&self.bitmaps),
                    touched: Rc::clone(&self.touched),
                    tells_mapping: self.tells_mapping(),
                    barrier: self.case.shape.barrier,
                    backed: self.case.shape.below != Below::Nothing,
                    number: number.into(),
                };
                spawn(async move {
                    for request in requests {
                        task.handle(request)
                            .await
                            .map_err(|e| format!("{number}{request}: {e}"))?;
                    }
                    Ok(())
                })
            })
            .collect();
        let mut result: Verdict = Ok(());
        for task in tasks {
            result = result.and(task.await);
        }
        result?;
        self.compare().await.map(drop)
    }

    /// The first write to a cluster is sure to map it.
    fn tells_mapping(&self) -> bool {
        let shape = &self.case.shape;
        shape.fill == 0
            && shape.space == qcow2_ublk::qcow2::create::Preallocation::Off
            && shape.data != super::shape::Data::RawFile
    }

    /// What the disk shows now, which has to be what was asked for.
    pub(crate) async fn compare(&self) -> Verdict<Vec<u8>> {
        let content = machine::read_all(self.engine()).await.map_err(text)?;
        let log = self.log.borrow();
        let world = log.world();
        ensure!(
            content.len() == world.sectors.len() * 512,
            "the disk has {} bytes, not {}",
            content.len(),
            world.sectors.len() * 512
        );
        let allowed = log.allowed_live(world);
        super::judge::fits(&log, &content, &allowed).map_err(|e| format!("while in use, {e}"))?;
        Ok(content)
    }
}

/// One of those who make requests.
struct Task {
    engine: Arc<Engine>,
    disks: Disks,
    log: Rc<RefCell<Log>>,
    features: Rc<RefCell<BTreeSet<String>>>,
    bitmaps: Rc<RefCell<BTreeMap<char, Bitmap>>>,
    /// Clusters that somebody has begun to change.
    touched: Rc<RefCell<BTreeSet<u64>>>,
    tells_mapping: bool,
    barrier: Barrier,
    backed: bool,
    number: u16,
}

impl Task {
    async fn handle(&self, request: Request) -> Verdict {
        let Some((at, len)) = request.range() else {
            let begun = self.log.borrow_mut().tick();
            let done = match request {
                Request::Flush => self.engine.flush().await,
                _ => self.engine.write_back().await,
            };
            done.map_err(text)?;
            if request == Request::Flush {
                let complete = self.disks.image.recorded();
                self.log
                    .borrow_mut()
                    .flushes
                    .push(Flush { begun, complete });
            }
            self.features
                .borrow_mut()
                .insert(features::of_request(request).to_owned());
            return Ok(());
        };
        // The disk may be smaller than when this was thought of.
        let sectors = self.engine.size() / 512;
        let len = len.min(sectors.saturating_sub(at));
        if len == 0 {
            return Ok(());
        }
        self.change(request, at, len).await
    }

    async fn change(&self, request: Request, at: u64, len: u64) -> Verdict {
        let maps = self.touch(request, at, len);
        let number = self.begin(request, at, len);
        let done = self.ask(request, at, len, number).await;
        let mut log = self.log.borrow_mut();
        let now = log.tick();
        let recorded = self.disks.image.recorded();
        let change = &mut log.changes[number];
        change.acked = Some(now);
        match done {
            Ok(()) => {}
            Err(error) if is_refusal(&error) && matches!(request, Request::Compressed { .. }) => {
                // Nothing was done.
                change.sectors = 0..0;
                return Ok(());
            }
            Err(error) => return Err(text(error)),
        }
        let begun = change.begun;
        let fua = matches!(
            request,
            Request::Write { fua: true, .. } | Request::Zero { fua: true, .. }
        );
        change.durable = fua.then_some(recorded);
        // A barrier promises as much as a flush that begins after the request.
        let promised = match self.barrier {
            Barrier::Full => true,
            Barrier::Metadata => maps,
            _ => false,
        };
        if promised {
            change.durable = Some(recorded);
            log.flushes.push(Flush {
                begun,
                complete: recorded,
            });
        }
        drop(log);
        for bitmap in self.bitmaps.borrow_mut().values_mut().filter(|b| b.enabled) {
            bitmap.mark(at * 512, (at + len) * 512);
        }
        self.features
            .borrow_mut()
            .insert(features::of_request(request).to_owned());
        Ok(())
    }

    /// True when the request is sure to change a mapping.
    fn touch(&self, request: Request, at: u64, len: u64) -> bool {
        let cluster = self.engine.chain().top().cluster_size() / 512;
        let mut touched = self.touched.borrow_mut();
        let new = (at / cluster..=(at + len - 1) / cluster)
            .filter(|&number| touched.insert(number))
            .count();
        new > 0 && self.tells_mapping && matches!(request, Request::Write { .. })
    }

    /// Notes that the request begins.
    fn begin(&self, request: Request, at: u64, len: u64) -> usize {
        let mut log = self.log.borrow_mut();
        let image = self.engine.chain().top();
        let number = log.changes.len();
        let mut sectors = at..at + len;
        let mut optional = false;
        let value = match request {
            Request::Write { .. } | Request::Compressed { .. } => Value::Stamp(number as u32 + 1),
            _ => Value::Zeros,
        };
        if let Request::Discard { .. } = request {
            // Whole clusters, where there is a way to hide what is below.
            let cluster = image.cluster_size() / 512;
            if sectors.end != self.engine.size() / 512 {
                sectors.end -= sectors.end % cluster;
            }
            sectors.start = sectors.start.next_multiple_of(cluster).min(sectors.end);
            optional = image.version() < 3 && self.backed;
        }
        let begun = log.tick();
        log.changes.push(Change {
            sectors,
            value,
            started: self.disks.image.recorded(),
            begun,
            acked: None,
            durable: None,
            optional,
        });
        number
    }

    async fn ask(&self, request: Request, at: u64, len: u64, number: usize) -> Result<()> {
        let (offset, bytes) = (at * 512, len * 512);
        let data = || -> Vec<u8> {
            (at..at + len)
                .flat_map(|sector| stamp(number as u32 + 1, sector))
                .collect()
        };
        let zeros = |op| Asked {
            op,
            offset,
            len: bytes,
            payload: Payload::zeros(bytes),
        };
        let engine = &*self.engine;
        match request {
            Request::Write { fua, .. } => {
                lab::write(engine, self.number, offset, &data(), fua).await
            }
            Request::Nulls { .. } => {
                lab::write(engine, self.number, offset, &vec![0; bytes as usize], false).await
            }
            Request::Zero { unmap, fua, .. } => {
                let op = Op::WriteZeroes { unmap, fua };
                engine.handle(self.number, zeros(op)).await
            }
            Request::Discard { .. } => engine.handle(self.number, zeros(Op::Discard)).await,
            Request::Compressed { .. } => {
                engine
                    .write_compressed(self.number, offset, &data(), None)
                    .await
            }
            Request::Flush | Request::WriteBack => unreachable!("they change nothing"),
        }
    }
}
