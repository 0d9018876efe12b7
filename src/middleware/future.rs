//! [`DeferFuture`]: from the call to the head.

use std::future::Future;
use std::pin::Pin;
use std::str::FromStr;
#[cfg(any(feature = "events", feature = "test-util"))]
use std::task::ready;
use std::task::{Context, Poll};

use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use pin_project::pin_project;

use super::DeferBody;
use super::body::Watch;
#[cfg(feature = "test-util")]
use super::inline;
#[cfg(feature = "events")]
use super::recorded;
#[cfg(feature = "events")]
use crate::defer::head_only;
use crate::defer::{Collector, Ending, Head, Hold, Mark};
use crate::response::End;
use crate::sync::Arc;

/// The response future of a [`DeferService`](crate::DeferService).
///
/// Dropped before it is ready, it releases the request's tasks with
/// [`End::Cancelled`](crate::End::Cancelled): the client has left.
///
/// # Panics
///
/// When it is polled after it was ready.
#[pin_project(project = DeferFutureProjection)]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct DeferFuture<F: Future> {
    /// None once it has answered: it is dropped before anything is released.
    #[pin]
    inner: Option<F>,
    /// The answer, while the events of its request are being recorded.
    #[cfg(feature = "events")]
    recording: Option<Box<recorded::Waiting<F::Output>>>,
    /// Empty in an inner layer. After `inner`, so that it is dropped after it.
    unanswered: Unanswered,
    /// The test kit's inline mode: the tasks end before the answer is given.
    #[cfg(feature = "test-util")]
    inline: Option<inline::Inline<F::Output>>,
}

/// A request without an answer. Dropped as it is, it says why there will be none.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    /// Empty once it has been answered.
    hold: Hold,
    /// We are within the inner service: dropped now, it has panicked.
    entered: bool,
    /// What of the request decides how its response ends.
    asked: Mark,
}

impl<F: Future> DeferFuture<F> {
    #[inline]
    pub(super) fn new(inner: F, unanswered: Unanswered) -> Self {
        Self {
            inner: Some(inner),
            #[cfg(feature = "events")]
            recording: None,
            unanswered,
            #[cfg(feature = "test-util")]
            inline: None,
        }
    }
}

impl<F, B, E> Future for DeferFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data = bytes::Bytes>,
    B::Error: std::fmt::Display,
{
    type Output = Result<Response<DeferBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        #[cfg(feature = "test-util")]
        if let Some(inline) = this.inline {
            return inline
                .poll(cx)
                .map_ok(|r| r.map(|body| DeferBody::new(body, None)));
        }
        #[cfg(not(feature = "events"))]
        let polled = this.poll_inner(cx);
        #[cfg(feature = "events")]
        let polled = this.poll_recorded(cx);
        #[cfg(feature = "test-util")]
        let polled = match this.unanswered.inline() {
            Some(tasks) if polled.is_ready() => {
                let result = ready!(polled);
                this.unanswered.end_now(&result);
                let inline = this.inline.insert(inline::Inline::new(result, tasks));
                return inline
                    .poll(cx)
                    .map_ok(|r| r.map(|body| DeferBody::new(body, None)));
            }
            _ => polled,
        };
        // Looked at where it lies, and moved once.
        let watch = match &polled {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(response)) => this.unanswered.answer(response),
            Poll::Ready(Err(_)) => {
                this.unanswered.finish(End::Failed);
                None
            }
        };
        polled.map_ok(|response| response.map(|body| DeferBody::new(body, watch)))
    }
}

impl<F, B, E> DeferFutureProjection<'_, F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    /// The handler, up to its answer.
    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Some(inner) = self.inner.as_mut().as_pin_mut() else {
            panic!("`DeferFuture` polled after it was ready");
        };
        self.unanswered.entered = true;
        let polled = inner.poll(cx);
        self.unanswered.entered = false;
        if polled.is_ready() {
            self.inner.set(None);
        }
        polled
    }

    /// The same, and then its events on their way to the store. Where they could not be recorded, the
    /// answer says so.
    #[cfg(feature = "events")]
    fn poll_recorded(&mut self, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.recording.is_none() {
            let polled = self.poll_inner(cx);
            let Poll::Ready(result) = &polled else {
                return Poll::Pending;
            };
            let Some(recording) = self.unanswered.record(result) else {
                return polled;
            };
            let result = ready!(polled);
            *self.recording = Some(recorded::Waiting::new(result, recording));
        }
        let Some(waiting) = self.recording else {
            unreachable!("it has just been set");
        };
        let (mut result, recorded) = ready!(waiting.poll(cx));
        *self.recording = None;
        match &mut result {
            Ok(response) if recorded.is_err() => {
                recorded::refuse(response);
                // Its body is empty.
                let empty = Mark::REFUSED.and(Mark::BODILESS);
                self.unanswered.asked = self.unanswered.asked.and(empty);
            }
            // What failed already fails as it did.
            Ok(_) | Err(_) => {}
        }
        Poll::Ready(result)
    }
}

impl Unanswered {
    /// Its events, where the answer lets them be recorded.
    #[cfg(feature = "events")]
    fn record<B, E>(&self, result: &Result<Response<B>, E>) -> Option<crate::event::Recording> {
        let collector = self.hold.collector()?;
        collector.record(|| match result {
            Ok(response) => head_only(Some(head_of(response)), End::Complete),
            Err(_) => head_only(None, End::Failed),
        })
    }

    pub(super) fn new<B>(collector: Arc<Collector>, request: &Request<B>) -> Self {
        let asked = Mark::BODILESS
            .when(request.method() == Method::HEAD)
            .and(Mark::CONNECT.when(request.method() == Method::CONNECT))
            .and(Mark::HTTP1.when(request.version() <= Version::HTTP_11));
        Self {
            hold: Hold::first(collector),
            entered: true,
            asked,
        }
    }

    /// The inner service has come back.
    #[inline]
    pub(super) fn left(&mut self) -> Self {
        Self {
            hold: std::mem::take(&mut self.hold),
            entered: false,
            asked: self.asked,
        }
    }

    /// There is a head. Returns what to watch its body with, if anyone cares.
    #[inline]
    fn answer<B: Body>(&mut self, response: &Response<B>) -> Option<Watch> {
        if !self.hold.answered() {
            return None;
        }
        // What the body answers is the user's code.
        self.entered = true;
        let status = response.status();
        let upgraded = status == StatusCode::SWITCHING_PROTOCOLS
            || (self.asked.has(Mark::CONNECT) && status.is_success());
        let bodiless = status == StatusCode::NO_CONTENT
            || status == StatusCode::NOT_MODIFIED
            || response.body().is_end_stream();
        let declared =
            declared_length(response.headers()).or_else(|| response.body().size_hint().exact());
        self.entered = false;
        let marks = self
            .asked
            .and(Mark::UPGRADED.when(upgraded))
            .and(Mark::BODILESS.when(bodiless));
        let collector = self.hold.pass_on()?;
        collector.head(|| head_of(response));
        collector.seen().begin(marks, declared);
        Some(Watch::new(collector))
    }

    /// What the test kit's inline mode waits for.
    #[cfg(feature = "test-util")]
    fn inline(&self) -> Option<inline::Tasks> {
        let test = self.hold.collector()?.scope().test.as_ref()?;
        test.inline()
    }

    /// Ends the response as if its body had been sent, and so releases its tasks.
    #[cfg(feature = "test-util")]
    fn end_now<B: Body, E>(&mut self, result: &Result<Response<B>, E>) {
        let Some(collector) = self.hold.collector() else {
            return;
        };
        let Ok(response) = result else {
            return self.finish(End::Failed);
        };
        collector.head(|| head_of(response));
        let ending = Ending {
            bytes: response.body().size_hint().exact().unwrap_or_default(),
            ..Ending::without_response(End::Complete)
        };
        if let Some(collector) = self.hold.pass_on() {
            Collector::finish(collector, ending);
        }
    }

    /// There is no answer.
    #[cold]
    fn finish(&mut self, end: End) {
        // What its events have been asked by then, they are not asked again.
        #[cfg(feature = "events")]
        if let Some(collector) = self.hold.collector() {
            if let Some(recording) = collector.record(|| head_only(None, end)) {
                recording.go_on();
            }
        }
        self.hold.unanswered(Ending::without_response(end));
    }
}

fn head_of<B>(response: &Response<B>) -> Head {
    Head {
        status: response.status(),
        grpc_status: grpc_status(response.headers()),
    }
}

impl Drop for Unanswered {
    #[inline]
    fn drop(&mut self) {
        if self.hold.collector().is_some() {
            self.finish(if self.entered {
                End::Panicked
            } else {
                End::Cancelled
            });
        }
    }
}

/// What the handler has declared. It counts more than the size hint: a server goes by it.
#[inline]
fn declared_length(headers: &HeaderMap) -> Option<u64> {
    number(headers, &CONTENT_LENGTH)
}

/// A gRPC error without a body has its status in the head.
#[inline]
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<i32> {
    // Made once, not parsed for each response.
    static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
    number(headers, &GRPC_STATUS)
}

#[inline(always)]
fn number<N: FromStr>(headers: &HeaderMap, name: &HeaderName) -> Option<N> {
    // In line: the look-up is a call, which a response without headers need not make.
    if headers.is_empty() {
        return None;
    }
    parsed(headers.get(name)?)
}

fn parsed<N: FromStr>(value: &HeaderValue) -> Option<N> {
    value.to_str().ok()?.trim().parse().ok()
}
