#![cfg(feature = "axum")]
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use tower::ServiceExt;
use tower_defer::{Defer, DeferLayer, Task, TaskError, When};

#[tokio::test]
async fn smoke() {
    let ran = Arc::new(AtomicUsize::new(0));
    let r = ran.clone();
    let layer = DeferLayer::new();
    let app = Router::new()
        .route(
            "/",
            get(move |defer: Defer| async move {
                let r1 = r.clone();
                defer.run(move || { let r = r1.clone(); async move { r.fetch_add(1, Ordering::SeqCst); } });
                defer.run_with(r.clone(), |r| async move { r.fetch_add(10, Ordering::SeqCst); Ok::<(), TaskError>(()) });
                let r2 = r.clone();
                defer.run(Task::blocking(move || { r2.fetch_add(100, Ordering::SeqCst); }));
                defer.run(Task::once(async move { r.fetch_add(1000, Ordering::SeqCst); }).when(When::failure()));
                "hello"
            }),
        )
        .layer(layer.clone());
    let res = app.oneshot(http::Request::new(axum::body::Body::empty())).await.unwrap();
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    let body = axum::body::to_bytes(res.into_body(), 100).await.unwrap();
    assert_eq!(&body[..], b"hello");
    drop(body);
    let report = layer.drain(Duration::from_secs(5)).await;
    println!("{report} {:#?}", layer.get_executor().snapshot());
    assert_eq!(ran.load(Ordering::SeqCst), 111);
    assert_eq!(report.completed, 3);
    assert_eq!(report.skipped, 1);
}

#[tokio::test(start_paused = true)]
async fn retries() {
    let layer = DeferLayer::new();
    let n = Arc::new(AtomicUsize::new(0));
    let ex = layer.get_executor();
    ex.submit(Task::with(n.clone(), |n| async move {
        if n.fetch_add(1, Ordering::SeqCst) < 2 { return Err("flaky"); }
        Ok(())
    }));
    ex.idle().await;
    assert_eq!(n.load(Ordering::SeqCst), 3);
    ex.submit(|| async { if true { panic!("boo") } });
    ex.submit(|| async { std::future::pending::<()>().await });
    ex.idle().await;
    println!("{:#?}", ex.dead_letters().list());
    println!("{:#?}", ex.snapshot());
}
