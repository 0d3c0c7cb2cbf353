//! One task: requests, one after the other, and what is promised of each.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use qcow2_ublk::Result;
use qcow2_ublk::block::{BlockHandler, Op, Payload, Request as Asked};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::Barrier;

use super::Verdict;
use super::common::lab;
use super::features;
use super::machine::{Disks, is_refusal};
use super::model::{Bitmap, Change, Flush, Log, Value, stamp};
use super::op::Request;
use super::run::text;

/// One of those who make requests.
pub(crate) struct Task {
    pub(crate) engine: Arc<Engine>,
    pub(crate) disks: Disks,
    pub(crate) log: Rc<RefCell<Log>>,
    pub(crate) features: Rc<RefCell<BTreeSet<String>>>,
    pub(crate) bitmaps: Rc<RefCell<BTreeMap<char, Bitmap>>>,
    /// Clusters that somebody has begun to change.
    pub(crate) touched: Rc<RefCell<BTreeSet<u64>>>,
    pub(crate) tells_mapping: bool,
    pub(crate) barrier: Barrier,
    pub(crate) backed: bool,
    /// Where the disk ends for requests, in sectors.
    pub(crate) end: u64,
    pub(crate) number: u16,
}

impl Task {
    pub(crate) async fn handle(&self, request: Request) -> Verdict {
        if let Request::Live(action) = request {
            return self.act(action).await;
        }
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
        let len = len.min(self.end.saturating_sub(at));
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
            if sectors.end != self.end {
                sectors.end -= sectors.end % cluster;
            }
            sectors.start = sectors.start.next_multiple_of(cluster).min(sectors.end);
            optional = image.version() < 3 && self.backed;
        }
        let begun = log.tick();
        log.changes.push(Change {
            sectors,
            named: at..at + len,
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
            Request::Flush | Request::WriteBack | Request::Live(_) => {
                unreachable!("they are no requests for sectors")
            }
        }
    }
}
