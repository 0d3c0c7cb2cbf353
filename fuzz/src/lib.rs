//! What the fuzz targets do with an input. The files of `fuzz_targets` only
//! call it, and so does `tests/fuzz_regressions.rs` with every input that is
//! kept. An input is wrong for us when a target panics with it.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "a part of tests")]

pub mod bases;
pub mod bitmaps;
pub mod chain;
pub mod check;
pub mod common;
pub mod compressed;
pub mod header;
mod images;
pub mod input;
pub mod l2;
pub mod luks;
pub mod operate;
mod places;
pub mod recipe;
pub mod refcount;
pub mod repair;
pub mod snapshots;
mod view;

/// What a target does with an input.
pub type Body = fn(&[u8]);

/// Name and body of each target.
pub const TARGETS: &[(&str, Body)] = &[
    ("header", header::run),
    ("l2", l2::run),
    ("refcount", refcount::run),
    ("compressed", compressed::run),
    ("snapshots", snapshots::run),
    ("bitmaps", bitmaps::run),
    ("luks1", luks::run_v1),
    ("luks2", luks::run_v2),
    ("check", check::run),
    ("repair", repair::run),
    ("operate", operate::run),
    ("chain", chain::run),
];
