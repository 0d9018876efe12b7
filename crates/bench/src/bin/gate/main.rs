//! The gate: what repeats exactly, held by CI. Instructions under callgrind, and allocations.
//!
//! ```text
//! gate                 measures everything, prints the table, fails if a ratio has grown
//! gate report          the same, and the lines that the report of all targets collects
//! gate run NAME N      one variant, N times: for callgrind
//! gate count NAME N    the same, and how often it allocates
//! ```
//!
//! Each variant runs under callgrind at two lengths, and the difference is divided: start-up cancels
//! out. References are in the same binary and the same run, so that ratios are compared and never
//! counts, which differ between compilers and machines. All on one current-thread runtime: valgrind
//! runs one thread at a time anyway.
#![expect(
    clippy::disallowed_methods,
    reason = "`tokio::spawn` is what is compared with"
)]

mod allocations;
mod report;
mod requests;
mod tasks;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => report::print(false),
        ["report"] => report::print(true),
        ["run", name, n] => run(name, parse(n)),
        ["count", name, n] => {
            let n = parse(n);
            println!("{:.2} allocations each", allocations_of(name, n));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: gate [report | run NAME N | count NAME N]");
            ExitCode::from(2)
        }
    }
}

fn parse(n: &str) -> usize {
    n.parse().expect("N is a number")
}

fn run(name: &str, n: usize) -> ExitCode {
    if in_runtime(perform(name, n)) {
        return ExitCode::SUCCESS;
    }
    eprintln!("there is no variant {name:?}");
    ExitCode::from(2)
}

async fn perform(name: &str, n: usize) -> bool {
    requests::run_named(name, n).await || tasks::run_named(name, n).await
}

/// Allocations of one of `n`, start-up taken off as under callgrind.
fn allocations_of(name: &str, n: usize) -> f64 {
    let once = |n| {
        let before = allocations::calls();
        assert!(in_runtime(perform(name, n)), "there is no variant {name:?}");
        allocations::calls() - before
    };
    // The first run of a process also fills what is filled once.
    once(n);
    let short = once(n);
    let long = once(2 * n);
    (long as f64 - short as f64) / n as f64
}

fn in_runtime<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
        .block_on(future)
}
