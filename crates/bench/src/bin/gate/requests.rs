//! What a request pays: a service is called directly, its body read to the end and dropped, and then
//! whatever it deferred is run.

use std::convert::Infallible;
use std::future::{Ready, poll_fn, ready};
use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower_defer::{Defer, DeferLayer};
use tower_http::add_extension::AddExtensionLayer;
use tower_http::request_id::{MakeRequestUuid, SetRequestIdLayer};
use tower_http::trace::TraceLayer;
use tower_layer::{Identity, Layer};
use tower_service::Service;

use crate::tasks::{Done, ready_task};

/// Captured by each task of a request: 16 bytes.
type Captured = [u64; 2];

const CAPTURED: Captured = [1, 2];

/// What the handler does beside answering.
#[derive(Clone, Copy)]
enum Handler {
    Nothing,
    Spawn(usize),
    Defer(usize),
}

impl Service<Request<Empty<Bytes>>> for Handler {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        match *self {
            Handler::Nothing => {}
            Handler::Spawn(tasks) => (0..tasks).for_each(|_| spawn()),
            Handler::Defer(tasks) => {
                let defer = request.extensions().get::<Defer>().expect("the layer");
                (0..tasks).for_each(|_| run(defer));
            }
        }
        ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

fn spawn() {
    let captured = black_box(CAPTURED);
    tokio::spawn(async move { ready_task(captured) });
}

fn run(defer: &Defer) {
    let captured = black_box(CAPTURED);
    defer.run(move || async move { ready_task(captured) });
}

/// A variant by its name; how many requests, and how many before their tasks are run.
pub async fn run_named(name: &str, n: usize) -> bool {
    let shared = Arc::new(7_u64);
    let plain = |service, tasks, burst| drive(service, empty, n, tasks, burst);
    match name {
        "request" => plain(Handler::Nothing, 0, 64).await,
        "request+add_extension" => {
            let layer = AddExtensionLayer::new(shared);
            drive(layer.layer(Handler::Nothing), empty, n, 0, 64).await;
        }
        "request+defer" => {
            let layer = DeferLayer::new();
            drive(layer.layer(Handler::Nothing), empty, n, 0, 64).await;
        }
        "request+request_id" => {
            let layer = SetRequestIdLayer::x_request_id(MakeRequestUuid);
            drive(layer.layer(Handler::Nothing), empty, n, 0, 64).await;
        }
        "request+trace" => {
            let layer = TraceLayer::new_for_http();
            drive(layer.layer(Handler::Nothing), empty, n, 0, 64).await;
        }
        "router" => drive(router(), axum_empty, n, 0, 64).await,
        "router+identity" => {
            drive(router().layer(Identity::new()), axum_empty, n, 0, 64).await;
        }
        "router+extension" => {
            let router = router().layer(axum::Extension(shared));
            drive(router, axum_empty, n, 0, 64).await;
        }
        "router+defer" => {
            let router = router().layer(DeferLayer::new());
            drive(router, axum_empty, n, 0, 64).await;
        }
        "defer around router" => {
            let around = DeferLayer::new().layer(router());
            drive(around, axum_empty, n, 0, 64).await;
        }
        "router+defer, 1 task" => {
            let handler = |defer: Defer| async move {
                run(&defer);
                "hello"
            };
            let router = Router::new()
                .route("/", get(handler))
                .layer(DeferLayer::new());
            drive(router, axum_empty, n, 1, 64).await;
        }
        "router, 1 spawn" => {
            let handler = || async {
                spawn();
                "hello"
            };
            drive(Router::new().route("/", get(handler)), axum_empty, n, 1, 64).await;
        }
        _ => return whole(name, n).await,
    }
    true
}

/// `whole spawn 4/64`: a handler with four tasks, 64 requests before they are run.
async fn whole(name: &str, n: usize) -> bool {
    let numbers = name
        .rsplit(' ')
        .next()
        .and_then(|numbers| numbers.split_once('/'));
    let parsed = numbers.and_then(|(t, b)| Some((t.parse().ok()?, b.parse().ok()?)));
    let Some((tasks, burst)) = parsed else {
        return false;
    };
    if name.starts_with("whole spawn ") {
        drive(Handler::Spawn(tasks), empty, n, tasks, burst).await;
    } else if name.starts_with("whole defer, no hold ") {
        let layer = DeferLayer::new().max_hold(Duration::MAX);
        drive(layer.layer(Handler::Defer(tasks)), empty, n, tasks, burst).await;
    } else if name.starts_with("whole defer ") {
        let service = DeferLayer::new().layer(Handler::Defer(tasks));
        drive(service, empty, n, tasks, burst).await;
    } else {
        return false;
    }
    true
}

fn router() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

fn empty() -> Request<Empty<Bytes>> {
    Request::new(Empty::new())
}

fn axum_empty() -> Request<axum::body::Body> {
    Request::new(axum::body::Body::empty())
}

async fn drive<S, A, B>(
    mut service: S,
    request: impl Fn() -> Request<A>,
    n: usize,
    tasks: usize,
    burst: usize,
) where
    S: Service<Request<A>, Response = Response<B>>,
    S::Error: std::fmt::Debug,
    B: Body<Data = Bytes>,
{
    for _ in 0..n / burst {
        let done = Done::expect(tasks * burst);
        for _ in 0..burst {
            let response = service
                .call(black_box(request()))
                .await
                .expect("a response");
            let mut body = pin!(response.into_body());
            while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                black_box(frame.is_ok());
            }
        }
        done.wait().await;
    }
}
