//! The span of an attempt, and what it follows from.
//!
//! Invariants:
//! 1. It is a root: never a child of the request's span, so the request's time does not contain it.
//! 2. Nothing here keeps the request's span open. Kept are its id and, with the feature
//!    `opentelemetry`, a copy of its `SpanContext`.
//! 3. Each attempt has one link to the request's trace, also long after the request's span is closed.
//!    `follows_from` gives it by id, which tracing-opentelemetry finds for open spans only; so where
//!    there is a `SpanContext` the link is added from that, and `follows_from` is not called: said
//!    twice it would be two links.

use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Span, debug};

use super::events::{TARGET, enabled, millis};
use super::happening::{Happening, note};
use crate::clock::Tick;
use crate::executor::Shared;
use crate::task::{Follows, Name, Node};

/// The span that is current where a task is registered, for the spans of its attempts to follow.
pub(crate) fn current_span() -> Option<Follows> {
    if LevelFilter::current() == LevelFilter::OFF {
        return None;
    }
    let span = Span::current();
    let id = span.id()?;
    Some(Follows {
        id,
        #[cfg(feature = "opentelemetry")]
        context: context(&span),
    })
}

/// None where no OpenTelemetry layer listens.
#[cfg(feature = "opentelemetry")]
fn context(span: &Span) -> Option<Box<opentelemetry::trace::SpanContext>> {
    use opentelemetry::trace::TraceContextExt;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_valid().then(|| Box::new(context))
}

fn follow(span: &Span, follows: Option<Follows>) {
    let Some(follows) = follows else { return };
    #[cfg(feature = "opentelemetry")]
    if let Some(context) = follows.context {
        tracing_opentelemetry::OpenTelemetrySpanExt::add_link(span, *context);
        return;
    }
    span.follows_from(follows.id);
}

/// An attempt, as it is observed. A box, because most are not, and each attempt moves one about.
#[derive(Debug)]
pub(crate) struct AttemptSpan(Option<Box<Seen>>);

#[derive(Debug)]
struct Seen {
    span: Span,
    /// Read only where a recorder wants to know.
    began: Option<Tick>,
    ended: bool,
}

impl AttemptSpan {
    pub(crate) const fn unseen() -> Self {
        Self(None)
    }

    /// Whether anyone is listening.
    pub(crate) fn is_seen(&self) -> bool {
        self.0.is_some()
    }

    #[inline]
    pub(crate) fn within<R>(&self, run: impl FnOnce() -> R) -> R {
        match &self.0 {
            None => run(),
            Some(seen) => seen.span.in_scope(run),
        }
    }

    /// How the attempt ended.
    pub(crate) fn outcome(&mut self, shared: &Shared, node: &Node, outcome: &'static str) {
        let Some(seen) = &mut self.0 else { return };
        seen.ended = true;
        seen.span.record("task.outcome", outcome);
        if let Some(began) = seen.began {
            let name = &node.name();
            let took = shared.clock.now().since(began);
            let ended = Happening::AttemptEnded {
                name,
                outcome,
                took,
            };
            note(shared, ended);
        }
    }
}

impl Drop for Seen {
    /// The worker is gone before the attempt's end.
    fn drop(&mut self) {
        if !self.ended {
            self.span.record("task.outcome", "interrupted");
        }
    }
}

#[inline]
pub(crate) fn started(shared: &Shared, node: &Node, name: &Name, attempt: u32) -> AttemptSpan {
    AttemptSpan(attempts_are_seen().then(|| Box::new(see(shared, node, name, attempt))))
}

/// Whether anyone may be listening.
#[inline]
pub(crate) fn attempts_are_seen() -> bool {
    is_counted() || enabled(Level::INFO)
}

#[cold]
fn see(shared: &Shared, node: &Node, name: &Name, attempt: u32) -> Seen {
    let now = shared.clock.now();
    let queue_wait = queue_wait(node, now);
    let began = is_counted().then(|| {
        note(shared, Happening::Began(name, queue_wait));
        now
    });
    let span = if enabled(Level::INFO) {
        open(node, name, attempt, queue_wait)
    } else {
        Span::none()
    };
    Seen {
        span,
        began,
        ended: false,
    }
}

fn is_counted() -> bool {
    #[cfg(feature = "metrics")]
    return super::metrics::is_on();
    #[cfg(not(feature = "metrics"))]
    false
}

/// Since the release or, for a retry, since it was due.
fn queue_wait(node: &Node, now: Tick) -> Duration {
    let due = node.settings().map_or(Tick::ZERO, |s| s.due_at);
    now.since(due.max(node.header().queued_at))
}

fn open(node: &Node, name: &Name, attempt: u32, queue_wait: Duration) -> Span {
    let response = node.response();
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
        rpc.grpc.status_code = response.and_then(|r| r.grpc_status),
        response.end = response.map(|r| r.end.as_str()),
    );
    // A task that was registered elsewhere than the request's first one knows so itself.
    let own = node.settings().and_then(|s| s.follows.clone());
    let origin = node.header().origin.as_ref();
    follow(
        &span,
        own.or_else(|| origin.and_then(|origin| origin.follows.clone())),
    );
    span.in_scope(|| debug!( target: TARGET, { task.name = name.as_str(), task.attempt = attempt }, "task started"));
    span
}
