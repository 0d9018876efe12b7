//! Whether a failed attempt is tried again, and when: plain data and pure functions.
//!
//! This is not `tower::retry`, which repeats a *request* while the client waits. No function here
//! reads a clock or draws a random number; both are passed in, and so the durable deliveries decide by
//! the very same functions as the tasks in memory.

mod budget;
mod decision;
mod policy;

pub use budget::RetryBudget;
pub(crate) use budget::TokenBucket;
pub use decision::DiscardReason;
pub(crate) use decision::{Decision, FailedAttempt, decide};
pub use policy::{Jitter, Retry};
