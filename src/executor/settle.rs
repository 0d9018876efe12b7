//! What the outcome of an attempt means: the end of the task, a retry, or a dead letter.
//!
//! Every accepted task comes through one of the functions here exactly once for its end, and each of
//! them counts it, says so, and gives its place back, in that order: who sees the place free sees the
//! count.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::Shared;
use super::attempt::{self, Begun, Outcome};
use super::report::UnfinishedState;
use super::running::Slot;
use crate::clock::{self, Tick};
use crate::error::{Class, TEXT_LIMIT, TaskError, bounded_text, error_text, panic_text};
use crate::observe;
use crate::retry::{Decision, DiscardReason, FailedAttempt, decide};
use crate::sync::Arc;
use crate::task::{AttemptRecord, Fifo, Kept, Lent, Node};

impl Shared {
    #[inline(always)]
    pub(super) fn settle(
        self: &Arc<Self>,
        node: Node,
        outcome: Outcome,
        begun: Option<&mut Begun>,
        slot: &Slot,
    ) {
        if slot.end() || matches!(outcome, Outcome::Abandoned) {
            return self.ended_after_all(node, outcome);
        }
        match (begun, outcome) {
            (Some(begun), outcome) if begun.span.is_seen() => {
                begun.span.outcome(self, &node, outcome.as_str());
                begun.span.within(|| self.conclude(node, outcome));
            }
            // First, and in line: nearly every attempt ends so.
            (_, Outcome::Completed) => self.completed(node),
            (_, outcome) => self.conclude(node, outcome),
        }
    }

    /// A drain has counted the task and given its place back.
    #[cold]
    pub(super) fn ended_after_all(&self, mut node: Node, outcome: Outcome) {
        observe::abandoned_ended(&node);
        if let (Some(lent), Outcome::Completed) = (node.take_lent(), &outcome) {
            lent.keeper.ended(Kept::Completed);
        }
        observe::panic_in_drop(node.drop_quietly());
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(outcome)));
        observe::panic_in_drop(dropped.err().map(panic_text));
    }

    fn conclude(self: &Arc<Self>, node: Node, outcome: Outcome) {
        match outcome {
            Outcome::Completed => self.completed(node),
            // The same to the task: `settle` tells them apart.
            Outcome::Skipped | Outcome::Abandoned => self.skipped(node),
            Outcome::Failed(error) => {
                let (class, text) = self.judge(&node, error);
                self.failed(node, class, text);
            }
            Outcome::TimedOut(limit) => {
                self.failed(node, Class::TimedOut, format!("timed out after {limit:?}"));
            }
            Outcome::Panicked(text) => {
                self.failed(node, Class::Panicked, format!("panicked: {text}"));
            }
        }
    }

    #[inline(always)]
    pub(super) fn completed(&self, mut node: Node) {
        observe::completed(self, &node);
        let lent = node.take_lent();
        // Dropped before it is counted: what it captured is free when the executor says so.
        observe::panic_in_drop(node.drop_quietly());
        self.counters.completed.add(1);
        match lent {
            None => self.give_back(),
            Some(lent) => self.tell(lent, Kept::Completed),
        }
    }

    /// Its keeper gives its place back, when it has written this down.
    #[cold]
    fn tell(&self, lent: Lent, end: Kept) {
        lent.keeper.ended(end);
        observe::changed(self);
    }

    fn skipped(&self, node: Node) {
        observe::skipped(self, &node);
        observe::panic_in_drop(node.drop_quietly());
        self.counters.skipped.add(1);
        self.give_back();
    }

    /// What kind of failure it is. The policy's predicate, the error's `Display` and its drop are the
    /// user's code.
    fn judge(&self, node: &Node, error: TaskError) -> (Class, String) {
        let retry = node
            .settings()
            .and_then(|s| s.retry.as_ref())
            .unwrap_or(&self.config.retry);
        let text = error_text(error.get_ref());
        let class = match error.class() {
            Class::Fatal => Ok(Class::Fatal),
            class => catch_unwind(AssertUnwindSafe(|| {
                if retry.admits(&error) {
                    class
                } else {
                    Class::NotRetryable
                }
            })),
        }
        .map_err(panic_text);
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(error))).map_err(panic_text);
        match (class, dropped) {
            (Ok(class), Ok(())) => (class, text),
            (Ok(class), Err(panic)) => (class, format!("{text} (its drop panicked: {panic})")),
            (Err(panic), _) => (
                Class::Panicked,
                format!("panicked in `Retry::only_if`: {panic}, asked about: {text}"),
            ),
        }
    }

    /// An attempt of what is kept elsewhere failed: its keeper hears what comes of it.
    fn failed_lent(&self, node: Node, lent: Lent, end: Kept) {
        match &end {
            Kept::Retry(delay, text) => {
                self.counters.retries.add(1);
                observe::retrying(self, &node, node.attempts(), *delay, text);
            }
            Kept::Discarded(reason, text) => {
                observe::discarded(self, &node, *reason, text);
                self.drain.note(
                    &node,
                    UnfinishedState::Discarded(*reason),
                    Some(text.clone()),
                );
            }
            Kept::Unreadable(text) => observe::unreadable(&node, text),
            Kept::Completed => {}
        }
        if !matches!(end, Kept::Discarded(..)) {
            observe::kept(self, &node);
        }
        observe::panic_in_drop(node.drop_quietly());
        let counter = match end {
            Kept::Discarded(..) => &self.counters.discarded,
            _ => &self.counters.kept,
        };
        counter.add(1);
        self.tell(lent, end);
    }

    fn failed(self: &Arc<Self>, mut node: Node, class: Class, text: String) {
        let reusable = node.body().reusable();
        let text: Arc<str> = if text.len() > TEXT_LIMIT {
            bounded_text(|out| out.write_str(&text)).into()
        } else {
            text.into()
        };
        let settings = node.settings_mut();
        settings.attempts += 1;
        let attempt = settings.attempts;
        let last = settings.last_chance || !reusable;
        settings.remember(AttemptRecord {
            attempt,
            at: clock::wall_now(),
            error: text.clone(),
        });
        let now = self.clock.now();
        let lent = node.take_lent();
        let before = lent.as_ref().map_or(Duration::ZERO, |lent| lent.age);
        let age = now.since(node.header().queued_at).saturating_add(before);
        let retry = node
            .settings()
            .and_then(|s| s.retry.as_ref())
            .unwrap_or(&self.config.retry);
        let failed = FailedAttempt {
            attempt,
            age,
            class,
            last,
            random: clock::random(),
        };
        let decision = decide(retry, failed);
        if let Some(lent) = lent {
            let end = match decision {
                _ if class == Class::Unreadable => Kept::Unreadable(text),
                Decision::Retry(delay) => Kept::Retry(delay, text),
                Decision::Discard(reason) => Kept::Discarded(reason, text),
            };
            return self.failed_lent(node, lent, end);
        }
        match decision {
            Decision::Retry(delay) => {
                self.counters.retries.add(1);
                observe::retrying(self, &node, attempt, delay, &text);
                self.retry_at(node, now.saturating_add(delay));
            }
            Decision::Discard(reason) => {
                self.discard(node, reason, text);
                self.give_back();
            }
        }
    }

    /// Makes a dead letter of a task. The caller decides what becomes of its place.
    pub(super) fn discard(&self, node: Node, reason: DiscardReason, text: Arc<str>) {
        observe::discarded(self, &node, reason, &text);
        self.drain.note(
            &node,
            UnfinishedState::Discarded(reason),
            Some(text.clone()),
        );
        self.bury(node, reason, text);
        self.counters.discarded.add(1);
    }

    /// Whether a retry's time was over before its turn came. What a drain gives its last chance has
    /// the drain's deadline instead.
    pub(super) fn is_too_late(&self, node: &Node) -> bool {
        node.settings()
            .is_some_and(|s| s.attempts > 0 && !s.last_chance)
            && self.clock.now() >= self.give_up_at(node)
    }

    pub(super) fn give_up_at(&self, node: &Node) -> Tick {
        let retry = node
            .settings()
            .and_then(|s| s.retry.as_ref())
            .unwrap_or(&self.config.retry);
        node.header().queued_at.saturating_add(retry.age_limit())
    }

    /// A retry found its time to be over when its turn came.
    pub(super) fn give_up(&self, node: Node) {
        let text = node
            .settings()
            .and_then(|s| s.history.last())
            .map_or_else(|| Arc::from("gave up"), |record| record.error.clone());
        self.discard(node, DiscardReason::GaveUp, text);
        self.give_back();
    }

    /// A task that did not come to its end: taken back by its handle, or abandoned.
    pub(crate) fn cancel(&self, mut node: Node, state: UnfinishedState) {
        if let Some(lent) = node.take_lent() {
            return self.hand_back(node, lent);
        }
        observe::cancelled(self, &node, state);
        self.drain.note(&node, state, None);
        observe::panic_in_drop(node.drop_quietly());
        self.counters.cancelled.add(1);
        self.give_back();
    }

    /// It goes back to its keeper as if it had not been lent.
    #[cold]
    fn hand_back(&self, node: Node, lent: Lent) {
        observe::kept(self, &node);
        observe::panic_in_drop(node.drop_quietly());
        self.counters.kept.add(1);
        drop(lent);
        observe::changed(self);
    }

    /// What is queued and was lent by somebody who is gone.
    #[cfg(feature = "events")]
    pub(crate) fn hand_back_orphans(&self) {
        while let Some(orphan) = self.take_queued(Node::is_orphan) {
            self.cancel(orphan, UnfinishedState::NeverStarted);
        }
    }

    /// The worker of a task is gone before the task's end.
    pub(super) fn interrupted(&self, mut node: Node, slot: &Slot) {
        let started = slot.with(|_| ()).is_some();
        // By itself: what the attempt holds and what the closure holds may both panic in their drop, and
        // the second panic of one unwinding ends the process.
        observe::panic_in_drop(attempt::end(&mut node));
        if slot.end() {
            observe::panic_in_drop(node.drop_quietly());
            return;
        }
        let state = if started {
            UnfinishedState::Interrupted
        } else {
            UnfinishedState::unstarted(&node)
        };
        self.cancel(node, state);
    }

    pub(crate) fn cancel_all(&self, mut tasks: Fifo<Node>, state: UnfinishedState) {
        while let Some(node) = tasks.pop() {
            self.cancel(node, state);
        }
    }
}
