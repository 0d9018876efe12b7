//! A sign-up: the answer comes back at once, the side effects run after it, and the mail is tried again
//! until it goes out.
//!
//! ```text
//! cargo run --example signup --features axum,signal
//! curl -i -d email=ada@example.org http://127.0.0.1:3000/users
//! curl http://127.0.0.1:3000/status
//! ```
//!
//! The first curl has its `303 See Other` at once. After `response is out` the log shows five tasks:
//! the trial, the mail (two failures, each with the delay until the next attempt, then success), the
//! newsletter, the audit and the PDF. The second curl shows the executor's counts. Ctrl-c or SIGTERM
//! stops accepting, finishes what was accepted within 10 s, and prints the report.
//!
//! `PORT=8080` listens elsewhere, `PORT=0` on any free port.

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::Redirect;
use axum::routing::{get, post};
use axum::{Form, Router};
use tower_defer::{Defer, DeferLayer, Executor, Retry, Shutdown, Task, TaskError, When};

#[derive(serde::Deserialize)]
struct SignUp {
    email: String,
}

async fn sign_up(defer: Defer, State(app): State<App>, Form(form): Form<SignUp>) -> Redirect {
    let began = now();
    let user = app.users.create(); // must happen before we answer
    let email: Arc<str> = form.email.into();

    // Runs after we answered, and again where it fails.
    defer.run(move || start_trial(user));

    // A name for the logs, and a clone of the state for each attempt.
    defer.run(
        Task::with((app.clone(), email.clone()), |(app, email)| async move {
            app.mailer.welcome(&email).await
        })
        .name("welcome-mail"),
    );

    // A policy of its own, and only where the client gets a success.
    defer.run(
        Task::with((app, email), |(app, email)| async move {
            app.newsletter.add(&email).await
        })
        .name("newsletter")
        .retry(Retry::exponential(12).give_up_after(Duration::from_secs(3600)))
        .timeout(Duration::from_secs(5))
        .when(When::success()),
    );

    // A plain future: one attempt.
    defer.run(Task::once(audit(user)).name("audit"));

    // CPU or blocking work: on a thread of the executor's own.
    defer.run(Task::blocking(move || render_pdf(user)).name("pdf"));

    let handler_ms = began.elapsed().as_secs_f64() * 1000.0;
    tracing::info!(user, handler_ms, "handler returns");
    Redirect::to("/dashboard")
}

/// What the executor has done and is doing.
async fn status(State(app): State<App>) -> String {
    format!("{:#?}\n", app.executor.snapshot())
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    common::show_tasks();
    let defer = DeferLayer::new(); // an executor of its own, with safe bounds
    let app = App::new(defer.get_executor().clone());
    let router = Router::new()
        .route("/users", post(sign_up))
        .route("/status", get(status))
        .with_state(app)
        .layer(defer.clone());

    let listener = common::listen(
        3000,
        &[
            "curl -i -d email=ada@example.org http://ADDRESS/users",
            "curl http://ADDRESS/status",
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

#[derive(Clone)]
struct App {
    users: Arc<Users>,
    mailer: Arc<Mailer>,
    newsletter: Newsletter,
    executor: Executor,
}

impl App {
    fn new(executor: Executor) -> Self {
        Self {
            users: Arc::default(),
            mailer: Arc::default(),
            newsletter: Newsletter,
            executor,
        }
    }
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

#[derive(Clone)]
struct Newsletter;

impl Newsletter {
    async fn add(&self, email: &str) -> Result<(), TaskError> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        tracing::info!(email, "on the newsletter's list");
        Ok(())
    }
}

async fn start_trial(user: i64) -> Result<(), TaskError> {
    tracing::info!(user, "trial started");
    Ok(())
}

async fn audit(user: i64) {
    tracing::info!(user, "audited");
}

/// Keeps a CPU busy for a while.
fn render_pdf(user: i64) {
    let is_prime = |n: u64| (2..).take_while(|d| d * d <= n).all(|d| n % d != 0);
    let primes = (2..50_000).filter(|n| is_prime(*n)).count();
    tracing::info!(user, primes, "pdf rendered");
}

#[expect(
    clippy::disallowed_methods,
    reason = "the ban is on the crate's own code: an application may read its clock"
)]
fn now() -> Instant {
    Instant::now()
}
