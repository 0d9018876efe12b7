//! The drawings at `DeferLayer`: which order of layers makes the release early.
#![cfg(feature = "axum")]

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::get;
use http_body_util::BodyExt;
use tower::ServiceExt;
use tower_defer::{Defer, DeferLayer};
use tower_http::compression::CompressionLayer;
use tower_http::trace::TraceLayer;

/// Whether the task has run while the last chunk is still in the server's hands.
async fn is_early(app: Router, defer: &DeferLayer) -> bool {
    let request = Request::get("/").header("accept-encoding", "gzip");
    let answer = app
        .oneshot(request.body(Body::empty()).unwrap())
        .await
        .unwrap();
    let mut body = answer.into_body();
    let mut held = Vec::new();
    while let Some(frame) = body.frame().await {
        held.extend(frame.unwrap().into_data());
    }
    drop(body);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let early = defer.get_executor().snapshot().completed == 1;
    drop(held);
    defer.get_executor().idle().await;
    assert_eq!(defer.get_executor().snapshot().completed, 1);
    early
}

fn routes() -> Router {
    let handler = |defer: Defer| async move {
        defer.run(|| async {});
        "hello, ".repeat(100)
    };
    Router::new().route("/", get(handler))
}

#[tokio::test]
async fn the_server_outside_is_in_time() {
    let defer = DeferLayer::new();
    let app = routes().layer(CompressionLayer::new()).layer(defer.clone());
    assert!(!is_early(app, &defer).await);
}

#[tokio::test]
async fn a_compressing_layer_outside_makes_it_early() {
    let defer = DeferLayer::new();
    let app = routes().layer(defer.clone()).layer(CompressionLayer::new());
    assert!(is_early(app, &defer).await);
}

#[tokio::test]
async fn a_layer_that_passes_chunks_on_does_not_matter() {
    let defer = DeferLayer::new();
    let app = routes()
        .layer(defer.clone())
        .layer(TraceLayer::new_for_http());
    assert!(!is_early(app, &defer).await);
}
