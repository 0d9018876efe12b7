//! What a user holds of a task that was registered.

use std::fmt;

use super::{RejectReason, Shared, UnfinishedState};
use crate::sync::Arc;
use crate::task::{Sequence, TaskId};

/// What `run` and `submit` return: whether the task was accepted, and a way to take it back.
///
/// Dropping it changes nothing: the task runs.
pub struct TaskHandle(Result<Accepted, RejectReason>);

struct Accepted {
    sequence: Sequence,
    holder: Arc<dyn Cancel>,
}

impl Accepted {
    fn id(&self) -> TaskId {
        self.sequence.id()
    }
}

/// Whoever holds tasks that have not started.
pub(crate) trait Cancel: Send + Sync {
    fn cancel(&self, id: TaskId) -> bool;
}

impl TaskHandle {
    pub(crate) fn accepted(sequence: Sequence, holder: Arc<dyn Cancel>) -> Self {
        Self(Ok(Accepted { sequence, holder }))
    }

    pub(crate) fn rejected(reason: RejectReason) -> Self {
        Self(Err(reason))
    }

    /// Whether the task was accepted. One that was not has been dropped, counted and logged.
    pub fn is_accepted(&self) -> bool {
        self.0.is_ok()
    }

    /// Why it was not accepted.
    pub fn rejection(&self) -> Option<RejectReason> {
        self.0.as_ref().err().copied()
    }

    /// The task's identity, where it was accepted.
    pub fn id(&self) -> Option<TaskId> {
        self.0.as_ref().ok().map(Accepted::id)
    }

    /// Takes the task back: a task of a request until the release, one that was submitted until a
    /// worker takes it (which walks the queue). Returns whether it was taken back: then it never runs
    /// and counts as cancelled. `false`: it has been released or started, was cancelled before, or was
    /// never accepted.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::Defer;
    /// # async fn welcome(_: i64) {}
    /// # async fn pay(_: i64) -> Result<(), &'static str> { Ok(()) }
    /// # async fn handler(defer: Defer) -> Result<(), &'static str> {
    /// let mail = defer.run(move || welcome(17));
    /// if let Err(error) = pay(17).await {
    ///     mail.cancel();
    ///     return Err(error);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn cancel(&self) -> bool {
        self.0
            .as_ref()
            .is_ok_and(|accepted| accepted.holder.cancel(accepted.id()))
    }
}

impl Cancel for Shared {
    fn cancel(&self, id: TaskId) -> bool {
        let Some(node) = self.take_queued(|node| node.id() == id) else {
            return false;
        };
        self.cancel(node, UnfinishedState::TakenBack);
        true
    }
}

impl fmt::Debug for TaskHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(accepted) => f.debug_tuple("TaskHandle").field(&accepted.id()).finish(),
            Err(reason) => f.debug_tuple("TaskHandle").field(reason).finish(),
        }
    }
}
