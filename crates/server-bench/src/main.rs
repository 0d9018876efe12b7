//! An axum server with a side effect per request, under a load generator.
//!
//! ```text
//! cargo run --release -p tower-defer-server-bench              # the whole report, about eight minutes
//! cargo run --release -p tower-defer-server-bench -- quick     # the same, shorter and noisier: a minute and a half
//! ```
//!
//! It needs `oha` (`cargo install oha`) and `taskset`. The server is a child process on the first core
//! with one worker thread, the load on the second. Compared are always two servers in turn, pair by
//! pair, and what is reported is the median of the pairs' ratios, with their spread: on a shared
//! machine a single run says nothing.
//!
//! Why oha: at a fixed rate h2load sends what is due every 10 ms in one go, so that what it measures
//! there are bursts at full speed. oha spreads the requests, and counts a response's time from when its
//! request was due.
#![expect(clippy::disallowed_methods, reason = "a program that measures time")]

mod load;
mod report;
mod serve;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", variant, effect] => serve::run(variant, effect),
        ["quick"] => report::report(report::Length::Quick),
        [] => report::report(report::Length::Full),
        _ => {
            eprintln!("usage: tower-defer-server-bench [quick]");
            std::process::exit(2);
        }
    }
}
