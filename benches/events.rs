//! What an event costs its request, and how fast deliveries go, with the embedded store.
//!
//! Not a benchmark of the disk: the figures that count are the ratios, made in one run.
//! `cargo bench --bench events --features axum,sqlite`; `-- --quick` for a short one, `-- --dir PATH` for
//! another disk, `-- --only latency` or `-- --only deliveries` for a half.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tower_defer::event::store::{NewEvent, Sqlite, Start, Store};
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer, Executor};

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

struct Options {
    quick: bool,
    dir: PathBuf,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if !args.iter().any(|arg| arg == "--bench") {
        println!("nothing is measured by a test run; say `cargo bench --bench events`");
        return;
    }
    let after = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let parent = after("--dir").map_or_else(std::env::temp_dir, PathBuf::from);
    let options = Options {
        quick: args.iter().any(|arg| arg == "--quick"),
        dir: parent.join(format!("defer-events-{}", std::process::id())),
    };
    std::fs::create_dir_all(&options.dir).expect("a directory to write to");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let only = after("--only");
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    if wanted("latency") {
        latency(&runtime, &options);
    }
    if wanted("deliveries") {
        deliveries(&runtime, &options);
    }
    let _ = std::fs::remove_dir_all(&options.dir);
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures time")]
fn now() -> Instant {
    Instant::now()
}

/// What a response waits for when it records one event, on an idle server: one client, one request
/// after the other, each after the deliveries of the one before are settled.
fn latency(runtime: &Runtime, options: &Options) {
    let rounds = if options.quick { 300 } else { 2_000 };
    let store = Sqlite::open(options.dir.join("latency.db")).expect("open");
    let events = Events::new(())
        .on("nobody", |(), _: UserCreated| async {})
        .store(store);
    let defer = DeferLayer::new().events(events);
    let emit = |defer: Defer| async move {
        defer.emit(UserCreated::new());
        "hello"
    };
    let task = |defer: Defer| async move {
        defer.run(|| async {});
        "hello"
    };
    let router = Router::new()
        .route("/event", get(emit))
        .route("/task", get(task))
        .layer(defer.clone());
    let executor = defer.get_executor().clone();
    let address = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a port");
        let address = listener.local_addr().expect("an address");
        #[expect(clippy::disallowed_methods, reason = "the server is not deferred work")]
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    });
    let mut client = TcpStream::connect(address).expect("it listens");
    client.set_nodelay(true).expect("a socket");
    let mut file = File::create(options.dir.join("log")).expect("a log");
    let record = [b'x'; 200];
    let (mut syncs, mut tasks, mut emits) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds + 20 {
        let took = [
            timed(|| {
                file.write_all(&record).expect("a write");
                file.sync_data().expect("a sync");
            }),
            timed(|| ask(&mut client, "/task")),
            {
                let took = timed(|| ask(&mut client, "/event"));
                runtime.block_on(executor.idle());
                took
            },
        ];
        // The first ones open files, make tables warm, and start threads.
        if round >= 20 {
            syncs.push(took[0]);
            tasks.push(took[1]);
            emits.push(took[2]);
        }
    }
    let all = [&mut syncs, &mut tasks, &mut emits].map(|times| {
        times.sort_by(f64::total_cmp);
        [times[times.len() / 2], times[times.len() * 99 / 100]]
    });
    println!("one request after the other, {rounds} of each, µs: p50, p99");
    for (what, [p50, p99]) in [
        "append + fdatasync of 200 bytes",
        "a response that defers a task",
        "a response that records an event",
    ]
    .into_iter()
    .zip(all)
    {
        println!("{what:34} {p50:8.0} {p99:8.0}");
    }
    let [[sync, _], [plain, plain99], [emit, emit99]] = all;
    let (added, ratio) = (emit - plain, (emit - plain) / sync);
    println!("added: p50 {added:.0} µs, p99 {:.0} µs", emit99 - plain99);
    let met = if ratio <= 1.5 { "met" } else { "NOT MET" };
    println!(
        "target 15 | added latency of a response that records one event, p50, idle, against one \
         `fdatasync` | {sync:.0} µs | {added:.0} µs | {ratio:.2} | ≤ 1.5 | {met}"
    );
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = now();
    work();
    start.elapsed().as_secs_f64() * 1e6
}

/// One request, to the last byte of its answer.
fn ask(client: &mut TcpStream, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    client.write_all(request.as_bytes()).expect("a request");
    let mut answer = [0; 1_024];
    let mut read = 0;
    while !answer[..read].ends_with(b"hello") {
        let more = client.read(&mut answer[read..]).expect("an answer");
        assert!(more > 0, "the server hung up");
        read += more;
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
}

/// How many deliveries a subscriber that does nothing has in a second, and how soon the first one
/// comes after the file is opened.
fn deliveries(runtime: &Runtime, options: &Options) {
    let large: u32 = if options.quick { 100_000 } else { 1_000_000 };
    println!("\nstored, unfinished | deliveries/s | first after the opening, ms");
    let mut rates = Vec::new();
    for stored in [20_000, large] {
        let path = options.dir.join(format!("deliveries-{stored}.db"));
        runtime.block_on(async {
            let store = Sqlite::open(&path).expect("open");
            fill(&store, stored).await;
            store.close().await.expect("close");
        });
        let (rate, first) = runtime.block_on(deliver(&path, stored.min(100_000)));
        println!(
            "{stored:18} | {rate:12.0} | {:10.1}",
            first.as_secs_f64() * 1e3
        );
        rates.push(rate);
    }
    println!(
        "with {large} stored, {:.2} of the rate with 20,000 (aim: at least 15,000/s, and not falling)",
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

async fn deliver(path: &std::path::Path, wanted: u32) -> (f64, Duration) {
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
