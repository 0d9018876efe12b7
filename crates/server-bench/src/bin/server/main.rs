//! An axum server with a side effect per request, under a load generator.
//!
//! ```text
//! cargo run --release -p tower-defer-server-bench --bin server            # the whole report
//! cargo run --release -p tower-defer-server-bench --bin server -- quick   # shorter and noisier
//! cargo run --release -p tower-defer-server-bench --bin server -- pairs   # only the targets 9 and 10
//! ```
//!
//! It needs `oha` (`cargo install oha`) and `taskset`. Compared are always two servers in turn, pair by
//! pair, and what is reported is the median of the pairs' ratios, with their spread: on a shared
//! machine a single run says nothing. What server and load are, and why oha: see the library of this
//! crate.
#![expect(clippy::disallowed_methods, reason = "a program that measures time")]

mod report;
mod serve;

use std::process::ExitCode;

use tower_defer_measure::{Arguments, unmeasured};
use tower_defer_server_bench::missing;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let ["serve", variant, effect] = words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        serve::run(variant, effect);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::read();
    if let Some(missing) = missing() {
        return unmeasured(missing);
    }
    report::report(&arguments);
    ExitCode::SUCCESS
}
