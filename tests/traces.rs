//! What the log and the spans say: names, fields, levels, and what an attempt's span follows from.
#![cfg(feature = "axum")]

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::get;
use tokio::sync::{Notify, oneshot};
use tower::{Service, ServiceExt};
use tower_defer::{
    Defer, DeferLayer, Executor, Overflow, Retry, RetryBudget, Task, TaskError, When,
};
use tracing::Instrument;

use capture::{Capture, Seen};

#[path = "traces/capture.rs"]
mod capture;
#[path = "traces/table.rs"]
mod table;

fn request() -> Request<Body> {
    Request::get("/").body(Body::empty()).unwrap()
}

/// Sends a request within a span of its own and reads the answer; the span is closed when it returns.
async fn ask(app: &mut Router) {
    let span = tracing::info_span!("request");
    async {
        let answer = app.call(request()).await.unwrap();
        axum::body::to_bytes(answer.into_body(), usize::MAX)
            .await
            .unwrap();
    }
    .instrument(span)
    .await;
}

fn app(defer: &DeferLayer, register: impl Fn(Defer) + Clone + Send + Sync + 'static) -> Router {
    let handler = move |defer: Defer| {
        register(defer);
        async { "hello" }
    };
    Router::new().route("/", get(handler)).layer(defer.clone())
}

/// Its budget delays no retry.
fn executor() -> Executor {
    Executor::builder()
        .retry_budget(RetryBudget::new(1000, 1000))
        .build()
}

// The table.

#[test]
fn every_event_of_the_code_stands_in_the_table_and_the_other_way_round() {
    assert_eq!(table::events_of_the_code(), table::events_of_the_docs());
}

#[test]
fn every_field_of_the_span_stands_in_the_table_and_the_other_way_round() {
    assert_eq!(
        table::span_fields_of_the_code(),
        table::span_fields_of_the_docs()
    );
}

// The span (CASES 32).

#[tokio::test(start_paused = true)]
async fn the_requests_span_ends_with_the_response_and_each_attempt_has_a_root_of_its_own() {
    let capture = Capture::here();
    let defer = DeferLayer::new().executor(executor());
    let mut app = app(&defer, |defer| {
        let task = Task::with_context(|context| async move {
            tokio::time::sleep(Duration::from_secs(10)).await; // the task's own work
            if context.attempt() < 3 {
                return Err(TaskError::from("not yet"));
            }
            Ok(())
        });
        defer.run(task.name("slow"));
    });

    ask(&mut app).await;
    let request = capture.span("request");
    assert!(request.closed, "something keeps the request's span open");
    defer.get_executor().idle().await;

    let attempts = capture.spans("attempt");
    assert_eq!(attempts.len(), 3);
    for (at, attempt) in attempts.iter().enumerate() {
        assert!(attempt.is_root, "attempt {at} is a child");
        assert_eq!(attempt.follows, [request.id], "attempt {at}");
        assert!(attempt.opened_at > request.closed_at, "attempt {at}");
        assert_eq!(attempt.field("task.attempt"), (at + 1).to_string());
        assert_eq!(attempt.field("task.name"), "slow");
        assert_eq!(attempt.field("task.id"), attempts[0].field("task.id"));
        assert!(attempt.field("task.location").contains("tests/traces.rs:"));
        assert_eq!(attempt.field("http.response.status_code"), "200");
        assert_eq!(attempt.field("response.end"), "complete");
        let outcome = if at == 2 { "completed" } else { "failed" };
        assert_eq!(attempt.field("task.outcome"), outcome);
        // From when it was due, not from the release ten seconds and a backoff earlier.
        let wait: u64 = attempt.field("task.queue_wait_ms").parse().unwrap();
        assert!(wait < 10, "attempt {at} waited {wait} ms");
    }
}

/// One worker, busy for 5 s: the other task waits.
#[tokio::test(start_paused = true)]
async fn the_queue_wait_is_that_for_a_worker() {
    let capture = Capture::here();
    let executor = Executor::builder().concurrency(1).build();
    for name in ["first", "second"] {
        let work = || tokio::time::sleep(Duration::from_secs(5)); // the task's own work
        executor.submit(Task::new(work).name(name));
    }
    executor.idle().await;

    let waits: Vec<_> = capture
        .spans("attempt")
        .iter()
        .map(|attempt| attempt.field("task.queue_wait_ms"))
        .collect();
    assert_eq!(waits, ["0", "5000"]);
}

#[tokio::test]
async fn it_does_not_matter_on_which_side_of_the_layer_the_trace_layer_stands() {
    for outside in [true, false] {
        let capture = Capture::here();
        let defer = DeferLayer::new();
        let trace = tower_http::trace::TraceLayer::new_for_http()
            .make_span_with(|_: &Request<Body>| tracing::info_span!("request"));
        let routes = Router::new().route(
            "/",
            get(|defer: Defer| async move {
                defer.run(|| async {});
            }),
        );
        let app = if outside {
            routes.layer(defer.clone()).layer(trace)
        } else {
            routes.layer(trace).layer(defer.clone())
        };
        let answer = app.oneshot(request()).await.unwrap();
        axum::body::to_bytes(answer.into_body(), usize::MAX)
            .await
            .unwrap();
        defer.get_executor().idle().await;

        let request = capture.span("request");
        assert!(request.closed);
        assert_eq!(capture.span("attempt").follows, [request.id]);
    }
}

#[tokio::test]
async fn a_late_registration_follows_its_own_span() {
    let capture = Capture::here();
    let defer = DeferLayer::new();
    let (give, got) = oneshot::channel();
    let give = Arc::new(std::sync::Mutex::new(Some(give)));
    let mut app = app(&defer, move |defer| {
        defer.run(Task::new(|| async {}).name("early"));
        let _ = give.lock().unwrap().take().unwrap().send(defer);
    });
    ask(&mut app).await;
    let handle = got.await.unwrap();
    let later = tracing::info_span!("later");
    later.in_scope(|| handle.run(Task::new(|| async {}).name("late")));
    drop((later, handle));
    defer.get_executor().idle().await;

    let of = |name: &str| {
        let attempts = capture.spans("attempt");
        attempts
            .into_iter()
            .find(|attempt| attempt.field("task.name") == name)
            .unwrap()
    };
    assert_eq!(of("early").follows, [capture.span("request").id]);
    assert_eq!(of("late").follows, [capture.span("later").id]);
}

#[tokio::test]
async fn without_a_request_it_follows_the_span_of_the_submission() {
    let capture = Capture::here();
    let executor = Executor::new();
    let cron = tracing::info_span!("cron");
    cron.in_scope(|| executor.submit(|| async {}));
    drop(cron);
    executor.submit(Task::new(|| async {}).name("alone"));
    executor.idle().await;

    let attempts = capture.spans("attempt");
    assert_eq!(attempts[0].follows, [capture.span("cron").id]);
    assert!(attempts[1].follows.is_empty());
    assert!(!attempts[0].has("response.end"));
}

#[tokio::test(start_paused = true)]
async fn the_outcomes() {
    let capture = Capture::here();
    let executor = executor();
    executor.submit(|| async { Err::<(), _>(TaskError::fatal("no")) });
    executor.submit(|| async {
        if true {
            panic!("boo")
        }
    });
    executor.submit(Task::once(std::future::pending::<()>()).timeout(Duration::from_secs(1)));
    executor.idle().await;
    executor.submit(std::future::pending::<()>);
    executor.drain(Duration::from_secs(1)).await;

    let mut outcomes: Vec<_> = capture
        .spans("attempt")
        .iter()
        .map(|attempt| attempt.field("task.outcome"))
        .collect();
    outcomes.sort();
    assert_eq!(outcomes, ["failed", "interrupted", "panicked", "timed_out"]);
}

// The log.

/// What was said holds against the table, and is said at all.
fn said(capture: &Capture, level: &str, message: &str) -> Vec<Seen> {
    let row = table::row(message);
    let events = capture.events(message);
    assert!(!events.is_empty(), "not said: {message}\n{capture:?}");
    for event in &events {
        assert_eq!(event.target, "tower_defer");
        assert_eq!(event.level, level, "{message}");
        assert_eq!(row.level, level, "{message} in the table");
        for field in event.fields.keys().filter(|field| *field != "message") {
            assert!(row.fields.contains(field), "{message} says {field}");
        }
    }
    events
}

#[tokio::test(start_paused = true)]
async fn chatter_is_debug() {
    let capture = Capture::here();
    let defer = DeferLayer::new();
    let mut app = app(&defer, |defer| {
        defer.run(Task::new(|| async {}).name("good"));
        defer.run(
            Task::new(|| async {})
                .name("unwanted")
                .when(When::failure()),
        );
        defer.run(Task::new(|| async {}).name("regretted")).cancel();
    });
    ask(&mut app).await;
    defer.get_executor().idle().await;

    let registered = said(&capture, "DEBUG", "task registered");
    let names: Vec<_> = registered
        .iter()
        .map(|event| event.field("task.name"))
        .collect();
    assert_eq!(names, ["good", "unwanted", "regretted"]);
    assert_eq!(
        said(&capture, "DEBUG", "response is out, tasks released")[0].field("tasks"),
        "2"
    );
    assert_eq!(
        said(&capture, "DEBUG", "task started")[0].field("task.name"),
        "good"
    );
    assert_eq!(
        said(&capture, "DEBUG", "task completed")[0].field("task.name"),
        "good"
    );
    let skipped = &said(
        &capture,
        "DEBUG",
        "task skipped, its condition did not hold",
    )[0];
    assert_eq!(skipped.field("condition"), "failure");
    assert_eq!(skipped.field("response.end"), "complete");
    let cancelled = said(&capture, "DEBUG", "task cancelled by its handle");
    assert_eq!(cancelled[0].field("task.name"), "regretted");
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_info_and_a_dead_letter_is_warn() {
    let capture = Capture::here();
    let executor = Executor::builder().dead_letters(1).build();
    let flaky = || async { Err::<(), _>("down") };
    executor.submit(Task::new(flaky).name("mail").retry(Retry::exponential(2)));
    executor.idle().await;
    let id = executor.dead_letters().list()[0].id;
    executor.dead_letters().replay(id).unwrap();
    executor.idle().await;
    executor.submit(|| async { Err::<(), _>(TaskError::fatal("no")) });
    executor.idle().await;

    let retry = &said(&capture, "INFO", "task failed, will be retried")[0];
    assert_eq!(
        (retry.field("task.attempt"), retry.field("error")),
        ("1".into(), "down".into())
    );
    let discarded = &said(&capture, "WARN", "task discarded, now a dead letter")[0];
    assert_eq!(discarded.field("reason"), "attempts");
    assert_eq!(discarded.field("task.attempt"), "2");
    said(&capture, "INFO", "dead letter replayed");
    said(
        &capture,
        "WARN",
        "dead letter lost: there are more than are kept",
    );
}

#[tokio::test(start_paused = true)]
async fn rejections_are_warned_about_once_a_minute() {
    let capture = Capture::here();
    let executor = Executor::builder()
        .name("small")
        .capacity(1)
        .overflow(Overflow::Reject)
        .build();
    let open = Arc::new(Notify::new());
    let waits = open.clone();
    executor.submit(Task::once(async move { waits.notified().await }).name("hog"));
    for _ in 0..3 {
        assert!(!executor.submit(|| async {}).is_accepted());
    }
    let warned = said(
        &capture,
        "WARN",
        "task rejected (said at most once a minute)",
    );
    assert_eq!(warned.len(), 1);
    assert_eq!(warned[0].field("executor"), "small");
    assert!(warned[0].field("filling").contains("hog × 1"), "{warned:?}");
    assert_eq!(said(&capture, "DEBUG", "task rejected").len(), 2);
    open.notify_one();
    executor.idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_info_when_clean_and_warn_when_not() {
    let capture = Capture::here();
    let clean = Executor::new();
    clean.submit(|| async {});
    clean.drain(Duration::from_secs(1)).await;
    assert_eq!(said(&capture, "INFO", "drained")[0].field("completed"), "1");

    let late = Executor::new();
    late.submit(std::future::pending::<()>);
    late.drain(Duration::from_secs(1)).await;
    let warned = &said(&capture, "WARN", "drained, and not every task completed")[0];
    assert_eq!(warned.field("timed_out"), "true");
    let cancelled = &said(&capture, "WARN", "task cancelled before its end")[0];
    assert_eq!(cancelled.field("state"), "interrupted");
}

#[tokio::test]
async fn panics_of_the_users_code_beside_the_attempt_are_warn() {
    struct Grenade;
    impl Drop for Grenade {
        fn drop(&mut self) {
            panic!("bang");
        }
    }
    let capture = Capture::here();
    let executor = Executor::builder()
        .on_dead_letter(|_| panic!("hook"))
        .build();
    let grenade = Grenade;
    executor.submit(move || {
        let _ = &grenade;
        async {}
    });
    executor.submit(|| async { Err::<(), _>(TaskError::fatal("no")) });
    executor.idle().await;
    let dropped = &said(&capture, "WARN", "a task panicked while it was dropped")[0];
    assert_eq!(dropped.field("panic"), "bang");
    let hook = &said(&capture, "WARN", "the dead-letter hook panicked")[0];
    assert_eq!(hook.field("panic"), "hook");
}

#[test]
fn no_runtime_is_an_error_and_what_is_lost_is_a_warning() {
    let capture = Capture::here();
    let executor = Executor::new();
    executor.submit(|| async {});
    let [(message, _)] = &table::events_of_the_docs()
        .into_iter()
        .filter(|(message, _)| message.starts_with("tasks wait for a tokio runtime: none"))
        .collect::<Vec<_>>()[..]
    else {
        panic!("not in the table");
    };
    said(&capture, "ERROR", message);
    drop(executor);
    let lost =
        "the executor was dropped with unfinished tasks: they are lost; drain it before the end";
    assert_eq!(said(&capture, "WARN", lost)[0].field("tasks"), "1");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_is_info() {
    let capture = Capture::here();
    let defer = DeferLayer::new().max_hold(Duration::from_secs(30));
    let mut app = app(&defer, |defer| {
        defer.run(|| async {});
    });
    let held = app.call(request()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await; // paused time
    let message =
        "the client has taken nothing for max_hold, tasks released before the response's end";
    assert_eq!(said(&capture, "INFO", message)[0].field("tasks"), "1");
    drop(held);
}

/// The watch is a thread of its own: it is heard by the process's subscriber only.
#[test]
fn a_stuck_task_is_warned_about() {
    let capture = Capture::everywhere();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let runtime = runtime.unwrap();
    let executor = runtime.block_on(async {
        let executor = Executor::new();
        let (let_go, held) = std::sync::mpsc::sync_channel::<()>(0);
        let held = std::sync::Mutex::new(held);
        let task = Task::blocking(move || {
            let _ = held.lock().unwrap().recv();
        });
        executor.submit(task.name("stubborn").timeout(Duration::from_millis(1)));
        let message = "task is stuck: it has outlived its timeout and does not yield";
        capture.until(message).await;
        let stuck = &said(&capture, "WARN", message)[0];
        assert_eq!(stuck.field("blocking"), "true");
        let report = executor.drain(Duration::ZERO).await;
        assert!(report.timed_out);
        said(
            &capture,
            "WARN",
            "task abandoned: it did not yield by the drain's deadline",
        );
        drop(let_go);
        capture.until("an abandoned task ended after all").await;
        said(&capture, "DEBUG", "an abandoned task ended after all");
        executor
    });
    drop(executor);
}

/// With the feature, an attempt has a link to the request's trace, however late it comes.
#[cfg(feature = "opentelemetry")]
mod opentelemetry {
    use ::opentelemetry::trace::{SpanId, TracerProvider};
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;

    use super::*;

    fn spans(exporter: &InMemorySpanExporter, name: &str) -> Vec<SpanData> {
        let spans = exporter.get_finished_spans().unwrap();
        spans.into_iter().filter(|span| span.name == name).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn every_attempt_is_a_trace_of_its_own_with_one_link_to_the_requests() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let _here = tracing_subscriber::registry().with(layer).set_default();

        let defer = DeferLayer::new().executor(executor());
        let mut app = app(&defer, |defer| {
            let fails = || async { Err::<(), _>("down") };
            defer.run(Task::new(fails).name("mail").retry(Retry::exponential(3)));
        });
        ask(&mut app).await;
        assert_eq!(
            spans(&exporter, "request").len(),
            1,
            "the request's span is not exported"
        );
        defer.get_executor().idle().await;
        // A dead letter, replayed an hour later.
        tokio::time::advance(Duration::from_secs(3600)).await;
        let letters = defer.get_executor().dead_letters();
        assert_eq!(letters.replay_where(|_| true).await, 1);
        defer.get_executor().idle().await;

        let request = spans(&exporter, "request").remove(0);
        let attempts = spans(&exporter, "attempt");
        assert_eq!(attempts.len(), 6);
        for attempt in &attempts {
            assert_eq!(attempt.parent_span_id, SpanId::INVALID);
            assert_ne!(
                attempt.span_context.trace_id(),
                request.span_context.trace_id()
            );
            let links: Vec<_> = attempt
                .links
                .iter()
                .map(|link| &link.span_context)
                .collect();
            assert_eq!(links, [&request.span_context]);
        }
    }

    /// The request's span is still open: one link, not two.
    #[tokio::test]
    async fn an_open_span_is_linked_once() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let _here = tracing_subscriber::registry().with(layer).set_default();

        let executor = Executor::new();
        let batch = tracing::info_span!("batch");
        batch.in_scope(|| executor.submit(|| async {}));
        executor.idle().await;
        assert_eq!(spans(&exporter, "attempt")[0].links.len(), 1);
        drop(batch);
    }
}
