//! An answer that waits until the events of its request are recorded, and what becomes of it if they
//! cannot be.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};

use crate::event::{EmitError, Recording};

/// Before `recording`, the answer: the client leaves, and the recording goes on by itself.
pub(super) struct Waiting<R> {
    answer: Option<R>,
    recording: Recording,
}

impl<R> Waiting<R> {
    /// Boxed: a future that records nothing does not grow by it.
    pub(super) fn new(answer: R, recording: Recording) -> Box<Self> {
        Box::new(Self {
            answer: Some(answer),
            recording,
        })
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(R, Result<(), EmitError>)> {
        let recorded = ready!(Pin::new(&mut self.recording).poll(cx));
        match self.answer.take() {
            Some(answer) => Poll::Ready((answer, recorded)),
            None => panic!("`DeferFuture` polled after it was ready"),
        }
    }
}

impl<R> fmt::Debug for Waiting<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiting")
    }
}

/// Makes a head of this one that says that the service is unavailable. The handler's headers spoke of
/// a success that nobody is to see.
pub(super) fn refuse<B>(response: &mut Response<B>) {
    const GRPC: &[u8] = b"application/grpc";
    let content_type = response.headers_mut().remove(CONTENT_TYPE);
    let grpc = content_type.filter(|value| value.as_bytes().starts_with(GRPC));
    response.headers_mut().clear();
    response.extensions_mut().clear();
    match grpc {
        None => *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE,
        Some(content_type) => {
            // gRPC says it in a response of headers only, with its own status.
            *response.status_mut() = StatusCode::OK;
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, content_type);
            headers.insert("grpc-status", HeaderValue::from_static("14"));
            let message = "the events of this call could not be recorded";
            headers.insert("grpc-message", HeaderValue::from_static(message));
        }
    }
}
