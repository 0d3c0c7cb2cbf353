//! Several queues at once, with a thread and a ring each.

#[path = "../common/mod.rs"]
mod common;

mod queues;
mod race;
