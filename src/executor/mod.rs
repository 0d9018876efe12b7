//! Where tasks run: bounded in what it accepts, bounded in what runs at once, honest about the rest.
//!
//! It knows no HTTP and can be used without a request ([`Executor::submit`]).
//!
//! **Not `tokio::spawn`**, which bounds nothing, retries nothing, and forgets its tasks when the
//! runtime ends. **Not `TaskTracker`**, which waits for them at shutdown and does no more. **Not a job
//! queue**: tasks live in this process and die with it.
//!
//! The way of a task: [`admission`] reserves its place, [`queue`] holds it until a [`worker`] takes it,
//! [`attempt`] runs it once, [`settle`] decides what its outcome means; then it is done, or a
//! [`dead letter`](dead_letters), or [`waiting`] until its next attempt is due.

mod admission;
mod alarm;
mod attempt;
mod blocking;
mod builder;
mod counters;
mod dead_letters;
mod dedicated;
mod drain;
mod groups;
mod handle;
#[cfg(feature = "test-util")]
mod held;
#[cfg(all(test, defer_loom))]
mod models;
mod place;
mod queue;
mod refusal;
mod rejected;
mod report;
mod requests;
mod running;
mod runtime;
mod settle;
mod shared;
mod snapshot;
mod task_handle;
mod timer;
mod waiting;
mod watch;
mod wheel;
mod worker;

pub use builder::{ExecutorBuilder, Overflow};
pub use dead_letters::{DeadLetter, DeadLetters, ReplayError};
pub use groups::DeadLetterGroup;
pub(crate) use handle::located;
pub use handle::{Executor, Permit, Reserve};
pub(crate) use place::Place;
pub use rejected::{Closed, RejectReason, Rejected};
pub use report::{DrainReport, Unfinished, UnfinishedState};
pub(crate) use requests::Source;
pub(crate) use running::Running;
pub(crate) use runtime::Missing;
pub(crate) use shared::Shared;
pub use snapshot::{RunningTask, Snapshot};
pub(crate) use task_handle::Cancel;
pub use task_handle::TaskHandle;
