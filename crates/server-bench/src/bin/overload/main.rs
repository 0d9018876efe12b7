//! What overload does to memory and to latency.
//!
//! ```text
//! cargo run --release -p tower-defer-server-bench --bin overload
//! cargo run --release -p tower-defer-server-bench --bin overload -- quick   # half as long
//! ```
//!
//! Requests arrive at twice the rate at which their tasks can run, each task with 4 KiB of captures. Five
//! servers, one after the other, each in a process of its own: a naked `tokio::spawn`, axum-tasks, an
//! executor that rejects, one that drops the oldest, and a handler that answers 503 when `try_run`
//! gives its task back.
//!
//! Every task does the same in all five: it takes one of 16 permits, as of a connection pool, and
//! sleeps for 10 ms. So what a naked spawn piles up are futures that wait for a permit. The rate is
//! measured first, not assumed. The load is an open loop: a response's time counts from when its
//! request was due, also where all connections were busy.
//!
//! It fails where a bounded variant took more memory than its bounds allow, or took more the longer it
//! lasted.
#![expect(clippy::disallowed_methods, reason = "a program that measures time")]

mod report;
mod serve;

use std::process::ExitCode;

use tower_defer_measure::{Arguments, unmeasured};
use tower_defer_server_bench::missing;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let ["serve", variant] = words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        serve::run(variant);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::read();
    if let Some(missing) = missing() {
        return unmeasured(missing);
    }
    if report::report(&arguments) {
        ExitCode::SUCCESS
    } else {
        eprintln!("more memory than the bounds allow");
        ExitCode::FAILURE
    }
}
