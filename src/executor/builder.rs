//! What an executor is allowed, with the reason for each default.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;

use super::dead_letters::{DeadLetter, Hook};
use super::{Executor, Shared};
use crate::retry::{Retry, RetryBudget};
use crate::sync::Arc;
use crate::task::Name;

/// What happens to a new task when there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// The new task is rejected, and its handle says so. The default: what was accepted stays.
    #[default]
    Reject,
    /// The oldest task that has not started makes room and becomes a dead letter; where there is none
    /// (all are running, waiting for a retry or not yet released), the new one is rejected.
    DropOldest,
}

/// Builds an [`Executor`].
///
/// | setting | default | reason |
/// | --- | --- | --- |
/// | [`name`](Self::name) | `default` | |
/// | [`concurrency`](Self::concurrency) | 64 | most side effects wait for a network; a pool or a peer seldom likes more from one process |
/// | [`capacity`](Self::capacity) | 16,384 | at 64 bytes and a kilobyte of captures each, 17 MiB |
/// | [`overflow`](Self::overflow) | reject the new one | what was accepted is a promise |
/// | [`timeout`](Self::timeout) | 60 s | longer than any sane call, short enough to free a slot |
/// | [`retry`](Self::retry) | see [`Retry`] | |
/// | [`retry_budget`](Self::retry_budget) | 100 a second, 500 at once | see [`RetryBudget`] |
/// | [`blocking_concurrency`](Self::blocking_concurrency) | 4 | CPU work gains nothing from more threads than cores |
/// | [`dead_letters`](Self::dead_letters) | 1,024 | as many as a person will look at |
/// | [`runtime`](Self::runtime), [`dedicated`](Self::dedicated) | that of the caller | a wake-up across runtimes costs more than the tasks that wait |
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::{Executor, Overflow};
///
/// let executor = Executor::builder()
///     .concurrency(64)
///     .capacity(65_536)
///     .overflow(Overflow::Reject)
///     .timeout(Duration::from_secs(20))
///     .build();
/// # let _ = executor;
/// ```
#[must_use = "call `build`"]
pub struct ExecutorBuilder {
    pub(crate) config: Config,
}

pub(crate) struct Config {
    pub(crate) name: Name,
    pub(crate) concurrency: usize,
    pub(crate) capacity: usize,
    pub(crate) overflow: Overflow,
    pub(crate) timeout: Duration,
    pub(crate) retry: Retry,
    pub(crate) budget: RetryBudget,
    pub(crate) blocking_concurrency: usize,
    pub(crate) dead_letters: usize,
    pub(crate) on_dead_letter: Option<Hook>,
    pub(crate) runtime: Option<Handle>,
    pub(crate) threads: Option<usize>,
}

impl Default for ExecutorBuilder {
    fn default() -> Self {
        Self {
            config: Config {
                name: Name::Static("default"),
                concurrency: 64,
                capacity: 16_384,
                overflow: Overflow::Reject,
                timeout: Duration::from_secs(60),
                retry: Retry::default(),
                budget: RetryBudget::default(),
                blocking_concurrency: 4,
                dead_letters: 1024,
                on_dead_letter: None,
                runtime: None,
                threads: None,
            },
        }
    }
}

impl ExecutorBuilder {
    /// What it is called in logs and metrics; worth giving where there is more than one.
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.config.name = name.into().into();
        self
    }

    /// Attempts of async tasks that run at once; at least 1. Waiting for a retry holds no slot. Default: 64.
    ///
    /// It bounds what *waits*. Tasks that keep a CPU busy hold the server's own threads, and no bound
    /// protects the responses from them, unless it is smaller than the number of worker threads: give
    /// such work a [`runtime`](Self::runtime) of its own, or make it
    /// [blocking](crate::Task::blocking).
    pub fn concurrency(mut self, attempts: usize) -> Self {
        self.config.concurrency = attempts.max(1);
        self
    }

    /// Accepted and unfinished tasks: registered, queued, running and waiting for a retry; at least 1.
    /// A place is reserved when a task is registered. Default: 16,384.
    pub fn capacity(mut self, tasks: usize) -> Self {
        self.config.capacity = tasks.max(1);
        self
    }

    /// What `run` and `submit` do with a new task when there is no room; `try_run` and `try_submit` give it
    /// back whatever stands here. Default: [`Overflow::Reject`].
    pub fn overflow(mut self, overflow: Overflow) -> Self {
        self.config.overflow = overflow;
        self
    }

    /// How long an attempt may take, where the task does not say so itself. Default: 60 s. It acts at await
    /// points: see [`Task::timeout`](crate::Task::timeout).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = timeout;
        self
    }

    /// When a task is tried again, where it does not say so itself. Default: [`Retry::default`].
    pub fn retry(mut self, retry: Retry) -> Self {
        self.config.retry = retry;
        self
    }

    /// How many retries are started in a second. It delays them and never discards one. Default: 100, and
    /// 500 at once.
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.config.budget = budget;
        self
    }

    /// Attempts of [blocking](crate::Task::blocking) tasks that run at once, each on a thread of its
    /// own; at least 1. Default: 4. The threads start on demand and end after 10 s without work.
    pub fn blocking_concurrency(mut self, attempts: usize) -> Self {
        self.config.blocking_concurrency = attempts.max(1);
        self
    }

    /// How many dead letters are kept. When one more is born the oldest falls out, counted and logged.
    /// Default: 1,024; with 0 none is kept, and the hook below still sees each.
    pub fn dead_letters(mut self, letters: usize) -> Self {
        self.config.dead_letters = letters;
        self
    }

    /// Called with each task that is discarded. Dead letters are in memory and end with the process, at
    /// every deploy: this is the way to keep them elsewhere. It is called where the task is
    /// discarded: on a worker, on a blocking thread, or, for one that [`Overflow::DropOldest`] pushes out,
    /// in the call that registers the new one. It must not block; a panic in it is caught and logged.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_defer::Executor;
    ///
    /// let executor = Executor::builder()
    ///     .on_dead_letter(|letter| eprintln!("{} failed for good: {}", letter.name, letter.error))
    ///     .build();
    /// # let _ = executor;
    /// ```
    ///
    /// It is called before the dead letter is kept, so it cannot be replayed from within. What the hook
    /// submits to a full executor is rejected, also with [`Overflow::DropOldest`].
    pub fn on_dead_letter(mut self, hook: impl Fn(&DeadLetter) + Send + Sync + 'static) -> Self {
        self.config.on_dead_letter = Some(Box::new(hook));
        self
    }

    /// Runs async tasks on this runtime instead of that of the caller: CPU-heavy work then cannot take
    /// the server's threads. The runtime must have its timer enabled, and outlive its work.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.config.runtime = Some(runtime);
        self
    }

    /// Runs async tasks on a runtime of the executor's own with this many threads (at least 1), for
    /// work that keeps a CPU busy: it then competes with the server for the cores, as everything does,
    /// but never for the server's threads, and responses wait for none of it. Fewer threads than cores
    /// leave the server the rest.
    ///
    /// The runtime is made when the first task needs it, and ends when the executor has been dropped and
    /// its workers have ended (idle ones within about ten seconds). Nothing waits for it: drain first.
    pub fn dedicated(mut self, threads: usize) -> Self {
        self.config.threads = Some(threads.max(1));
        self
    }

    /// Makes the executor. It starts nothing until a task needs it.
    #[must_use]
    pub fn build(self) -> Executor {
        Executor::from_shared(Arc::new(Shared::new(self.config)))
    }
}

impl fmt::Debug for ExecutorBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecutorBuilder")
            .field("name", &self.config.name.as_str())
            .field("concurrency", &self.config.concurrency)
            .field("capacity", &self.config.capacity)
            .field("overflow", &self.config.overflow)
            .field("timeout", &self.config.timeout)
            .field("retry", &self.config.retry)
            .field("retry_budget", &self.config.budget)
            .field("blocking_concurrency", &self.config.blocking_concurrency)
            .field("dead_letters", &self.config.dead_letters)
            .finish_non_exhaustive()
    }
}
