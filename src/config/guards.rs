//! Settings about how writes are treated: what is durable when, what is never
//! written over, and what becomes of zeros.

use serde::Deserialize;

use crate::engine::DetectZeroes;
use crate::qcow2::{Barrier, OverlapCheck};

/// What is durable when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BarrierSetting {
    /// Nothing, flushes or not: for work that is thrown away after a crash of
    /// the host
    None,
    /// What was written before a flush
    Batched,
    /// Besides, every write that needs new space, and every discard
    Metadata,
    /// Every write
    Full,
}

impl From<BarrierSetting> for Barrier {
    fn from(setting: BarrierSetting) -> Self {
        match setting {
            BarrierSetting::None => Self::None,
            BarrierSetting::Batched => Self::Batched,
            BarrierSetting::Metadata => Self::Metadata,
            BarrierSetting::Full => Self::Full,
        }
    }
}

/// Which metadata is protected from being written over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverlapSetting {
    /// None
    None,
    /// Header, active L1 table, refcount table, snapshot table, bitmap directory
    Constant,
    /// Besides, active L2 tables, refcount blocks, L1 tables of snapshots
    Cached,
    /// Besides, L2 tables of snapshots
    All,
}

impl From<OverlapSetting> for OverlapCheck {
    fn from(setting: OverlapSetting) -> Self {
        match setting {
            OverlapSetting::None => Self::None,
            OverlapSetting::Constant => Self::Constant,
            OverlapSetting::Cached => Self::Cached,
            OverlapSetting::All => Self::All,
        }
    }
}

/// What becomes of writes of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroesSetting {
    /// They are written
    Off,
    /// They become zeros that take no new space
    On,
    /// Besides, the space they cover is given up
    Unmap,
}

impl From<DetectZeroesSetting> for DetectZeroes {
    fn from(setting: DetectZeroesSetting) -> Self {
        match setting {
            DetectZeroesSetting::Off => Self::Off,
            DetectZeroesSetting::On => Self::On,
            DetectZeroesSetting::Unmap => Self::Unmap,
        }
    }
}
