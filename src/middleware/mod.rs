//! The only room that knows HTTP traffic: layer → service → future → body.
//!
//! The layer belongs outermost: what stands outside it and collects or compresses the body makes the
//! server let go of our body before the response is out, and the release comes early.

mod body;
mod future;
#[cfg(feature = "test-util")]
mod inline;
mod layer;
#[cfg(feature = "events")]
mod recorded;
mod service;

pub use body::DeferBody;
pub use future::DeferFuture;
pub use layer::DeferLayer;
pub use service::DeferService;
