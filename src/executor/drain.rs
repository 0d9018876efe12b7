//! The end: everything that was accepted is finished, or named.
//!
//! Invariants:
//! 1. Before the deadline nothing is refused: what running tasks and requests in flight still register
//!    belongs to what is drained. Closing and being empty are one atomic step, so nothing slips in
//!    between.
//! 2. After the deadline everything that is left is cancelled and named once, whoever holds it.

use std::fmt;
use std::panic::Location;
use std::time::Duration;

use super::Shared;
use crate::clock::Tick;
use crate::observe;
use crate::retry::DiscardReason;
use crate::sync::{Arc, AtomicU32, Mutex, Ordering};
use crate::task::{Name, Node, TaskId};

/// How long a drain waits, after its deadline, for the runtime to drop what it cancelled. It is
/// immediate unless an attempt does not yield.
const GRACE: Duration = Duration::from_millis(100);

/// More tasks than these are counted and not named.
const NAMED: usize = 10_000;

const OPEN: u32 = 0;
const DRAINING: u32 = 1;
const ABANDONED: u32 = 2;

#[derive(Debug)]
pub(crate) struct Drain {
    phase: AtomicU32,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    began: Option<Began>,
    unfinished: Vec<Unfinished>,
    unnamed: u64,
}

/// The counters when the drain began.
#[derive(Clone, Copy, Debug)]
struct Began {
    at: Tick,
    totals: Totals,
}

#[derive(Clone, Copy, Debug)]
struct Totals {
    completed: u64,
    discarded: u64,
    skipped: u64,
    cancelled: u64,
}

/// What a drain found: how many tasks came to which end while it lasted, and the name of each that
/// did not complete.
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
    /// Deliveries that stay in a store, their attempts not consumed.
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
    /// Whether everything completed or was skipped by its own condition.
    pub fn is_clean(&self) -> bool {
        self.unfinished.is_empty() && self.unnamed == 0
    }

    /// Two executors that were drained together.
    pub(crate) fn plus(mut self, other: Self) -> Self {
        self.completed += other.completed;
        self.discarded += other.discarded;
        self.skipped += other.skipped;
        self.cancelled += other.cancelled;
        self.kept += other.kept;
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
            "drained in {:?}{}: {} completed, {} skipped, {} discarded, {} cancelled, {} kept",
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
            self.kept
        )?;
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

impl Default for Drain {
    fn default() -> Self {
        Self {
            phase: AtomicU32::new(OPEN),
            log: Mutex::new(Log::default()),
        }
    }
}

impl Drain {
    pub(super) fn has_begun(&self) -> bool {
        self.phase.load(Ordering::SeqCst) != OPEN
    }

    /// The deadline has passed: what turns up now is cancelled.
    pub(super) fn is_abandoned(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == ABANDONED
    }

    /// Remembers a task that did not complete, once a drain has begun.
    pub(super) fn note(&self, node: &Node, state: UnfinishedState, error: Option<Arc<str>>) {
        if !self.has_begun() {
            return;
        }
        let error = error.or_else(|| {
            node.settings()
                .and_then(|s| s.history.last())
                .map(|record| record.error.clone())
        });
        let (id, location, attempts) = (node.id(), node.header().location, node.attempts());
        self.write(id, &node.name(), location, attempts, state, error);
    }

    fn write(
        &self,
        id: TaskId,
        name: &Name,
        location: &'static Location<'static>,
        failed_attempts: u32,
        state: UnfinishedState,
        error: Option<Arc<str>>,
    ) {
        let mut log = self.log.lock();
        if log.unfinished.len() == NAMED {
            log.unnamed += 1;
            return;
        }
        let name = name.as_str().to_owned();
        log.unfinished.push(Unfinished {
            id,
            name,
            location,
            failed_attempts,
            state,
            error,
        });
    }
}

impl Shared {
    /// See [`Executor::drain`](super::Executor::drain). `requests`: whether requests that may still
    /// register something are waited for.
    pub(crate) async fn drain(self: &Arc<Self>, deadline: Tick, requests: bool) -> DrainReport {
        self.begin_drain();
        let _watcher = Watcher::new(self);
        let mut timed_out = false;
        loop {
            let mut changed = std::pin::pin!(self.quiet.notified());
            changed.as_mut().enable();
            if self.admission.is_closed() {
                timed_out = self.drain.is_abandoned();
                if self.admission.taken() == 0 {
                    break;
                }
            } else if (!requests || self.open_requests() == 0) && self.admission.close_if_empty() {
                break;
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(self.clock.instant(deadline)) => {
                    timed_out = true;
                    self.abandon().await;
                    break;
                }
            }
        }
        let report = self.drain_report(timed_out);
        observe::drained(&report);
        report
    }

    /// Waits until no task is outstanding.
    pub(super) async fn idle(&self) {
        let _watcher = Watcher::new(self);
        loop {
            let mut changed = std::pin::pin!(self.quiet.notified());
            changed.as_mut().enable();
            if self.admission.taken() == 0 {
                return;
            }
            changed.await;
        }
    }

    fn begin_drain(self: &Arc<Self>) {
        let mut log = self.drain.log.lock();
        if log.began.is_none() {
            log.began = Some(Began {
                at: self.clock.now(),
                totals: self.totals(),
            });
            self.drain.phase.store(DRAINING, Ordering::SeqCst);
        }
        drop(log);
        self.hurry();
    }

    /// The deadline has passed.
    async fn abandon(self: &Arc<Self>) {
        self.drain.phase.store(ABANDONED, Ordering::SeqCst);
        self.admission.close();
        self.release_sources();
        self.cancel_queued();
        for slot in self.slots.all() {
            slot.with(|running| running.token.as_ref().map(|token| token.cancel()));
            slot.abort();
        }
        let emptied = async {
            loop {
                let mut changed = std::pin::pin!(self.quiet.notified());
                changed.as_mut().enable();
                if self.admission.taken() == 0 {
                    return;
                }
                changed.await;
            }
        };
        let _ = tokio::time::timeout(GRACE, emptied).await;
        self.abandon_running();
    }

    /// By invariant 2: called whenever tasks turn up after the deadline.
    pub(super) fn cancel_queued(&self) {
        #[cfg(feature = "test-util")]
        self.cancel_all(self.held.take_all(), UnfinishedState::NeverStarted);
        let (ready, due) = self.queue.take_all();
        self.cancel_all(ready, UnfinishedState::NeverStarted);
        self.cancel_all(due, UnfinishedState::Waiting);
        self.cancel_all(self.blocking.take_all(), UnfinishedState::NeverStarted);
        self.cancel_all(self.waiting.take_all(), UnfinishedState::Waiting);
    }

    /// What no runtime can drop is counted as cancelled now, and not again when it ends.
    fn abandon_running(&self) {
        for slot in self.slots.all() {
            let abandoned = slot.with(|running| {
                let first = !running.abandoned;
                running.abandoned = true;
                first.then(|| running.clone())
            });
            let Some(running) = abandoned.flatten() else {
                continue;
            };
            observe::still_running(self, &running);
            let state = UnfinishedState::StillRunning;
            let failed = running.attempt - 1;
            self.drain.write(
                running.id,
                &running.name,
                running.location,
                failed,
                state,
                None,
            );
            self.counters.cancelled.add(1);
            self.give_back();
        }
    }

    fn totals(&self) -> Totals {
        Totals {
            completed: self.counters.completed.get(),
            discarded: self.counters.discarded.get(),
            skipped: self.counters.skipped.get(),
            cancelled: self.counters.cancelled.get(),
        }
    }

    fn drain_report(&self, timed_out: bool) -> DrainReport {
        let now = self.totals();
        let log = self.drain.log.lock();
        let (at, then) = log
            .began
            .map_or((Tick::ZERO, now), |began| (began.at, began.totals));
        DrainReport {
            completed: now.completed - then.completed,
            discarded: now.discarded - then.discarded,
            skipped: now.skipped - then.skipped,
            cancelled: now.cancelled - then.cancelled,
            kept: 0,
            unfinished: log.unfinished.clone(),
            unnamed: log.unnamed,
            timed_out,
            took: self.clock.now().since(at),
        }
    }
}

/// Counts one who waits for quiet, so that nobody else pays for the notification.
struct Watcher<'a>(&'a Shared);

impl<'a> Watcher<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.watchers.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::SeqCst);
    }
}
