//! What every example needs and what is not its point: a log that shows the life of each task, and an
//! address to listen on.

use std::io::{self, IsTerminal};

use tokio::net::TcpListener;
use tracing_subscriber::filter::{self, EnvFilter};
use tracing_subscriber::fmt::time;
use tracing_subscriber::prelude::*;

/// Prints what tower-defer says, one line an event, with the seconds since the start.
///
/// `RUST_LOG` chooses; without it, every step of every task is shown. The spans of the attempts are
/// left out, because each event repeats what of them matters here.
pub(crate) fn show_tasks() {
    let chosen = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,tower_defer=debug"));
    let lines = tracing_subscriber::fmt::layer()
        .with_timer(time::uptime())
        .with_target(false)
        .with_ansi(io::stdout().is_terminal())
        .with_filter(filter::filter_fn(|said| said.is_event()));
    tracing_subscriber::registry()
        .with(chosen)
        .with(lines)
        .init();
}

/// The port: `PORT`, where it is set (0: any free one), else `default`.
pub(crate) fn port(default: u16) -> u16 {
    std::env::var("PORT")
        .ok()
        .and_then(|port| port.parse().ok())
        .unwrap_or(default)
}

/// Listens on this machine only, and prints the address and the lines to try.
pub(crate) async fn listen(default_port: u16, to_try: &[&str]) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(("127.0.0.1", port(default_port))).await?;
    let address = listener.local_addr()?;
    println!("listening on {address}; to try:");
    for line in to_try {
        println!("  {}", line.replace("ADDRESS", &address.to_string()));
    }
    println!("  kill -TERM {}", std::process::id());
    Ok(listener)
}
