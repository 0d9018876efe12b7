//! Side effects that run after the response is really sent.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

mod defer;
mod executor;
mod middleware;
mod observe;
mod response;
mod retry;
mod shutdown;
mod task;

#[cfg(feature = "axum")]
pub mod axum;
#[cfg(feature = "hyper")]
pub mod hyper;
#[cfg(feature = "tonic")]
pub mod tonic;

#[cfg(feature = "test-util")]
pub mod test_util;

mod clock;
mod sync;

pub use defer::{Defer, DeferPermit, DeferReserve, MissingLayer, RequestExt};
pub use executor::{
    Closed, DeadLetter, DeadLetterGroup, DeadLetters, DrainReport, Executor, ExecutorBuilder,
    Overflow, Permit, RejectReason, Rejected, ReplayError, Reserve, RunningTask, Snapshot,
    TaskHandle, Unfinished, UnfinishedState,
};
pub use middleware::{DeferBody, DeferFuture, DeferLayer, DeferService};
pub use response::{End, ResponseInfo};
pub use retry::{DiscardReason, Jitter, Retry, RetryBudget};
#[cfg(feature = "signal")]
pub use shutdown::signal;
pub use shutdown::{Shutdown, StopServing};
pub use task::{AttemptRecord, BoxError, Task, TaskContext, TaskError, TaskId, TaskOutput, When};
