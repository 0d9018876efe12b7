//! What a drain reports: plain data.

use std::fmt;
use std::panic::Location;
use std::time::Duration;

use crate::retry::DiscardReason;
use crate::sync::Arc;
use crate::task::{Node, TaskId};

/// What a drain found: how many tasks came to which end while it lasted, and the name of each that
/// did not complete.
///
/// What ended before the drain began is not in it: that is in the [`Snapshot`](crate::Snapshot).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DrainReport {
    /// Tasks that completed during the drain.
    pub completed: u64,
    /// Tasks that failed for good during the drain; they are dead letters.
    pub discarded: u64,
    /// Tasks whose condition did not hold.
    pub skipped: u64,
    /// Tasks that were abandoned at the deadline, or taken back by their handle.
    pub cancelled: u64,
    /// Dead letters that are kept, in memory, when the report is made: from before the drain, too. They
    /// go with the process.
    pub dead_letters: u64,
    /// Attempts of deliveries that went back to their store during the drain: unfinished and not
    /// consumed, or to be tried again. What waits there besides is in `Events::counts`.
    pub kept: u64,
    /// Each task that did not complete, and why; at most 10,000 of them.
    pub unfinished: Vec<Unfinished>,
    /// How many more there were.
    pub unnamed: u64,
    /// Whether the deadline came first.
    pub timed_out: bool,
    /// How long it took.
    pub took: Duration,
}

/// A task that did not complete.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Unfinished {
    /// Its identity.
    pub id: TaskId,
    /// Its name.
    pub name: String,
    /// Where it was registered.
    pub location: &'static Location<'static>,
    /// Attempts that had begun and failed.
    pub failed_attempts: u32,
    /// What became of it.
    pub state: UnfinishedState,
    /// Its last error, where it had one.
    pub error: Option<Arc<str>>,
}

/// Why a task did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnfinishedState {
    /// It was queued, or its request had not released it: nothing of it has run.
    NeverStarted,
    /// An attempt was running and was dropped at an await point.
    Interrupted,
    /// It waited for its next attempt.
    Waiting,
    /// An attempt was running and could not be stopped: it never yielded, or it blocks a thread.
    StillRunning,
    /// It failed for good during the drain.
    Discarded(DiscardReason),
    /// Its handle took it back.
    TakenBack,
}

impl UnfinishedState {
    /// That of a task that is cancelled between two attempts, or before the first.
    pub(super) fn unstarted(node: &Node) -> Self {
        if node.attempts() > 0 {
            UnfinishedState::Waiting
        } else {
            UnfinishedState::NeverStarted
        }
    }

    /// The name in logs, for example `never_started`.
    pub fn as_str(self) -> &'static str {
        match self {
            UnfinishedState::NeverStarted => "never_started",
            UnfinishedState::Interrupted => "interrupted",
            UnfinishedState::Waiting => "waiting",
            UnfinishedState::StillRunning => "still_running",
            UnfinishedState::Discarded(_) => "discarded",
            UnfinishedState::TakenBack => "taken_back",
        }
    }
}

impl DrainReport {
    /// Whether everything completed, was skipped by its own condition, or was taken back by its own
    /// handle. It says nothing of tasks that failed before the drain began.
    pub fn is_clean(&self) -> bool {
        self.unnamed == 0
            && self
                .unfinished
                .iter()
                .all(|task| task.state == UnfinishedState::TakenBack)
    }

    /// Two executors that were drained together.
    pub(crate) fn plus(mut self, other: Self) -> Self {
        self.completed += other.completed;
        self.discarded += other.discarded;
        self.skipped += other.skipped;
        self.cancelled += other.cancelled;
        self.kept += other.kept;
        self.dead_letters += other.dead_letters;
        self.unfinished.extend(other.unfinished);
        self.unnamed += other.unnamed;
        self.timed_out |= other.timed_out;
        self.took = self.took.max(other.took);
        self
    }
}

impl fmt::Display for DrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "drained in {:?}{}: {} completed, {} skipped, {} discarded, {} cancelled",
            self.took,
            if self.timed_out {
                " (the deadline came first)"
            } else {
                ""
            },
            self.completed,
            self.skipped,
            self.discarded,
            self.cancelled,
        )?;
        if self.kept > 0 {
            write!(f, ", {} kept", self.kept)?;
        }
        if self.dead_letters > 0 {
            write!(
                f,
                "; dead letters, lost with this process: {}",
                self.dead_letters
            )?;
        }
        for task in &self.unfinished {
            write!(
                f,
                "\n  {} ({}), {}",
                task.name,
                task.location,
                task.state.as_str()
            )?;
            if let UnfinishedState::Discarded(reason) = task.state {
                write!(f, " ({reason})")?;
            }
            if let Some(error) = &task.error {
                write!(f, ": {error}")?;
            }
        }
        if self.unnamed > 0 {
            write!(f, "\n  and {} more", self.unnamed)?;
        }
        Ok(())
    }
}
