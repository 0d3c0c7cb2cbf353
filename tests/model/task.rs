//! A task's requests on a part of the disk that nobody else touches, against a
//! vector of bytes.

use std::sync::Arc;

use super::assert_same;
use crate::common::lab;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::storage::sim::Rng;

/// One task's part of the disk: `model` is what it holds from `start` on.
pub(crate) struct Task {
    pub(crate) engine: Arc<Engine>,
    pub(crate) queue: u16,
    pub(crate) start: u64,
    pub(crate) model: Vec<u8>,
    pub(crate) rng: Rng,
    /// The image takes compressed writes.
    pub(crate) compress: bool,
    /// Discards do something.
    pub(crate) discards: bool,
}

/// What a task has done.
pub(crate) struct Done {
    pub(crate) start: u64,
    pub(crate) model: Vec<u8>,
    /// Offset and length of all that it changed, or might have.
    pub(crate) changed: Vec<(u64, u64)>,
}

impl Task {
    pub(crate) async fn work(mut self, operations: u32) -> Done {
        let mut changed = Vec::new();
        for step in 0..operations {
            if let Some(range) = self.step(step).await {
                changed.push(range);
            }
        }
        Done {
            start: self.start,
            model: self.model,
            changed,
        }
    }

    /// Offset and length of what was changed.
    async fn step(&mut self, step: u32) -> Option<(u64, u64)> {
        let size = self.model.len() as u64;
        // Mostly sectors, as devices do; sometimes any bytes.
        let unit = if self.rng.chance(3, 4) { 512 } else { 1 };
        let at = self.rng.below(size.div_ceil(unit)) * unit;
        let largest = match self.rng.below(6) {
            0 => size,
            1..3 => 4096,
            _ => 128 << 10,
        };
        let len = (self.rng.below(largest.div_ceil(unit)) * unit + unit).min(size - at);
        let range = at as usize..(at + len) as usize;
        let (engine, queue, offset) = (&self.engine, self.queue, self.start + at);
        match self.rng.below(13) {
            0..6 => {
                self.model[range.clone()].fill(some_byte(&mut self.rng));
                let fua = self.rng.chance(1, 20);
                lab::write(engine, queue, offset, &self.model[range], fua)
                    .await
                    .unwrap();
            }
            6 if self.compress => {
                self.model[range.clone()].fill(some_byte(&mut self.rng));
                engine
                    .write_compressed(queue, offset, &self.model[range], None)
                    .await
                    .unwrap();
            }
            6..8 => {
                self.model[range].fill(0);
                let unmap = self.rng.chance(1, 2);
                engine
                    .write_zeroes(queue, offset, len, unmap)
                    .await
                    .unwrap();
            }
            8 => {
                engine.discard(queue, offset, len).await.unwrap();
                // A discard promises nothing for parts of clusters.
                let now = lab::read(engine, queue, offset, len).await.unwrap();
                for (now, before) in now.iter().zip(&mut self.model[range]) {
                    assert!(*now == 0 || now == before, "step {step}: a discard");
                    *before = *now;
                }
                if !self.discards {
                    return None;
                }
            }
            9 => {
                engine.flush().await.unwrap();
                return None;
            }
            _ => {
                let seen = lab::read(engine, queue, offset, len).await.unwrap();
                assert_same(&seen, &self.model[range], &format!("step {step}"));
                return None;
            }
        }
        Some((offset, len))
    }
}

/// Any byte, sometimes zero.
fn some_byte(rng: &mut Rng) -> u8 {
    if rng.chance(1, 12) {
        0
    } else {
        rng.next_u64() as u8 | 1
    }
}
