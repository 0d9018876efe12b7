//! Side effects that run after the response is really sent.

#[cfg(feature = "events")]
pub mod event;
