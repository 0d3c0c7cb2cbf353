//! Does what a case says on simulated disks, and notes what it did.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use qcow2_ublk::Error;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::runtime::spawn;

use super::case::Case;
use super::features;
use super::machine::{self, Disks};
use super::model::{Bitmap, Closed, Flush, Log, Value, World};
use super::op::{Action, Request, Step};
use super::shape::Below;
use super::task::Task;
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
                keys: Rc::default(),
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
        let exact = exact.iter().filter(|(_, bitmap)| !bitmap.lost);
        let exact = exact.map(|(&name, bitmap)| (name, bitmap.dirty.clone()));
        let mut log = self.log.borrow_mut();
        log.flushes.push(Flush { begun, complete });
        log.closes.push(Closed {
            complete,
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
        let mut end = self.engine().size() / 512;
        let grows =
            |&(_, request): &(u8, Request)| matches!(request, Request::Live(Action::Resize(_)));
        if requests.iter().any(grows) {
            // Nobody may use the last cluster meanwhile.
            end -= end % (self.case.shape.cluster / 512);
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
                    end,
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

    /// Clusters from this sector on may be mapped already: growing maps them
    /// where only that hides what is below.
    pub(crate) fn touch_from(&self, sector: u64, end: u64) {
        let cluster = self.case.shape.cluster / 512;
        let clusters = sector / cluster..end.div_ceil(cluster);
        self.touched.borrow_mut().extend(clusters);
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
