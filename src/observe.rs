//! What an operator sees: the only file that names fields, levels and messages.
//!
//! All of it has the target `tower_defer`. Levels: chatter is `debug`, a retry is `info`, what needs
//! eyes (a dead letter, a rejection, a stuck attempt) is `warn`, what should not happen is `error`.
//! Without a subscriber each call is one relaxed load.

use std::collections::HashMap;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::span::Id;
use tracing::{Level, Span, debug, error, info, warn};

use crate::clock::Tick;
use crate::executor::{
    DeadLetter, DrainReport, Missing, RejectReason, Running, Shared, UnfinishedState,
};
use crate::response::End;
use crate::retry::DiscardReason;
use crate::sync::Mutex;
use crate::task::{Name, Node};

const TARGET: &str = "tower_defer";

/// Whether anyone may be listening: one relaxed load.
fn enabled(level: Level) -> bool {
    level <= LevelFilter::current()
}

/// The span that is current where a task is registered, for the spans of its attempts to follow.
pub(crate) fn current_span() -> Option<Id> {
    if LevelFilter::current() == LevelFilter::OFF {
        return None;
    }
    Span::current().id()
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
    if LevelFilter::current() != LevelFilter::OFF {
        if let Some(span) = current_span() {
            node.settings_mut().follows = Some(span);
        }
    }
    registered(node);
}

/// The span of an attempt: a new root that follows from the request's span, never a child of it, so
/// that the request's time does not contain the task's.
#[derive(Debug)]
pub(crate) struct AttemptSpan(Option<Box<Span>>);

impl AttemptSpan {
    /// Whether anyone is listening.
    pub(crate) fn is_seen(&self) -> bool {
        self.0.is_some()
    }

    #[inline]
    pub(crate) fn within<R>(&self, run: impl FnOnce() -> R) -> R {
        match &self.0 {
            None => run(),
            Some(span) => span.in_scope(run),
        }
    }

    /// How the attempt ended.
    pub(crate) fn outcome(&self, outcome: &'static str) {
        if let Some(span) = &self.0 {
            span.record("task.outcome", outcome);
        }
    }
}

#[inline]
pub(crate) fn started(shared: &Shared, node: &Node, name: &Name, attempt: u32) -> AttemptSpan {
    AttemptSpan(enabled(Level::INFO).then(|| Box::new(span_of(shared, node, name, attempt))))
}

#[cold]
fn span_of(shared: &Shared, node: &Node, name: &Name, attempt: u32) -> Span {
    let response = node
        .header()
        .origin
        .as_ref()
        .and_then(|origin| origin.response());
    let queue_wait = shared.clock.now().since(node.header().queued_at);
    let span = tracing::info_span!(
        target: TARGET,
        parent: None,
        "attempt",
        task.name = name.as_str(),
        task.id = %node.id(),
        task.location = %node.header().location,
        task.attempt = attempt,
        task.queue_wait_ms = millis(queue_wait),
        task.outcome = tracing::field::Empty,
        http.response.status_code = response.and_then(|r| r.status).map(|s| s.as_u16()),
        response.end = response.map(|r| r.end.as_str()),
    );
    let follows = match &node.header().origin {
        Some(origin) => origin.follows(),
        None => node
            .settings()
            .and_then(|settings| settings.follows.clone()),
    };
    span.follows_from(follows);
    span.in_scope(|| debug!( target: TARGET, { task.name = name.as_str(), task.attempt = attempt }, "task started"));
    span
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn completed(node: &Node) {
    if enabled(Level::DEBUG) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            task.id = %node.id(),
            task.attempt = node.attempts() + 1 }, "task completed");
    }
}

pub(crate) fn retrying(node: &Node, attempt: u32, delay: Duration, error: &str) {
    info!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        task.attempt = attempt,
        delay_ms = millis(delay),
        error }, "task failed, will be retried");
}

pub(crate) fn discarded(node: &Node, reason: DiscardReason, error: &str) {
    warn!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        task.location = %node.header().location,
        task.attempt = node.attempts(),
        reason = reason.as_str(),
        error }, "task discarded, now a dead letter");
}

pub(crate) fn skipped(node: &Node) {
    if !enabled(Level::DEBUG) {
        return;
    }
    let response = node
        .header()
        .origin
        .as_ref()
        .and_then(|origin| origin.response());
    debug!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id(),
        condition = node.when().map_or("unless_failed", |when| when.as_str()),
        http.response.status_code = response.and_then(|r| r.status).map(|s| s.as_u16()),
        rpc.grpc.status_code = response.and_then(|r| r.grpc_status),
        response.end = response.map(|r| r.end.as_str()) }, "task skipped, its condition did not hold");
}

pub(crate) fn cancelled(node: &Node, state: UnfinishedState) {
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

pub(crate) fn still_running(running: &Running) {
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

pub(crate) fn stuck(running: &Running, ran: Duration) {
    warn!( target: TARGET, { task.name = running.name.as_str(),
        task.id = %running.id,
        task.location = %running.location,
        task.attempt = running.attempt,
        blocking = running.blocking,
        ran_ms = millis(ran) }, "task is stuck: it has outlived its timeout and does not yield");
}

pub(crate) fn replayed(node: &Node) {
    info!( target: TARGET, { task.name = node.name().as_str(),
        task.id = %node.id() }, "dead letter replayed");
}

pub(crate) fn dead_letter_lost(letter: &DeadLetter) {
    warn!( target: TARGET, { task.name = letter.name,
        task.id = %letter.id,
        error = &*letter.error }, "dead letter lost: there are more than are kept");
}

/// Releases without a task say nothing.
pub(crate) fn released(tasks: usize, end: End) {
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
        error!(target: TARGET, panic = text, "a task panicked while it was dropped");
    }
}

pub(crate) fn panic_in_hook(text: &str) {
    error!(target: TARGET, panic = text, "the dead-letter hook panicked");
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

/// When the last complaint about rejected tasks was made: the first one is said, then one a minute.
#[derive(Debug, Default)]
pub(crate) struct Complaint(Mutex<Option<Tick>>);

impl Complaint {
    const EVERY: Duration = Duration::from_secs(60);

    pub(crate) fn is_due(&self, now: Tick) -> bool {
        let mut last = self.0.lock();
        let due = last.is_none_or(|last| now.since(last) >= Self::EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// One for each reason: a request at its limit does not hide that the executor is full.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    full: Complaint,
    request_limit: Complaint,
    closed: Complaint,
}

impl Complaints {
    pub(crate) fn of(&self, reason: RejectReason) -> &Complaint {
        match reason {
            RejectReason::Full => &self.full,
            RejectReason::RequestLimit => &self.request_limit,
            RejectReason::Closed => &self.closed,
        }
    }
}

/// A task was not accepted. What fills the executor is looked up only when it is said.
pub(crate) fn rejected(shared: &Shared, node: &Node, reason: RejectReason) {
    if !enabled(Level::WARN) {
        return;
    }
    if !shared.complaint_is_due(reason) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            reason = reason.as_str() }, "task rejected");
        return;
    }
    let filling = match reason {
        RejectReason::Full => shared.what_fills_it(),
        RejectReason::RequestLimit | RejectReason::Closed => String::new(),
    };
    warn!( target: TARGET, { task.name = node.name().as_str(),
        task.location = %node.header().location,
        reason = reason.as_str(),
        capacity = shared.admission.capacity(),
        rejected_so_far = shared.rejections(),
        filling }, "task rejected (said at most once a minute)");
}

/// The commonest names, as `name × count`.
pub(crate) fn commonest(names: impl Iterator<Item = Name>) -> String {
    let mut counts: HashMap<Name, usize> = HashMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.as_str().cmp(b.0.as_str())));
    let shown: Vec<String> = counts
        .iter()
        .take(3)
        .map(|(name, count)| format!("{} × {count}", name.as_str()))
        .collect();
    shown.join(", ")
}
