//! The simulation keeps its own promises.
