//! Open streams that each hold a task.

use std::convert::Infallible;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use tower_defer::{Defer, DeferLayer, Executor};
use tower_layer::Layer as _;
use tower_service::Service;

use crate::plot::{self, Line};
use crate::retries::cpu;
use crate::{decades, heap, runtime};

/// A stream that waits for its next item.
struct Idle;

impl Body for Idle {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

#[derive(Clone)]
struct Handler;

impl Service<Request<()>> for Handler {
    type Response = Response<Idle>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer");
        defer.run(|| async {});
        std::future::ready(Ok(Response::new(Idle)))
    }
}

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!(
        "\n## Open streams that each hold a task (`max_hold` of 400 ms: ten looks at all of them a second)\n"
    );
    println!(
        "| streams | ns to open one | bytes each | CPU ms a second for the looks | ns to end one and run its task |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: |");
    let (mut bytes_line, mut end_line) = (Vec::new(), Vec::new());
    for streams in decades(most) {
        let (open, bytes, looks, end) = runtime().block_on(hold(streams));
        println!("| {streams} | {open:.0} | {bytes:.0} | {looks:.1} | {end:.0} |");
        bytes_line.push((streams as f64, bytes));
        end_line.push((streams as f64, end));
    }
    plot::write(
        docs,
        "scale-streams.svg",
        "Open streams that each hold a task",
        "open streams",
        "each",
        &[
            Line {
                name: "bytes while it is open",
                points: bytes_line,
            },
            Line {
                name: "ns to end it and run its task",
                points: end_line,
            },
        ],
    );
}

async fn hold(streams: usize) -> (f64, f64, f64, f64) {
    let executor = Executor::builder().capacity(streams).build();
    let layer = DeferLayer::new()
        .executor(executor.clone())
        .max_hold(Duration::from_millis(400));
    let mut service = layer.layer(Handler);
    let each = |start: std::time::Instant| start.elapsed().as_nanos() as f64 / streams as f64;
    let mut held = Vec::with_capacity(streams);
    let before = heap::alive();
    let start = std::time::Instant::now();
    for _ in 0..streams {
        let mut body = service
            .call(Request::new(()))
            .await
            .expect("infallible")
            .into_body();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Pin::new(&mut body).poll_frame(&mut cx).is_pending());
        held.push(body);
    }
    let open = each(start);
    let bytes = (heap::alive() - before) as f64 / streams as f64;
    let cpu_before = cpu();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let looks = (cpu() - cpu_before).as_nanos() as f64 / 2e6;
    assert_eq!(
        executor.snapshot().collected,
        streams as u64,
        "an idle stream is not stalled"
    );
    let start = std::time::Instant::now();
    drop(held);
    executor.idle().await;
    (open, bytes, looks, each(start))
}
