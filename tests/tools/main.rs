//! `resize`, `commit` and `rebase`: against qemu-img on the same inputs, with
//! random images, and with the power cut at every write.

mod chain_cuts;
mod commit;
#[path = "../common/mod.rs"]
mod common;
mod cuts;
mod data_file_cuts;
mod options;
mod place;
mod rebase;
mod resize;
mod resize_cuts;
