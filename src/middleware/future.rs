//! [`DeferFuture`]: from the call to the head.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use pin_project::pin_project;

use super::DeferBody;
use super::body::Watch;
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
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct DeferFuture<F> {
    /// None once it has answered: it is dropped before anything is released.
    #[pin]
    inner: Option<F>,
    /// None in an inner layer. After `inner`, so that it is dropped after it.
    unanswered: Option<Unanswered>,
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

impl<F> DeferFuture<F> {
    pub(super) fn new(inner: F, unanswered: Unanswered) -> Self {
        Self {
            inner: Some(inner),
            unanswered: Some(unanswered),
        }
    }

    pub(super) fn inner(inner: F) -> Self {
        Self {
            inner: Some(inner),
            unanswered: None,
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
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            panic!("`DeferFuture` polled after it was ready");
        };
        if let Some(unanswered) = this.unanswered.as_mut() {
            unanswered.entered = true;
        }
        let polled = inner.poll(cx);
        if let Some(unanswered) = this.unanswered.as_mut() {
            unanswered.entered = false;
        }
        let result = ready!(polled);
        this.inner.set(None);
        let unanswered = this.unanswered.take();
        Poll::Ready(match result {
            Ok(response) => {
                let watch = unanswered.and_then(|unanswered| unanswered.answer(&response));
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

impl Unanswered {
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
    pub(super) fn left(&mut self) {
        self.entered = false;
    }

    /// There is a head. Returns what to watch its body with, if anyone cares.
    fn answer<B: Body>(mut self, response: &Response<B>) -> Option<Watch> {
        let hold = self.hold.take()?;
        let cares = hold.collector().head(|| Head {
            status: response.status(),
            grpc_status: grpc_status(response.headers()),
        });
        if !cares {
            hold.collector().close();
            return None;
        }
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
        Some(Watch::new(hold, seen))
    }

    fn finish(mut self, end: End) {
        if let Some(hold) = self.hold.take() {
            finish(&hold, end);
        }
    }
}

fn finish(hold: &Hold, end: End) {
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
    headers
        .get("grpc-status")?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}
