//! Tasks per request.

use std::convert::Infallible;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use tower_defer::{Defer, DeferLayer, Executor};
use tower_layer::Layer as _;
use tower_service::Service;

use crate::plot::{self, Line};
use crate::{median, time};

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
    println!("| tasks | ns per request, tower-defer | naked tokio::spawn | ratio |");
    println!("| ---: | ---: | ---: | ---: |");
    // One each: the parked workers of ours are tasks of their runtime, too.
    let (runtime, spawns) = (crate::runtime(), crate::runtime());
    let (mut ours_line, mut spawn_line) = (Vec::new(), Vec::new());
    for tasks in [1, 2, 4, 8, 16, 64, 256, 1024] {
        let executor = Executor::builder().capacity(2 * REQUESTS * tasks).build();
        let layer = DeferLayer::new().executor(executor.clone());
        let mut ours = layer.layer(Handler {
            tasks,
            spawn: false,
        });
        let mut spawn = Handler { tasks, spawn: true };
        let (mut ours_ns, mut spawn_ns) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours_ns.push(time(|| {
                runtime.block_on(async {
                    requests(&mut ours).await;
                    executor.idle().await;
                });
            }));
            spawn_ns.push(time(|| {
                spawns.block_on(async {
                    requests(&mut spawn).await;
                    while spawns.metrics().num_alive_tasks() > 0 {
                        tokio::task::yield_now().await;
                    }
                });
            }));
        }
        let per_request = |ns: Vec<f64>| median(ns) / REQUESTS as f64;
        let (a, b) = (per_request(ours_ns), per_request(spawn_ns));
        println!("| {tasks} | {a:.0} | {b:.0} | {:.2} |", a / b);
        ours_line.push((tasks as f64, a));
        spawn_line.push((tasks as f64, b));
        drop(layer);
        runtime.block_on(executor.drain(Duration::from_secs(1)));
    }
    plot::write(
        docs,
        "scale-tasks-per-request.svg",
        "A request with its tasks, all run",
        "tasks per request",
        "ns per request",
        &[
            Line {
                name: "tower-defer",
                points: ours_line,
            },
            Line {
                name: "naked tokio::spawn in the handler",
                points: spawn_line,
            },
        ],
    );
}
