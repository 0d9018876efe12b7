//! What the two programs of this crate share: a server in a process of its own, the load, and what
//! became of each request.
//!
//! The server is a child on the first core, with one worker thread; the load (`oha`) has the second.
//! Where there is one core, they share it.
//!
//! Why oha: at a fixed rate h2load sends what is due every 10 ms in one go, so that what it measures
//! there are bursts at full speed. oha spreads the requests, and counts a response's time from when its
//! request was due (no coordinated omission).
#![expect(clippy::disallowed_methods, reason = "programs that measure time")]

mod counts;
mod load;
mod process;
pub mod serve;

pub use counts::Counts;
pub use load::{Answers, Rate, load};
pub use process::Server;

use std::process::Command;

/// What is missing on this machine.
pub fn missing() -> Option<&'static str> {
    if !tower_defer_measure::has("taskset", "--version") {
        return Some("there is no `taskset` (Debian: util-linux)");
    }
    if !tower_defer_measure::has("oha", "--version") {
        return Some("there is no `oha` (`cargo install oha`)");
    }
    None
}

fn on_core(core: usize) -> Command {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.min(cores - 1).to_string());
    command
}
