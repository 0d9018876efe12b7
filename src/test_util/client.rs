//! [`Client`]: sends a request, takes the response as it is told to, and waits for the tasks.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::Location;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::guard::{self, guarded};
use super::modes::{TestScope, finish};
use super::split::Split;
use super::{Log, Report};
use crate::defer::{Collector, Ending};
use crate::executor::Executor;
use crate::middleware::DeferLayer;
use crate::response::End;
use crate::sync::Arc;

/// Sends a request, reads the response to its end, and waits until the tasks have ended that it
/// deferred, and theirs. [`Client`] does the same with settings.
///
/// The service is the application as it is, with its own [`DeferLayer`](crate::DeferLayer), and is
/// usable afterwards: nothing is closed. Pass a clone, or `&mut service`.
///
/// # Panics
///
/// When the service or the body fails, and when it has not ended after ten seconds of real time.
///
/// # Examples
///
/// See the [module](super).
#[track_caller]
pub fn send_and_drain<S, ReqB, ResB>(
    service: S,
    request: Request<ReqB>,
) -> impl Future<Output = (Response<Bytes>, Report)>
where
    S: Service<Request<ReqB>, Response = Response<ResB>, Error: fmt::Debug>,
    ResB: Body<Data = Bytes, Error: fmt::Display>,
{
    Client::new().send_and_drain(service, request)
}

/// A client of the application under test.
///
/// # Examples
///
/// ```
/// use tower_defer::{Defer, DeferLayer, End, Task, When, test_util::Client};
/// use axum::{Router, routing::get};
///
/// async fn download(defer: Defer) -> Vec<u8> {
///     defer.run(Task::new(|| async {}).name("count").when(When::complete()));
///     vec![0; 100]
/// }
/// # let request = http::Request::get("/").body(axum::body::Body::empty()).unwrap();
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let app = Router::new().route("/", get(download)).layer(DeferLayer::new());
/// let (response, report) = Client::new().leaves_at(10).send_and_drain(app, request).await;
///
/// assert_eq!(response.body().len(), 10);
/// assert_eq!(report.response().unwrap().end, End::Aborted);
/// report.assert_skipped("count");
/// # });
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "call `send_and_drain`"]
pub struct Client {
    leaves_at: Option<u64>,
    end: Option<End>,
    backoff: bool,
    limit: Duration,
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

impl Client {
    /// One that takes everything.
    pub fn new() -> Self {
        Self {
            leaves_at: None,
            end: None,
            backoff: false,
            limit: guard::LIMIT,
        }
    }

    /// It leaves when it has been given so many bytes of the body.
    pub fn leaves_at(mut self, bytes: u64) -> Self {
        self.leaves_at = Some(bytes);
        self
    }

    /// Its response ends so, whatever really became of it; together with
    /// [`leaves_at`](Self::leaves_at), at that byte.
    pub fn ends_with(mut self, end: End) -> Self {
        self.end = Some(end);
        self
    }

    /// Retries wait as they do in production: for tests of a backoff, under paused time.
    pub fn keep_backoff(mut self) -> Self {
        self.backoff = true;
        self
    }

    /// How long it may take, in real time, before the test fails. Ten seconds by default.
    pub fn guard(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// See [`send_and_drain`].
    ///
    /// # Panics
    ///
    /// As [`send_and_drain`], and where the body has ended before the byte at which it was to leave.
    #[track_caller]
    pub fn send_and_drain<S, ReqB, ResB>(
        self,
        service: S,
        request: Request<ReqB>,
    ) -> impl Future<Output = (Response<Bytes>, Report)>
    where
        S: Service<Request<ReqB>, Response = Response<ResB>, Error: fmt::Debug>,
        ResB: Body<Data = Bytes, Error: fmt::Display>,
    {
        let caller = Location::caller();
        async move {
            let sent = Sent::new();
            let exchange = async {
                let response = sent.call(service, request, self.leaves_at).await;
                let collector = sent.collector(caller);
                let response = match response {
                    Ok(response) => response,
                    Err(error) => panic!("sent at {caller}: the service failed: {error:?}"),
                };
                let response = self.take(response, &collector, caller).await;
                finish(&sent.log, self.backoff).await;
                (response, collector)
            };
            let (response, collector) = guarded(&sent.log, self.limit, caller, exchange).await;
            (response, sent.log.report(collector.response().cloned()))
        }
    }

    /// Sends a request and leaves before its response, when `when` is ready; then waits for the tasks
    /// as [`send_and_drain`] does. A server drops the handler's future then, and so does this.
    ///
    /// # Panics
    ///
    /// Where the handler answers first, and as [`send_and_drain`].
    #[track_caller]
    pub fn leaves_when<S, ReqB, ResB>(
        self,
        when: impl Future<Output = ()>,
        service: S,
        request: Request<ReqB>,
    ) -> impl Future<Output = Report>
    where
        S: Service<Request<ReqB>, Response = Response<ResB>, Error: fmt::Debug>,
        ResB: Body<Data = Bytes, Error: fmt::Display>,
    {
        let caller = Location::caller();
        async move {
            let sent = Sent::new();
            let exchange = async {
                let collector = {
                    let mut answer = pin!(sent.call(service, request, None));
                    tokio::select! {
                        biased;
                        _ = &mut answer => panic!(
                            "sent at {caller}: the handler answered before the client was to leave"
                        ),
                        () = when => {}
                    }
                    sent.collector(caller)
                };
                finish(&sent.log, self.backoff).await;
                collector
            };
            let collector = guarded(&sent.log, self.limit, caller, exchange).await;
            sent.log.report(collector.response().cloned())
        }
    }

    /// Reads the body, as far as it is to be read, and lets go of it.
    async fn take<B>(
        self,
        response: Response<B>,
        collector: &Arc<Collector>,
        caller: &'static Location<'static>,
    ) -> Response<Bytes>
    where
        B: Body<Data = Bytes, Error: fmt::Display>,
    {
        let (head, body) = response.into_parts();
        let mut taken = Vec::new();
        {
            let mut body = pin!(body);
            let leaves_at = self.leaves_at.unwrap_or(u64::MAX);
            let mut error = None;
            while (taken.len() as u64) < leaves_at && error.is_none() {
                match poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                    Some(Ok(frame)) => {
                        let chunk = frame.into_data().unwrap_or_default();
                        taken.extend_from_slice(&chunk);
                    }
                    Some(Err(failed)) => error = Some(failed.to_string()),
                    None => break,
                }
            }
            let early = self.leaves_at.is_some_and(|at| (taken.len() as u64) < at);
            if early && error.is_none() {
                panic!(
                    "sent at {caller}: the client was to leave at byte {leaves_at}, and the response \
                     has only {}",
                    taken.len()
                );
            }
            if let Some(end) = self.end {
                collector.release_as(Ending {
                    end,
                    bytes: taken.len() as u64,
                    body_error: error.map(Into::into),
                });
            }
        }
        Response::from_parts(head, taken.into())
    }
}

/// A request under way.
struct Sent {
    log: Arc<Log>,
    layer: DeferLayer,
}

impl Sent {
    fn new() -> Self {
        let log = Log::new(false);
        // Its own executor gets no task, and looks after a stalled body.
        let layer = DeferLayer::for_tests(Executor::new(), TestScope::probe(log.clone()));
        Self { log, layer }
    }

    async fn call<S, ReqB, ResB>(
        &self,
        service: S,
        request: Request<ReqB>,
        at: Option<u64>,
    ) -> Result<Response<impl Body<Data = Bytes, Error = ResB::Error> + use<S, ReqB, ResB>>, S::Error>
    where
        S: Service<Request<ReqB>, Response = Response<ResB>>,
        ResB: Body<Data = Bytes, Error: fmt::Display>,
    {
        let mut service = self.layer.layer(Split { inner: service, at });
        poll_fn(|cx| service.poll_ready(cx)).await?;
        service.call(request).await
    }

    fn collector(&self, caller: &'static Location<'static>) -> Arc<Collector> {
        match self.layer.test_scope().and_then(TestScope::probed) {
            Some(collector) => collector,
            None => panic!("sent at {caller}: the service was never called"),
        }
    }
}
