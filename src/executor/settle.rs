//! What the outcome of an attempt means: the end of the task, a retry, or a dead letter.
//!
//! Every accepted task comes through one of the functions here exactly once for its end, and each of
//! them counts it, says so, and gives its place back, in that order: who sees the place free sees the
//! count.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::Shared;
use super::attempt::{Begun, Outcome};
use super::drain::UnfinishedState;
use super::running::Slot;
use crate::clock;
use crate::observe::{self, AttemptSpan};
use crate::retry::{Class, Decision, DiscardReason, FailedAttempt, decide};
use crate::sync::Arc;
use crate::task::{AttemptRecord, Fifo, Node, TaskError, error_text, panic_text};

impl Shared {
    pub(super) fn settle(
        self: &Arc<Self>,
        node: Node,
        outcome: Outcome,
        begun: Option<Begun>,
        slot: &Slot,
    ) {
        if slot.end() {
            observe::abandoned_ended(&node);
            observe::panic_in_drop(node.drop_quietly());
            return;
        }
        let mut span = begun.map_or_else(AttemptSpan::none, |begun| begun.span);
        span.outcome(self, &node, outcome.as_str());
        span.within(|| self.conclude(node, outcome));
    }

    fn conclude(self: &Arc<Self>, node: Node, outcome: Outcome) {
        match outcome {
            Outcome::Completed => self.completed(node),
            Outcome::Skipped => self.skipped(node),
            Outcome::Failed(error) => {
                let (class, text) = self.judge(&node, error);
                self.failed(node, class, text);
            }
            Outcome::TimedOut => {
                let limit = node
                    .settings()
                    .and_then(|s| s.timeout)
                    .unwrap_or(self.config.timeout);
                self.failed(node, Class::TimedOut, format!("timed out after {limit:?}"));
            }
            Outcome::Panicked(text) => {
                self.failed(node, Class::Panicked, format!("panicked: {text}"));
            }
        }
    }

    fn completed(&self, node: Node) {
        observe::completed(self, &node);
        // Dropped before it is counted: what it captured is free when the executor says so.
        observe::panic_in_drop(node.drop_quietly());
        self.counters.completed.add(1);
        self.give_back();
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
        };
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(error)));
        match (class, dropped) {
            (Ok(class), Ok(())) => (class, text),
            (Ok(class), Err(payload)) => (
                class,
                format!("{text} (its drop panicked: {})", panic_text(payload)),
            ),
            (Err(payload), _) => (
                Class::Panicked,
                format!(
                    "panicked in `Retry::only_if`: {}, asked about: {text}",
                    panic_text(payload)
                ),
            ),
        }
    }

    fn failed(self: &Arc<Self>, mut node: Node, class: Class, text: String) {
        let reusable = node.body().reusable();
        let text: Arc<str> = text.into();
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
        let age = now.since(node.header().queued_at);
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
        match decide(retry, failed) {
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
    pub(crate) fn cancel(&self, node: Node, state: UnfinishedState) {
        observe::cancelled(self, &node, state);
        if state != UnfinishedState::TakenBack {
            self.drain.note(&node, state, None);
        }
        observe::panic_in_drop(node.drop_quietly());
        self.counters.cancelled.add(1);
        self.give_back();
    }

    /// The worker of a task is gone before the task's end.
    pub(super) fn interrupted(&self, node: Node, slot: &Slot) {
        let started = slot.with(|_| ()).is_some();
        if slot.end() {
            observe::panic_in_drop(node.drop_quietly());
            return;
        }
        let state = if started {
            UnfinishedState::Interrupted
        } else {
            UnfinishedState::NeverStarted
        };
        self.cancel(node, state);
    }

    pub(super) fn cancel_all(&self, mut tasks: Fifo<Node>, state: UnfinishedState) {
        while let Some(node) = tasks.pop() {
            self.cancel(node, state);
        }
    }
}
