//! A sign-up: one fact, three subscribers, recorded on disk before the client sees the answer.
//!
//! ```text
//! cargo run --example signup --features axum,signal,sqlite
//! curl -i -d email=ada@example.org http://127.0.0.1:3000/users
//! curl http://127.0.0.1:3000/status
//! ```
//!
//! The first curl has its `303 See Other` at once. Then the log shows the three deliveries of
//! `user.created`: the trial, which takes three seconds; the mail, which fails twice and is tried
//! again; and the newsletter, which has a bug and becomes a dead letter at once. A task without a
//! store, the audit, runs beside them.
//!
//! **Kill it** while the trial still runs (`kill -9 $(pgrep -x signup)`) and start it again: what was
//! not finished starts at once, in its second attempt.
//!
//! **Repair the newsletter**, and replay what it missed:
//!
//! ```text
//! curl -X POST http://127.0.0.1:3000/newsletter/repair
//! ```
//!
//! Ctrl-c or SIGTERM stops accepting, lets running attempts end within 10 s, keeps the rest in the
//! file, and prints the report. `PORT=8080` listens elsewhere, `PORT=0` on any free port; the events are
//! in `signup.db`, or where `EVENTS_DB` says.

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::Redirect;
use axum::routing::{get, post};
use axum::{Form, Router};
use serde::{Deserialize, Serialize};
use tower_defer::event::store::{Filter, Sqlite};
use tower_defer::event::{DeliveryContext, Event, Events, Subscriber};
use tower_defer::{BoxError, Defer, DeferLayer, Retry, Shutdown, TaskError};

#[derive(Deserialize)]
struct SignUp {
    email: String,
}

/// What has happened. Everything that follows from it subscribes, in `main`.
#[derive(Clone, Serialize, Deserialize)]
struct UserCreated {
    id: i64,
    email: String,
}

impl Event for UserCreated {
    const NAME: &'static str = "user.created";
}

async fn sign_up(defer: Defer, State(app): State<App>, Form(form): Form<SignUp>) -> Redirect {
    let began = now();
    let id = app.users.create(); // must happen before we answer
    let email = form.email;
    defer.emit(UserCreated { id, email }); // recorded before the client has its answer
    defer.run(move || audit(id)); // a task: runs after the answer, and is lost with the process
    let handler_ms = began.elapsed().as_secs_f64() * 1000.0;
    tracing::info!(user = id, handler_ms, "handler returns");
    Redirect::to("/dashboard")
}

// The subscribers: plain functions of the state and the event.

async fn welcome_mail(app: App, event: UserCreated) -> Result<(), TaskError> {
    app.mailer.welcome(&event.email).await
}

/// The billing provider is slow, and must not start a second trial when it is called again.
async fn start_trial(_: App, event: UserCreated, delivery: DeliveryContext) {
    let (user, key) = (event.id, delivery.id());
    tracing::info!(user, key, attempt = delivery.attempt(), "trial begins");
    tokio::time::sleep(Duration::from_secs(3)).await;
    tracing::info!(user, key, "trial started");
}

async fn newsletter(app: App, event: UserCreated) -> Result<(), TaskError> {
    if !app.newsletter_works.load(Ordering::Relaxed) {
        return Err(TaskError::fatal("the newsletter has no list 0"));
    }
    tracing::info!(email = event.email, "on the newsletter's list");
    Ok(())
}

/// How many deliveries the store has in which state, and what failed.
async fn status(State(events): State<Events<App>>) -> Result<String, String> {
    let counts = events.counts().await.map_err(|e| e.to_string())?;
    let letters = events.dead_letters().group(&Filter::default(), 10).await;
    let letters = letters.map_err(|e| e.to_string())?;
    let letters = letters.iter().map(|group| {
        let (count, name, error) = (group.count, &group.subscriber, &group.example);
        format!("dead letters: {count} of {name}: {error}\n")
    });
    Ok(format!("{counts:#?}\n{}", letters.collect::<String>()))
}

/// The bug is fixed: what the newsletter missed is delivered now, to it alone.
async fn repair(State((app, events)): State<(App, Events<App>)>) -> Result<String, String> {
    app.newsletter_works.store(true, Ordering::Relaxed);
    let missed = Filter {
        subscriber: Some("newsletter".into()),
        ..Filter::default()
    };
    // Under one name each delivery is replayed once, however often this is called.
    let replay = events.dead_letters().replay("newsletter-list-0", missed);
    let replayed = replay.run().await.map_err(|e| e.to_string())?;
    Ok(format!("replayed: {replayed}\n"))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    common::show_tasks();
    let file = std::env::var_os("EVENTS_DB").map_or("signup.db".into(), PathBuf::from);
    println!("events are kept in {}", file.display());

    let app = App::default();
    let events = Events::new(app.clone())
        .on("welcome-mail", welcome_mail)
        .on("start-trial", Subscriber::with_context(start_trial))
        .on(
            "newsletter",
            Subscriber::new(newsletter)
                .retry(Retry::exponential(12).give_up_after(Duration::from_secs(3600)))
                .timeout(Duration::from_secs(5)),
        )
        .store(Sqlite::open(file)?);

    let defer = DeferLayer::new().events(events.clone());
    let router = Router::new()
        .route("/users", post(sign_up).with_state(app.clone()))
        .route("/status", get(status).with_state(events.clone()))
        .route("/newsletter/repair", post(repair).with_state((app, events)))
        .layer(defer.clone());

    let listener = common::listen(
        3000,
        &[
            "curl -i -d email=ada@example.org http://ADDRESS/users",
            "curl http://ADDRESS/status",
            "curl -X POST http://ADDRESS/newsletter/repair",
        ],
    )
    .await?;
    let report = Shutdown::new(&defer)
        .deadline(Duration::from_secs(10))
        .serve(tower_defer::signal(), |stop| async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(stop)
                .await
        })
        .await?;
    println!("{report}");
    Ok(())
}

// The application.

#[derive(Clone, Default)]
struct App {
    users: Arc<Users>,
    mailer: Arc<Mailer>,
    newsletter_works: Arc<AtomicBool>,
}

#[derive(Default)]
struct Users(AtomicI64);

impl Users {
    fn create(&self) -> i64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// A mail server on a bad day: it fails twice for each address, and then works.
#[derive(Default)]
struct Mailer(Mutex<HashMap<String, u32>>);

impl Mailer {
    async fn welcome(&self, email: &str) -> Result<(), TaskError> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut tries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tries = tries.entry(email.to_owned()).or_default();
        *tries += 1;
        if *tries <= 2 {
            return Err("the mail server hung up".into());
        }
        tracing::info!(email, "mail sent");
        Ok(())
    }
}

async fn audit(user: i64) {
    tracing::info!(user, "audited");
}

#[expect(
    clippy::disallowed_methods,
    reason = "the ban is on the crate's own code: an application may read its clock"
)]
fn now() -> Instant {
    Instant::now()
}
