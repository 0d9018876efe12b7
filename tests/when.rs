//! When a task starts: cases 1 to 9, over real connections.
#![cfg(feature = "hyper")]
#![expect(
    clippy::disallowed_methods,
    reason = "a busy task and a stopwatch read the time themselves"
)]

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use tower::{Layer, ServiceExt};
use tower_defer::{Defer, DeferLayer, End, RequestExt, Task};

use support::body::Script;
use support::client::{Client, Manual, drain};
use support::ran::{Ran, settled};
use support::raw::http2_get;
use support::{Flavor, Gate, Http, Log, Server, Setting, app, eventually, everywhere, on, over};

const BIG: usize = 32 << 20;

fn noting(log: &Log, what: &'static str) -> Task {
    let log = log.clone();
    Task::new(move || {
        log.note(what);
        async {}
    })
}

/// A request on another connection, whose task runs: whatever was due before it has had its turn.
async fn witness(server: &Server, log: &Log) {
    let before = log.count("witness");
    for _ in 0..3 {
        Client::connect(server.addr, Http::One)
            .await
            .get("/witness")
            .await;
    }
    eventually("the witness", || log.count("witness") == before + 3).await;
}

/// Answers `/witness`, or leaves the request to the test.
fn is_witness(request: &Request<Incoming>, log: &Log) -> bool {
    let it_is = request.uri().path() == "/witness";
    if it_is {
        defer(request).run(noting(log, "witness"));
    }
    it_is
}

fn defer(request: &Request<Incoming>) -> Defer {
    request.defer().expect("the layer is there")
}

#[test]
fn case_01_a_task_starts_after_the_handler_and_the_last_frame() {
    everywhere(|setting| async move {
        // Given a handler that defers, goes on for a while, and answers with a stream.
        let (log, layer) = (Log::new(), DeferLayer::new());
        let (handler, stream) = (Gate::new(), Gate::new());
        let server = setting.serve({
            let (log, handler, stream) = (log.clone(), handler.clone(), stream.clone());
            app(&layer, move |request| {
                let (log, handler, stream) = (log.clone(), handler.clone(), stream.clone());
                async move {
                    if is_witness(&request, &log) {
                        return Response::new(Script::new());
                    }
                    defer(&request).run(noting(&log, "task"));
                    log.note("registered");
                    handler.passed().await;
                    log.note("returned");
                    let last = log.clone();
                    let body = Script::new().data("first").wait(&stream);
                    let body = body.then(move || last.note("last frame")).data("last");
                    Response::new(body.notes_drop(&log, "body dropped"))
                }
            })
        });
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");

        // When it answers, step by step.
        let answering = async {
            let mut response = client.send(request).await.expect("a response");
            let first = response.frame().await.expect("a frame").expect("no error");
            assert_eq!(first.into_data().expect("data"), "first");
            witness(&server, &log).await;
            log.note("streaming");
            stream.open();
            response.collect().await.expect("a whole body")
        };
        let pending = async {
            log.awaits("registered").await;
            witness(&server, &log).await;
            log.note("pending");
            handler.open();
        };
        let (body, ()) = tokio::join!(answering, pending);

        // Then the task comes last.
        assert_eq!(body.to_bytes(), "last");
        log.awaits("task").await;
        log.assert_order(&[
            "registered",
            "pending",
            "returned",
            "streaming",
            "last frame",
            "body dropped",
            "task",
        ]);
        assert_eq!(log.count("task"), 1);
    });
}

/// Answers `/` with 32 MiB in one frame, and defers a task.
fn big(setting: Setting, layer: &DeferLayer, log: &Log, ran: &Ran) -> Server {
    let (log, ran) = (log.clone(), ran.clone());
    setting.serve(app(layer, move |request| {
        let (log, ran) = (log.clone(), ran.clone());
        async move {
            if is_witness(&request, &log) {
                return Response::new(Script::new());
            }
            defer(&request).run(ran.task("task"));
            let body = Script::new().data(vec![b'x'; BIG]).hint(BIG as u64);
            log.note("answered");
            Response::new(body.tells_end())
        }
    }))
}

#[test]
fn case_02_a_body_that_the_client_does_not_read_holds_the_task() {
    everywhere(|setting| async move {
        // Given 32 MiB in one frame, and a client that leaves all of it in the socket.
        let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
        let server = big(setting, &layer, &log, &ran);
        let mut client = server.raw().await;
        match setting.http {
            Http::One => client.get("/").await,
            Http::Two => client.write(http2_get()).await,
        }

        // When the server has filled the socket, and other requests have come and gone.
        log.awaits("answered").await;
        witness(&server, &log).await;

        // Then the task waits,
        assert!(!ran.has("task"), "it started before the client read");

        // and starts when the client has read.
        let mut left = BIG;
        while left > 0 {
            let some = left.min(1 << 20);
            client.exactly(some).await;
            left -= some;
        }
        ran.awaits("task").await;
        assert_eq!(ran.end("task"), (End::Complete, BIG as u64));
        settled(&layer, log.count("witness") as u64 + 1).await;
        assert_eq!(ran.names(), "task");
    });
}

#[test]
fn case_03_a_closed_window_holds_the_task() {
    over(Http::Two, |setting| async move {
        // Given 32 MiB in one frame, and a client whose window takes 64 KiB of it.
        let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
        let server = big(setting, &layer, &log, &ran);
        let mut client = Manual::connect(server.addr, 65_535).await;
        let (response, _stream) = client.get("/").await;

        // When the server has filled the socket, and other requests have come and gone.
        log.awaits("answered").await;
        witness(&server, &log).await;

        // Then the task waits until the window opens.
        assert!(!ran.has("task"), "it started while the window was closed");
        let mut body = response.into_body();
        assert_eq!(drain(&mut body).await.expect("the body"), BIG);
        ran.awaits("task").await;
        assert_eq!(ran.end("task"), (End::Complete, BIG as u64));
    });
}

#[test]
fn case_03_the_last_byte_counts() {
    over(Http::Two, |setting| async move {
        // Given a window that opens for all but the last byte.
        let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
        let server = big(setting, &layer, &log, &ran);
        let mut client = Manual::connect(server.addr, BIG as u32 - 1).await;
        let (response, _stream) = client.get("/").await;
        let mut body = response.into_body();

        // When the client has all the others.
        let mut read = 0;
        while read < BIG - 1 {
            read += body.data().await.expect("a chunk").expect("no error").len();
        }
        witness(&server, &log).await;

        // Then the task still waits for it.
        assert!(!ran.has("task"), "it started before the last byte");
        body.flow_control().release_capacity(1).expect("a window");
        ran.awaits("task").await;
        assert_eq!(ran.end("task"), (End::Complete, BIG as u64));
    });
}

#[test]
fn case_04_the_connection_serves_while_a_task_runs() {
    everywhere(|setting| async move {
        // Given a task that runs for as long as the test likes.
        let (log, layer, gate) = (Log::new(), DeferLayer::new(), Gate::new());
        let server = setting.serve({
            let (log, gate) = (log.clone(), gate.clone());
            app(&layer, move |request| {
                let (log, gate) = (log.clone(), gate.clone());
                async move {
                    if request.uri().path() == "/long" {
                        defer(&request).run(move || {
                            let (log, gate) = (log.clone(), gate.clone());
                            async move {
                                log.note("started");
                                gate.passed().await;
                                log.note("ended");
                            }
                        });
                    }
                    Response::new(Script::new().data("answer").hint(6))
                }
            })
        });
        let mut client = setting.connect(&server).await;
        assert_eq!(client.get("/long").await.body, "answer");
        log.awaits("started").await;

        // When a second request comes on the same connection.
        let answer = client.get("/short").await;

        // Then it is answered while the task runs.
        assert_eq!(answer.body, "answer");
        assert!(!log.has("ended"));
        gate.open();
        log.awaits("ended").await;
    });
}

#[test]
fn case_05_a_task_registered_from_inside_the_stream_runs_after_it() {
    for first in [false, true] {
        everywhere(|setting| async move {
            // Given a stream that registers a task between two chunks: the request's first one, or not.
            let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
            let gate = Gate::new();
            let server = setting.serve({
                let (log, ran, gate) = (log.clone(), ran.clone(), gate.clone());
                app(&layer, move |request| {
                    let (log, ran, gate) = (log.clone(), ran.clone(), gate.clone());
                    async move {
                        if is_witness(&request, &log) {
                            return Response::new(Script::new());
                        }
                        let defer = defer(&request);
                        if !first {
                            defer.run(ran.task("handler's"));
                        }
                        let inside = move || {
                            defer.run(ran.task("stream's"));
                            log.note("registered");
                        };
                        let body = Script::new().data("one").then(inside).data("two");
                        Response::new(body.wait(&gate).data("three"))
                    }
                })
            });
            let mut client = setting.connect(&server).await;
            let mut response = client.head_of("/").await;

            // When it has been registered and the stream goes on.
            log.awaits("registered").await;
            witness(&server, &log).await;
            assert_eq!(ran.names(), "", "before the end of the stream");
            gate.open();
            let mut bytes = 0;
            while let Some(frame) = response.frame().await {
                bytes += frame.expect("no error").data_ref().map_or(0, Bytes::len);
            }

            // Then each runs after the end, once, and knows all bytes.
            assert_eq!(bytes, 11);
            ran.awaits("stream's").await;
            settled(&layer, 3 + 1 + u64::from(!first)).await;
            let expected = if first {
                "stream's"
            } else {
                "handler's stream's"
            };
            assert_eq!(ran.names(), expected);
            assert_eq!(ran.end("stream's"), (End::Complete, 11));
        });
    }
}

#[test]
fn case_06_responses_without_a_body_are_complete() {
    everywhere(|setting| async move {
        // Given each kind of response without a body.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let router = {
            let ran = ran.clone();
            axum::Router::new().fallback(move |request: Request<axum::body::Body>| async move {
                request
                    .defer()
                    .expect("the layer")
                    .run(ran.task(request.uri().path()));
                let status = request.uri().path()[1..].parse().unwrap_or(StatusCode::OK);
                let body = match request.uri().path() {
                    "/head" => "a body",
                    _ => "",
                };
                (status, body)
            })
        };
        let server = setting.serve(layer.layer(router));
        let mut client = setting.connect(&server).await;
        let kinds = ["/200", "/204", "/303", "/304", "/head"];

        // When each is asked for.
        for path in kinds {
            let method = if path == "/head" {
                Method::HEAD
            } else {
                Method::GET
            };
            let answer = client.ask(method, path).await;
            assert!(answer.body.is_empty(), "{path}");
        }

        // Then its task runs once, and the response was complete.
        settled(&layer, kinds.len() as u64).await;
        assert_eq!(ran.names(), kinds.join(" "));
        for path in kinds {
            assert_eq!(ran.end(path), (End::Complete, 0), "{path}");
        }
    });
}

#[test]
fn case_06_bodies_that_hyper_never_polls_are_complete() {
    over(Http::One, |setting| async move {
        // Given bodies that have bytes, in responses that carry none.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                let ran = ran.clone();
                async move {
                    let path = request.uri().path();
                    defer(&request).run(ran.task(path));
                    let mut response = Response::new(Script::new().data("a body").hint(6));
                    *response.status_mut() = path[1..].parse().unwrap_or(StatusCode::OK);
                    response
                }
            })
        });
        let mut client = setting.connect(&server).await;

        // When they are asked for.
        client.ask(Method::GET, "/204").await;
        client.ask(Method::GET, "/304").await;
        let answer = client.ask(Method::HEAD, "/head").await;

        // Then they are complete, and HEAD tells the length.
        assert_eq!(answer.head.headers["content-length"], "6");
        settled(&layer, 3).await;
        for path in ["/204", "/304", "/head"] {
            assert_eq!(ran.end(path), (End::Complete, 0), "{path}");
        }
    });
}

#[test]
fn case_06_a_client_that_takes_nothing_cannot_hold_the_task() {
    everywhere(|setting| async move {
        // Given a short `max_hold`, a stream that waits for its own next item, and 32 MiB for others.
        let (ran, gate) = (Ran::new(), Gate::new());
        let layer = DeferLayer::new().max_hold(Duration::from_millis(300));
        let server = setting.serve({
            let (ran, gate) = (ran.clone(), gate.clone());
            app(&layer, move |request| {
                let (ran, gate) = (ran.clone(), gate.clone());
                async move {
                    if request.uri().path() == "/events" {
                        defer(&request).run(ran.task("idle"));
                        return Response::new(Script::new().data("event").wait(&gate).data("last"));
                    }
                    defer(&request).run(ran.task("stalled"));
                    let body = Script::new().data(vec![b'x'; BIG]).hint(BIG as u64);
                    Response::new(body)
                }
            })
        });
        let mut watcher = setting.connect(&server).await;
        let mut events = watcher.head_of("/events").await;
        events.frame().await.expect("a frame").expect("an event");

        // When clients take nothing, one after the other, and so for several times `max_hold`.
        let mut rude = Vec::new();
        let mut closed = Vec::new();
        for n in 1..=3 {
            match setting.http {
                Http::One => {
                    let mut client = server.raw().await;
                    client.get("/").await;
                    rude.push(client);
                }
                // Once with a closed window, and then with a window and a deaf socket.
                Http::Two if n == 1 => {
                    let mut client = Manual::connect(server.addr, 65_535).await;
                    let got = client.get("/").await;
                    closed.push((client, got));
                }
                Http::Two => {
                    let mut client = server.raw().await;
                    client.write(http2_get()).await;
                    rude.push(client);
                }
            }
            let released = ["stalled"; 3][..n].join(" ");
            eventually("the release of the stalled one", || ran.names() == released).await;
        }

        // Then their tasks ran, and the idle stream's did not, until its end.
        let info = ran.info("stalled");
        assert_eq!(
            (info.end, info.status),
            (End::Stalled, Some(StatusCode::OK))
        );
        assert!(!ran.has("idle"), "an idle stream is not stalled");
        gate.open();
        events.collect().await.expect("the rest of the events");
        ran.awaits("idle").await;
        assert_eq!(ran.end("idle"), (End::Complete, 9));
    });
}

/// A client on a bad network, and a large body in one frame: its chunk is let go of only when all of it is
/// written, so it is passed on in pieces.
#[test]
fn case_06_a_client_that_reads_slowly_is_not_stalled() {
    over(Http::One, |setting| async move {
        // Given a `max_hold` much shorter than the time that 32 MiB take this client.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let layer = layer.max_hold(Duration::from_millis(800));
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                let ran = ran.clone();
                async move {
                    defer(&request).run(ran.task("sent"));
                    Response::new(Script::new().data(vec![b'x'; BIG]).hint(BIG as u64))
                }
            })
        });
        // When it takes a MiB at a time.
        let mut client = server.raw().await;
        client.get("/").await;
        client.until("\r\n\r\n").await;
        let begun = Instant::now();
        for _ in 0..BIG >> 20 {
            client.exactly(1 << 20).await;
            tokio::time::sleep(Duration::from_millis(100)).await; // the probe's pause
        }
        assert!(begun.elapsed() > Duration::from_millis(3200));

        // Then its response is complete.
        ran.awaits("sent").await;
        assert_eq!(ran.end("sent"), (End::Complete, BIG as u64));
    });
}

/// Without a layer, with one that nothing is deferred in, and with one whose handle is kept.
#[derive(Clone, Copy, Debug)]
enum Behind {
    Nothing,
    Layer,
    KeptHandle,
}

const SHAPES: [&str; 8] = [
    "/empty",
    "/fixed",
    "/hinted",
    "/chunked",
    "/trailers",
    "/204",
    "/declared",
    "/error",
];

/// Answers in every shape that a response has.
fn shape(path: &str) -> Response<Script> {
    let response = Response::builder().header("x-shape", path);
    let response = match path {
        "/empty" => response.body(Script::new().tells_end().hint(0)),
        "/fixed" => response.body(Script::new().data("fixed").tells_end().hint(5)),
        "/hinted" => response.body(Script::new().data("hin").data("ted").hint(6)),
        "/chunked" => response.body(Script::new().data("one").data("two")),
        "/trailers" => {
            let response = response.header("trailer", "x-sum");
            response.body(Script::new().data("data").trailers(&[("x-sum", "4")]))
        }
        "/204" => response.status(204).body(Script::new().tells_end()),
        "/declared" => {
            let response = response.header("content-length", "8");
            response.body(Script::new().data("declared"))
        }
        _ => response
            .status(500)
            .body(Script::new().data("error").hint(5)),
    };
    response.expect("a response")
}

fn shapes(setting: Setting, behind: Behind) -> Server {
    let handler = move |request: Request<Incoming>| {
        let mut response = shape(request.uri().path());
        if matches!(behind, Behind::KeptHandle) {
            response.extensions_mut().insert(defer(&request));
        }
        std::future::ready(response)
    };
    match behind {
        Behind::Nothing => setting.serve(tower::service_fn(move |request| {
            let answer = handler(request);
            async move { Ok::<_, Infallible>(answer.await) }
        })),
        _ => setting.serve(app(&DeferLayer::new(), handler)),
    }
}

#[test]
fn case_08_with_nothing_deferred_the_bytes_are_the_same() {
    over(Http::One, |setting| async move {
        for method in ["GET", "HEAD"] {
            for path in SHAPES {
                for version in ["1.1", "1.0"] {
                    let mut seen = Vec::new();
                    for behind in [Behind::Nothing, Behind::Layer, Behind::KeptHandle] {
                        // Given a service with and without the layer.
                        let server = shapes(setting, behind);

                        // When the same bytes ask for the same thing.
                        let mut client = server.raw().await;
                        let request = format!(
                            "{method} {path} HTTP/{version}\r\nhost: test\r\nte: trailers\r\n\
                             connection: close\r\n\r\n"
                        );
                        client.write(request).await;
                        seen.push(without_date(&client.rest().await));
                    }

                    // Then the same bytes come back, but for the date.
                    assert!(seen[0].starts_with("HTTP/1."), "{:?}", seen[0]);
                    assert_eq!(seen[0], seen[1], "{method} {path}");
                    assert_eq!(seen[0], seen[2], "{method} {path}");
                }
            }
        }
    });
}

fn without_date(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.split_inclusive("\r\n");
    lines.filter(|line| !line.starts_with("date:")).collect()
}

#[test]
fn case_08_with_nothing_deferred_the_frames_are_the_same() {
    over(Http::Two, |setting| async move {
        for path in SHAPES {
            let mut seen = Vec::new();
            for behind in [Behind::Nothing, Behind::Layer, Behind::KeptHandle] {
                // Given a service with and without the layer.
                let server = shapes(setting, behind);

                // When a client looks at each frame.
                let mut client = Manual::connect(server.addr, 65_535).await;
                let (response, _stream) = client.get(path).await;
                let (mut head, mut body) = response.into_parts();
                head.headers.remove("date");
                let mut frames = vec![format!("{} {:?}", head.status, head.headers)];
                let ended = body.is_end_stream();
                while let Some(chunk) = body.data().await {
                    frames.push(format!("{chunk:?}"));
                }
                let trailers = body.trailers().await;
                seen.push((frames, ended, format!("{trailers:?}")));
            }

            // Then they are the same.
            assert_eq!(seen[0], seen[1], "{path}");
            assert_eq!(seen[0], seen[2], "{path}");
        }
    });
}

#[tokio::test]
async fn case_08_the_body_says_of_itself_what_the_inner_one_says() {
    for registers in [false, true] {
        for path in SHAPES {
            // Given a response of each shape, with and without a task.
            let layer = DeferLayer::new();
            let service = layer.layer(tower::service_fn(move |request: Request<Empty<Bytes>>| {
                let defer = request.defer().expect("the layer is there");
                if registers {
                    defer.run(|| async {});
                }
                let response = shape(path);
                async move { Ok::<_, Infallible>(response) }
            }));
            let outer = service.oneshot(Request::new(Empty::new())).await;
            let mut outer = outer.expect("a response").into_body();
            let mut inner = shape(path).into_body();

            // When it is read, frame by frame, then it says the same at each.
            loop {
                assert_eq!(outer.is_end_stream(), inner.is_end_stream(), "{path}");
                let (ours, theirs) = (outer.size_hint(), inner.size_hint());
                assert_eq!(ours.lower(), theirs.lower(), "{path}");
                assert_eq!(ours.upper(), theirs.upper(), "{path}");
                match (outer.frame().await, inner.frame().await) {
                    (None, None) => break,
                    (Some(ours), Some(theirs)) => {
                        let (ours, theirs) = (ours.expect("no error"), theirs.expect("no error"));
                        assert_eq!(ours.data_ref(), theirs.data_ref(), "{path}");
                        assert_eq!(ours.trailers_ref(), theirs.trailers_ref(), "{path}");
                    }
                    (ours, theirs) => panic!("{path}: {ours:?} against {theirs:?}"),
                }
            }
        }
    }
}

#[test]
fn case_08_a_deferred_task_changes_no_byte_either() {
    over(Http::One, |setting| async move {
        let app = |registers: bool| {
            let handler = move |request: Request<Incoming>| {
                if registers {
                    defer(&request).run(|| async {});
                }
                std::future::ready(shape(request.uri().path()))
            };
            setting.serve(app(&DeferLayer::new(), handler))
        };
        for path in SHAPES {
            let mut seen = Vec::new();
            for registers in [false, true] {
                // Given a handler that defers, and one that does not.
                let server = app(registers);
                // When it answers.
                let mut client = server.raw().await;
                let head = "HTTP/1.1\r\nhost: test\r\nte: trailers\r\nconnection: close\r\n\r\n";
                client.write(format!("GET {path} {head}")).await;
                seen.push(without_date(&client.rest().await));
            }
            // Then nobody can tell.
            assert_eq!(seen[0], seen[1], "{path}");
        }
    });
}

/// How long the busy task holds its thread.
const BUSY: Duration = Duration::from_millis(50);

/// What a naive spawn misses by a factor of two, and a loaded machine still keeps.
const BOUND: Duration = Duration::from_millis(25);

const ENDS: [&str; 5] = [
    "/empty",
    "/small",
    "/late-end",
    "/trailers",
    "/late-trailers",
];

fn ending(path: &str) -> Script {
    let late = Duration::from_millis(2);
    let trailers = [("x-sum", "4")];
    match path {
        "/empty" => Script::new().tells_end().hint(0),
        "/small" => Script::new().data("small").tells_end().hint(5),
        "/late-end" => Script::new().data("data").pause(late),
        "/trailers" => Script::new().data("data").trailers(&trailers),
        _ => Script::new().data("data").pause(late).trailers(&trailers),
    }
}

/// The median of eleven times to the last byte.
async fn last_byte(setting: Setting, path: &'static str) -> Duration {
    let (layer, ran) = (DeferLayer::new(), Arc::new(AtomicUsize::new(0)));
    let server = setting.serve({
        let ran = ran.clone();
        app(&layer, move |request| {
            let ran = ran.clone();
            defer(&request).run(move || {
                let began = Instant::now();
                while began.elapsed() < BUSY {
                    std::hint::spin_loop();
                }
                ran.fetch_add(1, Ordering::Relaxed);
                async {}
            });
            std::future::ready(Response::new(ending(path)))
        })
    });
    let mut client = setting.connect(&server).await;
    let mut times = Vec::new();
    for n in 1..=11 {
        let began = Instant::now();
        client.get(path).await;
        times.push(began.elapsed());
        eventually("the busy task ends", || ran.load(Ordering::Relaxed) == n).await;
    }
    times.sort();
    eprintln!("{setting:?} {path}: {times:?}");
    times[times.len() / 2]
}

#[test]
fn case_09_a_busy_task_does_not_delay_its_own_response() {
    let mut late = Vec::new();
    for http in [Http::One, Http::Two] {
        for flavor in [Flavor::CurrentThread, Flavor::MultiThread(1)] {
            for path in ENDS {
                // Given a task that keeps the server's only thread busy for 50 ms,
                // when its response is read,
                let late = &mut late;
                on(Setting { http, flavor }, |setting| async move {
                    // What waits for its task is late every time, what waits for a loaded machine is not.
                    let mut medians = Vec::new();
                    while medians.len() < 3 && medians.last().is_none_or(|last| *last >= BOUND) {
                        medians.push(last_byte(setting, path).await);
                    }
                    if medians.iter().all(|median| *median >= BOUND) {
                        late.push((setting, path, medians));
                    }
                });
            }
        }
    }
    // then its last byte does not wait for the task, in any cell.
    assert!(late.is_empty(), "{late:#?}");
}
