//! Events through a service: in memory, and with a store.
#![cfg(all(feature = "sqlite", feature = "axum"))]
#![expect(
    clippy::disallowed_methods,
    reason = "servers, clients and deadlines of tests are no deferred work"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::post;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};
use tower::ServiceExt;
use tower_defer::event::store::{Memory, Sqlite};
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer, TaskError};

#[derive(Clone, Serialize, Deserialize)]
struct UserCreated {
    id: i64,
}

impl Event for UserCreated {
    const NAME: &'static str = "user.created";
}

#[derive(Clone, Default)]
struct App(Arc<Mutex<Vec<String>>>);

impl App {
    fn say(&self, text: impl Into<String>) {
        self.0.lock().expect("no panic").push(text.into());
    }

    fn said(&self) -> Vec<String> {
        let mut said = self.0.lock().expect("no panic").clone();
        said.sort();
        said
    }

    async fn until(&self, count: usize) -> Vec<String> {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while self.said().len() < count {
            assert!(std::time::Instant::now() < deadline, "{:?}", self.said());
            tokio::time::sleep(Duration::from_millis(2)).await; // the probe's pause
        }
        self.said()
    }
}

async fn welcome(app: App, event: UserCreated) -> Result<(), TaskError> {
    app.say(format!("welcome {}", event.id));
    Ok(())
}

async fn trial(app: App, event: UserCreated) -> Result<(), TaskError> {
    app.say(format!("trial {}", event.id));
    Err(TaskError::fatal("no trial"))
}

async fn audit(app: App, event: UserCreated) {
    app.say(format!("audit {}", event.id));
}

async fn sign_up(defer: Defer) -> StatusCode {
    let emitted = defer.emit(UserCreated { id: 7 });
    assert!(emitted.is_accepted(), "{emitted:?}");
    StatusCode::CREATED
}

fn events(app: &App) -> Events<App> {
    Events::new(app.clone())
        .on("welcome", welcome)
        .on("trial", trial)
        .on("audit", audit)
}

async fn serve(layer: &DeferLayer) -> StatusCode {
    let router = Router::new().route("/", post(sign_up)).layer(layer.clone());
    let request = Request::post("/").body(Body::empty()).expect("a request");
    let response = router.oneshot(request).await.expect("infallible");
    let status = response.status();
    response.into_body().collect().await.expect("a body");
    status
}

const ALL: [&str; 3] = ["audit 7", "trial 7", "welcome 7"];

#[tokio::test]
async fn in_memory_each_subscriber_has_its_own_delivery() {
    let app = App::default();
    let layer = DeferLayer::new().events(events(&app));
    assert_eq!(serve(&layer).await, 201);
    assert_eq!(app.until(3).await, ALL);
    layer.get_executor().idle().await;
    let snapshot = layer.get_executor().snapshot();
    assert_eq!((snapshot.completed, snapshot.discarded), (2, 1));
}

#[tokio::test]
async fn in_a_store_each_subscriber_has_its_own_delivery() {
    let app = App::default();
    let events = events(&app).store(Memory::new());
    let layer = DeferLayer::new().events(events.clone());
    assert_eq!(serve(&layer).await, 201);
    assert_eq!(app.until(3).await, ALL);
    layer.get_executor().idle().await;
    let counts = events.counts().await.expect("counts");
    assert_eq!(
        (counts.finished, counts.discarded, counts.events),
        (2, 1, 1)
    );
    let snapshot = layer.get_executor().snapshot();
    assert_eq!((snapshot.completed, snapshot.discarded), (2, 1));
}

#[tokio::test]
async fn in_sqlite_what_one_process_records_another_delivers() {
    let directory = tempdir();
    let file = directory.join("events.db");
    let app = App::default();
    {
        let events = Events::new(app.clone())
            .unheard(tower_defer::event::Unheard::Allow)
            .store(Sqlite::open(&file).expect("opens"));
        events
            .emit(UserCreated { id: 9 })
            .recorded()
            .await
            .expect("recorded");
        drop(events);
    }
    let sqlite = loop {
        match Sqlite::open(&file) {
            Ok(sqlite) => break sqlite,
            Err(error) if error.is_in_use() => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    let events = events(&app).store(sqlite);
    let added = events
        .add_past("welcome", std::time::SystemTime::UNIX_EPOCH)
        .await
        .expect("added");
    assert_eq!(added, 1);
    events.start();
    assert_eq!(app.until(1).await, ["welcome 9"]);
    std::fs::remove_dir_all(directory).expect("removed");
}

fn tempdir() -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("defer-events-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("made");
    path
}
