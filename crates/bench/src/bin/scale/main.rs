//! How cost grows: with tasks per request, with the queue's length, with waiting retries, with open
//! streams that each hold a task. Prints tables and draws a plot of each into `docs/`.
//!
//! ```text
//! cargo run --profile bench -p tower-defer-bench --bin scale            # about three minutes
//! cargo run --profile bench -p tower-defer-bench --bin scale -- quick   # a tenth of the sizes, no plots
//! cargo run --profile bench -p tower-defer-bench --bin scale -- retries # or requests, queue, streams
//! ```
//!
//! Times are medians of rounds in which ours and the reference take turns; bytes are what a counting
//! allocator saw alive. On a shared machine compare the shapes and the two lines of one plot, not the
//! numbers of two days.
#![expect(clippy::disallowed_methods, reason = "a program that measures time")]

mod heap;
mod plot;
mod queue;
mod requests;
mod retries;
mod streams;

use std::path::Path;
use std::time::Instant;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

fn main() {
    let quick = std::env::args().any(|argument| argument == "quick");
    let only = std::env::args()
        .skip(1)
        .find(|argument| argument != "quick");
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let docs = (!quick).then_some(docs.as_path());
    let most = if quick { 100_000 } else { 1_000_000 };
    if wanted("requests") {
        requests::run(docs);
    }
    if wanted("queue") {
        queue::run(docs, most);
    }
    if wanted("retries") {
        retries::run(docs, most);
    }
    if wanted("streams") {
        streams::run(docs, if quick { 1_000 } else { 10_000 });
    }
}

/// Nanoseconds that `work` takes.
fn time(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
}

/// Powers of ten from a hundred on.
fn decades(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(100), |n| Some(n * 10)).take_while(move |n| *n <= most)
}
