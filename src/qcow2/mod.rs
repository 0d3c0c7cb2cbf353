//! The qcow2 format.

pub mod spec;
