//! Numbers for Prometheus: `cargo run --example metrics --features axum,metrics`, then
//! `curl localhost:3000/` a few times and `curl localhost:3000/metrics`.
//!
//! The facade's exporter turns the dots of our names into underscores; docs/observability.md lists them.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tower_defer::{Defer, DeferLayer, Executor, Task, TaskError};

async fn sign_up(defer: Defer) -> &'static str {
    defer.run(Task::new(|| async {}).name("welcome"));
    defer.run(
        Task::new(|| async { Err::<(), _>(TaskError::fatal("no such address")) }).name("invoice"),
    );
    "hello\n"
}

async fn render(State(prometheus): State<PrometheusHandle>) -> String {
    prometheus.render()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Before the first task: what happens without a recorder is not counted.
    let seconds = [0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0];
    let prometheus = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Prefix("tower_defer".to_owned()), &seconds)?
        .set_buckets_for_metric(Matcher::Prefix("messaging".to_owned()), &seconds)?
        .install_recorder()?;
    let upkeep = prometheus.clone();
    let every = Duration::from_secs(5);

    let executor = Executor::builder().name("background").build();
    let defer = DeferLayer::new().executor(executor);
    let app = Router::new()
        .route("/", get(sign_up))
        // Outside the layer's concern: it defers nothing.
        .route("/metrics", get(render))
        .with_state(prometheus)
        .layer(defer.clone());

    let port = std::env::args().nth(1).unwrap_or_else(|| "3000".to_owned());
    let listener = tokio::net::TcpListener::bind(format!("127.0.0.1:{port}")).await?;
    println!("listening on http://{}", listener.local_addr()?);
    tokio::select! {
        served = axum::serve(listener, app).into_future() => served?,
        // The exporter keeps what histograms recorded until someone renders or this is called.
        () = async {
            loop {
                tokio::time::sleep(every).await;
                upkeep.run_upkeep();
            }
        } => {}
    }
    Ok(())
}
