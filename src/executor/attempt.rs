//! One attempt of one task: its condition, its clock, its panics.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Shared;
use super::running::{Running, Slot};
use super::worker::Alarm;
use crate::clock::Tick;
use crate::error::{TaskError, panic_text};
use crate::observe::{self, AttemptSpan};
use crate::sync::Arc;
use crate::task::{Attempt, Kind, Node};

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Completed,
    Failed(TaskError),
    /// It had this long.
    TimedOut(Duration),
    Panicked(String),
    /// The condition did not hold: there was no attempt.
    Skipped,
}

impl Outcome {
    /// The name in the attempt's span.
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Failed(_) => "failed",
            Outcome::TimedOut(_) => "timed_out",
            Outcome::Panicked(_) => "panicked",
            Outcome::Skipped => "skipped",
        }
    }
}

/// What an attempt needs beside its task.
pub(super) struct Begun {
    attempt: Option<Attempt>,
    pub(super) token: Option<CancellationToken>,
    limit: Limit,
    pub(super) span: AttemptSpan,
}

/// The whole task is bounded, too: a retry ends when the task gives up. The first attempt, which always
/// happens, counts that time from its own start, so that waiting in the queue does not use it up.
#[derive(Clone, Copy)]
struct Limit {
    timeout: Duration,
    give_up_at: Option<Tick>,
}

/// Asks the condition, once in the life of a task.
pub(super) fn admit(node: &mut Node) -> Option<Outcome> {
    let response = node
        .header()
        .origin
        .as_ref()
        .and_then(|origin| origin.response())?;
    let held = match node.settings() {
        None => Ok(!response.is_failure()),
        Some(settings) if settings.admitted => return None,
        Some(settings) => {
            let when = settings.when.clone().unwrap_or_default();
            catch_unwind(AssertUnwindSafe(|| when.holds(response)))
        }
    };
    match held {
        Ok(true) => {
            if let Some(settings) = &mut node.header_mut().settings {
                settings.admitted = true;
            }
            None
        }
        Ok(false) => Some(Outcome::Skipped),
        Err(payload) => Some(Outcome::Panicked(format!(
            "in its condition: {}",
            panic_text(payload)
        ))),
    }
}

/// Writes the attempt into the slot, where snapshots and the watch find it.
pub(super) fn begin(shared: &Arc<Shared>, node: &Node, slot: &Slot) -> Begun {
    let number = node.attempts() + 1;
    let kind = node.body().kind();
    let id = node.id();
    let name = node.name();
    let settings = node.settings();
    let timeout = settings
        .and_then(|s| s.timeout)
        .unwrap_or(shared.config.timeout);
    let retry = settings
        .and_then(|s| s.retry.as_ref())
        .unwrap_or(&shared.config.retry);
    let timeout = timeout.min(retry.age_limit());
    let is_retry_in_time = number > 1 && settings.is_some_and(|s| !s.last_chance);
    let give_up_at = is_retry_in_time.then(|| shared.give_up_at(node));
    let token = (kind != Kind::Async).then(CancellationToken::new);
    let attempt = (kind != Kind::Async).then(|| Attempt {
        id,
        name: name.clone(),
        number,
        last_error: settings
            .and_then(|s| s.history.last())
            .map(|record| record.error.clone()),
        origin: node.header().origin.clone(),
        token: token.clone(),
    });
    let span = observe::started(shared, node, &name, number);
    slot.begin(Running {
        id,
        name,
        location: node.header().location,
        attempt: number,
        limit: timeout,
        blocking: kind == Kind::Blocking,
        token: token.clone(),
        since: (kind == Kind::Blocking).then(|| shared.clock.now()),
        stuck: None,
        abandoned: false,
    });
    observe::changed(shared);
    shared.watch.wake(shared);
    Begun {
        attempt,
        token,
        limit: Limit {
            timeout,
            give_up_at,
        },
        span,
    }
}

/// Runs the attempt to its end or to its deadline.
///
/// The deadline is armed only after a first pending poll: a task that never waits pays for no timer
/// and for no look at the clock. `node` stays where the worker's drop finds it.
pub(super) async fn run(
    shared: &Arc<Shared>,
    node: &mut Node,
    begun: &mut Begun,
    slot: &Slot,
    alarm: &mut Alarm,
) -> Outcome {
    let mut deadline = None;
    poll_fn(|cx| {
        if let Poll::Ready(outcome) = poll_once(node, begun, cx) {
            return Poll::Ready(outcome);
        }
        let (deadline, limit) = *deadline.get_or_insert_with(|| {
            let now = shared.clock.now();
            slot.with(|running| running.since = Some(now));
            let left = begun.limit.give_up_at.map(|at| at.since(now));
            let limit = left.map_or(begun.limit.timeout, |left| left.min(begun.limit.timeout));
            (now.saturating_add(limit), limit)
        });
        if alarm.poll_until(&shared.clock, deadline, cx).is_ready() {
            return Poll::Ready(time_out(node, begun, limit));
        }
        Poll::Pending
    })
    .await
}

/// One poll of the user's code.
pub(super) fn poll_once(node: &mut Node, begun: &mut Begun, cx: &mut Context<'_>) -> Poll<Outcome> {
    let attempt = &mut begun.attempt;
    let polled = begun
        .span
        .within(|| catch_unwind(AssertUnwindSafe(|| node.body_mut().poll(attempt, cx))));
    match polled {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(Ok(()))) => Poll::Ready(Outcome::Completed),
        Ok(Poll::Ready(Err(error))) => Poll::Ready(Outcome::Failed(error)),
        Err(payload) => {
            let text = panic_text(payload);
            // What the attempt held is still there, half used; its drop may panic once more.
            let _ = end(node);
            Poll::Ready(Outcome::Panicked(text))
        }
    }
}

fn time_out(node: &mut Node, begun: &Begun, limit: Duration) -> Outcome {
    if let Some(token) = &begun.token {
        token.cancel();
    }
    match begun.span.within(|| end(node)) {
        None => Outcome::TimedOut(limit),
        Some(text) => Outcome::Panicked(text),
    }
}

/// Drops what the attempt holds. Returns what a panic of that drop said.
pub(super) fn end(node: &mut Node) -> Option<String> {
    catch_unwind(AssertUnwindSafe(|| node.body_mut().end()))
        .err()
        .map(panic_text)
}
