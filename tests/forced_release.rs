//! A release by force ends the request for an inner layer's executor, also where no task is left.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};
use tower_defer::{Defer, DeferLayer};

#[tokio::test(start_paused = true)]
async fn a_request_without_tasks_does_not_stay_open_with_the_inner_executor() {
    let outer = DeferLayer::new().max_hold(Duration::from_secs(1));
    let inner = DeferLayer::new();
    let handler = service_fn(|request: http::Request<Full<Bytes>>| async move {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        assert!(defer.run(|| async {}).cancel());
        Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from_static(b"hello"))))
    });
    let service = outer.layer(inner.layer(handler));
    let request = http::Request::new(Full::default());
    let response = service.oneshot(request).await.expect("infallible");
    // Nobody takes the body: a stall.
    tokio::time::sleep(Duration::from_secs(3)).await; // paused time
    drop(response);
    for layer in [outer, inner] {
        assert_eq!(layer.get_executor().snapshot().open_requests, 0);
        assert!(!layer.drain(Duration::from_secs(1)).await.timed_out);
    }
}
