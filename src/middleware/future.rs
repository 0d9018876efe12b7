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
#[cfg(feature = "test-util")]
use super::inline;
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
pub struct DeferFuture<F: Future> {
    /// None once it has answered: it is dropped before anything is released.
    #[pin]
    inner: Option<F>,
    /// None in an inner layer. After `inner`, so that it is dropped after it.
    unanswered: Option<Unanswered>,
    /// The test kit's inline mode: the tasks end before the answer is given.
    #[cfg(feature = "test-util")]
    inline: Option<inline::Inline<F::Output>>,
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
    pub(super) fn new(inner: F, unanswered: Unanswered) -> Self {
        Self {
            inner: Some(inner),
            unanswered: Some(unanswered),
            #[cfg(feature = "test-util")]
            inline: None,
        }
    }

    pub(super) fn inner(inner: F) -> Self {
        Self {
            inner: Some(inner),
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
        let mut hold = self.hold.take()?;
        if hold.is_of_no_concern() {
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
        // After all that the body was asked: its answers are the user's code.
        hold.collector().head(|| Head {
            status: response.status(),
            grpc_status: grpc_status(response.headers()),
        });
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
        hold.collector().head(|| Head {
            status: response.status(),
            grpc_status: grpc_status(response.headers()),
        });
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
