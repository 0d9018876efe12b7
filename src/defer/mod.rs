//! The meeting point of handler and executor: [`Defer`], the handle in the request's extensions, over
//! the collector, which holds what was registered until the response is out and then releases it,
//! once.

mod collector;
mod elsewhere;
mod ending;
mod gate;
mod handle;
mod hold;
mod missing;
#[cfg(all(test, defer_loom))]
mod models;
#[cfg(feature = "events")]
mod outbox;
mod pool;
mod registration;
mod release;
mod scope;
mod seen;
mod sweep;

pub(crate) use collector::Collector;
pub(crate) use ending::{Ending, Head};
pub use handle::Defer;
pub(crate) use hold::Hold;
pub use missing::{MissingLayer, RequestExt};
#[cfg(feature = "events")]
pub(crate) use outbox::head_only;
pub use registration::{DeferPermit, DeferReserve};
pub(crate) use scope::Scope;
pub(crate) use seen::Mark;
