//! How to test an application that defers work: an example to copy from.
//!
//! The application below knows nothing of the tests: it takes a `DeferLayer`, as in `main`. Everything
//! runs without a socket.
#![cfg(all(feature = "test-util", feature = "axum"))]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Request, StatusCode};
use axum::routing::{get, post};
use tower::ServiceExt;
use tower_defer::test_util::{
    Client, TaskState, TestDefer, client_left_at, response, send_and_drain,
};
use tower_defer::{Defer, DeferLayer, End, Retry, Task, TaskContext, TaskError, When};

// The application.

#[derive(Clone, Default)]
struct App {
    sent: Arc<Mutex<Vec<String>>>,
    /// How often the mail server is down before it is up.
    outages: Arc<Mutex<u32>>,
}

impl App {
    async fn mail(&self, text: String) -> Result<(), TaskError> {
        let mut outages = self.outages.lock().unwrap();
        if *outages > 0 {
            *outages -= 1;
            return Err("the mail server is down".into());
        }
        self.sent.lock().unwrap().push(text);
        Ok(())
    }

    fn sent(&self) -> Vec<String> {
        self.sent.lock().unwrap().clone()
    }
}

async fn sign_up(defer: Defer, State(app): State<App>, Path(name): Path<String>) -> StatusCode {
    if name == "nobody" {
        return StatusCode::UNPROCESSABLE_ENTITY;
    }
    defer.run(
        Task::with((app.clone(), name.clone()), |(app, name)| async move {
            app.mail(format!("welcome, {name}")).await
        })
        .name("welcome"),
    );
    defer.run(
        Task::with(app, |app| async move { app.mail("news".to_owned()).await })
            .name("newsletter")
            .when(When::success()),
    );
    if name == "taken" {
        return StatusCode::CONFLICT;
    }
    StatusCode::CREATED
}

async fn download(defer: Defer, State(app): State<App>) -> Vec<u8> {
    defer.run(
        Task::with_context(move |context: TaskContext| {
            let app = app.clone();
            async move {
                let taken = context.response().map_or(0, |response| response.bytes);
                app.mail(format!("{taken} bytes were taken")).await
            }
        })
        .name("bill")
        .when(When::always()),
    );
    defer.run(
        Task::new(|| async {})
            .name("finished")
            .when(When::complete()),
    );
    vec![0; 100]
}

fn routes(app: App, defer: DeferLayer) -> Router {
    Router::new()
        .route("/users/{name}", post(sign_up))
        .route("/file", get(download))
        .with_state(app)
        .layer(defer)
}

fn sign_up_as(name: &str) -> Request<Body> {
    Request::post(format!("/users/{name}"))
        .body(Body::empty())
        .unwrap()
}

fn get_file() -> Request<Body> {
    Request::get("/file").body(Body::empty()).unwrap()
}

// What is deferred: capture mode. Nothing runs.

#[tokio::test]
async fn a_sign_up_defers_the_welcome_and_the_newsletter() {
    let app = App::default();
    let defer = TestDefer::capture();

    let answer = routes(app.clone(), defer.layer())
        .oneshot(sign_up_as("ada"))
        .await
        .unwrap();

    assert_eq!(answer.status(), StatusCode::CREATED);
    defer.assert_deferred("welcome");
    defer.assert_deferred_times("newsletter", 1);
    defer.assert_not_deferred("goodbye");
    defer.assert_count(2);
    assert!(app.sent().is_empty(), "capture mode runs nothing");
}

#[tokio::test]
async fn nobody_gets_no_mail() {
    let defer = TestDefer::capture();

    let app = routes(App::default(), defer.layer());
    let answer = app.oneshot(sign_up_as("nobody")).await.unwrap();

    assert_eq!(answer.status(), StatusCode::UNPROCESSABLE_ENTITY);
    defer.assert_nothing_deferred();
}

#[tokio::test]
async fn the_newsletter_depends_on_the_answer() {
    let defer = TestDefer::capture();
    routes(App::default(), defer.layer())
        .oneshot(sign_up_as("ada"))
        .await
        .unwrap();

    let report = defer.report();
    let newsletter = report.task("newsletter");
    assert!(newsletter.would_run(&response(201)));
    assert!(newsletter.would_run(&client_left_at(10)));
    assert!(!newsletter.would_run(&response(409)));
}

/// Captured tasks can be run after all.
#[tokio::test]
async fn captured_tasks_run_on_request() {
    let app = App::default();
    let defer = TestDefer::capture();
    let answer = routes(app.clone(), defer.layer())
        .oneshot(sign_up_as("ada"))
        .await
        .unwrap();
    // The response is out when it has been read or dropped.
    drop(answer);

    let report = defer.run_captured().await;

    report
        .assert_completed("welcome")
        .assert_completed("newsletter");
    assert_eq!(app.sent(), ["welcome, ada", "news"]);
}

// What the tasks do: inline mode. They have ended when the response is there.

#[tokio::test]
async fn a_sign_up_is_welcomed() {
    let app = App::default();
    let defer = TestDefer::inline();

    routes(app.clone(), defer.layer())
        .oneshot(sign_up_as("ada"))
        .await
        .unwrap();

    assert_eq!(app.sent(), ["welcome, ada", "news"]);
    defer.report().assert_clean();
}

// Both, as in production: the response is read to its end, then the tasks run. The layer can be any.

#[tokio::test]
async fn a_conflict_sends_nothing() {
    let app = App::default();
    let service = routes(app.clone(), DeferLayer::new());

    let (answer, report) = send_and_drain(service, sign_up_as("taken")).await;

    assert_eq!(answer.status(), StatusCode::CONFLICT);
    report
        .assert_skipped("welcome")
        .assert_skipped("newsletter");
    assert!(app.sent().is_empty());
}

#[tokio::test]
async fn an_outage_of_the_mail_server_is_survived() {
    let app = App::default();
    *app.outages.lock().unwrap() = 3;
    let mut service = routes(app.clone(), DeferLayer::new());

    // Retries come at once: no test waits for a backoff.
    let (_, report) = send_and_drain(&mut service, sign_up_as("ada")).await;
    report.assert_clean();
    assert_eq!(
        report.task("welcome").attempts + report.task("newsletter").attempts,
        5
    );

    // And again: nothing was closed.
    let (_, report) = send_and_drain(&mut service, sign_up_as("bob")).await;
    report.assert_completed("welcome");
    assert_eq!(app.sent().len(), 4);
}

// The client misbehaves.

#[tokio::test]
async fn who_leaves_early_is_billed_for_what_was_taken() {
    let app = App::default();
    let service = routes(app.clone(), DeferLayer::new());

    let (answer, report) = Client::new()
        .leaves_at(10)
        .send_and_drain(service, get_file())
        .await;

    assert_eq!(answer.body().len(), 10);
    report.assert_completed("bill").assert_skipped("finished");
    assert_eq!(app.sent(), ["10 bytes were taken"]);
}

#[tokio::test]
async fn a_stalled_download_is_billed() {
    let app = App::default();
    let service = routes(app.clone(), DeferLayer::new());

    let stalls = Client::new().leaves_at(7).ends_with(End::Stalled);
    let (_, report) = stalls.send_and_drain(service, get_file()).await;

    assert_eq!(report.response().unwrap().end, End::Stalled);
    report.assert_completed("bill").assert_skipped("finished");
    assert_eq!(app.sent(), ["7 bytes were taken"]);
}

// Time: paused, it costs nothing.

#[tokio::test(start_paused = true)]
async fn a_slow_task_is_given_up() {
    async fn slow(defer: Defer) {
        defer.run(
            Task::new(|| async { tokio::time::sleep(Duration::from_secs(3600)).await }) // the task's own work
                .name("slow")
                .timeout(Duration::from_secs(60))
                .retry(Retry::exponential(3)),
        );
    }
    let service = Router::new().route("/", get(slow)).layer(DeferLayer::new());
    let request = Request::get("/").body(Body::empty()).unwrap();

    let (_, report) = Client::new()
        .keep_backoff()
        .send_and_drain(service, request)
        .await;

    let slow = report.task("slow");
    assert_eq!((slow.state, slow.attempts), (TaskState::Discarded, 3));
    assert_eq!(slow.error.as_deref(), Some("timed out after 60s"));
}
