//! loom models of the executor's concurrent parts, by the invariants in their modules' documentation.

mod admission;
mod crew;
mod queue;
