//! What the fuzz targets do with an input. The files of `fuzz_targets` only
//! call it, and so does `tests/fuzz_regressions.rs` with every input that is
//! kept. An input is wrong for us when a target panics with it.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "a part of tests")]

pub mod bases;
pub mod check;
#[path = "../../tests/common/mod.rs"]
pub mod common;
pub mod header;
mod images;
pub mod input;
pub mod l2;
pub mod operate;
mod places;
pub mod recipe;
pub mod refcount;
pub mod repair;
mod view;

/// What a target does with an input.
pub type Body = fn(&[u8]);

/// Name and body of each target.
pub const TARGETS: &[(&str, Body)] = &[
    ("header", header::run),
    ("l2", l2::run),
    ("refcount", refcount::run),
    ("check", check::run),
    ("repair", repair::run),
    ("operate", operate::run),
];
