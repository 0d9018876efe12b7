//! [`DeferFuture`]: from the call to the head.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Version};
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
use crate::defer::{Collector, Ending, Head, Hold};
use crate::response::{BodySeen, End};
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
    pub(super) inner: Option<F>,
    /// The answer, while the events of its request are being recorded.
    #[cfg(feature = "events")]
    pub(super) recording: Option<Box<recorded::Waiting<F::Output>>>,
    /// None in an inner layer. After `inner`, so that it is dropped after it.
    pub(super) unanswered: Option<Unanswered>,
    /// The test kit's inline mode: the tasks end before the answer is given.
    #[cfg(feature = "test-util")]
    pub(super) inline: Option<inline::Inline<F::Output>>,
}

/// A request without an answer. Dropped as it is, it says why there will be none.
#[derive(Debug)]
pub(super) struct Unanswered {
    /// None once it has been answered.
    hold: Option<Hold>,
    /// We are within the inner service: dropped now, it has panicked.
    entered: bool,
    asked: Asked,
}

/// What of the request decides how its response ends.
#[derive(Clone, Copy, Debug)]
struct Asked {
    head: bool,
    connect: bool,
    http1: bool,
}

impl<F: Future> DeferFuture<F> {
    pub(super) fn inner(inner: F) -> Self {
        Self {
            inner: Some(inner),
            #[cfg(feature = "events")]
            recording: None,
            unanswered: None,
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
        let result = ready!(this.poll_inner(cx));
        #[cfg(feature = "events")]
        let (result, refused) = ready!(this.poll_recorded(cx));
        let unanswered = this.unanswered.take();
        #[cfg(feature = "test-util")]
        if let Some(tasks) = unanswered.as_ref().and_then(Unanswered::inline) {
            if let Some(unanswered) = unanswered {
                unanswered.end_now(&result);
            }
            let inline = this.inline.insert(inline::Inline::new(result, tasks));
            return inline
                .poll(cx)
                .map_ok(|r| r.map(|body| DeferBody::new(body, None)));
        }
        Poll::Ready(match result {
            Ok(response) => {
                let watch = unanswered.and_then(|unanswered| unanswered.answer(&response));
                #[cfg(feature = "events")]
                let watch = if refused {
                    watch.map(Watch::refused)
                } else {
                    watch
                };
                Ok(response.map(|body| DeferBody::new(body, watch)))
            }
            Err(error) => {
                if let Some(unanswered) = unanswered {
                    unanswered.finish(End::Failed);
                }
                Err(error)
            }
        })
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
        if let Some(unanswered) = self.unanswered.as_mut() {
            unanswered.entered = true;
        }
        let polled = inner.poll(cx);
        if let Some(unanswered) = self.unanswered.as_mut() {
            unanswered.entered = false;
        }
        let result = ready!(polled);
        self.inner.set(None);
        Poll::Ready(result)
    }

    /// The same, and then its events on their way to the store. Whether they could not be recorded, and
    /// the answer says so.
    #[cfg(feature = "events")]
    fn poll_recorded(&mut self, cx: &mut Context<'_>) -> Poll<(F::Output, bool)> {
        if self.recording.is_none() {
            let result = ready!(self.poll_inner(cx));
            let recording = self.unanswered.as_ref().and_then(|u| u.record(&result));
            let Some(recording) = recording else {
                return Poll::Ready((result, false));
            };
            *self.recording = Some(recorded::Waiting::new(result, recording));
        }
        let Some(waiting) = self.recording else {
            unreachable!("it has just been set");
        };
        let (mut result, recorded) = ready!(waiting.poll(cx));
        *self.recording = None;
        let refused = match &mut result {
            Ok(response) if recorded.is_err() => {
                recorded::refuse(response);
                true
            }
            // What failed already fails as it did.
            Ok(_) | Err(_) => false,
        };
        Poll::Ready((result, refused))
    }
}

impl Unanswered {
    /// Its events, where the answer lets them be recorded.
    #[cfg(feature = "events")]
    fn record<B, E>(&self, result: &Result<Response<B>, E>) -> Option<crate::event::Recording> {
        let hold = self.hold.as_ref()?;
        hold.collector().record(|| match result {
            Ok(response) => head_only(Some(head_of(response)), End::Complete),
            Err(_) => head_only(None, End::Failed),
        })
    }

    pub(super) fn new<B>(collector: Arc<Collector>, request: &Request<B>) -> Self {
        let asked = Asked {
            head: request.method() == Method::HEAD,
            connect: request.method() == Method::CONNECT,
            http1: request.version() <= Version::HTTP_11,
        };
        Self {
            hold: Some(Hold::first(collector)),
            entered: true,
            asked,
        }
    }

    /// The inner service has come back.
    pub(super) fn left(mut self) -> Self {
        self.entered = false;
        self
    }

    /// There is a head. Returns what to watch its body with, if anyone cares.
    fn answer<B: Body>(mut self, response: &Response<B>) -> Option<Watch> {
        let hold = self.hold.take()?.answered()?;
        let hint = response.body().size_hint();
        let status = response.status();
        let seen = BodySeen {
            upgraded: status == StatusCode::SWITCHING_PROTOCOLS
                || (self.asked.connect && status.is_success()),
            bodiless: self.asked.head
                || status == StatusCode::NO_CONTENT
                || status == StatusCode::NOT_MODIFIED
                || response.body().is_end_stream(),
            declared: declared_length(response.headers()).or(hint.exact()),
            http1: self.asked.http1,
            ..BodySeen::default()
        };
        // After all that the body was asked: its answers are the user's code.
        hold.collector().head(|| head_of(response));
        Some(Watch::new(hold, seen))
    }

    /// What the test kit's inline mode waits for.
    #[cfg(feature = "test-util")]
    fn inline(&self) -> Option<inline::Tasks> {
        let test = self.hold.as_ref()?.collector().scope().test.as_ref()?;
        test.inline()
    }

    /// Ends the response as if its body had been sent, and so releases its tasks.
    #[cfg(feature = "test-util")]
    fn end_now<B: Body, E>(mut self, result: &Result<Response<B>, E>) {
        let Some(hold) = self.hold.take() else { return };
        let Ok(response) = result else {
            return finish(&hold, End::Failed);
        };
        hold.collector().head(|| head_of(response));
        hold.collector().end(Ending {
            bytes: response.body().size_hint().exact().unwrap_or_default(),
            ..Ending::without_response(End::Complete)
        });
        hold.collector().close();
    }

    fn finish(mut self, end: End) {
        if let Some(hold) = self.hold.take() {
            finish(&hold, end);
        }
    }
}

fn head_of<B>(response: &Response<B>) -> Head {
    Head {
        status: response.status(),
        grpc_status: grpc_status(response.headers()),
    }
}

/// There is no answer.
fn finish(hold: &Hold, end: End) {
    // What its events have been asked by then, they are not asked again.
    #[cfg(feature = "events")]
    if let Some(recording) = hold.collector().record(|| head_only(None, end)) {
        recording.go_on();
    }
    hold.collector().end(Ending::without_response(end));
    hold.collector().close();
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            finish(
                &hold,
                if self.entered {
                    End::Panicked
                } else {
                    End::Cancelled
                },
            );
        }
    }
}

/// What the handler has declared. It counts more than the size hint: a server goes by it.
fn declared_length(headers: &HeaderMap) -> Option<u64> {
    if headers.is_empty() {
        return None;
    }
    headers
        .get(CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// A gRPC error without a body has its status in the head.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<i32> {
    // Made once, not parsed for each response.
    static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
    if headers.is_empty() {
        return None;
    }
    headers
        .get(&GRPC_STATUS)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}
