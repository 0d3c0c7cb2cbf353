//! Internal snapshots: making, applying, deleting and renaming them, and
//! reading one. Knows nothing of guest data.
//!
//! A snapshot is an L1 table of its own. It shares L2 tables and clusters with
//! the active one, each counted once for every L1 table from which it can be
//! reached, and those with a count above 1 are copied before they change.
//!
//! # On disk
//!
//! Every operation builds the whole new state beside the old one and switches
//! with one sector of the header; see [`shadow`](super::shadow). A power cut
//! leaves the image as it was before, or as it is after.
//!
//! # What an operation needs
//!
//! [`SnapshotJob::run`] works on a file that nobody else has open, whatever
//! the image's features: guest data is not touched, encrypted or not.
//!
//! On an open [`Image`](super::Image) there are `create_snapshot` and its
//! kind. They wait until no request is under way, not even one that reads, and
//! requests that come wait for them. What is in memory is flushed before, and
//! read anew after.

mod job;
mod live;
mod table;

pub(crate) use job::refuse_external;
pub use job::{NewSnapshot, SnapshotJob};
pub(crate) use live::HeldSnapshot;
pub use table::Selector;
pub(crate) use table::{complete_table, encode as encode_table, read as read_table};
