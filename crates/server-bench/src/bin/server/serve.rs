//! The server: `GET /` with a side effect.

use std::convert::Infallible;
use std::hint::black_box;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use axum_tasks::{AppTasks, HasTasks, TaskHandler, TaskOutput, spawn_task_workers};
use serde::{Deserialize, Serialize};
use tower_defer::{Defer, DeferLayer, Executor};
use tower_defer_server_bench::serve::{COMPLETED, REFUSED, REQUESTS, count, counted};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Effect {
    None,
    /// 5 ms of waiting.
    Wait,
    /// So many µs of CPU.
    Burn(u32),
}

impl Effect {
    fn named(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "wait" => Self::Wait,
            burn => {
                let micros = burn.strip_prefix("burn").and_then(|n| n.parse().ok());
                TURNS.get_or_init(calibrate);
                Self::Burn(micros.unwrap_or_else(|| panic!("no such effect: {burn}")))
            }
        }
    }
}

async fn effect(effect: Effect) {
    match effect {
        Effect::None => {}
        Effect::Wait => tokio::time::sleep(Duration::from_millis(5)).await,
        Effect::Burn(micros) => burn(micros * TURNS.get_or_init(calibrate)),
    }
    count(&COMPLETED);
}

/// Turns of [`burn`] that take a microsecond of CPU. Not until a time on the clock: that passes as well
/// while somebody else has the core.
static TURNS: OnceLock<u32> = OnceLock::new();

fn burn(turns: u32) {
    let mut x = 1_u64;
    for _ in 0..turns {
        x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).rotate_left(17));
    }
}

fn calibrate() -> u32 {
    const TRIED: u32 = 100_000;
    let fastest = (0..50)
        .map(|_| {
            let start = Instant::now();
            burn(TRIED);
            start.elapsed()
        })
        .min()
        .unwrap_or_default();
    (f64::from(TRIED) / (fastest.as_secs_f64() * 1e6)).round() as u32
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
    let side = Effect::named(side);
    tower_defer_server_bench::serve::run(|| app(variant, side), counted);
}

async fn app(variant: &str, side: Effect) -> Router {
    match variant {
        "none" => Router::new().route(
            "/",
            get(async || {
                count(&REQUESTS);
                count(&COMPLETED);
                "hello"
            }),
        ),
        "inline" => Router::new().route(
            "/",
            get(move || async move {
                count(&REQUESTS);
                effect(side).await;
                "hello"
            }),
        ),
        "spawn" => Router::new().route(
            "/",
            get(move || async move {
                count(&REQUESTS);
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
        "dedicated" => {
            // What never yields runs one at a time on one thread, whatever is allowed.
            let concurrency = match side {
                Effect::Burn(_) => 1,
                _ => 1024,
            };
            deferred(
                side,
                Executor::builder()
                    .concurrency(concurrency)
                    .capacity(65_536)
                    .dedicated(1)
                    .build(),
            )
        }
        // A queue that holds half a second of what it can do.
        "dedicated, short queue" => deferred(
            side,
            Executor::builder()
                .concurrency(1)
                .capacity(1024)
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
                        count(&REQUESTS);
                        if queue.tasks.queue(Job { effect: side }).await.is_err() {
                            count(&REFUSED);
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
            count(&REQUESTS);
            if defer.try_run(move || effect(side)).is_err() {
                count(&REFUSED);
            }
            Ok::<_, Infallible>("hello")
        }),
    );
    app.layer(DeferLayer::new().executor(executor))
}
