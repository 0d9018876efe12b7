//! What was deferred, and what became of it.

use std::fmt;
use std::panic::Location;
use std::time::Duration;

use crate::executor::RejectReason;
use crate::response::ResponseInfo;
use crate::task::{TaskId, When};

/// A task that was deferred, or was to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TaskRecord {
    /// Its identity; `None` for one that was rejected.
    pub id: Option<TaskId>,
    /// Its name, in full.
    pub name: String,
    /// Where it was registered.
    pub location: &'static Location<'static>,
    /// Its condition; ask it with [`would_run`](Self::would_run).
    pub when: When,
    /// Its timeout, where it is not the executor's.
    pub timeout: Option<Duration>,
    /// Whether it was made with [`Task::blocking`](crate::Task::blocking).
    pub blocking: bool,
    /// What became of it.
    pub state: TaskState,
    /// How many attempts have ended.
    pub attempts: u32,
    /// Its last error.
    pub error: Option<String>,
    /// The response that its condition was asked with.
    pub response: Option<ResponseInfo>,
}

/// What became of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TaskState {
    /// It has not ended; in capture mode: it was not run.
    Unfinished,
    /// It ended well.
    Completed,
    /// It failed for good, and is a dead letter.
    Discarded,
    /// Its condition did not hold.
    Skipped,
    /// It was taken back, or abandoned.
    Cancelled,
    /// A store lent it, and has it back: for another attempt, or unfinished.
    Kept,
    /// It was not accepted.
    Rejected(RejectReason),
}

impl TaskState {
    pub(super) fn named(outcome: &str) -> Self {
        match outcome {
            "completed" => TaskState::Completed,
            "discarded" => TaskState::Discarded,
            "skipped" => TaskState::Skipped,
            "kept" => TaskState::Kept,
            _ => TaskState::Cancelled,
        }
    }

    /// The name in reports, for example `completed`.
    pub fn as_str(self) -> &'static str {
        match self {
            TaskState::Unfinished => "unfinished",
            TaskState::Completed => "completed",
            TaskState::Discarded => "discarded",
            TaskState::Skipped => "skipped",
            TaskState::Cancelled => "cancelled",
            TaskState::Kept => "kept",
            TaskState::Rejected(_) => "rejected",
        }
    }
}

impl TaskRecord {
    /// Whether it would run after such a response.
    #[must_use]
    pub fn would_run(&self, response: &ResponseInfo) -> bool {
        self.when.holds(response)
    }

    fn is_called(&self, name: &str) -> bool {
        let outer = self.name.strip_suffix(name);
        outer.is_some_and(|outer| outer.is_empty() || outer.ends_with("::"))
    }

    fn is_deferred(&self) -> bool {
        !matches!(self.state, TaskState::Rejected(_) | TaskState::Cancelled)
    }
}

impl fmt::Display for TaskRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, location) = (&self.name, self.location);
        let (when, state) = (self.when.as_str(), self.state.as_str());
        write!(f, "`{name}` ({location}), when {when}: {state}")?;
        if self.attempts > 0 {
            write!(f, " after {} attempts", self.attempts)?;
        }
        if let TaskState::Rejected(reason) = self.state {
            write!(f, " ({})", reason.as_str())?;
        }
        if let Some(error) = &self.error {
            write!(f, ", {error}")?;
        }
        Ok(())
    }
}

/// What was deferred, and what became of it. Each assertion that fails says what was expected, and
/// lists everything that was deferred, with its location.
///
/// A task counts as deferred if it was accepted and not taken back.
#[derive(Clone, Debug)]
#[must_use = "ask it what was deferred"]
pub struct Report {
    tasks: Vec<TaskRecord>,
    response: Option<ResponseInfo>,
}

impl Report {
    pub(super) fn new(tasks: Vec<TaskRecord>, response: Option<ResponseInfo>) -> Self {
        Self { tasks, response }
    }

    /// All of them, in the order of their registration.
    #[must_use]
    pub fn tasks(&self) -> &[TaskRecord] {
        &self.tasks
    }

    /// What became of the response, as the conditions saw it. `None` in the reports of
    /// [`TestDefer`](super::TestDefer), which may be about several.
    #[must_use]
    pub fn response(&self) -> Option<&ResponseInfo> {
        self.response.as_ref()
    }

    /// The one task of this name.
    ///
    /// # Panics
    ///
    /// Where none was deferred, or more than one.
    #[track_caller]
    #[must_use]
    pub fn task(&self, name: &str) -> &TaskRecord {
        match *self.deferred(name) {
            [task] => task,
            _ => self.fail(name, "one deferred task"),
        }
    }

    /// Asserts that at least one task of this name was deferred.
    ///
    /// # Panics
    ///
    /// As every assertion here, where it does not hold.
    #[track_caller]
    pub fn assert_deferred(&self, name: &str) -> &Self {
        if self.deferred(name).is_empty() {
            self.fail(name, "a deferred task");
        }
        self
    }

    /// Asserts that exactly so many tasks of this name were deferred.
    #[track_caller]
    pub fn assert_deferred_times(&self, name: &str, times: usize) -> &Self {
        if self.deferred(name).len() != times {
            self.fail(name, &format!("{times} deferred tasks"));
        }
        self
    }

    /// Asserts that at least one task of this name was deferred for which `holds` is true.
    #[track_caller]
    pub fn assert_deferred_where(&self, name: &str, holds: impl Fn(&TaskRecord) -> bool) -> &Self {
        if !self.deferred(name).into_iter().any(holds) {
            self.fail(name, "a deferred task that fits the given predicate");
        }
        self
    }

    /// Asserts that no task of this name was deferred.
    #[track_caller]
    pub fn assert_not_deferred(&self, name: &str) -> &Self {
        if !self.deferred(name).is_empty() {
            self.fail(name, "no deferred task");
        }
        self
    }

    /// Asserts that exactly so many tasks were deferred, whatever their names.
    #[track_caller]
    pub fn assert_count(&self, count: usize) -> &Self {
        let found = self.tasks.iter().filter(|task| task.is_deferred()).count();
        assert!(
            found == count,
            "expected {count} deferred tasks, found {found}\n{self}"
        );
        self
    }

    /// Asserts that nothing was deferred.
    #[track_caller]
    pub fn assert_nothing_deferred(&self) -> &Self {
        self.assert_count(0)
    }

    /// Asserts that the tasks of this name, one or more, completed.
    #[track_caller]
    pub fn assert_completed(&self, name: &str) -> &Self {
        self.assert_state(name, TaskState::Completed)
    }

    /// Asserts that the tasks of this name, one or more, were skipped by their condition.
    #[track_caller]
    pub fn assert_skipped(&self, name: &str) -> &Self {
        self.assert_state(name, TaskState::Skipped)
    }

    /// Asserts that the tasks of this name, one or more, failed for good.
    #[track_caller]
    pub fn assert_discarded(&self, name: &str) -> &Self {
        self.assert_state(name, TaskState::Discarded)
    }

    /// Asserts that every task completed, or was skipped by its own condition or taken back.
    #[track_caller]
    pub fn assert_clean(&self) -> &Self {
        let bad = |task: &TaskRecord| {
            let state = task.state;
            matches!(
                state,
                TaskState::Unfinished | TaskState::Discarded | TaskState::Rejected(_)
            )
        };
        let count = self.tasks.iter().filter(|task| bad(task)).count();
        assert!(count == 0, "expected no failed task, found {count}\n{self}");
        self
    }

    #[track_caller]
    fn assert_state(&self, name: &str, state: TaskState) -> &Self {
        let tasks = self.deferred(name);
        if tasks.is_empty() || tasks.iter().any(|task| task.state != state) {
            self.fail(name, &format!("{} task", state.as_str()));
        }
        self
    }

    fn deferred(&self, name: &str) -> Vec<&TaskRecord> {
        let named = |task: &&TaskRecord| task.is_deferred() && task.is_called(name);
        self.tasks.iter().filter(named).collect()
    }

    #[track_caller]
    fn fail(&self, name: &str, expected: &str) -> ! {
        let found = self.deferred(name).len();
        panic!("expected {expected} of the name `{name}`, found {found} deferred\n{self}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tasks.is_empty() {
            return f.write_str("nothing was deferred");
        }
        f.write_str("what was deferred:")?;
        for task in &self.tasks {
            write!(f, "\n  {task}")?;
        }
        if let Some(response) = &self.response {
            let (end, bytes) = (response.end, response.bytes);
            let status = response.status.map_or(0, |status| status.as_u16());
            write!(f, "\nthe response: {status}, {end} at byte {bytes}")?;
        }
        Ok(())
    }
}
