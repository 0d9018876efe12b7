//! The log: one function for each thing that is said.

use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Level, debug, error, info, warn};

pub(crate) use super::complaint::rejected;
use super::happening::{Happening, note};
use super::span::current_span;
use crate::executor::{DeadLetter, DrainReport, Missing, Running, Shared, UnfinishedState};
use crate::response::End;
use crate::retry::DiscardReason;
use crate::task::Node;

pub(super) const TARGET: &str = "tower_defer";

/// Whether anyone may be listening: one relaxed load.
pub(super) fn enabled(level: Level) -> bool {
    level <= LevelFilter::current()
}

/// A task was registered in a request.
pub(crate) fn registered(node: &Node) {
    if enabled(Level::DEBUG) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            task.id = %node.id(),
            task.location = %node.header().location }, "task registered");
    }
}

/// A task was submitted without a request.
pub(crate) fn submitted(node: &mut Node) {
    if LevelFilter::current() == LevelFilter::OFF {
        return;
    }
    if let Some(span) = current_span() {
        node.settings_mut().follows = Some(span);
    }
    registered(node);
}

/// A task has its place.
pub(crate) fn accepted(shared: &Shared, node: &Node) {
    note(shared, Happening::Accepted(node));
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn completed(shared: &Shared, node: &Node) {
    note(
        shared,
        Happening::Ended {
            node,
            outcome: "completed",
            reason: None,
            error: None,
        },
    );
    if enabled(Level::DEBUG) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            task.id = %node.id(),
            task.attempt = node.attempts() + 1 }, "task completed");
    }
}

pub(crate) fn retrying(shared: &Shared, node: &Node, attempt: u32, delay: Duration, error: &str) {
    note(
        shared,
        Happening::Retrying {
            node,
            attempt,
            error,
        },
    );
    info!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        task.attempt = attempt,
        delay_ms = millis(delay),
        error }, "task failed, will be retried");
}

pub(crate) fn discarded(shared: &Shared, node: &Node, reason: DiscardReason, error: &str) {
    note(
        shared,
        Happening::Ended {
            node,
            outcome: "discarded",
            reason: Some(reason.as_str()),
            error: Some(error),
        },
    );
    warn!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        task.location = %node.header().location,
        task.attempt = node.attempts(),
        reason = reason.as_str(),
        error }, "task discarded, now a dead letter");
}

pub(crate) fn skipped(shared: &Shared, node: &Node) {
    note(
        shared,
        Happening::Ended {
            node,
            outcome: "skipped",
            reason: None,
            error: None,
        },
    );
    if !enabled(Level::DEBUG) {
        return;
    }
    let response = node.response();
    debug!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        condition = node.when().map_or("unless_failed", |when| when.as_str()),
        http.response.status_code = response.and_then(|r| r.status).map(|s| s.as_u16()),
        rpc.grpc.status_code = response.and_then(|r| r.grpc_status),
        response.end = response.map(|r| r.end.as_str()) }, "task skipped, its condition did not hold");
}

pub(crate) fn cancelled(shared: &Shared, node: &Node, state: UnfinishedState) {
    note(
        shared,
        Happening::Ended {
            node,
            outcome: "cancelled",
            reason: None,
            error: None,
        },
    );
    let name = node.name();
    if state == UnfinishedState::TakenBack {
        debug!( target: TARGET, { task.name = name.as_str(),
            task.id = %node.id() }, "task cancelled by its handle");
    } else {
        warn!( target: TARGET, { task.name = name.as_str(),
            task.id = %node.id(),
            task.location = %node.header().location,
            state = state.as_str() }, "task cancelled before its end");
    }
}

/// It went back to the store that lent it.
pub(crate) fn kept(shared: &Shared, node: &Node) {
    note(
        shared,
        Happening::Ended {
            node,
            outcome: "kept",
            reason: None,
            error: None,
        },
    );
    if enabled(Level::DEBUG) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            task.id = %node.id() }, "delivery kept by its store");
    }
}

/// What the store has of it cannot be read any more.
pub(crate) fn unreadable(node: &Node, error: &str) {
    warn!( target: TARGET, { task.name = node.name().as_str(),
        task.location = %node.header().location,
        error }, "delivery parked: its payload does not decode");
}

pub(crate) fn still_running(shared: &Shared, running: &Running) {
    note(shared, Happening::Abandoned(running));
    warn!( target: TARGET, { task.name = running.name.as_str(),
        task.id = %running.id,
        task.location = %running.location,
        task.attempt = running.attempt }, "task abandoned: it did not yield by the drain's deadline");
}

/// It had been counted as cancelled when it was abandoned.
pub(crate) fn abandoned_ended(node: &Node) {
    debug!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id() }, "an abandoned task ended after all");
}

pub(crate) fn stuck(shared: &Shared, running: &Running, ran: Duration) {
    note(shared, Happening::Stuck(&running.name));
    warn!( target: TARGET, { task.name = running.name.as_str(),
        task.id = %running.id,
        task.location = %running.location,
        task.attempt = running.attempt,
        blocking = running.blocking,
        ran_ms = millis(ran) }, "task is stuck: it has outlived its timeout and does not yield");
}

pub(crate) fn replayed(shared: &Shared, node: &Node) {
    note(shared, Happening::Replayed(node));
    info!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id() }, "dead letter replayed");
}

pub(crate) fn dead_letter_lost(shared: &Shared, letter: &DeadLetter) {
    note(shared, Happening::DeadLetterLost(&letter.name));
    warn!( target: TARGET, { task.name = letter.name,
        task.id = %letter.id,
        error = &*letter.error }, "dead letter lost: there are more than are kept");
}

/// Releases without a task say nothing.
pub(crate) fn released(shared: &Shared, tasks: usize, end: End) {
    note(shared, Happening::Released(end));
    debug!( target: TARGET, { tasks, response.end = end.as_str() }, "response is out, tasks released");
}

pub(crate) fn stalled(tasks: usize) {
    info!(
        target: TARGET,
        tasks,
        "the client has taken nothing for max_hold, tasks released before the response's end"
    );
}

pub(crate) fn panic_in_drop(text: Option<String>) {
    if let Some(text) = text {
        warn!(target: TARGET, panic = text, "a task panicked while it was dropped");
    }
}

pub(crate) fn panic_in_hook(text: &str) {
    warn!(target: TARGET, panic = text, "the dead-letter hook panicked");
}

pub(crate) fn no_runtime(missing: Missing) {
    match missing {
        Missing::Runtime => error!(
            target: TARGET,
            "tasks wait for a tokio runtime: none is entered here; use the executor from within one, \
             or give it one with `ExecutorBuilder::runtime`"
        ),
        Missing::Timer => error!(
            target: TARGET,
            "tasks wait for a tokio runtime with a timer: this one has none; build it with \
             `enable_time` or `enable_all`"
        ),
    }
}

/// A runtime ended with tasks that are queued or wait for a retry.
pub(crate) fn stranded(queued: usize, waiting: usize) {
    warn!(
        target: TARGET,
        queued,
        waiting,
        "the runtime ended with unfinished tasks: they stay until the executor is used from within \
         another one; drain it before the end"
    );
}

pub(crate) fn no_thread(error: &std::io::Error) {
    error!(target: TARGET, error = %error, "the system refused a thread for the executor");
}

pub(crate) fn lost_with_executor(tasks: usize) {
    warn!(
        target: TARGET,
        tasks,
        "the executor was dropped with unfinished tasks: they are lost; drain it before the end"
    );
}

pub(crate) fn drained(report: &DrainReport) {
    if report.is_clean() {
        info!(
            target: TARGET,
            completed = report.completed,
            skipped = report.skipped,
            took_ms = millis(report.took),
            "drained"
        );
    } else {
        warn!(
            target: TARGET,
            completed = report.completed,
            skipped = report.skipped,
            discarded = report.discarded,
            cancelled = report.cancelled,
            timed_out = report.timed_out,
            took_ms = millis(report.took),
            "drained, and not every task completed"
        );
    }
}
