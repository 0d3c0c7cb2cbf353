#[path = "../../../../src/runtime/inbox.rs"]
pub(crate) mod inbox;
pub mod primitives;
#[path = "../../../../src/runtime/sync.rs"]
pub(crate) mod sync;
