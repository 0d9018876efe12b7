//! Tasks per request.

use std::convert::Infallible;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use tower_defer::{Defer, DeferLayer, Executor};
use tower_defer_measure::median;
use tower_layer::Layer as _;
use tower_service::Service;

use crate::plot::{self, pairs};

const ROUNDS: usize = 9;
const REQUESTS: usize = 64;

#[derive(Clone)]
struct Handler {
    tasks: usize,
    spawn: bool,
}

impl Service<Request<()>> for Handler {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        if self.spawn {
            for n in 0..self.tasks {
                tokio::spawn(async move {
                    let _ = black_box(n);
                });
            }
        } else {
            let defer = Defer::from_extensions(request.extensions()).expect("the layer");
            for n in 0..self.tasks {
                defer.run(move || async move {
                    let _ = black_box(n);
                });
            }
        }
        std::future::ready(Ok(Response::new(Full::from("hello"))))
    }
}

async fn requests<S, B>(service: &mut S)
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    for _ in 0..REQUESTS {
        let response = service.call(Request::new(())).await.expect("infallible");
        black_box(response.into_body().collect().await.expect("a body"));
    }
}

pub(crate) fn run(docs: Option<&Path>) {
    println!("\n## Tasks per request ({REQUESTS} requests, bodies read, then all tasks run)\n");
    println!(
        "| tasks | ns until the response is out, tower-defer | `tokio::spawn` in the handler | ns until all tasks have run, a request, tower-defer | `tokio::spawn` in the handler | ratio, until the response is out | until all tasks have run |"
    );
    println!("|{}", " ---: |".repeat(7));
    // One each: the parked workers of ours are tasks of their runtime, too.
    let (runtime, spawns) = (crate::runtime(), crate::runtime());
    let mut lines = vec![Vec::new(); 4];
    for tasks in [1, 2, 4, 8, 16, 64, 256, 1024] {
        let executor = Executor::builder().capacity(2 * REQUESTS * tasks).build();
        let layer = DeferLayer::new().executor(executor.clone());
        let mut ours = layer.layer(Handler {
            tasks,
            spawn: false,
        });
        let mut spawn = Handler { tasks, spawn: true };
        let mut rounds = [const { Vec::new() }; 4];
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let out = runtime.block_on(async {
                requests(&mut ours).await;
                let out = start.elapsed();
                executor.idle().await;
                out
            });
            let all = start.elapsed();
            let start = Instant::now();
            let spawn_out = spawns.block_on(async {
                requests(&mut spawn).await;
                let out = start.elapsed();
                while spawns.metrics().num_alive_tasks() > 0 {
                    tokio::task::yield_now().await;
                }
                out
            });
            let times = [out, spawn_out, all, start.elapsed()];
            for (round, time) in rounds.iter_mut().zip(times) {
                round.push(time.as_nanos() as f64 / REQUESTS as f64);
            }
        }
        let ratio = |ours: usize, reference: usize| {
            let each = rounds[ours].iter().zip(&rounds[reference]);
            median(each.map(|(ours, reference)| ours / reference))
        };
        let ratios = [ratio(0, 1), ratio(2, 3)];
        let [out, spawn_out, all, spawn_all] = rounds.map(median);
        println!(
            "| {tasks} | {out:.0} | {spawn_out:.0} | {all:.0} | {spawn_all:.0} | {:.2} | {:.2} |",
            ratios[0], ratios[1]
        );
        for (line, value) in lines.iter_mut().zip([out, spawn_out, all, spawn_all]) {
            line.push((tasks as f64, value));
        }
        drop(layer);
        runtime.block_on(executor.drain(Duration::from_secs(1)));
    }
    plot::write(
        docs,
        "scale-tasks-per-request.svg",
        "A request with its tasks",
        "tasks per request",
        "ns per request",
        &pairs(
            &[
                (
                    "tower-defer: until the response is out",
                    "tokio::spawn in the handler: until the response is out",
                ),
                (
                    "tower-defer: until all tasks have run",
                    "tokio::spawn in the handler: until all tasks have run",
                ),
            ],
            lines,
        ),
    );
}
