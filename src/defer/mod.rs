//! The meeting point of handler and executor: [`Defer`], the handle in the request's extensions, over
//! the collector, which holds what was registered until the response is out and then releases it,
//! once.

mod collector;
mod gate;
mod handle;
mod missing;
#[cfg(all(test, defer_loom))]
mod models;
mod registration;
mod scope;
mod sweep;

pub(crate) use collector::{Collector, Ending, Head, Hold};
pub use handle::Defer;
pub use missing::{MissingLayer, RequestExt};
pub use registration::{DeferPermit, DeferReserve};
pub(crate) use scope::Scope;
