//! One attempt of one task: its condition, its clock, its panics.
//!
//! What every attempt passes is inlined into its worker by force, as is [`Shared::settle`]: the compiler
//! left it out of line, and with that and a smaller `Begun` 1,565 instructions of a ready task became
//! 1,283.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Shared;
use super::running::{Plain, Running, Slot};
use crate::clock::Tick;
use crate::error::{TaskError, panic_text};
use crate::observe::{self, AttemptSpan};
use crate::sync::Arc;
use crate::task::{Attempt, Kind, Name, Node, TaskContext};

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
    /// A drain came to its deadline while the condition was asked, and has counted the task.
    Abandoned,
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
            Outcome::Abandoned => "abandoned",
        }
    }
}

/// When an attempt has to end, and the time that led to it.
pub(super) type Deadline = (Tick, Duration);

/// What an attempt needs beside its task. Small, because it is made for every attempt.
pub(super) struct Begun {
    /// It is an attempt of a task without settings that asks for no context, and nobody watches it.
    pub(super) is_plain: bool,
    /// Where the body can see it.
    context: Option<TaskContext>,
    /// Known once it has waited.
    pub(super) deadline: Option<Deadline>,
    pub(super) span: AttemptSpan,
}

impl Begun {
    pub(super) fn plain(deadline: Option<Deadline>) -> Self {
        Self {
            is_plain: true,
            context: None,
            deadline,
            span: AttemptSpan::unseen(),
        }
    }

    /// How long it may take, once it has waited.
    pub(super) fn limit(&self) -> Duration {
        self.deadline.map_or(Duration::ZERO, |(_, limit)| limit)
    }
}

/// Asks the condition, once in the life of a task.
#[inline(always)]
pub(super) fn admit(shared: &Arc<Shared>, node: &mut Node, slot: &Slot) -> Option<Outcome> {
    let response = node.response()?;
    let held = match node.settings() {
        None => Ok(!response.is_failure()),
        Some(settings) if settings.admitted => return None,
        Some(settings) => {
            let when = settings.when.clone().unwrap_or_default();
            if when.is_custom() {
                // It may block: it is to be seen meanwhile, by the watch and by a drain.
                slot.begin(running(shared, node, node.name(), None));
                shared.watch.wake(shared);
            }
            let held = catch_unwind(AssertUnwindSafe(|| when.holds(response)));
            if when.is_custom() && slot.end() {
                return Some(Outcome::Abandoned);
            }
            held
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
#[inline(always)]
pub(super) fn begin(shared: &Arc<Shared>, node: &Node, slot: &Slot) -> Begun {
    let number = node.attempts() + 1;
    let kind = node.body().about().kind;
    let name = node.name();
    let context = (kind != Kind::Async).then(|| describe(node, number, name.clone()));
    let span = observe::started(shared, node, &name, number);
    slot.begin(running(shared, node, name, context.as_ref()));
    observe::changed(shared);
    shared.watch.wake(shared);
    Begun {
        is_plain: false,
        context,
        deadline: None,
        span,
    }
}

/// As [`begin`], for a task without settings that asks for no context, where nobody listens.
#[inline(always)]
pub(super) fn begin_plain(
    shared: &Arc<Shared>,
    node: &Node,
    function: fn() -> &'static str,
    slot: &Slot,
) {
    slot.begin_plain(Plain {
        marks: node.marks(),
        function,
        location: node.header().location,
    });
    observe::changed(shared);
    shared.watch.wake(shared);
}

#[inline(always)]
fn running(shared: &Shared, node: &Node, name: Name, context: Option<&TaskContext>) -> Running {
    let blocking = node.is_blocking();
    Running {
        id: node.id(),
        name,
        location: node.header().location,
        attempt: node.attempts() + 1,
        limit: timeout(shared, node),
        blocking,
        token: context.map(TaskContext::cancellation),
        since: blocking.then(|| shared.clock.now()),
        first_seen: None,
        stuck: None,
        abandoned: false,
        lent: node.is_lent(),
    }
}

#[cold]
fn describe(node: &Node, number: u32, name: Name) -> TaskContext {
    TaskContext::new(Attempt {
        id: node.id(),
        name,
        number,
        last_error: node
            .settings()
            .and_then(|s| s.history.last())
            .map(|record| record.error.clone()),
        origin: node.header().origin.clone(),
        token: CancellationToken::new(),
    })
}

/// The time of an attempt. The whole task is bounded, too; the first attempt, which always happens,
/// counts that time from its own start, so that waiting in the queue does not use it up.
fn timeout(shared: &Shared, node: &Node) -> Duration {
    let settings = node.settings();
    let timeout = settings
        .and_then(|s| s.timeout)
        .unwrap_or(shared.config.timeout);
    let retry = settings
        .and_then(|s| s.retry.as_ref())
        .unwrap_or(&shared.config.retry);
    timeout.min(retry.age_limit())
}

/// When the attempt has to end. Asked after a pending poll only: a task that never waits pays for no
/// timer and for no look at the clock. Also the time, where it was read.
pub(super) fn deadline(
    shared: &Shared,
    node: &Node,
    begun: &mut Begun,
    slot: &Slot,
) -> (Tick, Option<Tick>) {
    if let Some((deadline, _)) = begun.deadline {
        return (deadline, None);
    }
    let now = shared.clock.now();
    slot.set_since(now);
    let mut limit = timeout(shared, node);
    // A retry ends when the task gives up; a last chance has its whole time.
    if node
        .settings()
        .is_some_and(|s| s.attempts > 0 && !s.last_chance && s.lent.is_none())
    {
        limit = limit.min(shared.give_up_at(node).since(now));
    }
    let deadline = now.saturating_add(limit);
    begun.deadline = Some((deadline, limit));
    (deadline, Some(now))
}

/// What a poll of the user's code came to.
pub(super) type Polled = std::thread::Result<Poll<Result<(), TaskError>>>;

/// One poll of the user's code, of a body that asks for no context. None: it ended well.
#[inline(always)]
pub(super) fn poll_plain(node: &mut Node, cx: &mut Context<'_>) -> Option<Polled> {
    // By value all the way, so that nothing is left whose drop would have to be asked for.
    match catch_unwind(AssertUnwindSafe(|| node.body_mut().poll(None, cx))) {
        Ok(Poll::Ready(result)) => match result {
            Ok(()) => None,
            Err(error) => Some(Ok(Poll::Ready(Err(error)))),
        },
        Ok(Poll::Pending) => Some(Ok(Poll::Pending)),
        Err(payload) => Some(Err(payload)),
    }
}

/// One poll of the user's code.
#[inline(always)]
pub(super) fn poll_once(node: &mut Node, begun: &mut Begun, cx: &mut Context<'_>) -> Poll<Outcome> {
    let context = begun.context.as_ref();
    let polled = begun
        .span
        .within(|| catch_unwind(AssertUnwindSafe(|| node.body_mut().poll(context, cx))));
    outcome(node, polled)
}

pub(super) fn outcome(node: &mut Node, polled: Polled) -> Poll<Outcome> {
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

pub(super) fn time_out(node: &mut Node, begun: &Begun) -> Outcome {
    let limit = begun.limit();
    if let Some(context) = &begun.context {
        context.cancellation().cancel();
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
