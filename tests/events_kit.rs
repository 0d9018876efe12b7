//! Events under the test kit.
#![cfg(all(feature = "sqlite", feature = "hyper", feature = "test-util"))]

mod support;

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt};
use tower_defer::event::store::Memory;
use tower_defer::test_util::TestDefer;
use tower_defer::{Defer, DeferLayer};

use support::events::{Book, Paid, Tap, events};
use support::soon;

async fn call(layer: &DeferLayer) -> u16 {
    let service = layer.layer(tower::service_fn(|request: Request<()>| async move {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        defer.emit(Paid { id: 1 });
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"done"))))
    }));
    let response = service.oneshot(Request::new(())).await.expect("infallible");
    let status = response.status().as_u16();
    response.into_body().collect().await.expect("a body");
    status
}

#[tokio::test]
async fn captured_deliveries_run_when_they_are_told_to() {
    let book = Book::new();
    let defer = TestDefer::capture();
    let events = events(&book, &["mail", "books"]).store(Memory::new());
    let layer = defer.layer().events(events.clone());
    assert_eq!(call(&layer).await, 200);
    defer.assert_deferred("mail");
    defer.assert_deferred("books");
    assert_eq!(book.runs().len(), 0);
    assert_eq!(events.counts().await.expect("counts").running, 2);
    drop(soon("run", defer.run_captured()).await);
    assert_eq!((book.count("mail"), book.count("books")), (1, 1));
    soon("idle", defer.executor().idle()).await;
    assert_eq!(events.counts().await.expect("counts").finished, 2);
}

#[tokio::test]
async fn captured_deliveries_that_never_ran_go_back_to_their_store() {
    let book = Book::new();
    let tap = Tap::new(Memory::new());
    let defer = TestDefer::capture();
    let executor = defer.executor().clone();
    let events = events(&book, &["mail", "books"]).store(tap.clone());
    let layer = defer.layer().events(events.clone());
    assert_eq!(call(&layer).await, 200);
    drop(defer);
    soon("they are handed back", async {
        while tap.settled().len() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let reserved = executor.snapshot().reserved;
    assert!(reserved <= 2, "each place was given back once: {reserved}");
    let counts = events.counts().await.expect("counts");
    assert_eq!((counts.finished, counts.discarded), (0, 0), "{counts:?}");
}
