//! The end: everything that was accepted is finished, or named.
//!
//! Invariants:
//! 1. Before the deadline nothing is refused: what running tasks and requests in flight still register
//!    belongs to what is drained. Closing and being empty are one atomic step, so nothing slips in
//!    between.
//! 2. After the deadline everything that is left is cancelled and named once, whoever holds it.

use std::panic::Location;
use std::time::Duration;

use tokio::sync::Notify;

use super::Shared;
use super::report::{DrainReport, Unfinished, UnfinishedState};
use crate::clock::Tick;
use crate::observe;
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
    /// Whoever feeds the executor stops when it begins.
    begun: Notify,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    began: Option<Began>,
    unfinished: Vec<Unfinished>,
    unnamed: u64,
    /// When the first drain ended, and the report was logged.
    ended: Option<Tick>,
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
    kept: u64,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            phase: AtomicU32::new(OPEN),
            begun: Notify::new(),
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
        if self.log.lock().began.is_none() {
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
    /// See [`Executor::drain`](super::Executor::drain). `responses`: whether responses under way, from
    /// which something may still be registered, are waited for, as handlers always are.
    pub(crate) async fn drain(self: &Arc<Self>, deadline: Tick, responses: bool) -> DrainReport {
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
            } else if self.no_more_requests(responses) && self.admission.close_if_empty() {
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
        self.drain_report(timed_out)
    }

    /// Ready once a drain has begun: what feeds the executor from elsewhere stops then.
    #[cfg(feature = "events")]
    pub(crate) async fn draining(&self) {
        let mut begun = std::pin::pin!(self.drain.begun.notified());
        begun.as_mut().enable();
        if !self.drain.has_begun() {
            begun.await;
        }
    }

    #[cfg(feature = "events")]
    pub(crate) fn is_draining(&self) -> bool {
        self.drain.has_begun()
    }

    fn no_more_requests(&self, responses: bool) -> bool {
        let (handlers, open) = self.open_requests();
        handlers == 0 && (open == 0 || !responses)
    }

    /// Waits until no task is outstanding.
    pub(super) async fn idle(self: &Arc<Self>) {
        self.kick();
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

    /// What happens from now on belongs to the report, though the drain itself may begin later.
    pub(crate) fn note_shutdown(&self) {
        self.drain.log.lock().began.get_or_insert_with(|| Began {
            at: self.clock.now(),
            totals: self.totals(),
        });
    }

    fn begin_drain(self: &Arc<Self>) {
        self.note_shutdown();
        // A deadline that has passed stays passed.
        let _ =
            self.drain
                .phase
                .compare_exchange(OPEN, DRAINING, Ordering::SeqCst, Ordering::SeqCst);
        self.drain.begun.notify_waiters();
        // After the beginning was noted: what it sets going belongs to its report.
        self.kick();
        self.hurry();
    }

    /// The deadline has passed.
    async fn abandon(self: &Arc<Self>) {
        self.drain.phase.store(ABANDONED, Ordering::SeqCst);
        self.admission.close();
        self.release_sources(true);
        self.cancel_queued();
        for slot in self.slots.all() {
            // Not under the slot's lock: cancelling wakes whoever waits for the token.
            if let Some(token) = slot.with(|running| running.token.clone()).flatten() {
                token.cancel();
            }
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
        // What had its place before the closing and was registered after the first look.
        self.release_sources(true);
        self.cancel_queued();
        self.abandon_running();
    }

    /// By invariant 2: called whenever tasks turn up after the deadline.
    pub(super) fn cancel_queued(&self) {
        #[cfg(feature = "test-util")]
        self.cancel_all(self.held.take_all(), UnfinishedState::NeverStarted);
        for (ready, due) in [self.queue.take_all(), self.blocking.take_all()] {
            self.cancel_all(ready, UnfinishedState::NeverStarted);
            self.cancel_all(due, UnfinishedState::Waiting);
        }
        self.cancel_all(self.waiting.take_all(), UnfinishedState::Waiting);
    }

    /// What no runtime can drop is counted as cancelled now, and not again when it ends.
    fn abandon_running(&self) {
        for slot in self.slots.all() {
            let Some(running) = slot.abandon() else {
                continue;
            };
            observe::still_running(self, &running);
            if running.lent {
                // Its keeper has its place, and hears of its end if there is one.
                self.counters.kept.add(1);
                continue;
            }
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
            kept: self.counters.kept.get(),
        }
    }

    fn drain_report(&self, timed_out: bool) -> DrainReport {
        let now = self.totals();
        let mut log = self.drain.log.lock();
        let first = log.ended.is_none();
        let ended = *log.ended.get_or_insert_with(|| self.clock.now());
        let (at, then) = log
            .began
            .map_or((Tick::ZERO, now), |began| (began.at, began.totals));
        let report = DrainReport {
            completed: now.completed - then.completed,
            discarded: now.discarded - then.discarded,
            skipped: now.skipped - then.skipped,
            cancelled: now.cancelled - then.cancelled,
            kept: now.kept - then.kept,
            dead_letters: self.letters.len() as u64,
            unfinished: log.unfinished.clone(),
            unnamed: log.unnamed,
            timed_out,
            took: ended.since(at),
        };
        drop(log);
        if first {
            observe::drained(&report);
        }
        report
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
