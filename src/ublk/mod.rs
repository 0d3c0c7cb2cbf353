//! Block devices through the kernel's ublk driver: the only part of the crate
//! that knows the driver and its library.
//!
//! [`Device::create`] serves any [`BlockHandler`](crate::block::BlockHandler)
//! as `/dev/ublkbN`. Each hardware queue is a thread with one io_uring on which
//! the driver's commands and the handler's file I/O meet; each tag is a task
//! that fetches a request, awaits the handler, and commits the result. The
//! control plane is a ring of its own, on which every command has a time limit.
//!
//! libublk contributes the generated types of the driver's interface and no
//! code: its control plane waits without limit and refuses features that it
//! does not know.

mod apart;
mod control;
mod datapath;
mod device;
mod explain;
mod halt;
mod info;
mod map;
mod options;
mod params;
mod queue;
mod remove;
mod request;
mod shared;
mod steward;
mod uapi;
mod users;

pub use datapath::DataPath;
pub use device::{Device, Ended, Handle, Prepared, Stopped};
pub use info::{DeviceInfo, State, features, info, list};
pub use options::Options;
pub use remove::remove;
pub use steward::Steward;
pub use uapi::Features;
