//! The server: `GET /` with a task.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum_tasks::{AppTasks, HasTasks, TaskHandler, TaskOutput, spawn_task_workers};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tower_defer::{Defer, DeferLayer, Executor, Overflow, Task};
use tower_defer_server_bench::Counts;
use tower_defer_server_bench::serve::{COMPLETED, REFUSED, REQUESTS, count, counted};

pub(crate) const PERMITS: usize = 16;
pub(crate) const WORK: Duration = Duration::from_millis(10);
/// Bytes of each task.
pub(crate) const CAPTURED: usize = 4096;
pub(crate) const CAPACITY: usize = 4096;

static POOL: Semaphore = Semaphore::const_new(PERMITS);

/// Text, because axum-tasks writes what it is given as JSON, and bytes would be many times as long.
fn captured() -> String {
    "x".repeat(CAPTURED)
}

async fn work(captured: String) {
    let permit = POOL.acquire().await;
    tokio::time::sleep(WORK).await;
    black_box(&captured);
    drop(permit);
    count(&COMPLETED);
}

fn task() -> Task {
    Task::once(work(captured()))
}

#[derive(Debug, Clone, Serialize, Deserialize, axum_tasks::Task)]
struct Job {
    captured: String,
}

impl Job {
    async fn execute(&self) -> TaskOutput {
        work(self.captured.clone()).await;
        TaskOutput::Success(serde_json::Value::Null)
    }
}

#[derive(Clone, HasTasks)]
struct Queue {
    tasks: AppTasks,
}

pub(crate) fn run(variant: &str) {
    let overflow = match variant {
        "drop-oldest" => Overflow::DropOldest,
        _ => Overflow::Reject,
    };
    let executor = Executor::builder()
        .concurrency(PERMITS)
        .capacity(CAPACITY)
        .overflow(overflow)
        .build();
    let layer = DeferLayer::new().executor(executor.clone());
    let counts = move || with_executor(counted(), &executor);
    let app = async || match variant {
        "spawn" => Router::new().route("/", get(spawn)),
        "axum-tasks" => {
            let tasks = AppTasks::new();
            let shutdown = axum_tasks::CancellationToken::new();
            spawn_task_workers(tasks.clone(), shutdown, Some(PERMITS));
            let queue = Arc::new(Queue { tasks });
            Router::new().route("/", get(queued)).with_state(queue)
        }
        "answer-503" => Router::new().route("/", get(try_run)).layer(layer),
        "reject" | "drop-oldest" => Router::new().route("/", get(deferred)).layer(layer),
        other => panic!("no such variant: {other}"),
    };
    tower_defer_server_bench::serve::run(app, counts);
}

/// `run` refuses without a word to the handler, and says so in the executor's counts.
fn with_executor(mut counts: Counts, executor: &Executor) -> Counts {
    let snapshot = executor.snapshot();
    counts.refused += snapshot.rejected_full + snapshot.discarded;
    counts
}

async fn spawn() -> StatusCode {
    count(&REQUESTS);
    tokio::spawn(work(captured()));
    StatusCode::ACCEPTED
}

async fn queued(State(queue): State<Arc<Queue>>) -> StatusCode {
    count(&REQUESTS);
    let captured = captured();
    match queue.tasks.queue(Job { captured }).await {
        Ok(_) => StatusCode::ACCEPTED,
        Err(_) => {
            count(&REFUSED);
            StatusCode::SERVICE_UNAVAILABLE
        }
    }
}

async fn deferred(defer: Defer) -> StatusCode {
    count(&REQUESTS);
    defer.run(task());
    StatusCode::ACCEPTED
}

async fn try_run(defer: Defer) -> StatusCode {
    count(&REQUESTS);
    match defer.try_run(task()) {
        Ok(_) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}
