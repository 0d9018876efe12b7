//! How tasks are registered, taken back and tried again: cases 17 to 20 and 26, and their neighbours.
#![cfg(all(feature = "axum", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "tests of delays read the paused clock"
)]

mod support;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::time::Instant;
use tower::{Layer, ServiceExt};
use tower_defer::{
    Defer, DeferLayer, End, Executor, RejectReason, RequestExt, Retry, Task, TaskContext,
    TaskError, When,
};

use support::body::Script;
use support::ran::{Ran, settled};
use support::{DEADLINE, Gate, Log, app, everywhere};

fn defer(request: &Request<Incoming>) -> Defer {
    request.defer().expect("the layer is there")
}

#[test]
fn case_17_tasks_that_defer_tasks_are_all_waited_for() {
    everywhere(|setting| async move {
        // Given T1, which defers T2, which defers T3; T1 runs until the gate opens.
        let (log, layer, gate) = (Log::new(), DeferLayer::new(), Gate::new());
        let server = setting.serve({
            let (log, gate) = (log.clone(), gate.clone());
            app(&layer, move |request| {
                let (outer, log, gate) = (defer(&request), log.clone(), gate.clone());
                let first = move || {
                    let (outer, log, gate) = (outer.clone(), log.clone(), gate.clone());
                    async move {
                        log.note("T1 runs");
                        gate.passed().await;
                        let inner = outer.clone();
                        let log = log.clone();
                        outer.run(move || {
                            log.note("T2 runs");
                            let log = log.clone();
                            inner.run(move || {
                                log.note("T3 runs");
                                async {}
                            });
                            async {}
                        });
                    }
                };
                defer(&request).run(first);
                std::future::ready(Response::new(Script::new()))
            })
        });
        setting.connect(&server).await.get("/").await;
        log.awaits("T1 runs").await;

        // When a drain begins while T1 runs.
        let (report, ()) = tokio::join!(layer.drain(DEADLINE), async {
            setting.connect(&server).await;
            gate.open();
        });

        // Then it waits for all three.
        assert_eq!(log.entries(), ["T1 runs", "T2 runs", "T3 runs"]);
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(report.completed, 3);
        let now = layer.get_executor().snapshot();
        assert_eq!((now.accepted, now.completed), (3, 3));
    });
}

#[test]
fn case_18_a_clone_used_after_the_response_knows_it() {
    everywhere(|setting| async move {
        // Given a handler that gives its handle away, and registers nothing.
        let kept: Arc<Mutex<Option<Defer>>> = Arc::default();
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let kept = kept.clone();
            app(&layer, move |request| {
                *kept.lock().expect("no panic") = Some(defer(&request));
                let mut response = Response::new(Script::new().data("not here"));
                *response.status_mut() = StatusCode::NOT_FOUND;
                std::future::ready(response)
            })
        });
        setting.connect(&server).await.get("/").await;
        let handle = kept.lock().expect("no panic").take().expect("a handle");
        support::eventually("the release", || handle.response().is_some()).await;

        // When it is used after the response.
        let info = handle.response().expect("a response").clone();
        let six = ran.clone();
        let used = server.handle().spawn(async move { six.six(&handle) });
        used.await.expect("no panic");

        // Then the tasks run at once, as the response that was says.
        assert_eq!((info.end, info.bytes), (End::Complete, 8));
        settled(&layer, 6).await;
        assert_eq!(ran.names(), "always failure");
        assert_eq!(ran.info("always").status, Some(StatusCode::NOT_FOUND));
        assert_eq!(ran.end("always"), (End::Complete, 8));
    });
}

#[test]
fn case_18_a_live_clone_does_not_hold_the_response_open() {
    everywhere(|setting| async move {
        // Given a handler that registers, and gives its handle away.
        let kept: Arc<Mutex<Vec<Defer>>> = Arc::default();
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let server = setting.serve({
            let (kept, ran) = (kept.clone(), ran.clone());
            app(&layer, move |request| {
                ran.six(&defer(&request));
                kept.lock().expect("no panic").push(defer(&request));
                std::future::ready(Response::new(Script::new().data("here")))
            })
        });

        // When the response is read.
        setting.connect(&server).await.get("/").await;

        // Then the tasks run, though the clone lives.
        settled(&layer, 6).await;
        assert_eq!(ran.names(), "always complete default success");
        assert_eq!(kept.lock().expect("no panic").len(), 1);
        assert_eq!(layer.get_executor().snapshot().open_requests, 0);
    });
}

#[test]
fn case_19_without_the_layer_the_answer_names_the_line_to_add() {
    everywhere(|setting| async move {
        // Given routes without the layer.
        let router = Router::new()
            .route("/", get(async |_: Defer| "never"))
            .route(
                "/optional",
                get(async |defer: Option<Defer>| defer.is_some().to_string()),
            )
            .route(
                "/request",
                get(async |request: axum::extract::Request| {
                    let missing = Defer::from_extensions(request.extensions());
                    missing.expect_err("no layer").to_string()
                }),
            );
        let server = setting.serve(router.clone());
        let mut client = setting.connect(&server).await;

        // When the handle is asked for, then the text says which line is missing,
        let answer = client.get("/").await;
        assert_eq!(answer.head.status, StatusCode::INTERNAL_SERVER_ERROR);
        let line = ".layer(tower_defer::DeferLayer::new())";
        for body in [answer.body, client.get("/request").await.body] {
            let text = String::from_utf8_lossy(&body).into_owned();
            assert!(text.contains(line), "{text}");
        }

        // and an optional one is there, or not.
        assert_eq!(client.get("/optional").await.body, "false");
        let server = setting.serve(router.layer(DeferLayer::new()));
        let mut client = setting.connect(&server).await;
        assert_eq!(client.get("/optional").await.body, "true");
        assert_eq!(client.get("/").await.body, "never");
    });
}

#[test]
fn case_20_a_task_taken_back_before_the_release_never_runs() {
    everywhere(|setting| async move {
        // Given a handler that registers three tasks, and takes one back.
        let (log, ran, layer) = (Log::new(), Ran::new(), DeferLayer::new());
        let elsewhere = Executor::new();
        let server = setting.serve({
            let (log, ran, elsewhere) = (log.clone(), ran.clone(), elsewhere.clone());
            app(&layer, move |request| {
                let defer = defer(&request);
                let kept = defer.run(ran.task("kept"));
                let back = defer.run(ran.task("taken back"));
                let other = defer.on(&elsewhere).run(ran.task("taken back elsewhere"));
                assert!(kept.is_accepted() && back.is_accepted() && other.is_accepted());
                for handle in [&back, &other] {
                    assert!(handle.cancel(), "it had not started");
                    assert!(!handle.cancel(), "it was there twice");
                }
                let (log, late) = (log.clone(), Arc::new(Mutex::new(Some(kept))));
                // Tried again when the task it belongs to has run.
                defer.run(move || {
                    let kept = late.lock().expect("no panic").take().expect("one attempt");
                    log.note(format!("cancelled: {}", kept.cancel()));
                    async {}
                });
                std::future::ready(Response::new(Script::new()))
            })
        });

        // When the response is out.
        setting.connect(&server).await.get("/").await;

        // Then it has not run, and counts as cancelled.
        settled(&layer, 3).await;
        log.awaits("cancelled: false").await;
        assert_eq!(ran.names(), "kept");
        let here = layer.get_executor().snapshot();
        assert_eq!((here.completed, here.cancelled, here.skipped), (2, 1, 0));
        let there = elsewhere.snapshot();
        assert_eq!(
            (there.accepted, there.cancelled, there.outstanding),
            (1, 1, 0)
        );
    });
}

#[test]
fn case_20_a_drain_counts_what_was_taken_back() {
    everywhere(|setting| async move {
        // Given a task that is taken back while a drain waits for its request.
        let (log, ran, layer, gate) = (Log::new(), Ran::new(), DeferLayer::new(), Gate::new());
        let server = setting.serve({
            let (log, ran, gate) = (log.clone(), ran.clone(), gate.clone());
            app(&layer, move |request| {
                let (log, gate) = (log.clone(), gate.clone());
                let handle = defer(&request).run(ran.task("taken back"));
                async move {
                    log.note("pending");
                    gate.passed().await;
                    assert!(handle.cancel());
                    Response::new(Script::new())
                }
            })
        });
        let mut client = setting.connect(&server).await;

        // When it drains.
        let drained = server.handle().spawn({
            let (layer, log) = (layer.clone(), log.clone());
            async move {
                log.awaits("pending").await;
                let draining = layer.drain(DEADLINE);
                let opening = async { gate.open() };
                tokio::join!(draining, opening).0
            }
        });
        client.get("/").await;

        // Then it is counted in the report, and nothing ran.
        let report = drained.await.expect("a report");
        assert_eq!((report.completed, report.cancelled), (0, 1));
        assert_eq!(ran.names(), "");
    });
}

#[test]
fn a_request_has_a_cap_of_its_own() {
    everywhere(|setting| async move {
        // Given a cap of two, a request that registers three tasks, and one that registers one.
        let (ran, layer) = (Ran::new(), DeferLayer::new().max_tasks_per_request(2));
        let server = setting.serve({
            let ran = ran.clone();
            app(&layer, move |request| {
                let defer = defer(&request);
                if request.uri().path() == "/greedy" {
                    assert!(defer.run(ran.task("1")).is_accepted());
                    assert!(defer.run(ran.task("2")).is_accepted());
                    let third = defer.run(ran.task("3"));
                    assert_eq!(third.rejection(), Some(RejectReason::RequestLimit));
                    let given_back = defer.try_run(ran.task("4")).expect_err("no room");
                    assert_eq!(given_back.reason(), RejectReason::RequestLimit);
                } else {
                    assert!(defer.run(ran.task("modest")).is_accepted());
                }
                std::future::ready(Response::new(Script::new()))
            })
        });

        // When both are served.
        let mut client = setting.connect(&server).await;
        client.get("/greedy").await;
        client.get("/modest").await;

        // Then the first one's surplus is all that is missing.
        settled(&layer, 3).await;
        assert_eq!(ran.names(), "1 2 modest");
        let now = layer.get_executor().snapshot();
        assert_eq!((now.rejected_request_limit, now.reserved), (2, 0));
    });
}

#[test]
fn room_that_was_waited_for_is_used_after_the_response() {
    everywhere(|setting| async move {
        // Given a handler that reserves room, and keeps the permit for later.
        let (ran, layer) = (Ran::new(), DeferLayer::new());
        let kept = Arc::new(Mutex::new(None));
        let server = setting.serve({
            let kept = kept.clone();
            app(&layer, move |request| {
                let kept = kept.clone();
                async move {
                    let permit = defer(&request).reserve().await.expect("room");
                    *kept.lock().expect("no panic") = Some(permit);
                    Response::new(Script::new().data("data"))
                }
            })
        });
        setting.connect(&server).await.get("/").await;
        assert_eq!(layer.get_executor().snapshot().reserved, 1);

        // When it is used.
        let permit = kept.lock().expect("no panic").take().expect("a permit");
        let task = ran.task("late");
        let used = server
            .handle()
            .spawn(async move { permit.run(task).map(drop) });
        used.await.expect("no panic").expect("room");

        // Then the task runs, with the response.
        settled(&layer, 1).await;
        assert_eq!(ran.end("late"), (End::Complete, 4));
        assert_eq!(layer.get_executor().snapshot().reserved, 0);
    });
}

/// A request without a socket, because the clock is paused: it is answered, and its body dropped.
async fn registered(layer: &DeferLayer, register: impl Fn(&Defer) + Clone) {
    let service = layer.layer(tower::service_fn(move |request: Request<Empty<Bytes>>| {
        register(&request.defer().expect("the layer is there"));
        async { Ok::<_, Infallible>(Response::new(Script::new().tells_end())) }
    }));
    let answered = service.oneshot(Request::new(Empty::new())).await;
    drop(answered.expect("a response"));
}

/// When each attempt began, and its number.
type Attempts = Arc<Mutex<Vec<(u32, Duration)>>>;

/// A task that ends as `ends` says of each attempt, and writes down when it began.
fn attempts<E>(attempts: &Attempts, ends: E) -> Task
where
    E: Fn(&TaskContext) -> Result<(), TaskError> + Send + 'static,
{
    let (attempts, began) = (attempts.clone(), Instant::now());
    Task::with_context(move |context| {
        let attempt = (context.attempt(), began.elapsed());
        attempts.lock().expect("no panic").push(attempt);
        let end = ends(&context);
        async { end }
    })
}

fn numbers(attempts: &Attempts) -> Vec<u32> {
    let attempts = attempts.lock().expect("no panic");
    attempts.iter().map(|(number, _)| *number).collect()
}

fn delays(attempts: &Attempts) -> Vec<Duration> {
    let attempts = attempts.lock().expect("no panic");
    attempts
        .windows(2)
        .map(|pair| pair[1].1 - pair[0].1)
        .collect()
}

/// tokio's timer is good to the millisecond.
const TICK: Duration = Duration::from_millis(2);

#[tokio::test(start_paused = true)]
async fn case_26_a_task_that_fails_twice_is_tried_three_times() {
    let mut first = Vec::new();
    for _ in 0..20 {
        // Given a task that fails twice, with the default policy.
        let (layer, tried) = (DeferLayer::new(), Attempts::default());
        registered(&layer, |defer| {
            defer.run(attempts(&tried, |context| match context.attempt() {
                1 => Err("flaky".into()),
                2 => {
                    assert_eq!(context.last_error(), Some("flaky"));
                    Err(TaskError::new("still flaky"))
                }
                _ => {
                    assert_eq!(context.last_error(), Some("still flaky"));
                    Ok(())
                }
            }));
        })
        .await;

        // When it comes to its end.
        layer.get_executor().idle().await;

        // Then there were three attempts, with delays within what doubles.
        assert_eq!(numbers(&tried), [1, 2, 3]);
        let delays = delays(&tried);
        assert!(delays[0] <= Duration::from_millis(500) + TICK, "{delays:?}");
        assert!(
            delays[1] <= Duration::from_millis(1000) + TICK,
            "{delays:?}"
        );
        first.push(delays);
        let now = layer.get_executor().snapshot();
        assert_eq!((now.completed, now.retries, now.dead_letters), (1, 2, 0));
    }
    // And they are jittered: twenty of them are not the same, and the second ones are longer.
    assert!(first.iter().any(|delays| *delays != first[0]), "{first:?}");
    let sum = |at: usize| first.iter().map(|delays| delays[at]).sum::<Duration>();
    assert!(sum(1) > sum(0), "{first:?}");
}

#[tokio::test(start_paused = true)]
async fn case_26_a_fatal_error_is_not_tried_again() {
    // Given a task that says that another try is not worth it.
    let (layer, tried) = (DeferLayer::new(), Attempts::default());
    registered(&layer, |defer| {
        defer.run(attempts(&tried, |_| Err(TaskError::fatal("no such user"))));
    })
    .await;

    // When it comes to its end.
    layer.get_executor().idle().await;

    // Then it was tried once, and is a dead letter with its error and its response.
    assert_eq!(numbers(&tried), [1]);
    let letters = layer.get_executor().dead_letters().list();
    assert_eq!(letters.len(), 1);
    assert_eq!(&*letters[0].error, "no such user");
    let response = letters[0].response.as_ref().expect("a response");
    assert_eq!(response.end, End::Complete);
}

#[tokio::test(start_paused = true)]
async fn case_26_a_task_can_say_when_to_try_again() {
    // Given a task that was told to come back in seven seconds.
    let (layer, tried) = (DeferLayer::new(), Attempts::default());
    let later = Duration::from_secs(7);
    registered(&layer, |defer| {
        defer.run(attempts(&tried, move |context| match context.attempt() {
            1 => Err(TaskError::retry_after(later, "too many requests")),
            _ => Ok(()),
        }));
    })
    .await;

    // When it comes to its end.
    layer.get_executor().idle().await;

    // Then it waited as long as that.
    assert_eq!(numbers(&tried), [1, 2]);
    let delays = delays(&tried);
    assert!((later..=later + TICK).contains(&delays[0]), "{delays:?}");
}

#[tokio::test(start_paused = true)]
async fn case_26_waiting_for_a_retry_holds_no_slot() {
    // Given one slot, and a task that fails and waits for an hour.
    let executor = Executor::builder().concurrency(1).build();
    let (layer, tried, ran) = (
        DeferLayer::new().executor(executor),
        Attempts::default(),
        Ran::new(),
    );
    let hour = Duration::from_secs(3600);
    registered(&layer, |defer| {
        let waits = attempts(&tried, |context| match context.attempt() {
            1 => Err("flaky".into()),
            _ => Ok(()),
        });
        defer.run(waits.retry(Retry::fixed(2, hour).give_up_after(2 * hour)));
        defer.run(ran.task("another"));
    })
    .await;

    // When the other has run.
    ran.awaits("another").await;

    // Then it still waits, and comes home in its time.
    assert_eq!(numbers(&tried), [1]);
    assert_eq!(layer.get_executor().snapshot().waiting, 1);
    layer.get_executor().idle().await;
    assert_eq!(numbers(&tried), [1, 2]);
    assert_eq!(layer.get_executor().snapshot().completed, 2);
}

#[tokio::test(start_paused = true)]
async fn case_26_a_condition_is_asked_once_and_not_of_each_attempt() {
    // Given a task whose condition counts how often it is asked, and which fails once.
    let (layer, tried, log) = (DeferLayer::new(), Attempts::default(), Log::new());
    registered(&layer, |defer| {
        let asked = log.clone();
        let when = When::new(move |_| {
            asked.note("asked");
            asked.count("asked") == 1
        });
        let task = attempts(&tried, |context| match context.attempt() {
            1 => Err("flaky".into()),
            _ => Ok(()),
        });
        defer.run(task.when(when));
    })
    .await;

    // When it comes to its end, then the second attempt did not ask again.
    layer.get_executor().idle().await;
    assert_eq!(numbers(&tried), [1, 2]);
    assert_eq!(log.count("asked"), 1);
}
