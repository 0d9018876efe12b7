//! How fast deliveries go, from the embedded store to a subscriber that does nothing, and how soon the
//! first one comes after a start.
//!
//! Not a benchmark of the disk. `cargo bench --bench events --features sqlite`; `-- quick` for a short
//! one, `-- --dir PATH` for another disk.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tower_defer::Executor;
use tower_defer::event::store::{NewEvent, Sqlite, Start, Store};
use tower_defer::event::{Event, Events};
use tower_defer_measure::Arguments;

/// 200 bytes as JSON, like the records of `benches/store.rs`.
#[derive(Clone, Serialize, Deserialize)]
struct UserCreated {
    id: i64,
    email: String,
}

impl Event for UserCreated {
    const NAME: &'static str = "user.created";
}

impl UserCreated {
    fn new() -> Self {
        let (id, email) = (1_234_567, "x".repeat(171));
        Self { id, email }
    }
}

fn main() {
    let Some(arguments) = Arguments::of_bench() else {
        return;
    };
    let directory = arguments.scratch();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let large = arguments.length.choose(40_000, 100_000, 1_000_000);
    deliveries(&runtime, directory.path(), large);
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures time")]
fn now() -> Instant {
    Instant::now()
}

/// How many deliveries a subscriber that does nothing has in a second, and how soon the first one
/// comes after the file is opened.
fn deliveries(runtime: &Runtime, directory: &Path, large: u32) {
    println!("| stored, unfinished | deliveries/s | first after the opening, ms |");
    println!("| ---: | ---: | ---: |");
    let mut rates = Vec::new();
    for stored in [20_000, large] {
        let path = directory.join(format!("deliveries-{stored}.db"));
        runtime.block_on(async {
            let store = Sqlite::open(&path).expect("open");
            fill(&store, stored).await;
            store.close().await.expect("close");
        });
        let (rate, first) = runtime.block_on(deliver(&path, stored.min(100_000)));
        println!(
            "| {stored} | {rate:.0} | {:.1} |",
            first.as_secs_f64() * 1e3
        );
        rates.push(rate);
    }
    println!(
        "\nWith {large} stored, {:.2} of the rate with 20,000 (aim: at least 15,000/s, and not falling).",
        rates[1] / rates[0]
    );
}

async fn fill(store: &Sqlite, count: u32) {
    let payload = serde_json::to_string(&UserCreated::new()).expect("JSON");
    let since = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970");
    let now_ms = i64::try_from(since.as_millis()).expect("before 292,000,000");
    for _ in 0..count / 1_000 {
        let batch = (0..1_000)
            .map(|_| {
                NewEvent::new(UserCreated::NAME, payload.as_str())
                    .deliver("counts", Start::At(now_ms))
            })
            .collect();
        store.append(batch, now_ms).await.expect("append");
    }
}

/// What subscribers share.
#[derive(Clone)]
struct Counted {
    wanted: u64,
    so_far: Arc<AtomicU64>,
    first: Arc<Notify>,
    all: Arc<Notify>,
}

async fn deliver(path: &Path, wanted: u32) -> (f64, Duration) {
    let counted = Counted {
        wanted: u64::from(wanted),
        so_far: Arc::default(),
        first: Arc::default(),
        all: Arc::default(),
    };
    let executor = Executor::new();
    let opening = now();
    let events = Events::new(counted.clone())
        .on("counts", |counted: Counted, _: UserCreated| async move {
            let count = counted.so_far.fetch_add(1, Ordering::Relaxed) + 1;
            if count == 1 {
                counted.first.notify_one();
            }
            if count == counted.wanted {
                counted.all.notify_one();
            }
        })
        .executor(&executor)
        .store(Sqlite::open(path).expect("open"));
    events.start();
    counted.first.notified().await;
    let (first, start) = (opening.elapsed(), now());
    counted.all.notified().await;
    let rate = f64::from(wanted - 1) / start.elapsed().as_secs_f64();
    // What is left stays in the file, which is thrown away.
    executor.drain(Duration::from_secs(10)).await;
    (rate, first)
}
