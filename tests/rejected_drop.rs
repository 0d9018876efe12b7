//! What a rejected task captured is the user's, and its drop may panic: not in the handler's face.

use tower_defer::{Executor, Task};

struct PanicsInDrop;

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("in a drop");
        }
    }
}

fn panicking_task() -> Task {
    let captured = PanicsInDrop;
    Task::new(move || {
        let _ = &captured;
        async {}
    })
}

#[tokio::test]
async fn a_panic_in_the_drop_of_a_task_that_submit_rejects_stays_inside() {
    let executor = Executor::builder().capacity(1).build();
    let _permit = executor.reserve().await.expect("there is room");
    assert!(!executor.submit(panicking_task()).is_accepted());
    assert_eq!(executor.snapshot().rejected_full, 1);
}

#[tokio::test]
async fn a_panic_in_the_drop_of_a_task_that_run_rejects_stays_inside() {
    use tower::{Layer, ServiceExt};
    use tower_defer::{Defer, DeferLayer};

    let layer = DeferLayer::new().max_tasks_per_request(1);
    let service = layer.layer(tower::service_fn(
        |request: http::Request<http_body_util::Empty<bytes::Bytes>>| async move {
            let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
            assert!(defer.run(|| async {}).is_accepted());
            assert!(!defer.run(panicking_task()).is_accepted());
            Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Empty::<
                bytes::Bytes,
            >::new()))
        },
    ));
    let request = http::Request::new(http_body_util::Empty::new());
    service.oneshot(request).await.expect("infallible");
    assert_eq!(layer.get_executor().snapshot().rejected_request_limit, 1);
}
