//! A task that is kept elsewhere than in this process: a store has it, and lends it for one attempt.
//!
//! The executor runs that attempt, says here how it ended, and forgets the task: a retry is the
//! keeper's affair, and so is a dead letter. The keeper brings its own place in the executor's capacity
//! and gives it back when what it was told is written down.

use std::fmt;
use std::time::Duration;

use crate::retry::DiscardReason;
use crate::sync::Arc;

/// Who keeps the task. Dropped without a word, it takes the attempt for one that never began.
pub(crate) trait Keeper: fmt::Debug + Send + Sync {
    /// It is handed to a worker: the response that it waited for is out.
    #[cfg(feature = "events")]
    fn released(&self);

    fn ended(self: Box<Self>, end: Kept);

    /// Nobody is left to be told how it ended.
    #[cfg(feature = "events")]
    fn is_gone(&self) -> bool;
}

/// How the attempt ended.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    Completed,
    /// Another attempt, after this long.
    Retry(Duration, Arc<str>),
    Discarded(DiscardReason, Arc<str>),
    /// What was kept cannot be read.
    Unreadable(Arc<str>),
}

/// What a task has from its keeper.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) keeper: Box<dyn Keeper>,
    /// How long ago its first attempt began.
    pub(crate) age: Duration,
}
