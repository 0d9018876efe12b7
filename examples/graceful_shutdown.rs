//! SIGTERM under load, with a stream open that never ends.
//!
//! ```text
//! cargo run --example graceful_shutdown --features axum,signal
//! curl -N http://127.0.0.1:3000/events &
//! curl http://127.0.0.1:3000/work
//! curl http://127.0.0.1:3000/slow
//! kill -TERM PID
//! ```
//!
//! The program prints its PID. A server's own graceful shutdown would wait for ever on the first curl.
//! Here the deadline is 4 s from the signal: at 2 s the stream's task is released although the stream
//! goes on, and runs; at 4 s the task of `/slow`, which takes a minute, is cancelled and named. The
//! last lines account for every task that a handler was told was accepted.
//!
//! `PORT=8080` listens elsewhere, `PORT=0` on any free port.

mod common;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::Event;
use axum::routing::get;
use futures_util::stream::{self, Stream};
use tower_defer::{Defer, DeferLayer, Shutdown, Task, TaskHandle};

const DEADLINE: Duration = Duration::from_secs(4);

/// What the application itself has counted, to be compared with the report.
#[derive(Clone, Default)]
struct Counted {
    accepted: Arc<AtomicU64>,
    finished: Arc<AtomicU64>,
}

impl Counted {
    fn accept(&self, task: &TaskHandle) -> &'static str {
        if task.is_accepted() {
            self.accepted.fetch_add(1, Ordering::Relaxed);
            "accepted\n"
        } else {
            "rejected\n"
        }
    }

    fn task(&self, name: &'static str, takes: Duration) -> Task {
        let finished = self.finished.clone();
        let work = move |finished: Arc<AtomicU64>| async move {
            tokio::time::sleep(takes).await;
            finished.fetch_add(1, Ordering::Relaxed);
        };
        Task::with(finished, work).name(name)
    }
}

async fn work(defer: Defer, State(counted): State<Counted>) -> &'static str {
    let task = counted.task("work", Duration::from_millis(200));
    counted.accept(&defer.run(task))
}

async fn slow(defer: Defer, State(counted): State<Counted>) -> &'static str {
    let task = counted.task("slow-report", Duration::from_secs(60));
    counted.accept(&defer.run(task))
}

async fn events(
    defer: Defer,
    State(counted): State<Counted>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let task = counted.task("after-the-stream", Duration::ZERO);
    counted.accept(&defer.run(task));
    Sse::new(stream::unfold(0_u64, |tick| async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let event = Event::default().data(format!("tick {tick}"));
        Some((Ok(event), tick + 1))
    }))
}

/// Tells when the signal came, so that the end can say how long everything took.
async fn timed(signal: impl Future<Output = ()>, tell: tokio::sync::oneshot::Sender<Instant>) {
    signal.await;
    println!("signal received, {} s left", DEADLINE.as_secs());
    let _ = tell.send(now());
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    common::show_tasks();
    let defer = DeferLayer::new();
    let counted = Counted::default();
    let router = Router::new()
        .route("/work", get(work))
        .route("/slow", get(slow))
        .route("/events", get(events))
        .with_state(counted.clone())
        .layer(defer.clone());
    let listener = common::listen(
        3000,
        &[
            "curl -N http://ADDRESS/events &",
            "curl http://ADDRESS/work",
            "curl http://ADDRESS/slow",
        ],
    )
    .await?;

    let (tell, told) = tokio::sync::oneshot::channel();
    let report = Shutdown::new(&defer)
        .deadline(DEADLINE)
        .serve(timed(tower_defer::signal(), tell), |stop| async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(stop)
                .await
        })
        .await?;

    println!("{report}");
    let total = defer.get_executor().snapshot();
    println!(
        "since the start: {} accepted = {} completed + {} skipped + {} discarded + {} cancelled",
        total.accepted, total.completed, total.skipped, total.discarded, total.cancelled
    );
    println!(
        "the handlers' own count: {} accepted, {} finished",
        counted.accepted.load(Ordering::Relaxed),
        counted.finished.load(Ordering::Relaxed)
    );
    if let Ok(signalled) = told.await {
        println!(
            "ended {} ms after the signal",
            signalled.elapsed().as_millis()
        );
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the ban is on the crate's own code: an application may read its clock"
)]
fn now() -> Instant {
    Instant::now()
}
