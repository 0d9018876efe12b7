//! The length of the queue.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tower_defer::{Executor, Task};

use crate::plot::{self, Line};
use crate::{decades, heap, runtime, time};

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!("\n## The length of the queue (one task blocks the only worker, the rest waits)\n");
    println!(
        "| queued | ns to submit one | ns to run one | bytes each, captures (8) included | tokio::spawn: ns to spawn one | ns to run one | bytes each |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let runtime = runtime();
    let (mut submit_line, mut run_line) = (Vec::new(), Vec::new());
    for length in decades(most) {
        let ours = runtime.block_on(ours(length));
        let spawned = runtime.block_on(spawned(length));
        println!(
            "| {length} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} |",
            ours.0, ours.1, ours.2, spawned.0, spawned.1, spawned.2
        );
        submit_line.push((length as f64, ours.0));
        run_line.push((length as f64, ours.1));
    }
    plot::write(
        docs,
        "scale-queue.svg",
        "A task in a queue of this length",
        "queued tasks",
        "ns per task",
        &[
            Line {
                name: "to submit",
                points: submit_line,
            },
            Line {
                name: "to run",
                points: run_line,
            },
        ],
    );
}

/// Nanoseconds to submit and to run a task, and what it takes up while it waits.
async fn ours(length: usize) -> (f64, f64, f64) {
    let executor = Executor::builder()
        .concurrency(1)
        .capacity(length + 1)
        .build();
    let gate = Arc::new(Semaphore::new(0));
    let opened = gate.clone();
    executor.submit(Task::once(
        async move { drop(opened.acquire_owned().await) },
    ));
    while executor.snapshot().running.is_empty() {
        tokio::task::yield_now().await;
    }
    let before = heap::alive();
    let submit = time(|| {
        for n in 0..length {
            executor.submit(Task::once(async move {
                let _ = black_box(n);
            }));
        }
    });
    let bytes = heap::alive() - before;
    gate.add_permits(1);
    let start = std::time::Instant::now();
    executor.idle().await;
    let run = start.elapsed().as_nanos() as f64;
    let each = length as f64;
    (submit / each, run / each, bytes as f64 / each)
}

async fn spawned(length: usize) -> (f64, f64, f64) {
    let before = heap::alive();
    let mut last = None;
    let spawn = time(|| {
        for n in 0..length {
            last = Some(tokio::spawn(async move {
                let _ = black_box(n);
            }));
        }
    });
    let bytes = heap::alive() - before;
    let start = std::time::Instant::now();
    if let Some(last) = last {
        last.await.expect("it ends");
    }
    let run = start.elapsed().as_nanos() as f64;
    let each = length as f64;
    (spawn / each, run / each, bytes as f64 / each)
}
