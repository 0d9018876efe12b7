//! The application inside the kit's own layer: its body is cut where the client is to leave.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use tower_service::Service;

/// A chunk never reaches over byte `at`: so a client can leave exactly there.
#[derive(Debug)]
pub(super) struct Split<S> {
    pub(super) inner: S,
    pub(super) at: Option<u64>,
}

#[pin_project]
pub(super) struct SplitFuture<F> {
    #[pin]
    inner: F,
    at: Option<u64>,
}

#[pin_project]
pub(super) struct SplitBody<B> {
    #[pin]
    inner: B,
    /// How many bytes until the cut.
    left: Option<u64>,
    rest: Option<Bytes>,
}

impl<S, ReqB, ResB> Service<Request<ReqB>> for Split<S>
where
    S: Service<Request<ReqB>, Response = Response<ResB>>,
    ResB: Body<Data = Bytes>,
{
    type Response = Response<SplitBody<ResB>>;
    type Error = S::Error;
    type Future = SplitFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        SplitFuture {
            inner: self.inner.call(request),
            at: self.at,
        }
    }
}

impl<F, B, E> Future for SplitFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<SplitBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let left = *this.at;
        let answered = ready!(this.inner.poll(cx));
        Poll::Ready(answered.map(|response| {
            response.map(|inner| SplitBody {
                inner,
                left,
                rest: None,
            })
        }))
    }
}

impl<B: Body<Data = Bytes>> Body for SplitBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if let Some(rest) = this.rest.take() {
            return Poll::Ready(Some(Ok(Frame::data(rest))));
        }
        let frame = match ready!(this.inner.poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other),
        };
        let mut chunk = match frame.into_data() {
            Ok(chunk) => chunk,
            Err(frame) => return Poll::Ready(Some(Ok(frame))),
        };
        if let Some(left) = this.left {
            let length = chunk.len() as u64;
            if *left > 0 && *left < length {
                // Less than the chunk's length, so it fits.
                *this.rest = Some(chunk.split_off(*left as usize));
                *left = 0;
            } else {
                *left = left.saturating_sub(length);
            }
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let hint = self.inner.size_hint();
        let rest = self.rest.as_ref().map_or(0, |rest| rest.len() as u64);
        let mut with_rest = SizeHint::new();
        with_rest.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest
    }
}
