//! The server: `GET /` with a side effect, `GET /stats` with what became of the side effects.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use axum_tasks::{AppTasks, HasTasks, TaskHandler, TaskOutput, spawn_task_workers};
use serde::{Deserialize, Serialize};
use tower_defer::{Defer, DeferLayer, Executor};

/// Completed and refused side effects.
#[derive(Default)]
struct Stats {
    completed: AtomicU64,
    refused: AtomicU64,
}

static STATS: Stats = Stats {
    completed: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Effect {
    None,
    /// 5 ms of waiting.
    Wait,
    /// 200 µs of CPU.
    Burn,
}

async fn effect(effect: Effect) {
    match effect {
        Effect::None => {}
        Effect::Wait => tokio::time::sleep(Duration::from_millis(5)).await,
        Effect::Burn => {
            let until = Instant::now() + Duration::from_micros(200);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }
    STATS.completed.fetch_add(1, Ordering::Relaxed);
}

#[derive(Debug, Clone, Serialize, Deserialize, axum_tasks::Task)]
struct Job {
    effect: Effect,
}

impl Job {
    async fn execute(&self) -> TaskOutput {
        effect(self.effect).await;
        TaskOutput::Success(serde_json::Value::Null)
    }
}

#[derive(Clone, HasTasks)]
struct Queue {
    tasks: AppTasks,
}

pub(crate) fn run(variant: &str, side: &str) {
    let side = match side {
        "none" => Effect::None,
        "wait" => Effect::Wait,
        "burn" => Effect::Burn,
        other => panic!("no such effect: {other}"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let app = app(variant, side).await;
        let app = app.route("/stats", get(stats));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        println!("{}", listener.local_addr().expect("an address"));
        axum::serve(listener, app).await.expect("the server");
    });
}

async fn stats() -> String {
    let completed = STATS.completed.load(Ordering::Relaxed);
    let refused = STATS.refused.load(Ordering::Relaxed);
    format!("{completed} {refused}")
}

async fn app(variant: &str, side: Effect) -> Router {
    match variant {
        "none" => Router::new().route("/", get(async || "hello")),
        "inline" => Router::new().route(
            "/",
            get(move || async move {
                effect(side).await;
                "hello"
            }),
        ),
        "spawn" => Router::new().route(
            "/",
            get(move || async move {
                tokio::spawn(effect(side));
                "hello"
            }),
        ),
        "defer" => deferred(
            side,
            Executor::builder()
                .concurrency(1024)
                .capacity(65_536)
                .build(),
        ),
        "dedicated" => deferred(
            side,
            Executor::builder()
                .concurrency(1)
                .capacity(65_536)
                .dedicated(1)
                .build(),
        ),
        "axum-tasks" => {
            let queue = Queue {
                tasks: AppTasks::new(),
            };
            let shutdown = axum_tasks::CancellationToken::new();
            spawn_task_workers(queue.tasks.clone(), shutdown, Some(1024));
            Router::new()
                .route(
                    "/",
                    get(move |State(queue): State<Arc<Queue>>| async move {
                        if queue.tasks.queue(Job { effect: side }).await.is_err() {
                            STATS.refused.fetch_add(1, Ordering::Relaxed);
                        }
                        "hello"
                    }),
                )
                .with_state(Arc::new(queue))
        }
        other => panic!("no such variant: {other}"),
    }
}

fn deferred(side: Effect, executor: Executor) -> Router {
    let app: Router<()> = Router::new().route(
        "/",
        get(move |defer: Defer| async move {
            if defer.try_run(move || effect(side)).is_err() {
                STATS.refused.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, Infallible>("hello")
        }),
    );
    app.layer(DeferLayer::new().executor(executor))
}
