//! The end of a server: case 29, and case 31 within one process, for axum, tonic and hyper.
#![cfg(all(feature = "axum", feature = "hyper", feature = "tonic"))]
#![expect(
    clippy::disallowed_methods,
    reason = "clients that make a load, and a stopwatch"
)]

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::sse::{Event, Sse};
use axum::routing::get;
use futures_util::StreamExt;
use futures_util::stream;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tower::Layer;
use tower_defer::{
    Defer, DeferLayer, DrainReport, End, Executor, RequestExt, Retry, Shutdown, Task, TaskError,
    UnfinishedState,
};

use support::body::Script;
use support::client::Client;
use support::grpc::{Echo, EchoClient};
use support::ran::{Ran, settled};
use support::{
    DEADLINE, Flavor, Gate, Http, Log, Server, Setting, app, eventually, everywhere, over, soon,
};

fn defer(request: &Request<Incoming>) -> Defer {
    request.defer().expect("the layer is there")
}

/// Fails in its first attempt, and waits for an hour then; `ends` is how the second one ends.
fn flaky(log: &Log, ends: Result<(), &'static str>) -> Task {
    let hour = Duration::from_secs(3600);
    let log = log.clone();
    let task = Task::with_context(move |context| {
        log.note(format!("attempt {}", context.attempt()));
        let end = match context.attempt() {
            1 => Err("flaky"),
            _ => ends,
        };
        async move { end.map_err(TaskError::new) }
    });
    task.name("flaky")
        .retry(Retry::fixed(5, hour).give_up_after(9 * hour))
}

#[test]
fn case_29_a_drain_waits_for_all_that_was_and_will_be_accepted() {
    for last in [Ok(()), Err("still flaky")] {
        everywhere(|setting| async move {
            // Given one slot, and a task in each state: one that waits for its retry,
            let (log, ran) = (Log::new(), Ran::new());
            let (running, handler) = (Gate::new(), Gate::new());
            let executor = Executor::builder().concurrency(1).build();
            let layer = DeferLayer::new().executor(executor.clone());
            let server = setting.serve({
                let (log, ran) = (log.clone(), ran.clone());
                let (running, handler) = (running.clone(), handler.clone());
                app(&layer, move |request| {
                    let (log, ran) = (log.clone(), ran.clone());
                    let (running, handler) = (running.clone(), handler.clone());
                    async move {
                        let defer = defer(&request);
                        match request.uri().path() {
                            "/waits" => drop(defer.run(flaky(&log, last))),
                            "/runs" => {
                                let nested = (defer.clone(), ran.task("nested"));
                                let runs = ran.task("ran");
                                defer.run(Task::once(async move {
                                    log.note("running");
                                    running.passed().await;
                                    nested.0.run(nested.1);
                                    nested.0.run(runs);
                                }));
                                defer.run(ran.task("queued"));
                            }
                            _ => {
                                log.note("in flight");
                                handler.passed().await;
                                defer.run(ran.task("late"));
                            }
                        }
                        Response::new(Script::new())
                    }
                })
            });
            let mut client = setting.connect(&server).await;
            client.get("/waits").await;
            eventually("the wait for a retry", || executor.snapshot().waiting == 1).await;

            // one that runs, and will defer another, one that is queued,
            client.get("/runs").await;
            log.awaits("running").await;
            eventually("the queue", || executor.snapshot().queued == 1).await;

            // and a request in flight that will defer one more.
            let mut other = setting.connect(&server).await;
            let in_flight = tokio::spawn(async move { other.get("/late").await });
            log.awaits("in flight").await;

            // When it drains, step by step.
            let drained = server.handle().spawn({
                let executor = executor.clone();
                async move { executor.drain(DEADLINE).await }
            });
            eventually("the retry's turn", || executor.snapshot().waiting == 0).await;
            assert_eq!(log.count("attempt 2"), 0, "the one slot is taken");
            running.open();
            eventually("the queue's end", || executor.snapshot().outstanding == 0).await;
            settled(&layer, 5).await;
            assert!(!drained.is_finished(), "a request is in flight");
            handler.open();
            in_flight.await.expect("an answer");

            // Then it returns after all of them, and nobody waited for an hour.
            let report = soon("the end of the drain", drained)
                .await
                .expect("a report");
            assert_eq!(ran.names(), "late nested queued ran");
            assert_eq!(log.count("attempt 2"), 1);
            assert_eq!(log.count("attempt 3"), 0, "the last one is the last");
            assert!(!report.timed_out, "{report}");
            match last {
                Ok(()) => {
                    assert!(report.is_clean(), "{report}");
                    assert_eq!(report.completed, 6);
                }
                Err(_) => {
                    assert_eq!((report.completed, report.discarded), (5, 1));
                    assert_eq!(report.unfinished.len(), 1, "{report}");
                    let left = &report.unfinished[0];
                    assert_eq!((left.name.as_str(), left.failed_attempts), ("flaky", 2));
                    assert!(
                        matches!(left.state, UnfinishedState::Discarded(_)),
                        "{left:?}"
                    );
                    assert_eq!(left.error.as_deref(), Some("still flaky"));
                }
            }
            // And it is closed: what comes now is refused.
            assert!(!executor.submit(ran.task("too late")).is_accepted());
        });
    }
}

#[test]
fn case_29_a_drain_waits_for_a_stream_until_its_end() {
    everywhere(|setting| async move {
        // Given a stream that is open, and holds a task.
        let (ran, layer, gate) = (Ran::new(), DeferLayer::new(), Gate::new());
        let server = setting.serve({
            let (ran, gate) = (ran.clone(), gate.clone());
            app(&layer, move |request| {
                defer(&request).run(ran.task("task"));
                let body = Script::new().data("event").wait(&gate).data("last");
                std::future::ready(Response::new(body))
            })
        });
        let mut client = setting.connect(&server).await;
        let mut response = client.head_of("/").await;
        response.frame().await.expect("a frame").expect("an event");

        // When it drains, and the stream ends before the deadline.
        let opens = async {
            setting.connect(&server).await;
            assert!(!ran.has("task"));
            gate.open();
            response.collect().await.expect("a whole body")
        };
        let (report, _) = tokio::join!(layer.drain(DEADLINE), opens);

        // Then its task was waited for.
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(ran.end("task"), (End::Complete, 9));
    });
}

#[test]
fn case_29_a_drain_gives_up_an_endless_stream_at_its_deadline() {
    everywhere(|setting| async move {
        // Given a stream without an end, that holds a task.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                defer(&request).run(ran.task("task").name("goodbye"));
                let body = Script::new().data("event").never();
                std::future::ready(Response::new(body))
            })
        });
        let mut client = setting.connect(&server).await;
        let mut response = client.head_of("/").await;
        response.frame().await.expect("a frame").expect("an event");

        // When it drains, without a server that stops.
        let report = layer.drain(Duration::from_millis(100)).await;

        // Then the task is named, and it is known that it never started.
        assert!(report.timed_out, "{report}");
        assert_eq!(report.cancelled, 1);
        assert_eq!(report.unfinished.len(), 1, "{report}");
        let left = &report.unfinished[0];
        assert_eq!(left.name, "goodbye");
        assert_eq!(left.state, UnfinishedState::NeverStarted);
        assert_eq!(ran.names(), "");
        settled(&layer, 1).await;
    });
}

/// What is served in case 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum With {
    Axum,
    Hyper,
    Tonic,
}

/// A server behind [`Shutdown::serve`]: a signal to open, and the report that comes.
struct Served {
    server: Server,
    signal: Gate,
    report: oneshot::Receiver<DrainReport>,
    layer: DeferLayer,
    ran: Ran,
    log: Log,
    handler: Gate,
}

impl Served {
    /// `/` answers, `/events` never ends, `/pending` answers when the gate opens (never for tonic).
    /// Each registers a task of its name; those of tonic register its six.
    fn start(with: With, flavor: Flavor, deadline: Duration) -> Self {
        let (layer, signal, echo) = (DeferLayer::new(), Gate::new(), Echo::new());
        let (send, report) = oneshot::channel();
        let shutdown = Shutdown::new(&layer).deadline(deadline);
        let server = Server::start(flavor, {
            let (layer, signal, echo) = (layer.clone(), signal.clone(), echo.clone());
            move |listener: TcpListener| async move {
                let signal = async move { signal.passed().await };
                let report = match with {
                    With::Axum => {
                        let app = with_axum(&echo).layer(layer);
                        let served = shutdown.serve(signal, |stop| {
                            let served = axum::serve(listener, app).with_graceful_shutdown(stop);
                            served.into_future()
                        });
                        served.await.expect("no error")
                    }
                    With::Hyper => {
                        let app = with_hyper(&layer, &echo);
                        let served = shutdown.serve(signal, |stop| {
                            tower_defer::hyper::serve(listener, app, stop)
                        });
                        served.await.expect("no error")
                    }
                    With::Tonic => {
                        let served = shutdown.serve(signal, |stop| {
                            let mut server = tonic::transport::Server::builder().layer(layer);
                            let incoming = TcpListenerStream::new(listener);
                            let router = server.add_service(echo);
                            router.serve_with_incoming_shutdown(incoming, stop)
                        });
                        served.await.expect("no error")
                    }
                };
                let _ = send.send(report);
            }
        });
        Self {
            server,
            signal,
            report,
            layer,
            ran: echo.ran,
            log: echo.log,
            handler: echo.gate,
        }
    }

    /// Gives the signal, and waits for the report. Returns how long it took.
    async fn stop(&mut self) -> (DrainReport, Duration) {
        let began = Instant::now();
        self.signal.open();
        let report = soon("the report", &mut self.report)
            .await
            .expect("a report");
        (report, began.elapsed())
    }
}

fn with_axum(echo: &Echo) -> Router {
    let (one, two, three) = (echo.clone(), echo.clone(), echo.clone());
    Router::new()
        .route(
            "/",
            get(async move |defer: Defer| {
                defer.run(one.ran.task("/"));
                "answer"
            }),
        )
        .route(
            "/events",
            get(async move |defer: Defer| {
                defer.run(two.ran.task("/events"));
                let first = stream::iter([Ok::<_, Infallible>(Event::default().data("event"))]);
                Sse::new(first.chain(stream::pending()))
            }),
        )
        .route(
            "/pending",
            get(async move |defer: Defer| {
                defer.run(three.ran.task("/pending"));
                three.log.note("pending");
                three.gate.passed().await;
                defer.run(three.ran.task("/pending late"));
                "answer"
            }),
        )
}

fn with_hyper(
    layer: &DeferLayer,
    echo: &Echo,
) -> impl tower::Service<
    Request<Incoming>,
    Response = Response<tower_defer::DeferBody<Script>>,
    Error = Infallible,
    Future: Send,
> + Clone
+ Send
+ 'static {
    let echo = echo.clone();
    app(layer, move |request| {
        let echo = echo.clone();
        async move {
            let (defer, path) = (defer(&request), request.uri().path());
            defer.run(echo.ran.task(path));
            match path {
                "/events" => Response::new(Script::new().data("event").never()),
                "/pending" => {
                    echo.log.note("pending");
                    echo.gate.passed().await;
                    defer.run(echo.ran.task("/pending late"));
                    Response::new(Script::new().data("answer"))
                }
                _ => Response::new(Script::new().data("answer").hint(6)),
            }
        }
    })
}

/// Asks, one request after the other, until the server is gone. Counts the whole answers.
async fn load(http: Http, server: &Server, answered: Arc<AtomicU64>) {
    let addr = server.addr;
    for _ in 0..4 {
        let answered = answered.clone();
        tokio::spawn(async move {
            let mut client = Client::connect(addr, http).await;
            loop {
                let request = client.request(Method::GET, "/");
                let Ok(response) = client.send(request).await else {
                    return;
                };
                if support::client::read(response).await.is_err() {
                    return;
                }
                answered.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
}

/// Half of it is the server's, for its streams; far more than what the rest takes.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// What a loaded machine may take longer.
const SLACK: Duration = Duration::from_secs(2);

fn assert_accounted(served: &Served) {
    let now = served.layer.get_executor().snapshot();
    assert_eq!(now.outstanding, 0, "{now:?}");
    let ended = now.completed + now.discarded + now.skipped + now.cancelled;
    assert_eq!(now.accepted, ended, "{now:?}");
}

#[test]
fn case_31_an_endless_stream_does_not_hold_the_shutdown() {
    for with in [With::Axum, With::Hyper] {
        everywhere(|setting| async move {
            // Given a server under load, and one stream without an end.
            let Setting { http, flavor } = setting;
            let mut served = Served::start(with, flavor, SHUTDOWN);
            let mut watcher = Client::connect(served.server.addr, http).await;
            let mut events = watcher.head_of("/events").await;
            events.frame().await.expect("a frame").expect("an event");
            let answered = Arc::new(AtomicU64::new(0));
            load(http, &served.server, answered.clone()).await;
            eventually("the load", || answered.load(Ordering::SeqCst) > 50).await;

            // When the signal comes.
            let (report, took) = served.stop().await;

            // Then it ends within the deadline, and every task is accounted for.
            assert!(took < SHUTDOWN + SLACK, "{with:?}: {took:?}");
            assert!(report.is_clean() && !report.timed_out, "{with:?}: {report}");
            assert_accounted(&served);
            let now = served.layer.get_executor().snapshot();
            assert_eq!(now.completed, now.accepted, "{with:?}: {now:?}");
            assert!(now.completed > answered.load(Ordering::SeqCst), "{now:?}");

            // The stream's task ran as well, knowing why.
            assert_eq!(served.ran.info("/events").end, End::Stalled);
            assert_eq!(served.ran.info("/").end, End::Complete);
        });
    }
}

#[test]
fn case_31_an_endless_grpc_stream_does_not_hold_the_shutdown() {
    over(Http::Two, |setting| async move {
        // Given a tonic server under load, and one stream without an end.
        let mut served = Served::start(With::Tonic, setting.flavor, SHUTDOWN);
        let mut watcher = EchoClient::connect(served.server.addr).await;
        let mut stream = watcher.stream("never").await.expect("a stream");
        assert!(stream.message().await.expect("a message").is_some());
        let answered = Arc::new(AtomicU64::new(0));
        for _ in 0..4 {
            let answered = answered.clone();
            let mut client = EchoClient::connect(served.server.addr).await;
            tokio::spawn(async move {
                while client.unary("witness").await.is_ok() {
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        eventually("the load", || answered.load(Ordering::SeqCst) > 50).await;

        // When the signal comes.
        let (report, took) = served.stop().await;

        // Then it ends within the deadline, and every task is accounted for.
        assert!(took < SHUTDOWN + SLACK, "{took:?}");
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_accounted(&served);
        let now = served.layer.get_executor().snapshot();
        assert!(
            now.completed >= answered.load(Ordering::SeqCst) + 3,
            "{now:?}"
        );
        assert_eq!(served.ran.info("always").end, End::Stalled);
        assert!(!served.ran.has("complete") && !served.ran.has("failure"));
    });
}

#[test]
fn case_31_without_a_stream_nobody_waits_for_the_deadline() {
    for with in [With::Axum, With::Hyper] {
        everywhere(|setting| async move {
            // Given a server with an idle keep-alive connection, and a deadline that is far away.
            let far = Duration::from_secs(3600);
            let mut served = Served::start(with, setting.flavor, far);
            let mut client = Client::connect(served.server.addr, setting.http).await;
            client.get("/").await;

            // When the signal comes, then the report comes soon.
            let (report, _) = served.stop().await;
            assert!(report.is_clean() && !report.timed_out, "{report}");
            assert_eq!(served.ran.names(), "/");
            assert_accounted(&served);
        });
    }
}

#[test]
fn case_31_a_handler_in_flight_is_waited_for_beyond_the_streams() {
    for with in [With::Axum, With::Hyper] {
        everywhere(|setting| async move {
            // Given a stream without an end, and a handler that answers after it was given up.
            let Setting { http, flavor } = setting;
            let mut served = Served::start(with, flavor, SHUTDOWN);
            let mut watcher = Client::connect(served.server.addr, http).await;
            let mut events = watcher.head_of("/events").await;
            events.frame().await.expect("a frame").expect("an event");
            let mut client = Client::connect(served.server.addr, http).await;
            let pending = tokio::spawn(async move { client.get("/pending").await });
            served.log.awaits("pending").await;

            // When the signal comes, and the handler answers in the second half of the deadline.
            let (ran, handler) = (served.ran.clone(), served.handler.clone());
            let answers = async {
                ran.awaits("/events").await;
                assert!(!ran.has("/pending"), "its handler still runs");
                handler.open();
            };
            let ((report, took), ()) = tokio::join!(served.stop(), answers);

            // Then its tasks run, the one that came late as well.
            assert!(took < SHUTDOWN + SLACK, "{with:?}: {took:?}");
            assert!(!report.timed_out, "{with:?}: {report}");
            assert_eq!(
                served.ran.names(),
                "/events /pending /pending late",
                "{with:?}: {report}"
            );
            assert!(report.is_clean(), "{with:?}: {report}");
            assert_accounted(&served);
            drop(pending);
        });
    }
}

#[test]
fn case_31_a_handler_that_never_answers_is_given_up_by_name() {
    for with in [With::Axum, With::Hyper] {
        everywhere(|setting| async move {
            // Given a handler that registers a task, and never answers.
            let Setting { http, flavor } = setting;
            let deadline = Duration::from_millis(500);
            let mut served = Served::start(with, flavor, deadline);
            let mut client = Client::connect(served.server.addr, http).await;
            let pending = tokio::spawn(async move {
                let request = client.request(Method::GET, "/pending");
                drop(client.send(request).await);
            });
            served.log.awaits("pending").await;

            // When the signal comes.
            let (report, took) = served.stop().await;

            // Then the deadline holds, and the task is named.
            assert!(took < deadline + SLACK, "{with:?}: {took:?}");
            assert!(report.timed_out, "{with:?}: {report}");
            assert_eq!(report.cancelled, 1, "{with:?}: {report}");
            assert_eq!(report.unfinished[0].state, UnfinishedState::NeverStarted);
            assert_eq!(served.ran.names(), "");
            assert_accounted(&served);
            pending.abort();
        });
    }
}

#[test]
fn case_31_a_client_that_does_not_read_does_not_hold_the_shutdown() {
    everywhere(|setting| async move {
        // Given 32 MiB for a client that reads nothing.
        const BIG: usize = 32 << 20;
        let (ran, log, layer, signal) = (Ran::new(), Log::new(), DeferLayer::new(), Gate::new());
        let (send, mut report) = oneshot::channel();
        let service = {
            let (ran, log) = (ran.clone(), log.clone());
            layer.layer(tower::service_fn(move |request: Request<Incoming>| {
                defer(&request).run(ran.task("task"));
                let body = Script::new()
                    .data(vec![b'x'; BIG])
                    .hint(BIG as u64)
                    .tells_end();
                log.note("answered");
                async { Ok::<_, Infallible>(Response::new(body)) }
            }))
        };
        let server = Server::start(setting.flavor, {
            let (shutdown, signal) = (Shutdown::new(&layer), signal.clone());
            move |listener| async move {
                let signal = async move { signal.passed().await };
                let shutdown = shutdown.deadline(SHUTDOWN);
                let served = shutdown.serve(signal, |stop| {
                    tower_defer::hyper::serve(listener, service, stop)
                });
                let _ = send.send(served.await.expect("no error"));
            }
        });
        let mut client = server.raw().await;
        match setting.http {
            Http::One => client.get("/").await,
            Http::Two => client.write(support::raw::http2_get()).await,
        }
        log.awaits("answered").await;

        // When the signal comes.
        let began = Instant::now();
        signal.open();
        let report = soon("the report", &mut report).await.expect("a report");

        // Then its task runs, within the deadline.
        assert!(began.elapsed() < SHUTDOWN + SLACK, "{:?}", began.elapsed());
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(ran.info("task").end, End::Stalled);
        settled(&layer, 1).await;
    });
}

#[test]
fn case_31_a_pending_handlers_task_on_another_executor_is_given_up_as_well() {
    everywhere(|setting| async move {
        // Given a handler that registers a task on a second executor, and never answers.
        let (ran, log, layer, signal) = (Ran::new(), Log::new(), DeferLayer::new(), Gate::new());
        let (send, mut report) = oneshot::channel();
        let second = Executor::new();
        let service = {
            let (ran, log, second) = (ran.clone(), log.clone(), second.clone());
            app(&layer, move |request| {
                let (log, defer) = (log.clone(), defer(&request));
                defer.on(&second).run(ran.task("task"));
                async move {
                    log.note("pending");
                    std::future::pending().await
                }
            })
        };
        let server = Server::start(setting.flavor, {
            let shutdown = Shutdown::new(&layer).and(&second);
            let signal = signal.clone();
            move |listener| async move {
                let signal = async move { signal.passed().await };
                let shutdown = shutdown.deadline(Duration::from_millis(200));
                let served = shutdown.serve(signal, |stop| {
                    tower_defer::hyper::serve(listener, service, stop)
                });
                let _ = send.send(served.await.expect("no error"));
            }
        });
        let mut client = setting.connect(&server).await;
        let pending = tokio::spawn(async move {
            let request = client.request(Method::GET, "/");
            drop(client.send(request).await);
        });
        log.awaits("pending").await;

        // When the deadline passes.
        signal.open();
        let report = soon("the report", &mut report).await.expect("a report");

        // Then the task never ran, and is named.
        assert_eq!(ran.names(), "", "its handler was pending: {report}");
        assert_eq!((report.completed, report.cancelled), (0, 1), "{report}");
        assert_eq!(report.unfinished[0].state, UnfinishedState::NeverStarted);
        pending.abort();
    });
}
