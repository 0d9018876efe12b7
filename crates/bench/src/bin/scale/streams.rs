//! Open streams that each hold a task.

use std::convert::Infallible;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use tokio::sync::oneshot;
use tower_defer::{Defer, DeferLayer, Executor};
use tower_defer_measure::median;
use tower_layer::Layer as _;
use tower_service::Service;

use crate::plot::{self, pairs};
use crate::retries::cpu;
use crate::{decades, fresh, heap};

/// A stream that waits for its next item.
struct Idle {
    /// What people write: goes with the stream, and with it the task's wait ends.
    _ended: Option<oneshot::Sender<()>>,
}

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
struct Handler {
    by_hand: bool,
}

impl Service<Request<()>> for Handler {
    type Response = Response<Idle>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let ended = self.by_hand.then(|| {
            let (ended, end) = oneshot::channel::<()>();
            tokio::spawn(async move {
                let _ = end.await;
            });
            ended
        });
        if !self.by_hand {
            let defer = Defer::from_extensions(request.extensions()).expect("the layer");
            defer.run(|| async {});
        }
        std::future::ready(Ok(Response::new(Idle { _ended: ended })))
    }
}

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!(
        "\n## Open streams that each hold a task (`max_hold` of 400 ms: ten looks at all of them a second; beside them, a spawned task that waits until its stream is dropped)\n"
    );
    println!(
        "| streams | ns to open one | bytes each | CPU ms a second for the looks | ns to end one and run its task | spawned: ns to open one | bytes each | CPU ms a second | ns to end one and its task | ratio, to open | to end | bytes |"
    );
    println!("|{}", " ---: |".repeat(12));
    let mut lines = vec![Vec::new(); 4];
    for streams in decades(most) {
        let rounds: Vec<_> = (0..3)
            .map(|_| {
                let ours = fresh(|| ours(streams));
                (ours, fresh(|| by_hand(streams)))
            })
            .collect();
        let of = |figure: &dyn Fn(&(Held, Held)) -> f64| median(rounds.iter().map(figure));
        let [open, end] = [of(&|r| r.0.open), of(&|r| r.0.end)];
        let [spawned_open, spawned_end] = [of(&|r| r.1.open), of(&|r| r.1.end)];
        println!(
            "| {streams} | {open:.0} | {:.0} | {:.1} | {end:.0} | {spawned_open:.0} | {:.0} | {:.1} | {spawned_end:.0} | {:.2} | {:.2} | {:.2} |",
            of(&|r| r.0.bytes),
            of(&|r| r.0.looks),
            of(&|r| r.1.bytes),
            of(&|r| r.1.looks),
            of(&|r| r.0.open / r.1.open),
            of(&|r| r.0.end / r.1.end),
            of(&|r| r.0.bytes / r.1.bytes),
        );
        for (line, value) in lines.iter_mut().zip([open, spawned_open, end, spawned_end]) {
            line.push((streams as f64, value));
        }
    }
    plot::write(
        docs,
        "scale-streams.svg",
        "Open streams that each hold a task",
        "open streams",
        "ns each",
        &pairs(
            &[
                (
                    "tower-defer: to open one",
                    "a spawned task that waits for its stream's end: to open one",
                ),
                (
                    "tower-defer: to end one and run its task",
                    "a spawned task that waits for its stream's end: to end both",
                ),
            ],
            lines,
        ),
    );
}

/// Of one stream, in nanoseconds and bytes; the looks in milliseconds a second, of all.
struct Held {
    open: f64,
    bytes: f64,
    looks: f64,
    end: f64,
}

async fn ours(streams: usize) -> Held {
    let executor = Executor::builder().capacity(streams).build();
    let layer = DeferLayer::new()
        .executor(executor.clone())
        .max_hold(Duration::from_millis(400));
    let service = layer.layer(Handler { by_hand: false });
    let held = || {
        let collected = executor.snapshot().collected;
        assert_eq!(collected, streams as u64, "an idle stream is not stalled");
    };
    hold(service, streams, held, executor.idle()).await
}

async fn by_hand(streams: usize) -> Held {
    let metrics = tokio::runtime::Handle::current().metrics();
    let held = || assert_eq!(metrics.num_alive_tasks(), streams);
    let ended = async {
        while metrics.num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    };
    hold(Handler { by_hand: true }, streams, held, ended).await
}

async fn hold<S, B>(
    mut service: S,
    streams: usize,
    all_held: impl Fn(),
    ended: impl Future<Output = ()>,
) -> Held
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: Body + Unpin,
{
    let each = |start: Instant| start.elapsed().as_nanos() as f64 / streams as f64;
    let mut held = Vec::with_capacity(streams);
    let before = heap::alive();
    let start = Instant::now();
    for _ in 0..streams {
        let response = service.call(Request::new(())).await.expect("infallible");
        let mut body = response.into_body();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Pin::new(&mut body).poll_frame(&mut cx).is_pending());
        held.push(body);
    }
    let open = each(start);
    let bytes = (heap::alive() - before) as f64 / streams as f64;
    // What was spawned is polled for the first time.
    tokio::task::yield_now().await;
    let cpu_before = cpu();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let looks = (cpu() - cpu_before).as_nanos() as f64 / 2e6;
    all_held();
    let start = Instant::now();
    drop(held);
    ended.await;
    Held {
        open,
        bytes,
        looks,
        end: each(start),
    }
}
