//! What is asked of an open image.

use std::sync::Arc;

use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::{BitmapAction, NewSnapshot, Selector};
use qcow2_ublk::{Error, ErrorKind, Result};

use super::super::common::lab;
use super::super::input::Input;
use super::bitmaps::Change;
use super::model::{End, Model, SECTOR};
use super::state::State;

/// Largest disk that one grows to, in sectors.
const MOST: u64 = 1024;

#[derive(Clone, Debug)]
pub enum Op {
    Write {
        first: u64,
        count: u64,
        byte: u8,
        fua: bool,
        queue: u16,
    },
    Compressed {
        first: u64,
        count: u64,
        byte: u8,
    },
    Zero {
        first: u64,
        count: u64,
        unmap: bool,
    },
    Discard {
        first: u64,
        count: u64,
    },
    Flush,
    WriteBack,
    Grow {
        sectors: u64,
    },
    CreateSnapshot,
    ApplySnapshot,
    DeleteSnapshot,
    Bitmap {
        name: Vec<u8>,
        change: Change,
    },
}

/// Some sectors of the disk: first and number. Mostly few.
pub fn range(input: &mut Input<'_>, model: &Model) -> (u64, u64) {
    let first = u64::from(input.u16()) % model.sectors();
    let len = input.u8();
    let count = match len {
        0..200 => u64::from(len % 40) + 1,
        _ => u64::from(len - 199) * 8,
    };
    (first, count.min(model.sectors() - first))
}

impl Op {
    /// One of those that may meet others.
    pub fn request(input: &mut Input<'_>, model: &Model) -> Self {
        let what = input.u8();
        let (first, count) = range(input, model);
        let byte = input.u8();
        match what % 16 {
            0..7 => Self::Write {
                first,
                count,
                byte,
                fua: what & 0x10 != 0,
                queue: (what >> 7).into(),
            },
            7 | 8 => Self::Compressed { first, count, byte },
            9 | 10 => Self::Zero {
                first,
                count,
                unmap: what & 0x10 != 0,
            },
            11 | 12 => Self::Discard { first, count },
            13 => Self::WriteBack,
            _ => Self::Flush,
        }
    }

    /// Any; of the snapshots made here there is one at most.
    pub fn choose(input: &mut Input<'_>, state: &State, with_bitmaps: bool) -> Self {
        let model = &state.model;
        let kinds = if with_bitmaps { 40 } else { 32 };
        match (input.u8() % kinds, state.made.is_some()) {
            (32.., _) => Self::bitmap(input, state),
            (0, _) => {
                let more = u64::from(input.u16()) % 256;
                Self::Grow {
                    sectors: (model.sectors() + more).min(MOST.max(model.sectors())),
                }
            }
            (1 | 2, false) => Self::CreateSnapshot,
            (1, true) => Self::ApplySnapshot,
            (2, true) => Self::DeleteSnapshot,
            _ => Self::request(input, model),
        }
    }

    fn bitmap(input: &mut Input<'_>, state: &State) -> Self {
        let names = [b"a".to_vec(), b"b".to_vec()];
        let names: Vec<_> = state.bitmaps.names().chain(&names).collect();
        let name = names[usize::from(input.u8()) % names.len()].clone();
        let what = input.u8();
        let change = match what % 8 {
            0 => Change::Remove,
            1 => Change::Clear,
            2 => Change::Disable,
            3 => Change::Enable,
            _ => Change::Add {
                bits: 9 + what / 8 % 8,
            },
        };
        Self::Bitmap { name, change }
    }

    pub async fn run(self, engine: Arc<Engine>) -> Result<()> {
        let image = engine.chain().top();
        match self {
            Self::Write {
                first,
                count,
                byte,
                fua,
                queue,
            } => {
                let bytes = vec![byte; (count * SECTOR) as usize];
                lab::write(&engine, queue, first * SECTOR, &bytes, fua).await
            }
            Self::Compressed { first, count, byte } => {
                let bytes = vec![byte; (count * SECTOR) as usize];
                engine
                    .write_compressed(0, first * SECTOR, &bytes, Some(1))
                    .await
            }
            Self::Zero {
                first,
                count,
                unmap,
            } => {
                engine
                    .write_zeroes(0, first * SECTOR, count * SECTOR, unmap)
                    .await
            }
            Self::Discard { first, count } => {
                engine.discard(0, first * SECTOR, count * SECTOR).await
            }
            Self::Flush => engine.flush().await,
            Self::WriteBack => engine.write_back().await,
            Self::Grow { sectors } => engine.grow(sectors * SECTOR).await,
            Self::CreateSnapshot => {
                let new = NewSnapshot {
                    name: b"made".to_vec(),
                    ..NewSnapshot::default()
                };
                image.create_snapshot(new).await
            }
            Self::ApplySnapshot => image.apply_snapshot(Selector::Name(b"made".to_vec())).await,
            Self::DeleteSnapshot => {
                image
                    .delete_snapshot(Selector::Name(b"made".to_vec()))
                    .await
            }
            Self::Bitmap { name, change } => {
                let action = match change {
                    Change::Add { bits } => BitmapAction::Add {
                        granularity: Some(1 << bits),
                    },
                    Change::Remove => BitmapAction::Remove,
                    Change::Clear => BitmapAction::Clear,
                    Change::Enable => BitmapAction::Enable,
                    Change::Disable => BitmapAction::Disable,
                };
                image.change_bitmap(&name, &action).await
            }
        }
    }

    /// What it may be refused for, though nothing goes wrong.
    pub fn may_be_refused(&self, error: &Error, state: &State) -> bool {
        match self {
            // Nothing would be recorded; or narrow refcounts cannot count another
            // owner of what only snapshots share, or what a power cut has leaked.
            Self::ApplySnapshot => {
                let narrow = error.to_string().contains("a refcount does not fit");
                error.kind() == ErrorKind::Unsupported && (narrow || !state.bitmaps.is_empty())
            }
            Self::Bitmap { name, change } => match (error.kind(), state.bitmaps.find(name)) {
                (ErrorKind::NotFound, None) => !matches!(change, Change::Add { .. }),
                (ErrorKind::Usage, Some(_)) => matches!(change, Change::Add { .. }),
                (ErrorKind::Corrupt, Some(tracked)) => {
                    tracked.lost && !matches!(change, Change::Remove)
                }
                // Version 2 has none.
                (kind, None) => kind == ErrorKind::Unsupported,
                _ => false,
            },
            // Nobody knows how large such a bitmap should be.
            Self::Grow { .. } if error.kind() == ErrorKind::Corrupt => state.bitmaps.has_lost(),
            // Narrow refcounts cannot count another owner; version 2 does not say
            // how large a snapshot's disk is.
            Self::CreateSnapshot | Self::Compressed { .. } | Self::Grow { .. } => {
                error.kind() == ErrorKind::Unsupported
            }
            _ => false,
        }
    }

    /// It changes more than some sectors.
    pub fn is_about_the_whole(&self) -> bool {
        matches!(
            self,
            Self::Grow { .. }
                | Self::CreateSnapshot
                | Self::ApplySnapshot
                | Self::DeleteSnapshot
                | Self::Bitmap { .. }
        )
    }

    pub fn sectors(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Write { first, count, .. }
            | Self::Compressed { first, count, .. }
            | Self::Zero { first, count, .. }
            | Self::Discard { first, count } => Some((first, count)),
            _ => None,
        }
    }

    /// Both touch some sector; or one makes the other durable, or not.
    pub fn meets(&self, other: &Self) -> bool {
        match (self.sectors(), other.sectors()) {
            (Some(a), Some(b)) => a.0 < b.0 + b.1 && b.0 < a.0 + a.1,
            // A flush beside it counts for what came before only.
            (None, _) => true,
            (Some(_), None) => false,
        }
    }

    /// How it ends when it succeeds.
    pub fn end(&self) -> End {
        match self {
            Self::Write { fua: true, .. } => End::Durable,
            _ => End::Acknowledged,
        }
    }

    /// `cluster` is its size in sectors; `hides` says that a discard hides
    /// what is below.
    pub fn change(&self, model: &mut Model, end: End, cluster: u64, hides: bool) {
        let Some((mut first, mut count)) = self.sectors() else {
            return;
        };
        let (byte, end) = match *self {
            Self::Write { byte, .. } | Self::Compressed { byte, .. } => (byte, end),
            Self::Discard { .. } => {
                // Of clusters that are not wholly in it, nothing.
                let mut last = first + count;
                if last != model.sectors() {
                    last -= last % cluster;
                }
                first = first.next_multiple_of(cluster).min(last);
                count = last - first;
                (0, if hides { end } else { End::Unknown })
            }
            _ => (0, end),
        };
        model.fill(first, count, byte, end);
    }
}
