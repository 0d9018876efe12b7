//! How cost and latency grow: with tasks per request, with the queue's length, with threads that submit,
//! with waiting retries, with open streams that each hold a task. Prints tables and draws plots into
//! `docs/`.
//!
//! ```text
//! cargo run --profile bench -p tower-defer-bench --bin scale
//! cargo run --profile bench -p tower-defer-bench --bin scale -- quick   # a tenth of the sizes, no plots
//! cargo run --profile bench -p tower-defer-bench --bin scale -- retries # or requests, queue, threads, streams
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
mod threads;

use std::path::Path;
use std::time::Instant;

use tower_defer_measure::{Arguments, Length};

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

fn main() {
    let arguments = Arguments::read();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let docs = (arguments.length == Length::Full).then_some(docs.as_path());
    let most = arguments.length.choose(1_000, 100_000, 1_000_000);
    if arguments.wanted("requests") {
        requests::run(docs);
    }
    if arguments.wanted("queue") {
        queue::run(docs, most);
    }
    if arguments.wanted("threads") {
        threads::run(most);
    }
    if arguments.wanted("retries") {
        retries::run(docs, most);
    }
    if arguments.wanted("streams") {
        streams::run(docs, arguments.length.choose(100, 1_000, 10_000));
    }
}

/// Nanoseconds that `work` takes.
fn time(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64
}

/// More where one is short.
fn rounds(size: usize) -> usize {
    if size > 100_000 { 3 } else { 9 }
}

/// On a new thread with a runtime of its own: what the thread before kept for later (boxes of tasks
/// that have ended) would be missing in the bytes.
fn fresh<T: Send, F: Future<Output = T>>(work: impl FnOnce() -> F + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| runtime().block_on(work()));
        thread.join().expect("the measuring thread")
    })
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
