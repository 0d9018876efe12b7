//! The length of the queue.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tower_defer::{Executor, Task};
use tower_defer_measure::median;

use crate::plot::{self, pairs};
use crate::{decades, fresh, heap, rounds, time};

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!("\n## The length of the queue (one task blocks the only worker, the rest waits)\n");
    println!(
        "| queued | ns to submit one | ns to run one | ms until the last has run | bytes each, of ours | `tokio::spawn`: ns to spawn one | ns to run one | ms until the last has run | bytes each, of tokio's | ratio, to submit | to run |"
    );
    println!("|{}", " ---: |".repeat(11));
    let mut lines = vec![Vec::new(); 4];
    // The same on both sides.
    let future = size_of_val(&work(0)) as f64;
    for length in decades(most) {
        let rounds: Vec<_> = (0..rounds(length))
            .map(|_| {
                let ours = fresh(|| ours(length));
                (ours, fresh(|| spawned(length)))
            })
            .collect();
        let of = |figure: &dyn Fn(&(Queued, Queued)) -> f64| median(rounds.iter().map(figure));
        let [submit, run] = [of(&|r| r.0.submit), of(&|r| r.0.run)];
        let [spawn, spawned] = [of(&|r| r.1.submit), of(&|r| r.1.run)];
        let all = |each: f64| each * length as f64 / 1e6;
        println!(
            "| {length} | {submit:.0} | {run:.0} | {:.2} | {:.0} | {spawn:.0} | {spawned:.0} | {:.2} | {:.0} | {:.2} | {:.2} |",
            all(run),
            of(&|r| r.0.bytes) - future,
            all(spawned),
            of(&|r| r.1.bytes) - future,
            of(&|r| r.0.submit / r.1.submit),
            of(&|r| r.0.run / r.1.run),
        );
        for (line, value) in lines.iter_mut().zip([submit, spawn, run, spawned]) {
            line.push((length as f64, value));
        }
    }
    println!(
        "\nBytes are those beside the task's future, which takes {future} more on both sides."
    );
    plot::write(
        docs,
        "scale-queue.svg",
        "A task in a queue of this length",
        "queued tasks",
        "ns per task",
        &pairs(
            &[
                ("tower-defer: to submit", "tokio::spawn: to spawn"),
                ("tower-defer: to run", "tokio::spawn: to run"),
            ],
            lines,
        ),
    );
}

/// It holds a number and its own state.
async fn work(n: usize) {
    let _ = black_box(n);
}

/// Of one task, in nanoseconds, and what it takes up while it waits.
struct Queued {
    submit: f64,
    run: f64,
    bytes: f64,
}

async fn ours(length: usize) -> Queued {
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
            executor.submit(Task::once(work(n)));
        }
    });
    let bytes = heap::alive() - before;
    gate.add_permits(1);
    let start = std::time::Instant::now();
    executor.idle().await;
    Queued::new(length, submit, start, bytes)
}

async fn spawned(length: usize) -> Queued {
    let before = heap::alive();
    let mut last = None;
    let spawn = time(|| {
        for n in 0..length {
            last = Some(tokio::spawn(work(n)));
        }
    });
    let bytes = heap::alive() - before;
    let start = std::time::Instant::now();
    if let Some(last) = last {
        last.await.expect("it ends");
    }
    Queued::new(length, spawn, start, bytes)
}

impl Queued {
    fn new(length: usize, submit: f64, start: std::time::Instant, bytes: isize) -> Self {
        let run = start.elapsed().as_nanos() as f64;
        let each = length as f64;
        Self {
            submit: submit / each,
            run: run / each,
            bytes: bytes as f64 / each,
        }
    }
}
