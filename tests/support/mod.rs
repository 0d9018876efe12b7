//! What the socket tests share: a server on a runtime of its own, polite and rude clients, gates,
//! probes, and a log of what happened in which order.
//!
//! Invariants:
//! 1. The server runs on another thread and another runtime than the client, so that nothing that
//!    keeps the server's threads busy can be mistaken for the network, or the other way round.
//! 2. Nothing here makes something true by waiting for a fixed time: a probe looks until it sees what
//!    it waits for, and fails after [`DEADLINE`].
//! 3. A server that is dropped takes its runtime with it, whatever is still open.
#![expect(dead_code, reason = "each test binary uses its part of this module")]
#![expect(
    clippy::disallowed_methods,
    reason = "servers, clients and deadlines of tests are no deferred work"
)]

pub(crate) mod body;
pub(crate) mod client;
#[cfg(all(feature = "sqlite", feature = "hyper"))]
pub(crate) mod events;
#[cfg(feature = "tonic")]
pub(crate) mod grpc;
pub(crate) mod ran;
pub(crate) mod raw;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot};
use tower::{Layer as _, Service};
use tower_defer::{BoxError, DeferBody, DeferLayer};

use body::Script;
use client::Client;
use raw::Raw;

/// After it, what a probe waits for counts as never.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// After it, a whole test body counts as hung.
const HUNG: Duration = Duration::from_secs(120);

/// A binary that uses everything else still has something to fulfil the `expect` above with.
fn used_by_no_test() {}

/// A version of HTTP, spoken in cleartext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    /// With prior knowledge.
    Two,
}

/// The server's runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavor {
    CurrentThread,
    /// With so many workers.
    MultiThread(usize),
}

impl Flavor {
    pub(crate) fn build(self) -> Runtime {
        let mut builder = match self {
            Flavor::CurrentThread => tokio::runtime::Builder::new_current_thread(),
            Flavor::MultiThread(_) => tokio::runtime::Builder::new_multi_thread(),
        };
        if let Flavor::MultiThread(workers) = self {
            builder.worker_threads(workers);
        }
        builder.enable_all().build().expect("a runtime")
    }
}

/// One of the settings that a test body runs in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) http: Http,
    pub(crate) flavor: Flavor,
}

impl Setting {
    /// Serves a tower service over loopback, on a runtime of this flavor.
    pub(crate) fn serve<S, B>(self, service: S) -> Server
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Server::start(self.flavor, move |listener| async move {
            let served = tower_defer::hyper::serve(listener, service, std::future::pending());
            served.await.expect("the server serves");
        })
    }

    /// A client that speaks this version.
    pub(crate) async fn connect(self, server: &Server) -> Client {
        Client::connect(server.addr, self.http).await
    }
}

/// Runs a test body on {HTTP/1.1, HTTP/2} × {`current_thread`, `multi_thread(2)`}, one after the other.
/// The flavor is the server's; the body itself, with the client, has a thread of its own.
pub(crate) fn everywhere<F, Fut>(body: F)
where
    F: Fn(Setting) -> Fut,
    Fut: Future<Output = ()>,
{
    for http in [Http::One, Http::Two] {
        over(http, &body);
    }
}

/// As [`everywhere`], for what makes sense on one version only.
pub(crate) fn over<F, Fut>(http: Http, body: F)
where
    F: Fn(Setting) -> Fut,
    Fut: Future<Output = ()>,
{
    for flavor in [Flavor::CurrentThread, Flavor::MultiThread(2)] {
        on(Setting { http, flavor }, &body);
    }
}

/// Runs a test body in one setting.
pub(crate) fn on<F, Fut>(setting: Setting, body: F)
where
    F: FnOnce(Setting) -> Fut,
    Fut: Future<Output = ()>,
{
    // Seen where the test fails.
    eprintln!("in {setting:?}");
    Flavor::CurrentThread.build().block_on(async {
        tokio::time::timeout(HUNG, body(setting))
            .await
            .unwrap_or_else(|_| panic!("the test hangs in {setting:?}"));
    });
}

/// A handler without a framework, behind the layer.
pub(crate) fn app<F, Fut>(
    layer: &DeferLayer,
    handler: F,
) -> impl Service<
    Request<Incoming>,
    Response = Response<DeferBody<Script>>,
    Error = Infallible,
    Future: Send,
> + Clone
+ Send
+ 'static
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<Script>> + Send + 'static,
{
    layer.layer(tower::service_fn(move |request| {
        let answer = handler(request);
        async move { Ok(answer.await) }
    }))
}

/// A server on its own thread and runtime.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    handle: tokio::runtime::Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Runs whatever serves a listener: axum's, tonic's or hyper's.
    pub(crate) fn start<F, Fut>(flavor: Flavor, serve: F) -> Self
    where
        F: FnOnce(TcpListener) -> Fut + Send + 'static,
        Fut: Future<Output = ()>,
    {
        let runtime = flavor.build();
        let handle = runtime.handle().clone();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let addr = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = serve(listener) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Self {
            addr,
            handle,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The server's runtime, for work that belongs there.
    pub(crate) fn handle(&self) -> &tokio::runtime::Handle {
        &self.handle
    }

    pub(crate) async fn raw(&self) -> Raw {
        Raw::connect(self.addr).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let joined = self.thread.take().map(thread::JoinHandle::join);
        if !thread::panicking() {
            joined.transpose().expect("the server did not panic");
        }
    }
}

/// Looks until it is true.
///
/// # Panics
///
/// After [`DEADLINE`], with what was waited for.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await; // the probe's pause
    }
}

/// Awaits what must happen.
///
/// # Panics
///
/// After [`DEADLINE`], with what was waited for.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}

/// Closed until a test opens it, for all who wait and for those who come later.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Semaphore>);

impl Gate {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    pub(crate) fn open(&self) {
        self.0.close();
    }

    pub(crate) fn is_open(&self) -> bool {
        self.0.is_closed()
    }

    /// Waits until it is open.
    pub(crate) async fn passed(&self) {
        // A closed semaphore is an open gate.
        let _ = self.0.acquire().await;
    }
}

/// What happened, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn note(&self, what: impl Into<String>) {
        self.entries_mut().push(what.into());
    }

    pub(crate) fn entries(&self) -> Vec<String> {
        self.entries_mut().clone()
    }

    pub(crate) fn has(&self, what: &str) -> bool {
        self.count(what) > 0
    }

    pub(crate) fn count(&self, what: &str) -> usize {
        self.entries_mut().iter().filter(|it| *it == what).count()
    }

    /// Waits until it has happened.
    pub(crate) async fn awaits(&self, what: &str) {
        eventually(what, || self.has(what)).await;
    }

    /// # Panics
    ///
    /// Unless all of these have happened, the first of each in this order.
    pub(crate) fn assert_order(&self, order: &[&str]) {
        let entries = self.entries();
        let places: Vec<_> = order
            .iter()
            .map(|what| entries.iter().position(|it| it == what))
            .collect();
        let in_order = places.iter().all(Option::is_some) && places.is_sorted();
        assert!(in_order, "{order:?} did not happen in order: {entries:?}");
    }

    /// Notes it when dropped.
    pub(crate) fn on_drop(&self, what: &str) -> Dropped {
        Dropped(self.clone(), what.to_owned())
    }

    fn entries_mut(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Log::on_drop`].
#[derive(Debug)]
pub(crate) struct Dropped(Log, String);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.note(self.1.clone());
    }
}
