//! A task that was not accepted, and why.

use std::fmt;

use super::admission::NoPlace;
use crate::task::Task;

/// Why a task was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectReason {
    /// The executor holds as many unfinished tasks as its capacity allows.
    Full,
    /// The request has registered as many tasks as a request may.
    RequestLimit,
    /// The executor has been drained.
    Closed,
}

impl RejectReason {
    /// The name in logs and metric labels, for example `request_limit`.
    pub fn as_str(self) -> &'static str {
        match self {
            RejectReason::Full => "full",
            RejectReason::RequestLimit => "request_limit",
            RejectReason::Closed => "closed",
        }
    }
}

impl From<NoPlace> for RejectReason {
    fn from(none: NoPlace) -> Self {
        match none {
            NoPlace::Full => RejectReason::Full,
            NoPlace::Closed => RejectReason::Closed,
        }
    }
}

/// A task that was not accepted. It is given back: nothing of it has run.
#[must_use = "the task has not been accepted and is given back here"]
pub struct Rejected {
    task: Task,
    reason: RejectReason,
}

impl Rejected {
    pub(crate) fn new(task: Task, reason: RejectReason) -> Self {
        Self { task, reason }
    }

    /// Why it was not accepted.
    pub fn reason(&self) -> RejectReason {
        self.reason
    }

    /// The task, for another try or another executor.
    pub fn into_task(self) -> Task {
        self.task
    }
}

impl fmt::Debug for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected")
            .field("reason", &self.reason)
            .field("task", &self.task)
            .finish()
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            RejectReason::Full => {
                "the task was rejected: the executor is full; answer 503, wait with `reserve`, or \
                 give the executor more `capacity` or `concurrency`"
            }
            RejectReason::RequestLimit => {
                "the task was rejected: this request has registered as many tasks as \
                 `DeferLayer::max_tasks_per_request` allows"
            }
            RejectReason::Closed => "the task was rejected: the executor has been drained",
        })
    }
}

impl std::error::Error for Rejected {}

/// No place will become free: the executor has been drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(pub(crate) ());

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the executor has been drained and accepts no more tasks")
    }
}

impl std::error::Error for Closed {}
