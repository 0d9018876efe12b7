//! The server as it sees itself.

use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::routing::get;

use crate::Counts;

/// Requests that came to the handler.
pub static REQUESTS: AtomicU64 = AtomicU64::new(0);
/// Side effects that have ended.
pub static COMPLETED: AtomicU64 = AtomicU64::new(0);
/// Side effects that were refused; none is known to both sides.
pub static REFUSED: AtomicU64 = AtomicU64::new(0);

/// One more.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the handlers have counted.
pub fn counted() -> Counts {
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    // What has ended first: a request that comes between is then seen as unfinished, never the reverse.
    let (completed, refused) = (of(&COMPLETED), of(&REFUSED));
    Counts {
        requests: of(&REQUESTS),
        completed,
        refused,
    }
}

/// Serves until the process that has started it lets go of its input: `GET /counts` beside what the
/// application has. The address is the first line that it prints.
pub fn run<F: Future<Output = Router>>(
    app: impl FnOnce() -> F,
    counts: impl Fn() -> Counts + Clone + Send + Sync + 'static,
) {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let app = app().await;
        let app = app.route("/counts", get(async move || counts().text()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        println!("{}", listener.local_addr().expect("an address"));
        axum::serve(listener, app).await.expect("the server");
    });
}
