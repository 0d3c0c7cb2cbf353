//! The protocols between threads, from the very files of the program, with
//! loom's primitives in place of the standard library's; and models that use
//! them as the program does. Loom runs a model in every order of its threads
//! that the memory model allows. See `tests/protocols.rs`.

pub mod models;
#[allow(dead_code)]
mod qcow2;
#[allow(dead_code)]
mod runtime;

pub use runtime::primitives::{Mutant, with};
