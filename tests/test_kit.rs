//! The test kit: what it promises beyond tests/example_app_tests.rs.
#![cfg(all(feature = "test-util", feature = "axum"))]
#![expect(clippy::disallowed_methods, reason = "the test measures paused time")]

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use axum::routing::get;
use futures_util::FutureExt;
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn};
use tower_defer::test_util::{
    Client, TaskState, TestDefer, client_left_at, holds, response, send_and_drain, stalled_at,
    without_response,
};
use tower_defer::{Defer, DeferLayer, End, Executor, RejectReason, Retry, Task, When};

fn request() -> Request<Body> {
    Request::get("/").body(Body::empty()).unwrap()
}

fn app(defer: DeferLayer, register: impl Fn(Defer) + Clone + Send + Sync + 'static) -> Router {
    let handler = move |defer: Defer| {
        register(defer);
        async { "hello" }
    };
    Router::new().route("/", get(handler)).layer(defer)
}

/// What a panic said.
fn said(panicking: impl FnOnce()) -> String {
    let panic =
        std::panic::catch_unwind(AssertUnwindSafe(panicking)).expect_err("it did not panic");
    text(panic)
}

fn text(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap()
}

async fn said_by(panicking: impl Future) -> String {
    let panic = AssertUnwindSafe(panicking).catch_unwind().await;
    text(panic.err().expect("it did not panic"))
}

// Capture.

#[tokio::test]
async fn a_failure_says_what_was_expected_and_what_was_deferred() {
    let defer = TestDefer::capture();
    let line = line!() + 2;
    let app = app(defer.layer(), |defer| {
        defer.run(Task::new(|| async {}).name("app::users::welcome"));
        defer.run(Task::new(|| async {}).name("audit").when(When::always()));
    });
    app.oneshot(request()).await.unwrap();

    let wrong = said(|| defer.assert_deferred("newsletter"));
    for expected in [
        "expected a deferred task of the name `newsletter`, found 0",
        &format!("`app::users::welcome` ({}:{line}:", file!()),
        "when unless_failed: unfinished",
        "`audit`",
        "when always",
    ] {
        assert!(wrong.contains(expected), "{expected} is not in:\n{wrong}");
    }
    assert!(said(|| defer.assert_not_deferred("welcome")).contains("expected no deferred task"));
    assert!(
        said(|| defer.assert_deferred_times("welcome", 2)).contains("expected 2 deferred tasks")
    );
    assert!(
        said(|| defer.assert_deferred_where("audit", |task| task.blocking)).contains("predicate")
    );
    assert!(
        said(|| defer.assert_nothing_deferred()).contains("expected 0 deferred tasks, found 2")
    );
    assert!(said(|| _ = defer.report().task("nobody")).contains("expected one deferred task"));
    assert!(
        said(|| _ = defer.report().assert_completed("audit")).contains("expected completed task")
    );
    // The short name is a whole word of the path.
    defer.assert_deferred("users::welcome");
    defer.assert_not_deferred("elcome");
    defer.clear();
    defer.assert_nothing_deferred();
}

/// The panic is reported at the line of the assertion.
#[test]
fn assertions_are_tracked() {
    static LINE: AtomicUsize = AtomicUsize::new(0);
    let usual = std::panic::take_hook();
    let here = std::thread::current().id();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().id() == here {
            LINE.store(panic.location().unwrap().line() as usize, Ordering::SeqCst);
        } else {
            usual(panic);
        }
    }));
    let defer = TestDefer::capture();
    let _ = said(|| defer.assert_deferred("nothing"));
    assert_eq!(LINE.load(Ordering::SeqCst), line!() as usize - 1);
}

#[tokio::test]
async fn capture_records_details_and_what_was_taken_back_or_rejected() {
    let defer = TestDefer::capture();
    let layer = defer.layer().max_tasks_per_request(3);
    let app = app(layer, |defer| {
        defer.run(
            Task::blocking(|| ())
                .name("render")
                .timeout(Duration::from_secs(7)),
        );
        defer.run(Task::new(|| async {}).name("regretted")).cancel();
        defer.run(Task::new(|| async {}).name("third"));
        defer.run(Task::new(|| async {}).name("fourth"));
    });
    app.oneshot(request()).await.unwrap();

    let report = defer.report();
    let render = report.task("render");
    assert!(render.blocking);
    assert_eq!(render.timeout, Some(Duration::from_secs(7)));
    defer.assert_not_deferred("regretted");
    defer.assert_not_deferred("fourth");
    defer.assert_count(2);
    let states: Vec<_> = report.tasks().iter().map(|task| task.state).collect();
    let rejected = TaskState::Rejected(RejectReason::RequestLimit);
    assert_eq!(
        states,
        [
            TaskState::Unfinished,
            TaskState::Cancelled,
            TaskState::Unfinished,
            rejected
        ]
    );
}

/// A released one can be taken back too, and what is submitted without a request is captured.
#[tokio::test]
async fn capture_holds_what_is_submitted_without_a_request() {
    let defer = TestDefer::capture();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = |ran: &Arc<AtomicUsize>| {
        Task::with(ran.clone(), |ran| async move {
            ran.fetch_add(1, Ordering::SeqCst);
        })
    };
    defer.executor().submit(count(&ran).name("kept"));
    let handle = defer.executor().submit(count(&ran).name("regretted"));
    assert!(handle.cancel());
    tokio::task::yield_now().await;
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    defer.assert_count(1);

    defer
        .run_captured()
        .await
        .assert_completed("kept")
        .assert_count(1);
    assert_eq!(ran.load(Ordering::SeqCst), 1);
    // And nothing runs again.
    defer.executor().submit(count(&ran).name("next"));
    tokio::task::yield_now().await;
    assert_eq!(ran.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn captured_tasks_are_asked_with_the_response_that_there_was() {
    let defer = TestDefer::capture();
    let app = app(defer.layer(), |defer| {
        defer.run(
            Task::new(|| async {})
                .name("complete")
                .when(When::complete()),
        );
        defer.run(Task::new(|| async {}).name("aborted").when(When::aborted()));
    });
    // Dropped unread: the client left.
    drop(app.oneshot(request()).await.unwrap());
    defer
        .run_captured()
        .await
        .assert_skipped("complete")
        .assert_completed("aborted");
}

/// A nested router with a layer and an executor of its own is captured as well.
#[tokio::test]
async fn capture_reaches_inner_layers() {
    let inner = DeferLayer::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = ran.clone();
    let nested = app(inner.clone(), move |defer| {
        let count = count.clone();
        defer.run(Task::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
            async {}
        }));
    });
    let defer = TestDefer::capture();
    drop(
        nested
            .layer(defer.layer())
            .oneshot(request())
            .await
            .unwrap(),
    );
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    defer.assert_count(1);
}

/// What a captured task holds is free when the kit is.
#[tokio::test]
async fn captured_tasks_are_freed_with_the_kit() {
    let held = Arc::new(());
    let defer = TestDefer::capture();
    let captured = held.clone();
    let app = app(defer.layer(), move |defer| {
        let captured = captured.clone();
        defer.run(Task::once(async move { drop(captured) }));
    });
    drop(app.oneshot(request()).await.unwrap());
    assert_eq!(Arc::strong_count(&held), 2);
    drop(defer);
    assert_eq!(Arc::strong_count(&held), 1);
}

// Inline.

#[tokio::test]
async fn inline_mode_runs_everything_before_the_response() {
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let note =
        |order: &Arc<std::sync::Mutex<Vec<&'static str>>>, text| order.lock().unwrap().push(text);
    let defer = TestDefer::inline();
    let executor = defer.executor().clone();
    let seen = order.clone();
    let app = app(defer.layer(), move |defer| {
        let (executor, order) = (executor.clone(), seen.clone());
        let flaky = Task::with_context(move |context| {
            let (executor, order) = (executor.clone(), order.clone());
            async move {
                note(&order, "attempt");
                assert_eq!(context.response().unwrap().end, End::Complete);
                if context.attempt() < 3 {
                    return Err("not yet");
                }
                let order = order.clone();
                executor.submit(Task::once(async move { note(&order, "nested") }).name("nested"));
                Ok(())
            }
        });
        defer.run(flaky.name("flaky"));
        defer.run(
            Task::new(|| async {})
                .name("unwanted")
                .when(When::failure()),
        );
    });
    let answer = app.oneshot(request()).await.unwrap();
    note(&order, "answered");

    assert_eq!(
        *order.lock().unwrap(),
        ["attempt", "attempt", "attempt", "nested", "answered"]
    );
    defer
        .report()
        .assert_completed("flaky")
        .assert_completed("nested")
        .assert_skipped("unwanted");
    let body = axum::body::to_bytes(answer.into_body(), 100).await.unwrap();
    assert_eq!(body, "hello");
}

#[tokio::test]
async fn inline_mode_tells_a_failed_service() {
    let defer = TestDefer::inline();
    let service = defer
        .layer()
        .layer(service_fn(|request: Request<Body>| async move {
            let defer = Defer::from_extensions(request.extensions()).unwrap();
            defer.run(Task::new(|| async {}).name("undo").when(When::failure()));
            Err::<Response<Body>, _>("broken")
        }));
    assert_eq!(service.oneshot(request()).await.unwrap_err(), "broken");
    defer.report().assert_completed("undo");
}

// send_and_drain.

/// Any service, no axum, no feature but the kit's.
#[tokio::test]
async fn any_tower_service_can_be_sent_to() {
    let service = DeferLayer::new().layer(service_fn(|request: Request<Body>| async move {
        let defer = Defer::from_extensions(request.extensions()).unwrap();
        defer.run(Task::new(|| async {}).name("work"));
        Ok::<_, Infallible>(Response::new(Body::from("hello")))
    }));
    let (response, report) = send_and_drain(service, request()).await;
    assert_eq!(response.body(), "hello");
    let work = report.assert_completed("work").task("work");
    assert_eq!(work.attempts, 1);
    assert_eq!(work.response.as_ref().unwrap().bytes, 5);
    let info = report.response().unwrap();
    assert_eq!((info.end, info.bytes), (End::Complete, 5));
}

/// An application without the layer fails in the test as it does in production.
#[tokio::test]
async fn a_missing_layer_is_still_missing() {
    let app = Router::new().route("/", get(|_: Defer| async {}));
    let (response, report) = send_and_drain(app, request()).await;
    assert_eq!(response.status(), 500);
    assert!(String::from_utf8_lossy(response.body()).contains("DeferLayer"));
    report.assert_nothing_deferred();
}

#[tokio::test]
async fn the_layers_own_limit_and_executor_hold() {
    let executor = Executor::builder().capacity(2).build();
    let layer = DeferLayer::new()
        .executor(executor.clone())
        .max_tasks_per_request(3);
    let mut app = app(layer, |defer| {
        for _ in 0..4 {
            defer.run(Task::new(|| async {}).name("one"));
        }
    });
    for _ in 0..2 {
        let (_, report) = send_and_drain(&mut app, request()).await;
        report.assert_count(2);
        assert_eq!(
            report.tasks()[2].state,
            TaskState::Rejected(RejectReason::Full)
        );
    }
    let now = executor.snapshot();
    assert_eq!(
        (now.completed, now.outstanding, now.open_requests),
        (4, 0, 0)
    );
    let (_, report) = send_and_drain(
        app_of_four(DeferLayer::new().max_tasks_per_request(3)),
        request(),
    )
    .await;
    report.assert_deferred_times("one", 3);
}

fn app_of_four(layer: DeferLayer) -> Router {
    app(layer, |defer| {
        for _ in 0..4 {
            defer.run(Task::new(|| async {}).name("one"));
        }
    })
}

/// A task registered while the body streams belongs to what is waited for.
#[tokio::test]
async fn what_the_stream_registers_is_drained() {
    let handler = |defer: Defer| async move {
        let chunks = (0..3).map(move |at| {
            defer.run(Task::new(|| async {}).name("chunk"));
            Ok::<_, Infallible>(Bytes::from(format!("{at}")))
        });
        Body::from_stream(futures_util::stream::iter(chunks))
    };
    let app = Router::new()
        .route("/", get(handler))
        .layer(DeferLayer::new());
    let (response, report) = send_and_drain(app, request()).await;
    assert_eq!(response.body(), "012");
    report
        .assert_deferred_times("chunk", 3)
        .assert_completed("chunk");
}

#[tokio::test]
async fn a_dead_letter_is_reported_with_its_error() {
    let app = app(DeferLayer::new(), |defer| {
        let fails = || async { Err::<(), _>("down") };
        defer.run(Task::new(fails).name("mail").retry(Retry::exponential(3)));
    });
    let (_, report) = send_and_drain(app, request()).await;
    let mail = report.assert_discarded("mail").task("mail");
    assert_eq!((mail.attempts, mail.error.as_deref()), (3, Some("down")));
    let wrong = said(|| _ = report.assert_clean());
    assert!(
        wrong.contains("discarded after 3 attempts, down"),
        "{wrong}"
    );
}

/// In paused time a backoff of minutes is kept, and costs nothing.
#[tokio::test(start_paused = true)]
async fn the_backoff_is_kept_where_it_is_wanted() {
    let app = |retry: Retry| {
        app(DeferLayer::new(), move |defer| {
            let fails = || async { Err::<(), _>("down") };
            defer.run(Task::new(fails).name("mail").retry(retry.clone()));
        })
    };
    let retry = Retry::fixed(3, Duration::from_secs(100));
    let began = tokio::time::Instant::now();
    send_and_drain(app(retry.clone()), request())
        .await
        .1
        .assert_discarded("mail");
    assert!(began.elapsed() < Duration::from_secs(1));
    Client::new()
        .keep_backoff()
        .send_and_drain(app(retry), request())
        .await
        .1
        .assert_discarded("mail");
    assert!(began.elapsed() > Duration::from_secs(100));
}

// Ends.

#[tokio::test]
async fn the_client_leaves_at_the_very_byte() {
    for at in [1, 4, 5, 9] {
        let handler = |defer: Defer| async move {
            defer.run(Task::new(|| async {}).name("count").when(When::always()));
            let chunks = ["hello", "world"].map(|chunk| Ok::<_, Infallible>(Bytes::from(chunk)));
            Body::from_stream(futures_util::stream::iter(chunks))
        };
        let app = Router::new()
            .route("/", get(handler))
            .layer(DeferLayer::new());
        let (response, report) = Client::new()
            .leaves_at(at)
            .send_and_drain(app, request())
            .await;
        assert_eq!(response.body(), &"helloworld"[..at as usize]);
        let info = report.response().unwrap();
        assert_eq!((info.end, info.bytes), (End::Aborted, at));
        report.assert_completed("count");
    }
}

#[tokio::test]
async fn a_client_cannot_leave_after_the_end() {
    let app = app(DeferLayer::new(), |_| {});
    let said = said_by(Client::new().leaves_at(10).send_and_drain(app, request())).await;
    assert!(
        said.contains("was to leave at byte 10, and the response has only 5"),
        "{said}"
    );
    assert!(said.contains(file!()), "{said}");
}

#[tokio::test]
async fn any_end_can_be_had() {
    for end in [
        End::BodyFailed,
        End::Stalled,
        End::Truncated,
        End::Upgraded,
        End::Complete,
    ] {
        let app = app(DeferLayer::new(), move |defer| {
            let fits = When::new(move |info| info.end == end);
            defer.run(Task::new(|| async {}).name("work").when(fits));
        });
        let (_, report) = Client::new()
            .ends_with(end)
            .send_and_drain(app, request())
            .await;
        assert_eq!(report.response().unwrap().end, end);
        report.assert_completed("work");
    }
}

#[tokio::test]
async fn the_client_leaves_before_the_response() {
    let registered = Arc::new(Notify::new());
    let tell = registered.clone();
    let handler = move |defer: Defer| async move {
        defer.run(Task::new(|| async {}).name("default"));
        defer.run(Task::new(|| async {}).name("success").when(When::success()));
        tell.notify_one();
        std::future::pending::<()>().await;
    };
    let app = Router::new()
        .route("/", get(handler))
        .layer(DeferLayer::new());
    let left = Client::new().leaves_when(registered.notified(), app, request());
    let report = left.await;
    assert_eq!(report.response().unwrap().end, End::Cancelled);
    report.assert_completed("default").assert_skipped("success");
}

#[test]
fn conditions_by_themselves() {
    assert!(holds(&When::default(), &client_left_at(10)));
    assert!(!holds(&When::default(), &response(500)));
    assert!(!holds(&When::complete(), &stalled_at(10)));
    assert!(holds(&When::aborted(), &without_response(End::Cancelled)));
    let early = When::new(|info| info.end == End::Aborted && info.bytes < 11);
    assert!(holds(&early, &client_left_at(10)) && !holds(&early, &client_left_at(11)));
}

// The guard.

/// An hour of timeouts, in real time: the guard speaks first.
#[tokio::test]
async fn a_task_that_never_ends_cannot_hang_a_test() {
    let app = app(DeferLayer::new(), |defer| {
        let never = Task::new(std::future::pending::<()>).name("never");
        defer.run(never.timeout(Duration::from_secs(3600)));
        defer.run(Task::new(|| async {}).name("fine"));
    });
    let client = Client::new().guard(Duration::from_millis(50));
    let said = said_by(client.send_and_drain(app, request())).await;
    for expected in ["after 50ms", file!(), "`never`", "attempt 1 is running"] {
        assert!(said.contains(expected), "{expected} is not in: {said}");
    }
    assert!(!said.contains("`fine`"), "{said}");
}

#[tokio::test]
async fn a_handler_that_never_answers_cannot_hang_a_test() {
    let app = Router::new()
        .route("/", get(std::future::pending::<()>))
        .layer(DeferLayer::new());
    let client = Client::new().guard(Duration::from_millis(50));
    let said = said_by(client.send_and_drain(app, request())).await;
    assert!(
        said.contains("the handler or the response's body does not end"),
        "{said}"
    );
}

/// A task that holds the only thread: this test starts itself once more, and that process is ended.
#[test]
fn a_task_that_does_not_yield_ends_the_process() {
    const INSIDE: &str = "TOWER_DEFER_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let app = app(DeferLayer::new(), |defer| {
            defer.run(
                Task::new(|| async {
                    while std::env::var_os(INSIDE).is_some() {
                        std::hint::spin_loop();
                    }
                })
                .name("spinner"),
            );
        });
        let client = Client::new().guard(Duration::from_millis(50));
        let _ = runtime.block_on(client.send_and_drain(app, request()));
        unreachable!("the process has ended");
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_task_that_does_not_yield_ends_the_process",
            "--nocapture",
        ])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    for expected in ["`spinner`", "attempt 1 is running", "does not yield"] {
        assert!(said.contains(expected), "{expected} is not in: {said}");
    }
}
