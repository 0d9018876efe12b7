//! A thread keeps collectors and records of responses for its next requests: none sees what another left.
#![expect(
    clippy::disallowed_methods,
    reason = "the tests spawn what competes with the tasks"
)]

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Body;
use http_body_util::Full;
use tokio::sync::{Notify, oneshot};
use tower::{Layer, Service, service_fn};
use tower_defer::{Defer, DeferLayer, End, Executor, Task, TaskContext, When};

const LONG: Duration = Duration::from_secs(20);

fn defer_of<B>(request: &Request<B>) -> Defer {
    Defer::from_extensions(request.extensions()).expect("there is a layer")
}

/// How a request goes, and whether others of its thread go before its tasks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Http1,
    /// More than a socket takes at once.
    Http1Large,
    /// Nobody knows yet who answers, and what.
    Http1Dropped,
    Http2,
    Http2Dropped,
}

impl Kind {
    const ALL: [Kind; 5] = [
        Kind::Http1,
        Kind::Http1Large,
        Kind::Http1Dropped,
        Kind::Http2,
        Kind::Http2Dropped,
    ];

    fn bytes(self) -> usize {
        match self {
            Kind::Http1Large => (16 << 10) + 1,
            _ => 16 << 10,
        }
    }

    fn is_dropped(self) -> bool {
        matches!(self, Kind::Http1Dropped | Kind::Http2Dropped)
    }

    fn request(self) -> Request<()> {
        let mut request = Request::new(());
        *request.version_mut() = match self {
            Kind::Http2 | Kind::Http2Dropped => Version::HTTP_2,
            _ => Version::HTTP_11,
        };
        request
    }
}

/// Who came first: a task that another one of the thread competes with, spawned right after its release.
async fn first(kind: Kind) -> &'static str {
    let order = Arc::new(Mutex::new(Vec::new()));
    let noted = order.clone();
    let layer = DeferLayer::new();
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let noted = noted.clone();
        let task = Task::new(move || {
            noted.lock().expect("not poisoned").push("task");
            async {}
        });
        defer_of(&request).run(task.when(When::always()));
        async move {
            if kind.is_dropped() {
                std::future::pending::<()>().await;
            }
            let body = Full::new(Bytes::from(vec![7; kind.bytes()]));
            Ok::<_, Infallible>(Response::new(body))
        }
    }));
    let mut cx = Context::from_waker(Waker::noop());
    let future = service.call(kind.request());
    if kind.is_dropped() {
        let mut future = Box::pin(future);
        assert!(future.as_mut().poll(&mut cx).is_pending());
    } else {
        let Ok(response) = future.await;
        let mut body = pin!(response.into_body());
        while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
            drop(frame);
        }
        // With that the last chunk is gone, and then the body.
    }
    let noted = order.clone();
    let other = tokio::spawn(async move { noted.lock().expect("not poisoned").push("other") });
    other.await.expect("no panic");
    layer.get_executor().idle().await;
    let order = order.lock().expect("not poisoned");
    assert_eq!(order.len(), 2);
    order[0]
}

/// In every order of two kinds, so that each finds the collector of each.
#[tokio::test]
async fn who_goes_first_is_a_matter_of_the_request_and_not_of_the_one_before_it() {
    for before in Kind::ALL {
        for kind in Kind::ALL {
            let _ = first(before).await;
            let expected = if kind == Kind::Http1 { "task" } else { "other" };
            assert_eq!(first(kind).await, expected, "{kind:?} after {before:?}");
        }
    }
}

/// The drain of an inner layer's executor waits for the request, also where its collector is an old one.
#[tokio::test]
async fn an_inner_layer_is_told_of_a_request_whose_collector_was_used_before() {
    let inner = Executor::new();
    let go_on = Arc::new(Notify::new());
    let waits = go_on.clone();
    let handler = service_fn(move |request: Request<()>| {
        let waits = waits.clone();
        async move {
            if request.uri().path() == "/waits" {
                waits.notified().await;
            }
            defer_of(&request).run(|| async {});
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }
    });
    let layer = DeferLayer::new();
    let nested = DeferLayer::new().executor(inner.clone()).layer(handler);
    let mut service = layer.layer(nested);
    for _ in 0..3 {
        drop(service.call(Request::new(())).await);
    }
    inner.idle().await;
    assert_eq!(inner.snapshot().completed, 3);
    let request = Request::builder().uri("/waits").body(()).expect("valid");
    let mut future = pin!(service.call(request));
    let mut drained = pin!(inner.drain(LONG));
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        assert!(
            drained.as_mut().poll(cx).is_pending(),
            "a handler is at work"
        );
        Poll::Ready(())
    })
    .await;
    go_on.notify_one();
    let ((), report) = tokio::join!(async { drop(future.await) }, drained);
    assert_eq!((report.completed, report.unfinished.len()), (1, 0));
}

/// Its drop defers once more, through the handle of its own request and to a service that it calls: both
/// while a worker empties the task in which it lay.
struct DefersInDrop {
    defer: Defer,
    told: Option<oneshot::Sender<(Option<u16>, Option<u16>)>>,
}

impl Drop for DefersInDrop {
    fn drop(&mut self) {
        let told = self.told.take();
        let own = Task::with_context(move |context: TaskContext| {
            context
                .response()
                .and_then(|info| info.status)
                .map(|status| status.as_u16());
            async {}
        });
        self.defer.run(own);
        let mut other = None;
        let layer = DeferLayer::new();
        let mut service = layer.layer(service_fn(|request: Request<()>| {
            other = Some(defer_of(&request));
            std::future::ready(Ok::<_, Infallible>(
                Response::builder()
                    .status(204)
                    .body(Full::<Bytes>::default())
                    .expect("valid"),
            ))
        }));
        let mut future = pin!(service.call(Request::new(())));
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else {
            panic!("nothing here waits");
        };
        drop(response);
        let status = |defer: &Defer| Some(defer.response()?.status?.as_u16());
        let seen = (status(&self.defer), other.as_ref().and_then(status));
        if let Some(told) = told {
            let _ = told.send(seen);
        }
    }
}

#[tokio::test]
async fn a_drop_that_defers_and_calls_a_service_sees_each_request_as_it_is() {
    let layer = DeferLayer::new();
    let (tell, told) = oneshot::channel();
    let tell = Mutex::new(Some(tell));
    let mut service = layer.layer(service_fn(|request: Request<()>| {
        let captured = DefersInDrop {
            defer: defer_of(&request),
            told: tell.lock().expect("not poisoned").take(),
        };
        let captured = Mutex::new(Some(captured));
        defer_of(&request).run(move || {
            let captured = captured.lock().expect("not poisoned").take();
            async move { drop(captured) }
        });
        let response = Response::builder().status(201);
        std::future::ready(Ok::<_, Infallible>(
            response.body(Full::<Bytes>::default()).expect("valid"),
        ))
    }));
    drop(service.call(Request::new(())).await);
    assert_eq!(told.await.expect("it was dropped"), (Some(201), Some(204)));
    layer.get_executor().idle().await;
    assert_eq!(layer.get_executor().snapshot().completed, 2);
}

/// Released by force, a response can be asked for while its body lives, and the body gives the collector back.
#[tokio::test(start_paused = true)]
async fn what_became_of_a_stalled_response_is_not_said_of_the_next_one() {
    let layer = DeferLayer::new().max_hold(LONG);
    let kept = Arc::new(Mutex::new(None));
    let keeps = kept.clone();
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let defer = defer_of(&request);
        let before = defer.response().cloned();
        defer.run(|| async {});
        *keeps.lock().expect("not poisoned") = Some(defer);
        let body = Full::new(Bytes::from_static(b"hello"));
        async move {
            Ok::<_, Infallible>(
                Response::builder()
                    .extension(before.is_none())
                    .body(body)
                    .expect("valid"),
            )
        }
    }));
    for number in 0..3 {
        let Ok(response) = service.call(Request::new(())).await;
        assert_eq!(response.extensions().get(), Some(&true), "request {number}");
        tokio::time::sleep(2 * LONG).await; // paused time
        let defer = kept.lock().expect("not poisoned").take().expect("kept");
        let end = defer.response().map(|info| info.end);
        assert_eq!(end, Some(End::Stalled), "request {number}");
        drop(defer);
        drop(response);
    }
}

/// The sweep lives while there is a response to watch, and is there again for the next one.
#[tokio::test(start_paused = true)]
async fn the_sweep_ends_when_there_is_nothing_to_watch() {
    let layer = DeferLayer::new().max_hold(LONG);
    let mut service = layer.layer(service_fn(|request: Request<()>| {
        defer_of(&request).run(|| async {});
        let body = Full::new(Bytes::from_static(b"hello"));
        std::future::ready(Ok::<_, Infallible>(Response::new(body)))
    }));
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    for _ in 0..2 {
        let Ok(response) = service.call(Request::new(())).await;
        assert!(alive() >= 1);
        drop(response);
        layer.get_executor().idle().await;
        tokio::time::sleep(2 * LONG).await; // paused time
        // The worker, which stays for a while.
        assert!(alive() <= 1);
    }
}

/// What a thread keeps holds no executor: without a runtime a task waits for ever, and is dropped with the last
/// handle.
#[test]
fn a_kept_collector_keeps_no_executor() {
    for handles_are_used in [false, true] {
        let layer = DeferLayer::new();
        let held = Arc::new(());
        let task = held.clone();
        layer.get_executor().submit(move || {
            let _held = &task;
            async {}
        });
        let mut service = layer.layer(service_fn(move |request: Request<()>| {
            if handles_are_used {
                defer_of(&request).run(|| async {});
            }
            let body = Full::<Bytes>::default();
            std::future::ready(Ok::<_, Infallible>(Response::new(body)))
        }));
        let mut cx = Context::from_waker(Waker::noop());
        let mut future = Box::pin(service.call(Request::new(())));
        assert!(future.as_mut().poll(&mut cx).is_ready());
        drop((future, service, layer));
        assert_eq!(Arc::strong_count(&held), 1, "used: {handles_are_used}");
    }
}

/// A thread keeps a bounded number of what it may use again.
#[test]
fn a_burst_leaves_a_bounded_number_of_collectors_on_its_thread() {
    const REQUESTS: usize = 1_000;
    let layer = DeferLayer::new();
    let left = std::thread::spawn(move || {
        let mut service = layer.layer(service_fn(|_: Request<()>| {
            std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>()
        }));
        let mut futures = Vec::with_capacity(REQUESTS);
        let burst = allocation_counter::measure(|| {
            for _ in 0..REQUESTS {
                futures.push(service.call(Request::new(())));
            }
            futures.clear();
        });
        burst.bytes_current
    });
    let left = left.join().expect("no panic");
    assert!((0..=32 * 1024).contains(&left), "{left} bytes");
}
