//! What the protocols between threads are made of, in one place: `tests/loom`
//! compiles the same protocols with loom's, and tries every order.

pub(crate) use std::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
