//! Waiting retries, beside as many tasks that sleep.

use std::path::Path;
use std::time::Duration;

use tower_defer::{Executor, Retry, RetryBudget, TaskError};

use crate::plot::{self, Line};
use crate::{decades, heap, runtime};

pub(crate) fn run(docs: &Path, most: usize) {
    println!("\n## Waiting retries (each task fails once and is to be tried again in an hour)\n");
    println!(
        "| waiting | ns to run, fail and arm one | bytes each | CPU ms of a second's waiting | a sleeping task each: ns to start one | bytes each | CPU ms of a second's waiting | ratio of ns |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let (mut ours_line, mut sleep_line) = (Vec::new(), Vec::new());
    for waiting in decades(most) {
        let ours = runtime().block_on(ours(waiting));
        let sleep = runtime().block_on(sleeping(waiting));
        println!(
            "| {waiting} | {:.0} | {:.0} | {:.1} | {:.0} | {:.0} | {:.1} | {:.2} |",
            ours.0,
            ours.1,
            ours.2,
            sleep.0,
            sleep.1,
            sleep.2,
            ours.0 / sleep.0
        );
        ours_line.push((waiting as f64, ours.0));
        sleep_line.push((waiting as f64, sleep.0));
    }
    plot::write(
        &docs.join("scale-retries.svg"),
        "Waiting retries",
        "waiting",
        "ns each",
        &[
            Line {
                name: "tower-defer: run, fail, wait",
                points: ours_line,
            },
            Line {
                name: "a tokio task that sleeps",
                points: sleep_line,
            },
        ],
    );
}

/// Nanoseconds to arm one, bytes each, milliseconds of CPU in a second of waiting.
async fn ours(waiting: usize) -> (f64, f64, f64) {
    let executor = Executor::builder()
        .capacity(waiting)
        .retry(Retry::exponential(2).give_up_after(Duration::from_secs(7200)))
        .retry_budget(RetryBudget::new(1_000_000, 1_000_000))
        .build();
    let before = heap::alive();
    let start = std::time::Instant::now();
    for _ in 0..waiting {
        executor.submit(|| async { Err::<(), _>(TaskError::retry_after(HOUR, "down")) });
    }
    while executor.snapshot().waiting < waiting as u64 {
        tokio::task::yield_now().await;
    }
    let arm = start.elapsed().as_nanos() as f64 / waiting as f64;
    let bytes = (heap::alive() - before) as f64 / waiting as f64;
    (arm, bytes, a_second_of_waiting().await)
}

const HOUR: Duration = Duration::from_secs(3600);

async fn sleeping(waiting: usize) -> (f64, f64, f64) {
    let before = heap::alive();
    let start = std::time::Instant::now();
    for _ in 0..waiting {
        tokio::spawn(tokio::time::sleep(HOUR));
    }
    // Each has been polled once when the last one has: the queue is in order.
    tokio::spawn(async {}).await.expect("it ends");
    let arm = start.elapsed().as_nanos() as f64 / waiting as f64;
    let bytes = (heap::alive() - before) as f64 / waiting as f64;
    (arm, bytes, a_second_of_waiting().await)
}

async fn a_second_of_waiting() -> f64 {
    let before = cpu();
    tokio::time::sleep(Duration::from_secs(1)).await;
    (cpu() - before).as_nanos() as f64 / 1e6
}

/// User and system time of this process.
pub(crate) fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let main: u64 = text
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    Duration::from_nanos(main)
}
