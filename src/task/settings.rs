//! [`Task`]: what a user says about a unit of deferred work.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::time::{Duration, SystemTime};

use super::body::{Blocking, Once, Plain, Repeat, WithContext, WithState};
use super::{Follows, Lent, Name, Node, TaskContext, TaskOutput, When};
use crate::clock::Tick;
use crate::retry::Retry;
use crate::sync::Arc;

/// A unit of deferred work, and how it is to be treated.
///
/// A closure becomes a task by itself ([`Defer::run`](crate::Defer::run) takes `impl IntoTask`); the
/// constructors here are for tasks that need a name, a policy or a state. The closure is `Fn`, not
/// `FnMut` or `FnOnce`: an attempt must not spend what the next one needs. A future cannot borrow from
/// its closure on stable Rust, so what it needs is cloned per attempt: [`with`](Task::with) does that.
///
/// Every setting that is not made is the executor's default.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::{Retry, Task, TaskError, When};
///
/// # #[derive(Clone)] struct App;
/// # impl App { async fn subscribe(&self, _: i64) -> Result<(), std::io::Error> { Ok(()) } }
/// # let app = App;
/// let user = 7;
/// let task = Task::with(app.clone(), move |app| async move { app.subscribe(user).await })
///     .name("newsletter")
///     .retry(Retry::exponential(12).give_up_after(Duration::from_secs(3600)))
///     .timeout(Duration::from_secs(5))
///     .when(When::success());
/// # let _ = task;
/// ```
#[must_use = "a task does nothing until it is given to `Defer::run` or `Executor::submit`"]
pub struct Task(Node);

/// What only some tasks have.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) name: Option<Name>,
    pub(crate) retry: Option<Retry>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) when: Option<When>,
    /// The span in which it was registered, where that is not the one of its request.
    pub(crate) follows: Option<Follows>,
    /// When its next attempt was due.
    pub(crate) due_at: Tick,
    /// Failed attempts since it was accepted, or replayed.
    pub(crate) attempts: u32,
    /// A drain gave it its last attempt.
    pub(crate) last_chance: bool,
    /// The condition held once, and is not asked again.
    pub(crate) admitted: bool,
    pub(crate) history: History,
    /// It is kept elsewhere, and lent for this attempt.
    pub(crate) lent: Option<Lent>,
}

/// A failed attempt, as a dead letter remembers it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttemptRecord {
    /// The number of the attempt, counted from 1; a replay starts again at 1.
    pub attempt: u32,
    /// When it ended.
    pub at: SystemTime,
    /// Its error's text with its causes, or what the panic said, at most 1 KiB.
    pub error: Arc<str>,
}

/// Failed attempts over all replays: the first one and the latest.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    first: Option<AttemptRecord>,
    latest: Vec<AttemptRecord>,
}

impl History {
    /// More than these are forgotten.
    const LATEST: usize = 15;

    pub(crate) fn push(&mut self, record: AttemptRecord) {
        if self.first.is_none() {
            self.first = Some(record);
            return;
        }
        if self.latest.len() == Self::LATEST {
            self.latest.remove(0);
        }
        // Room for four at once would be a third of what a waiting retry takes up.
        self.latest.reserve_exact(1);
        self.latest.push(record);
    }

    pub(crate) fn last(&self) -> Option<&AttemptRecord> {
        self.latest.last().or(self.first.as_ref())
    }

    pub(crate) fn to_vec(&self) -> Vec<AttemptRecord> {
        self.first.iter().chain(&self.latest).cloned().collect()
    }
}

impl Task {
    /// A task that calls `attempt` for each of its attempts. What each attempt consumes it must clone, or
    /// be given by [`with`](Task::with).
    #[track_caller]
    pub fn new<F, Fut>(attempt: F) -> Self
    where
        F: Fn() -> Fut + Send + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        Self(Node::reused::<Repeat<_>>(
            Plain(attempt),
            Location::caller(),
        ))
    }

    /// A task that gives each of its attempts a clone of `state`.
    #[track_caller]
    pub fn with<S, F, Fut>(state: S, attempt: F) -> Self
    where
        S: Clone + Send + 'static,
        F: Fn(S) -> Fut + Send + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        Self(Node::reused::<Repeat<_>>(
            WithState(state, attempt),
            Location::caller(),
        ))
    }

    /// A task that is told about its attempt: its number, how the last one ended, what became of the
    /// response, a cancellation token.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_defer::{Task, TaskContext, TaskError};
    ///
    /// # async fn charge(_: String) -> Result<(), std::io::Error> { Ok(()) }
    /// let task = Task::with_context(|context: TaskContext| async move {
    ///     // The same for every attempt: the receiver can tell a repetition.
    ///     charge(context.id().to_string()).await?;
    ///     Ok::<_, TaskError>(())
    /// });
    /// # let _ = task;
    /// ```
    #[track_caller]
    pub fn with_context<F, Fut>(attempt: F) -> Self
    where
        F: Fn(TaskContext) -> Fut + Send + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        Self(Node::reused::<Repeat<_>>(
            WithContext(attempt),
            Location::caller(),
        ))
    }

    /// A plain future. It can be run only once: one attempt, whatever the policy says, and no replay if
    /// that fails.
    #[track_caller]
    pub fn once<Fut>(future: Fut) -> Self
    where
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        Self(Node::reused::<Once<_>>(future, Location::caller()))
    }

    /// CPU-heavy or blocking work. It runs on a thread of the executor's own, not on the async
    /// workers, and counts against
    /// [`blocking_concurrency`](crate::ExecutorBuilder::blocking_concurrency). Nothing can stop it but
    /// itself; see [`blocking_with_context`](Task::blocking_with_context).
    #[track_caller]
    pub fn blocking<F, R>(attempt: F) -> Self
    where
        F: Fn() -> R + Send + 'static,
        R: TaskOutput + 'static,
    {
        let attempt = move |_: TaskContext| attempt();
        Self(Node::new(Blocking::named::<F>(attempt), Location::caller()))
    }

    /// As [`blocking`](Task::blocking), told about its attempt: it should look at the context's
    /// cancellation token from time to time.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_defer::{Task, TaskContext};
    ///
    /// # fn render(_page: u32) {}
    /// let task = Task::blocking_with_context(|context: TaskContext| {
    ///     for page in 0..1000 {
    ///         if context.is_cancelled() {
    ///             return Err("cancelled before its last page");
    ///         }
    ///         render(page);
    ///     }
    ///     Ok(())
    /// });
    /// # let _ = task;
    /// ```
    #[track_caller]
    pub fn blocking_with_context<F, R>(attempt: F) -> Self
    where
        F: Fn(TaskContext) -> R + Send + 'static,
        R: TaskOutput + 'static,
    {
        Self(Node::new(Blocking::named::<F>(attempt), Location::caller()))
    }

    /// What it is called in logs, metrics and reports. Default: the path of the function that
    /// registered it. Use few different names: they become metric labels.
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.0.settings_mut().name = Some(name.into().into());
        self
    }

    /// When it is tried again. Default: the executor's, which is [`Retry::default`] unless it says
    /// otherwise.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.0.settings_mut().retry = Some(retry);
        self
    }

    /// How long an attempt may take. Default: the executor's (60 s).
    ///
    /// It acts at await points: an attempt that never yields is reported as stuck instead. A blocking
    /// one is reported, and its token cancelled; it keeps its place until it returns.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.0.settings_mut().timeout = Some(timeout);
        self
    }

    /// Whether it runs, given what became of the response. Default: [`When::unless_failed`].
    pub fn when(mut self, when: When) -> Self {
        self.0.settings_mut().when = Some(when);
        self
    }

    pub(crate) fn from_node(node: Node) -> Self {
        Self(node)
    }

    pub(crate) fn into_node(self) -> Node {
        self.0
    }
}

/// What `run` and `submit` take: a [`Task`], or a closure that makes the future of an attempt.
///
/// Not `Into<Task>`, which says no more than that it is not implemented.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a task",
    label = "expected a closure that makes a future, or a `Task`",
    note = "wrap an async call in a closure, `|| call(…)`: each attempt makes its own future",
    note = "a future that can only be run once is given as `Task::once(future)`"
)]
pub trait IntoTask: sealed::Sealed {
    /// The task, with the defaults of its executor where it says nothing itself.
    fn into_task(self) -> Task;
}

mod sealed {
    pub trait Sealed {}
    impl<T: Into<super::Task>> Sealed for T {}
}

impl IntoTask for Task {
    fn into_task(self) -> Task {
        self
    }
}

impl<F, Fut> IntoTask for F
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
    #[track_caller]
    fn into_task(self) -> Task {
        Task::new(self)
    }
}

impl<F, Fut> From<F> for Task
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
    #[track_caller]
    fn from(attempt: F) -> Self {
        Task::new(attempt)
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("name", &self.0.name().as_str())
            .finish_non_exhaustive()
    }
}
