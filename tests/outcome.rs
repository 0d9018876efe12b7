//! What is known of the response, and which tasks run: cases 10 to 16, and their neighbours.
#![cfg(all(feature = "axum", feature = "hyper"))]

mod support;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Redirect};
use axum::routing::{get, post};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::{Layer, ServiceExt};
use tower_defer::{BoxError, Defer, DeferLayer, End, Executor, RequestExt, Task, When};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::timeout::TimeoutLayer;

use support::body::Script;
use support::client::{Client, Manual};
use support::ran::{Ran, quiet};
use support::{Flavor, Gate, Http, Log, Server, Setting, app, everywhere, on, over};

fn defer(request: &Request<Incoming>) -> Defer {
    request.defer().expect("the layer is there")
}

/// What runs when the client left.
const LEFT: &str = "aborted always default success";

/// What runs when the handler reported failure.
const FAILED: &str = "always failure";

/// What runs when all went well.
const WELL: &str = "always complete default success";

/// Registers the six tasks before the extractors that follow it.
struct Registered;

impl FromRequestParts<Ran> for Registered {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, ran: &Ran) -> Result<Self, Infallible> {
        ran.six(&Defer::from_extensions(&parts.extensions).expect("the layer is there"));
        Ok(Self)
    }
}

#[test]
fn case_10_the_status_decides_whether_returned_or_rejected() {
    let table = [
        ("/200", 200, WELL),
        ("/302", 302, WELL),
        ("/404", 404, FAILED),
        ("/500", 500, FAILED),
        ("/error", 404, FAILED),
        ("/number/17", 200, WELL),
        ("/number/rejected", 400, FAILED),
    ];
    for (path, status, expected) in table {
        everywhere(|setting| async move {
            // Given handlers that register tasks of each condition, and answer in every way.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let router = Router::new()
                .route("/200", get(async |_: Registered| "well"))
                .route(
                    "/302",
                    get(async |_: Registered| (StatusCode::FOUND, Redirect::to("/"))),
                )
                .route("/404", get(async |_: Registered| StatusCode::NOT_FOUND))
                .route(
                    "/500",
                    get(async |_: Registered| StatusCode::INTERNAL_SERVER_ERROR),
                )
                .route(
                    "/error",
                    get(async |_: Registered| Err::<(), _>(StatusCode::NOT_FOUND)),
                )
                .route(
                    "/number/{number}",
                    get(async |_: Registered, Path(number): Path<u32>| number.to_string()),
                )
                .layer(layer.clone())
                .with_state(ran.clone());
            let server = setting.serve(router);

            // When one is asked.
            let answer = setting.connect(&server).await.get(path).await;

            // Then its status decides.
            assert_eq!(answer.head.status, status);
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), expected, "{path}");
            let info = ran.info("always");
            assert_eq!(info.status, Some(answer.head.status));
            assert_eq!(
                (info.end, info.bytes),
                (End::Complete, answer.body.len() as u64)
            );
        });
    }
}

#[test]
fn case_10_a_service_that_returns_an_error_has_failed() {
    everywhere(|setting| async move {
        // Given a service that registers tasks and returns an error.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve(layer.layer(tower::service_fn({
            let ran = ran.clone();
            move |request: Request<Incoming>| {
                ran.six(&defer(&request));
                async { Err::<Response<Script>, _>("broken") }
            }
        })));

        // When it is called.
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");
        client.send(request).await.expect_err("no response");

        // Then the tasks for failure run, and there was no response.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), FAILED);
        let info = ran.info("always");
        assert_eq!((info.end, info.status), (End::Failed, None));
    });
}

/// Panics after it has registered: in its future, or already in `call`.
fn panicking(
    ran: &Ran,
    in_call: bool,
) -> impl tower::Service<
    Request<Incoming>,
    Response = Response<Script>,
    Error = Infallible,
    Future: Send,
> + Clone
+ Send
+ 'static {
    let ran = ran.clone();
    tower::service_fn(move |request: Request<Incoming>| {
        let panics = request.uri().path() == "/panic";
        if panics {
            ran.six(&defer(&request));
        }
        assert!(!(panics && in_call), "the handler's own panic, in `call`");
        async move {
            tokio::task::yield_now().await;
            assert!(!panics, "the handler's own panic");
            Ok(Response::new(Script::new()))
        }
    })
}

#[test]
fn case_11_a_panic_reaches_the_server_and_the_tasks_know() {
    for in_call in [false, true] {
        everywhere(|setting| async move {
            // Given a handler that panics, and nobody who catches it.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let server = setting.serve(layer.layer(panicking(&ran, in_call)));

            // When it is called.
            let mut client = setting.connect(&server).await;
            let request = client.request(Method::GET, "/panic");
            client.send(request).await.expect_err("no response");

            // Then the tasks for failure run once, and the server goes on.
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), FAILED);
            let info = ran.info("always");
            assert_eq!((info.end, info.status), (End::Panicked, None));
            setting.connect(&server).await.get("/").await;
        });
    }
}

#[test]
fn case_11_a_panic_caught_outside_is_still_a_panic() {
    for in_call in [false, true] {
        everywhere(|setting| async move {
            // Given a layer outside that makes a response of a panic.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let service = CatchPanicLayer::new().layer(layer.layer(panicking(&ran, in_call)));
            let server = setting.serve(service);

            // When the handler panics.
            let answer = setting.connect(&server).await.get("/panic").await;

            // Then the client has a 500, and the tasks know of the panic.
            assert_eq!(answer.head.status, 500);
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), FAILED);
            let info = ran.info("always");
            assert_eq!((info.end, info.status), (End::Panicked, None));
        });
    }
}

#[test]
fn case_11_a_panic_caught_inside_is_a_500() {
    for in_call in [false, true] {
        everywhere(|setting| async move {
            // Given a layer inside that makes a response of a panic.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let service = layer.layer(CatchPanicLayer::new().layer(panicking(&ran, in_call)));
            let server = setting.serve(service);

            // When the handler panics.
            let answer = setting.connect(&server).await.get("/panic").await;

            // Then it is a response like any other.
            assert_eq!(answer.head.status, 500);
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), FAILED);
            let info = ran.info("always");
            assert_eq!(info.status, Some(StatusCode::INTERNAL_SERVER_ERROR));
            assert_eq!(
                (info.end, info.bytes),
                (End::Complete, answer.body.len() as u64)
            );
        });
    }
}

/// The ways in which a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Close,
    /// HTTP/1.1 only.
    HalfClose,
    /// Of the connection; over HTTP/2 of the stream.
    Reset,
}

const WAYS: [(Http, Way); 5] = [
    (Http::One, Way::Close),
    (Http::One, Way::HalfClose),
    (Http::One, Way::Reset),
    (Http::Two, Way::Close),
    (Http::Two, Way::Reset),
];

/// Asks for `/`, and leaves when `ready`. What it returns is a connection that stays.
async fn leave(
    setting: Setting,
    server: &Server,
    way: Way,
    ready: impl Future<Output = ()>,
) -> Option<Manual> {
    if setting.http == Http::One {
        let mut client = server.raw().await;
        client.get("/").await;
        ready.await;
        match way {
            Way::Close => drop(client),
            Way::Reset => client.reset(),
            Way::HalfClose => {
                client.half_close().await;
                // To the server's end of it: what it sees is the half-close and nothing else.
                client.rest().await;
            }
        }
        return None;
    }
    let mut client = Manual::connect(server.addr, 65_535).await;
    let (response, mut stream) = client.start("/").await;
    ready.await;
    if way == Way::Reset {
        stream.send_reset(h2::Reason::CANCEL);
        return Some(client);
    }
    client.leave().await;
    drop(response);
    None
}

#[test]
fn case_12_the_client_leaves_while_the_handler_is_pending() {
    for (http, way) in WAYS {
        over(http, |setting| async move {
            // Given a handler that has registered tasks and is pending.
            let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
            let server = setting.serve({
                let (log, ran) = (log.clone(), ran.clone());
                app(&layer, move |request| {
                    let (log, ran) = (log.clone(), ran.clone());
                    async move {
                        if request.uri().path() == "/" {
                            let order = log.clone();
                            let first = Task::new(move || {
                                order.note("first task");
                                async {}
                            });
                            defer(&request).run(first);
                            ran.six(&defer(&request));
                            let _dropped = log.on_drop("handler dropped");
                            log.note("pending");
                            std::future::pending::<()>().await;
                        }
                        Response::new(Script::new())
                    }
                })
            });

            // When the client leaves, after others have been served.
            let pending = async {
                log.awaits("pending").await;
                setting.connect(&server).await.get("/other").await;
                assert_eq!(ran.names(), "", "while the handler is pending");
            };
            let stays = leave(setting, &server, way, pending).await;

            // Then the handler is dropped first, and each task runs as its condition says.
            quiet(&layer, 7).await;
            log.assert_order(&["pending", "handler dropped", "first task"]);
            assert_eq!(ran.names(), "aborted always default", "{way:?}");
            let info = ran.info("always");
            assert_eq!((info.end, info.status), (End::Cancelled, None));
            drop(stays);
        });
    }
}

#[test]
fn case_13_the_client_leaves_an_idle_stream() {
    for (http, way) in WAYS {
        over(http, |setting| async move {
            // Given a stream that has sent an event and waits for the next.
            let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
            let server = setting.serve({
                let (log, ran) = (log.clone(), ran.clone());
                app(&layer, move |request| {
                    ran.six(&defer(&request));
                    let log = log.clone();
                    let idle = move || log.note("idle");
                    let body = Script::new().data("event").then(idle).never();
                    std::future::ready(Response::new(body))
                })
            });

            // When the client leaves.
            let stays = leave(setting, &server, way, log.awaits("idle")).await;

            // Then the response was aborted after what it had.
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), LEFT, "{way:?}");
            assert_eq!(ran.end("always"), (End::Aborted, 5));
            assert_eq!(ran.info("always").status, Some(StatusCode::OK));
            drop(stays);
        });
    }
}

#[test]
fn case_13_the_client_leaves_a_busy_stream() {
    const CHUNK: usize = 64 << 10;
    for (http, way) in WAYS {
        if way == Way::HalfClose {
            // A server that is busy writing does not look, and the client still reads.
            continue;
        }
        over(http, |setting| async move {
            // Given a stream with far more than anybody buffers.
            let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
            let server = setting.serve({
                let (log, ran) = (log.clone(), ran.clone());
                app(&layer, move |request| {
                    ran.six(&defer(&request));
                    let chunk = Bytes::from(vec![b'x'; CHUNK]);
                    let log = log.clone();
                    let mut body = Script::new().data(chunk.clone());
                    body = body.then(move || log.note("busy"));
                    for _ in 0..1024 {
                        body = body.data(chunk.clone());
                    }
                    std::future::ready(Response::new(body))
                })
            });

            // When the client leaves.
            let stays = leave(setting, &server, way, log.awaits("busy")).await;

            // Then the response was aborted somewhere.
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), LEFT, "{way:?}");
            let (end, bytes) = ran.end("always");
            assert_eq!(end, End::Aborted);
            let whole = 1025 * CHUNK as u64;
            assert!((CHUNK as u64..whole).contains(&bytes), "{bytes}");
            drop(stays);
        });
    }
}

#[test]
fn case_14_a_body_that_fails_is_not_one_that_was_left() {
    for late in [false, true] {
        everywhere(|setting| async move {
            // Given a body that fails, at once or after some bytes.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let server = setting.serve({
                let ran = ran.clone();
                app(&layer, move |request| {
                    ran.six(&defer(&request));
                    let body = if late {
                        Script::new().data("half")
                    } else {
                        Script::new()
                    };
                    std::future::ready(Response::new(body.fail("the disk is gone")))
                })
            });

            // When it is read.
            let mut client = setting.connect(&server).await;
            let request = client.request(Method::GET, "/");
            let read = match client.send(request).await {
                Ok(response) => support::client::read(response).await.map(drop),
                Err(error) => Err(error),
            };
            read.expect_err("no whole response");

            // Then the tasks know its text.
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), "always default success");
            let expected = (End::BodyFailed, if late { 4 } else { 0 });
            assert_eq!(ran.end("always"), expected);
            assert_eq!(
                ran.info("always").body_error.as_deref(),
                Some("the disk is gone")
            );
        });
    }
}

#[test]
fn case_14_a_body_that_panics_has_failed() {
    everywhere(|setting| async move {
        // Given a body that panics in the middle.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                ran.six(&defer(&request));
                std::future::ready(Response::new(Script::new().data("half").panic()))
            })
        });

        // When it is read.
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");
        if let Ok(response) = client.send(request).await {
            support::client::read(response)
                .await
                .expect_err("no whole response");
        }

        // Then the tasks know it.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), "always default success");
        assert_eq!(ran.end("always"), (End::BodyFailed, 4));
        assert_eq!(
            ran.info("always").body_error.as_deref(),
            Some("the body panicked")
        );
    });
}

/// Panics when it is asked how long it will be.
struct Unmeasured;

impl http_body::Body for Unmeasured {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        panic!("nobody has measured it");
    }
}

#[test]
fn case_14_a_body_that_panics_when_it_is_looked_at_is_no_answer() {
    everywhere(|setting| async move {
        // Given a body that panics before its first frame.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            layer.layer(tower::service_fn(move |request| {
                ran.six(&defer(&request));
                std::future::ready(Ok::<_, Infallible>(Response::new(Unmeasured)))
            }))
        });

        // When it is asked for.
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");
        client.send(request).await.expect_err("no response");

        // Then the tasks know it, and the request is over.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), FAILED);
        let info = ran.info("always");
        assert_eq!((info.end, info.status), (End::Panicked, None));
    });
}

#[test]
fn case_15_a_running_task_does_not_care_who_leaves() {
    everywhere(|setting| async move {
        // Given a task that runs, its response sent.
        let (log, layer, gate) = (Log::new(), DeferLayer::new(), Gate::new());
        let server = setting.serve({
            let (log, gate) = (log.clone(), gate.clone());
            app(&layer, move |request| {
                let (log, gate) = (log.clone(), gate.clone());
                if request.uri().path() == "/" {
                    defer(&request).run(move || {
                        let (log, gate) = (log.clone(), gate.clone());
                        async move {
                            let _dropped = log.on_drop("dropped");
                            log.note("started");
                            gate.passed().await;
                            log.note("ended");
                        }
                    });
                }
                std::future::ready(Response::new(Script::new()))
            })
        });
        let mut client = setting.connect(&server).await;
        client.get("/").await;
        log.awaits("started").await;

        // When the client leaves, and the server has served others since.
        client.leave().await;
        for _ in 0..3 {
            setting.connect(&server).await.get("/other").await;
        }

        // Then the task runs to its end.
        assert!(!log.has("dropped"));
        gate.open();
        log.awaits("dropped").await;
        log.assert_order(&["started", "ended", "dropped"]);
        quiet(&layer, 1).await;
        assert_eq!(layer.get_executor().snapshot().completed, 1);
    });
}

/// Given a router within a router, each with a layer and an executor of its own; the outer one reads
/// the inner body whole, and answers with one of its own that waits for the gate.
fn nested(setting: Setting, ran: &Ran, gate: &Gate) -> (Server, DeferLayer, Executor) {
    let (outer, inner) = (DeferLayer::new(), Executor::new());
    let handler = {
        let ran = ran.clone();
        async move |defer: Defer| {
            ran.six(&defer);
            "inner"
        }
    };
    let replace = {
        let (ran, gate) = (ran.clone(), gate.clone());
        move |defer: Defer, request: axum::extract::Request, next: Next| {
            let (ran, gate) = (ran.clone(), gate.clone());
            async move {
                if request.uri().path() == "/elsewhere" {
                    return next.run(request).await;
                }
                defer.run(ran.task("outer"));
                let response = next.run(request).await;
                let body = axum::body::to_bytes(response.into_body(), 1024).await;
                let body = Script::new().data(body.expect("a body")).wait(&gate);
                axum::body::Body::new(body.data(" and outer")).into_response()
            }
        }
    };
    let within = Router::new()
        .route("/", get(handler))
        .layer(DeferLayer::new().executor(inner.clone()));
    let router = Router::new()
        .nest("/in", within)
        .layer(from_fn(replace))
        .layer(outer.clone());
    (setting.serve(router), outer, inner)
}

#[test]
fn case_16_an_inner_layer_waits_for_the_outer_body() {
    everywhere(|setting| async move {
        // Given nested layers, and a drain of the inner one's executor.
        let (ran, gate) = (Ran::new(), Gate::new());
        let (server, outer, inner) = nested(setting, &ran, &gate);
        let mut client = setting.connect(&server).await;
        let response = client.head_of("/in").await;
        let drained = server.handle().spawn({
            let inner = inner.clone();
            async move { inner.drain(support::DEADLINE).await }
        });

        // When the inner body is over and the outer one is not, and others have been served.
        setting.connect(&server).await.head_of("/elsewhere").await;
        assert_eq!(ran.names(), "", "before the outer body's end");
        assert!(
            !drained.is_finished(),
            "the drain does not wait for the request"
        );

        // Then the tasks run after it, each once, and each on the executor of its layer.
        gate.open();
        let answer = support::client::read(response).await.expect("a whole body");
        assert_eq!(answer.body, "inner and outer");
        let report = drained.await.expect("a report");
        assert!(!report.timed_out, "{report}");
        let inner = inner.snapshot();
        assert_eq!((inner.accepted, inner.completed, inner.skipped), (6, 4, 2));
        quiet(&outer, 1).await;
        assert_eq!(outer.get_executor().snapshot().completed, 1);
        assert_eq!(ran.names(), "always complete default outer success");
        assert_eq!(ran.end("always"), (End::Complete, 15));
    });
}

#[test]
fn case_16_the_same_layer_twice_is_one() {
    everywhere(|setting| async move {
        // Given a router that has the same layer inside and outside.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let handler = {
            let ran = ran.clone();
            get(async move |defer: Defer| ran.six(&defer))
        };
        let router = Router::new().route("/", handler).layer(layer.clone());
        let server = setting.serve(layer.layer(router));
        // When it is asked.
        setting.connect(&server).await.get("/").await;
        // Then each task runs once.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), WELL);
    });
}

// The neighbours.

/// Answers whatever is asked with `body`, and registers a task named after the path.
fn echo_path(setting: Setting, layer: &DeferLayer, ran: &Ran) -> Server {
    let ran = ran.clone();
    setting.serve(app(layer, move |request| {
        let path = request.uri().path();
        defer(&request).run(ran.task(path));
        let body = Script::new().data(path.to_owned()).hint(path.len() as u64);
        std::future::ready(Response::new(body))
    }))
}

#[test]
fn pipelined_requests_are_released_one_by_one() {
    over(Http::One, |setting| async move {
        // Given three requests in one write.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = echo_path(setting, &layer, &ran);
        let mut client = server.raw().await;
        let lines =
            ["/1", "/2", "/3"].map(|path| format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
        client.write(lines.concat()).await;

        // When they are answered in turn.
        for path in ["/1", "/2", "/3"] {
            client.until(&format!("\r\n\r\n{path}")).await;
        }

        // Then each has its task.
        quiet(&layer, 3).await;
        assert_eq!(ran.names(), "/1 /2 /3");
        for path in ["/1", "/2", "/3"] {
            assert_eq!(ran.end(path), (End::Complete, 2));
        }
    });
}

#[test]
fn a_connection_that_closes_after_the_response_is_complete() {
    over(Http::One, |setting| async move {
        let asks = [
            ("/close", "1.1\r\nconnection: close"),
            ("/one-zero", "1.0"),
            ("/alive", "1.0\r\nconnection: keep-alive"),
        ];
        // Given requests after which the server closes, or does not.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = echo_path(setting, &layer, &ran);
        for (path, version) in asks {
            // When they are answered.
            let mut client = server.raw().await;
            client
                .write(format!("GET {path} HTTP/{version}\r\nhost: test\r\n\r\n"))
                .await;
            client.until(&format!("\r\n\r\n{path}")).await;
            // Then the task has run, while the client is still there.
            ran.awaits(path).await;
            assert_eq!(ran.end(path), (End::Complete, path.len() as u64));
        }
        quiet(&layer, 3).await;
    });
}

#[test]
fn a_close_delimited_stream_is_complete_at_its_end() {
    over(Http::One, |setting| async move {
        // Given HTTP/1.0 and a body of unknown length: it ends with the connection.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                ran.six(&defer(&request));
                std::future::ready(Response::new(Script::new().data("one").data("two")))
            })
        });
        // When it is read.
        let mut client = server.raw().await;
        client.write("GET / HTTP/1.0\r\n\r\n").await;
        assert!(client.rest().await.ends_with(b"onetwo"));
        // Then it is complete.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), WELL);
        assert_eq!(ran.end("always"), (End::Complete, 6));
    });
}

#[test]
fn an_interim_response_releases_nothing() {
    over(Http::One, |setting| async move {
        // Given a handler that registers, and then reads the body that the client holds back.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let router = Router::new().route("/", {
            let ran = ran.clone();
            post(async move |defer: Defer, body: axum::body::Body| {
                ran.six(&defer);
                axum::body::to_bytes(body, 1024).await.expect("a body")
            })
        });
        let server = setting.serve(layer.layer(router));
        let mut client = server.raw().await;
        let head =
            "POST / HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        client.write(head).await;

        // When the server says to go on.
        client.until("HTTP/1.1 100 Continue\r\n\r\n").await;
        setting.connect(&server).await.get("/other").await;
        assert_eq!(ran.names(), "");

        // Then the tasks still wait for the response.
        client.write("data").await;
        client.until("\r\n\r\ndata").await;
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), WELL);
        assert_eq!(ran.end("always"), (End::Complete, 4));
    });
}

#[test]
fn an_upgrade_is_its_own_end() {
    for method in ["GET", "CONNECT"] {
        over(Http::One, |setting| async move {
            // Given a handler that upgrades, and echoes on what follows.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let server = setting.serve({
                let ran = ran.clone();
                app(&layer, move |mut request| {
                    ran.six(&defer(&request));
                    let upgrade = hyper::upgrade::on(&mut request);
                    defer(&request).run(Task::once(async move {
                        let upgraded = upgrade.await?;
                        let mut io = hyper_util::rt::TokioIo::new(upgraded);
                        let mut four = [0; 4];
                        io.read_exact(&mut four).await?;
                        io.write_all(&four).await?;
                        Ok::<_, BoxError>(())
                    }));
                    let mut response = Response::new(Script::new());
                    if request.method() == Method::GET {
                        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                        let headers = response.headers_mut();
                        headers.insert("connection", http::HeaderValue::from_static("upgrade"));
                        headers.insert("upgrade", http::HeaderValue::from_static("echo"));
                    }
                    std::future::ready(response)
                })
            });

            // When the client is upgraded, and has said nothing yet.
            let mut client = server.raw().await;
            let head = match method {
                "GET" => {
                    "GET / HTTP/1.1\r\nhost: t\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n"
                }
                _ => "CONNECT test:80 HTTP/1.1\r\nhost: test:80\r\n\r\n",
            };
            client.write(head).await;
            client.until("\r\n\r\n").await;

            // Then the tasks run, and one of them is the echo.
            ran.awaits("always").await;
            assert_eq!(ran.end("always"), (End::Upgraded, 0), "{method}");
            client.write("ping").await;
            assert_eq!(client.exactly(4).await, b"ping");
            quiet(&layer, 7).await;
            assert_eq!(ran.names(), "always default success", "{method}");
        });
    }
}

#[test]
fn connect_over_http2_is_an_upgrade() {
    over(Http::Two, |setting| async move {
        // Given a handler that accepts CONNECT.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                ran.six(&defer(&request));
                std::future::ready(Response::new(Script::new()))
            })
        });
        // When a client asks for it.
        let mut client = Manual::connect(server.addr, 65_535).await;
        let request = Request::builder().method(Method::CONNECT).uri("test:80");
        let request = request.body(()).expect("a request");
        let (response, _stream) = client
            .sender
            .send_request(request, false)
            .expect("a stream");
        assert_eq!(response.await.expect("a head").status(), 200);
        // Then the tunnel's end is not the response's.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), "always default success");
        assert_eq!(ran.end("always"), (End::Upgraded, 0));
    });
}

#[test]
fn fewer_bytes_than_declared_are_truncated() {
    everywhere(|setting| async move {
        // Given a response that declares ten bytes and has four.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                ran.six(&defer(&request));
                let response = Response::builder().header("content-length", "10");
                let response = response.body(Script::new().data("four"));
                std::future::ready(response.expect("a response"))
            })
        });

        // When it is read.
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");
        if let Ok(response) = client.send(request).await {
            support::client::read(response)
                .await
                .expect_err("no whole response");
        }

        // Then it is not complete.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), "always default success");
        assert_eq!(ran.end("always"), (End::Truncated, 4));
    });
}

#[test]
fn more_bytes_than_declared_are_cut_and_complete() {
    over(Http::One, |setting| async move {
        // Given a response that declares four bytes and has ten.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                ran.six(&defer(&request));
                let response = Response::builder().header("content-length", "4");
                let response = response.body(Script::new().data("four and more"));
                std::future::ready(response.expect("a response"))
            })
        });
        // When it is read.
        let answer = setting.connect(&server).await.get("/").await;
        // Then the client has what was declared.
        assert_eq!(answer.body, "four");
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), WELL);
        assert_eq!(ran.end("always"), (End::Complete, 13));
    });
}

#[test]
fn compression_inside_is_part_of_the_response_and_outside_it_is_not() {
    for inside in [false, true] {
        everywhere(|setting| async move {
            // Given 100 kB that shrink, compressed on this or on that side of the layer.
            const TEXT: usize = 100_000;
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let handler = {
                let ran = ran.clone();
                get(async move |defer: Defer| {
                    ran.six(&defer);
                    "x".repeat(TEXT)
                })
            };
            let router = Router::new().route("/", handler);
            let router = match inside {
                true => router.layer(CompressionLayer::new()).layer(layer.clone()),
                false => router.layer(layer.clone()).layer(CompressionLayer::new()),
            };
            let server = setting.serve(router);

            // When it is asked for.
            let mut client = setting.connect(&server).await;
            let mut request = client.request(Method::GET, "/");
            let gzip = http::HeaderValue::from_static("gzip");
            request.headers_mut().insert("accept-encoding", gzip);
            let response = client.send(request).await.expect("a response");
            let answer = support::client::read(response).await.expect("a whole body");

            // Then each task runs once, and the bytes are those of the layer's place.
            assert_eq!(answer.head.headers["content-encoding"], "gzip");
            assert!(answer.body.len() < TEXT / 10);
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), WELL, "inside: {inside}");
            let bytes = if inside { answer.body.len() } else { TEXT };
            assert_eq!(ran.end("always"), (End::Complete, bytes as u64));
        });
    }
}

#[test]
fn a_timeout_outside_cancels() {
    everywhere(|setting| async move {
        // Given a handler that never answers, and a timeout around the layer.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let handler = {
            let ran = ran.clone();
            get(async move |defer: Defer| {
                ran.six(&defer);
                std::future::pending::<()>().await;
            })
        };
        let timeout = Duration::from_millis(20);
        let timeout = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, timeout);
        let router = Router::new()
            .route("/", handler)
            .layer(layer.clone())
            .layer(timeout);
        let server = setting.serve(router);

        // When it has passed.
        let answer = setting.connect(&server).await.get("/").await;

        // Then the tasks know of no response, though the client has one.
        assert_eq!(answer.head.status, 504);
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), "aborted always default");
        let info = ran.info("always");
        assert_eq!((info.end, info.status), (End::Cancelled, None));
    });
}

#[test]
fn a_timeout_inside_is_a_response() {
    everywhere(|setting| async move {
        // Given a handler that never answers, and a timeout within the layer.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let handler = {
            let ran = ran.clone();
            get(async move |defer: Defer| {
                ran.six(&defer);
                std::future::pending::<()>().await;
            })
        };
        let timeout = Duration::from_millis(20);
        let timeout = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, timeout);
        let router = Router::new()
            .route("/", handler)
            .layer(timeout)
            .layer(layer.clone());
        let server = setting.serve(router);

        // When it has passed.
        setting.connect(&server).await.get("/").await;

        // Then it is a failure like any other.
        quiet(&layer, 6).await;
        assert_eq!(ran.names(), FAILED);
        assert_eq!(ran.end("always"), (End::Complete, 0));
    });
}

#[tokio::test]
async fn a_body_polled_after_its_end_releases_once() {
    // Given a body that has said `None`.
    let (ran, layer) = (Ran::new(), DeferLayer::new());
    let service = layer.layer(tower::service_fn({
        let ran = ran.clone();
        move |request: Request<Empty<Bytes>>| {
            ran.six(&request.defer().expect("the layer is there"));
            async { Ok::<_, Infallible>(Response::new(Script::new().data("data"))) }
        }
    }));
    let response = service.oneshot(Request::new(Empty::new())).await;
    let mut body = response.expect("a response").into_body();
    body.frame().await.expect("a frame").expect("no error");
    assert!(body.frame().await.is_none());

    // When it is asked again.
    for _ in 0..3 {
        assert!(body.frame().await.is_none());
    }
    assert_eq!(layer.get_executor().snapshot().collected, 6);
    drop(body);

    // Then nothing happens twice.
    quiet(&layer, 6).await;
    assert_eq!(ran.names(), WELL);
    assert_eq!(ran.end("always"), (End::Complete, 4));
}

#[test]
fn head_through_a_router_is_complete() {
    everywhere(|setting| async move {
        for around in [false, true] {
            // Given a route for GET, within the layer, or the finished router within it.
            let (ran, layer) = (Ran::new(), DeferLayer::new());
            let handler = {
                let ran = ran.clone();
                get(async move |defer: Defer| {
                    ran.six(&defer);
                    "a body"
                })
            };
            let router = Router::new().route("/", handler);
            let server = match around {
                true => setting.serve(layer.layer(router)),
                false => setting.serve(router.layer(layer.clone())),
            };

            // When it is asked for its head.
            let answer = setting.connect(&server).await.ask(Method::HEAD, "/").await;

            // Then that is the whole of it.
            assert_eq!(answer.head.headers["content-length"], "6");
            quiet(&layer, 6).await;
            assert_eq!(ran.names(), WELL, "around: {around}");
            assert_eq!(ran.end("always"), (End::Complete, 0));
        }
    });
}

#[test]
fn a_condition_of_ones_own_is_asked_with_the_response() {
    everywhere(|setting| async move {
        // Given a task that runs for large responses only.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                let large = When::new(|info| info.bytes > 4 && info.to_head.is_some());
                defer(&request).run(ran.task(request.uri().path()).when(large));
                let body = Script::new().data(request.uri().path().to_owned());
                std::future::ready(Response::new(body))
            })
        });
        // When a small and a large one are asked for.
        let mut client = setting.connect(&server).await;
        client.get("/").await;
        client.get("/large").await;
        // Then it runs for the latter.
        quiet(&layer, 2).await;
        assert_eq!(ran.names(), "/large");
        assert_eq!(layer.get_executor().snapshot().skipped, 1);
    });
}

#[test]
fn a_stream_is_released_by_its_own_end_and_not_by_its_connection() {
    on(
        Setting {
            http: Http::Two,
            flavor: Flavor::MultiThread(2),
        },
        |setting| async move {
            // Given two streams on one connection, of which one stalls.
            let (ran, layer, gate) = (Ran::new(), DeferLayer::new(), Gate::new());
            let server = setting.serve({
                let (ran, gate) = (ran.clone(), gate.clone());
                app(&layer, move |request| {
                    let path = request.uri().path();
                    defer(&request).run(ran.task(path));
                    let body = Script::new().data("data");
                    let body = if path == "/slow" {
                        body.wait(&gate)
                    } else {
                        body
                    };
                    std::future::ready(Response::new(body))
                })
            });
            let mut client = Client::connect(server.addr, Http::Two).await;
            let slow = client.head_of("/slow").await;

            // When the other one ends.
            client.get("/quick").await;

            // Then its task runs, and the slow one's does not.
            ran.awaits("/quick").await;
            assert_eq!(ran.names(), "/quick");
            gate.open();
            slow.into_body().collect().await.expect("a whole body");
            quiet(&layer, 2).await;
            assert_eq!(ran.names(), "/quick /slow");
        },
    );
}
