//! [`DeferService`]: a request goes in with a handle.

use std::future::Future;
use std::task::{Context, Poll};

use http::{Request, Response};
use tower_service::Service;

use super::future::Unanswered;
use super::{DeferBody, DeferFuture};
use crate::defer::{Collector, Defer, Scope};
use crate::sync::Arc;

/// A service behind a [`DeferLayer`](crate::DeferLayer).
///
/// Its error is the inner service's, untouched, and so is its readiness. The inner response's body must
/// yield [`bytes::Bytes`], as axum's, tonic's and hyper's do.
#[derive(Clone, Debug)]
pub struct DeferService<S> {
    inner: S,
    scope: Arc<Scope>,
}

impl<S> DeferService<S> {
    pub(crate) fn new(inner: S, scope: Arc<Scope>) -> Self {
        Self { inner, scope }
    }
}

impl<S, ReqB, ResB> Service<Request<ReqB>> for DeferService<S>
where
    S: Service<Request<ReqB>, Response = Response<ResB>>,
    ResB: http_body::Body<Data = bytes::Bytes>,
    ResB::Error: std::fmt::Display,
{
    type Response = Response<DeferBody<ResB>>;
    type Error = S::Error;
    type Future = DeferFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqB>) -> Self::Future {
        #[cfg(feature = "test-util")]
        if let Some(probe) = request.extensions_mut().remove::<crate::test_util::Probe>() {
            let inner = probe.0.inner_alone(&self.scope);
            request.extensions_mut().insert(inner);
            return self.enter(request, &mut Unanswered::default());
        }
        if let Some(outer) = request.extensions().get::<Defer>() {
            // An inner layer: one collector per request, so that nothing fires before the outer body
            // is out.
            let inner = outer.inner(&self.scope);
            request.extensions_mut().insert(inner);
            return self.enter(request, &mut Unanswered::default());
        }
        let collector = Collector::open(self.scope.clone());
        // From here on, so that a panic in the inner `call` is seen as one.
        let mut unanswered = Unanswered::new(collector.clone(), &request);
        #[cfg(feature = "test-util")]
        if let Some(test) = &self.scope.test {
            if test.probes(&collector) {
                test.attach(&self.scope.executor);
                let probe = crate::test_util::Probe(Defer::new(collector));
                request.extensions_mut().insert(probe);
                return self.enter(request, &mut unanswered);
            }
        }
        request.extensions_mut().insert(Defer::new(collector));
        self.enter(request, &mut unanswered)
    }
}

impl<S> DeferService<S> {
    /// Calls the inner service; the caller sees to a panic. Apart, because the inner future, which is often
    /// large, goes to its place directly only where nothing is to be dropped in a panic: 29 of 1,071
    /// instructions that the layer adds to a request.
    #[inline(never)]
    fn enter<R>(&mut self, request: R, unanswered: &mut Unanswered) -> DeferFuture<S::Future>
    where
        S: Service<R, Future: Future>,
    {
        DeferFuture::new(enter(&mut self.inner, request), unanswered.left())
    }
}

/// Apart, too: a future that is put together in the caller would be moved once more, through an axum router
/// 64 of 857 instructions.
#[inline(never)]
fn enter<S: Service<R>, R>(inner: &mut S, request: R) -> S::Future {
    inner.call(request)
}
