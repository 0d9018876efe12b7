//! What an operator sees: the only room that names fields, levels, messages and metrics.
//! `docs/observability.md` lists them all, and a test holds it against this room.
//!
//! All of it has the target `tower_defer`. Levels: chatter is `debug`, a retry is `info`, what needs
//! eyes (a dead letter, a rejection, a stuck attempt, a panic of the user's code) is `warn`, what
//! keeps the executor from its promise is `error`. Without a subscriber each call is one relaxed
//! load; without a recorder each metric is a look at one thread-local and one atomic.

mod complaint;
#[cfg(feature = "events")]
mod deliveries;
mod events;
mod happening;
#[cfg(feature = "metrics")]
mod metrics;
mod span;

pub(crate) use complaint::{Complaint, Complaints, commonest};
#[cfg(feature = "events")]
pub(crate) use deliveries::*;
pub(crate) use events::*;
#[cfg(feature = "test-util")]
pub(crate) use happening::Happening;
pub(crate) use happening::{changed, gone, place_freed};
#[cfg(feature = "metrics")]
pub(crate) use metrics::Gauges;
pub(crate) use span::{AttemptSpan, attempts_are_seen, current_span, started};
