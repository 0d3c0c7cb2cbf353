#[path = "../../../../src/qcow2/grace.rs"]
pub(crate) mod grace;
