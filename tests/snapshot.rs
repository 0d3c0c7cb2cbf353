//! Internal snapshots: what each of them shows, whatever is done to the image;
//! what a power cut and a failure leave; and that QEMU agrees.

mod common;

#[path = "snapshot/cuts.rs"]
mod cuts;
#[path = "snapshot/entries.rs"]
mod entries;
#[path = "snapshot/features.rs"]
mod features;
#[path = "snapshot/hostile.rs"]
mod hostile;
#[path = "snapshot/model.rs"]
mod model;
#[path = "snapshot/qemu.rs"]
mod qemu;
