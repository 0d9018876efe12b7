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
use crate::error::{Class, TaskError, error_text, kept_text, panic_text};
use crate::observe;
use crate::retry::{Decision, DiscardReason, FailedAttempt, Retry, decide};
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
            Outcome::Failed(error) => self.failed_with(node, error),
            Outcome::TimedOut(limit) => {
                let text = kept_text(|out| write!(out, "timed out after {limit:?}"));
                self.failed(node, Class::TimedOut, text);
            }
            Outcome::Panicked(said) => {
                let text = kept_text(|out| write!(out, "panicked: {said}"));
                self.failed(node, Class::Panicked, text);
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

    pub(super) fn failed_with(self: &Arc<Self>, node: Node, error: TaskError) {
        let (class, text) = self.judge(&node, error);
        self.failed(node, class, text);
    }

    /// What kind of failure it is. The policy's predicate, the error's `Display` and its drop are the
    /// user's code.
    fn judge(&self, node: &Node, error: TaskError) -> (Class, Arc<str>) {
        let text = error_text(error.get_ref());
        let class = error.class();
        let admitted = match class {
            Class::Fatal => Ok(true),
            _ => catch_unwind(AssertUnwindSafe(|| self.retry_of(node).admits(&error))),
        };
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(error)));
        match (admitted, dropped) {
            (Ok(true), Ok(())) => (class, text),
            (Ok(false), Ok(())) => (Class::NotRetryable, text),
            (Ok(admitted), Err(payload)) => {
                let class = if admitted { class } else { Class::NotRetryable };
                let panic = panic_text(payload);
                let text = kept_text(|out| write!(out, "{text} (its drop panicked: {panic})"));
                (class, text)
            }
            (Err(payload), dropped) => {
                let panic = panic_text(payload);
                if let Err(second) = dropped {
                    panic_text(second);
                }
                let text = kept_text(|out| {
                    write!(
                        out,
                        "panicked in `Retry::only_if`: {panic}, asked about: {text}"
                    )
                });
                (Class::Panicked, text)
            }
        }
    }

    fn retry_of<'a>(&'a self, node: &'a Node) -> &'a Retry {
        node.settings()
            .and_then(|s| s.retry.as_ref())
            .unwrap_or(&self.config.retry)
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

    fn failed(self: &Arc<Self>, mut node: Node, class: Class, text: Arc<str>) {
        let settings = node.settings();
        let attempt = node.attempts() + 1;
        let last = settings.is_some_and(|s| s.last_chance) || !node.body().reusable();
        let lent = settings.and_then(|s| s.lent.as_ref());
        let before = lent.map_or(Duration::ZERO, |lent| lent.age);
        let now = self.clock.now();
        let failed = FailedAttempt {
            attempt,
            age: now.since(node.header().queued_at).saturating_add(before),
            class,
            last,
            random: clock::random(),
        };
        let decision = decide(self.retry_of(&node), failed);
        let failure = AttemptRecord {
            attempt,
            at: clock::wall_now(),
            error: text,
        };
        match decision {
            Decision::Retry(delay) if lent.is_none() => {
                self.counters.retries.add(1);
                observe::retrying(self, &node, attempt, delay, &failure.error);
                self.retry_at(node, failure, now.saturating_add(delay));
            }
            decision => {
                let text = failure.error.clone();
                node.remember(failure);
                self.failed_for_good(node, class, decision, text);
            }
        }
    }

    /// Its next attempt, if there is one, is not this executor's affair.
    fn failed_for_good(&self, mut node: Node, class: Class, decision: Decision, text: Arc<str>) {
        match (node.take_lent(), decision) {
            (Some(lent), decision) => {
                let end = match decision {
                    _ if class == Class::Unreadable => Kept::Unreadable(text),
                    Decision::Retry(delay) => Kept::Retry(delay, text),
                    Decision::Discard(reason) => Kept::Discarded(reason, text),
                };
                self.failed_lent(node, lent, end);
            }
            (None, Decision::Discard(reason)) => {
                self.discard(node, reason, text);
                self.give_back();
            }
            (None, Decision::Retry(_)) => unreachable!("it waits"),
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
        let limit = self.retry_of(node).age_limit();
        node.header().queued_at.saturating_add(limit)
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
