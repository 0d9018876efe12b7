//! A streamed body that defers from inside itself.
//!
//! ```text
//! cargo run --example streaming --features axum,signal
//! curl -N http://127.0.0.1:3000/export
//! curl -N --max-time 0.5 http://127.0.0.1:3000/export
//! ```
//!
//! The first curl prints a row every 200 ms. The stream registers a task for each row while it yields,
//! and one that is told what became of the response; none of them starts before the last byte is out.
//! The second curl leaves after half a second: the tasks of the rows that were yielded still run, the
//! end is `aborted`, and the task that wants a complete response is skipped.
//!
//! What a stream yielded before the first registration of its request is not guarded: a client that
//! reads slowly may not have it yet when the tasks start. So this handler registers before it streams.
//!
//! `PORT=8080` listens elsewhere, `PORT=0` on any free port.

mod common;

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use futures_util::stream::{self, StreamExt};
use tower_defer::{Defer, DeferLayer, Shutdown, Task, TaskContext, When};

const ROWS: u32 = 5;

async fn export(defer: Defer) -> Body {
    defer.run(
        Task::with_context(account_for)
            .name("account")
            .when(When::always()),
    );
    defer.run(
        Task::new(|| async { tracing::info!("the export counts as done") })
            .name("whole-export")
            .when(When::complete()),
    );
    // The stream owns a clone of the handle. That delays nothing: a release waits for bytes, not for
    // handles.
    let rows = stream::iter(1..=ROWS).then(move |row| {
        let defer = defer.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            defer.run(Task::new(move || mark_exported(row)).name("mark-exported"));
            tracing::info!(row, "row yielded");
            Ok::<_, Infallible>(format!("row {row} of {ROWS}\n"))
        }
    });
    Body::from_stream(rows)
}

async fn account_for(context: TaskContext) {
    if let Some(response) = context.response() {
        let (end, bytes) = (response.end, response.bytes);
        tracing::info!(%end, bytes, "what became of the response");
    }
}

async fn mark_exported(row: u32) {
    tracing::info!(row, "row marked");
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    common::show_tasks();
    let defer = DeferLayer::new();
    let router = Router::new()
        .route("/export", get(export))
        .layer(defer.clone());
    let listener = common::listen(
        3000,
        &[
            "curl -N http://ADDRESS/export",
            "curl -N --max-time 0.5 http://ADDRESS/export",
        ],
    )
    .await?;
    let report = Shutdown::new(&defer)
        .serve(tower_defer::signal(), |stop| async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(stop)
                .await
        })
        .await?;
    println!("{report}");
    Ok(())
}
