//! Everything at once, for as long as one likes: `cargo run --example soak`.
//!
//! A real server with three executors (the layer's own; one that handlers name, on a runtime of its
//! own; an inner layer's) under random load: tasks that succeed, fail, panic, time out, block, register
//! others; clients over HTTP/1.1 and HTTP/2 that leave at any stage. Each round ends in a drain, some
//! patient, some not, some by the shutdown helper, and the next round begins with new executors.
//!
//! After each round must hold, exactly and for each executor:
//!
//! 1. accepted = completed + discarded + skipped + cancelled, and nothing is outstanding, queued,
//!    waiting, running, collected or reserved;
//! 2. no request is open;
//! 3. accepted and rejected are what the handlers were told; completed is what the tasks themselves
//!    counted, where no deadline came first;
//! 4. what tasks captured has been dropped, all of it.
//!
//! And at the end: every executor has been freed, and the resident memory is that of the end of the
//! warm-up, within [`MARGIN`].
//!
//! `SOAK_SECONDS` (120) says how long, `SOAK_SEED` which decisions are drawn: the same seed draws the
//! same again, though threads and sockets interleave as they like. Exit code 1 says what did not hold.
#![expect(
    clippy::disallowed_methods,
    reason = "clients and handlers that are slow, and a program that reads the clock"
)]

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use fastrand::Rng;
use futures_util::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tower_defer::{
    Defer, DeferLayer, Executor, Overflow, Rejected, Retry, RetryBudget, Shutdown, Snapshot, Task,
    TaskError, TaskHandle, When,
};

/// In MiB. What the allocator keeps after one round differs from what it keeps after another by 2 MiB
/// (see the `memory` of the printed rounds), without a lasting trend. A leak has one: 120 s of load are
/// some 50,000 tasks after the warm-up, so that 170 bytes lost with each exceed this. What is lost with
/// fewer of them is found by the counts, which are exact and need no margin.
const MARGIN: f64 = 8.0;

const CLIENTS: usize = 12;
const EXECUTORS: usize = 3;
const NAMES: [&str; EXECUTORS] = ["layer", "named", "inner"];
const BLOCKING: usize = 2;
const KINDS: [&str; 9] = [
    "small", "empty", "big", "stream", "slow", "idle", "broken", "panic", "failing",
];
static BIG: [u8; 2 << 20] = [7; 2 << 20];

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number("SOAK_SECONDS").unwrap_or(120);
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("SOAK_SEED={seed} SOAK_SECONDS={seconds}");
    expect_panics();

    let runtime = |name: &str| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(name)
            .enable_all()
            .build()
            .expect("a runtime")
    };
    let (main, other) = (runtime("soak"), runtime("soak-named"));
    let result = main.block_on(soak(seed, Duration::from_secs(seconds), &other));
    main.shutdown_background();
    other.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            println!("SOAK FAILED, with SOAK_SEED={seed}:\n{failure}");
            ExitCode::FAILURE
        }
    }
}

/// The panics that the load consists of are not worth a backtrace.
fn expect_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let expected = info
            .payload()
            .downcast_ref::<&str>()
            .is_some_and(|text| text.starts_with("part of the soak"));
        if !expected {
            usual(info);
        }
    }));
}

async fn soak(seed: u64, length: Duration, other: &Runtime) -> Result<(), Failure> {
    let mut rng = Rng::with_seed(seed);
    let began = Instant::now();
    let mut after_warm_up: Option<f64> = None;
    let mut executors = Vec::new();
    let mut number = 0;
    while began.elapsed() < length || number < 3 {
        number += 1;
        let round = Round::new(&mut rng, other);
        executors.extend(round.app.alive.iter().map(Arc::downgrade));
        let told = round.run(&mut rng).await;
        let told = told.map_err(|failure| format!("round {number}: {failure}"))?;
        let memory = memory();
        println!("round {number}: {told}; memory {memory:.1} MiB");
        // A third of the time, and at least two rounds: the arenas, the parked workers and threads
        // that stay for a while, the pools of hyper are as large then as they become.
        if began.elapsed() < length / 3 || number <= 2 {
            after_warm_up = Some(after_warm_up.unwrap_or_default().max(memory));
        }
    }
    // Parked workers, which hold their executor, end after 10 to 20 s.
    let freed = probe(Duration::from_secs(60), || {
        executors
            .iter()
            .all(|executor| executor.strong_count() == 0)
    });
    if !freed.await {
        let kept = executors.iter().filter(|e| e.strong_count() > 0).count();
        return Err(format!("{kept} of {} executors are never freed", executors.len()).into());
    }
    let (start, end) = (after_warm_up.unwrap_or(f64::NAN), memory());
    println!("memory: {start:.1} MiB after the warm-up, {end:.1} MiB at the end");
    if end > start + MARGIN {
        return Err(format!("memory grew from {start:.1} to {end:.1} MiB").into());
    }
    println!("{number} rounds passed");
    Ok(())
}

/// Resident, in MiB; not a number where there is no `/proc`, and then nothing is compared.
fn memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        let kibibytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?;
        kibibytes.trim().parse::<f64>().ok()
    });
    resident.map_or(f64::NAN, |kibibytes| kibibytes / 1024.0)
}

async fn probe(within: Duration, holds: impl Fn() -> bool) -> bool {
    let until = Instant::now() + within;
    while !holds() {
        if Instant::now() > until {
            return false;
        }
        sleep(Duration::from_millis(5)).await;
    }
    true
}

// A round.

#[derive(Clone, Copy, Debug)]
enum Ending {
    /// Clients leave, then a drain with all the time it wants.
    Patient,
    /// A drain with little time, under load.
    Impatient,
    /// The shutdown helper, under load.
    Shutdown,
}

struct Round {
    app: App,
    layer: DeferLayer,
    inner: DeferLayer,
}

#[derive(Clone)]
struct App {
    executors: [Executor; EXECUTORS],
    books: [Arc<Book>; EXECUTORS],
    /// Each is held by its executor's hook, too, and so tells when that is freed.
    alive: [Arc<()>; EXECUTORS],
    bounds: [usize; EXECUTORS],
}

/// What handlers and tasks count by themselves.
#[derive(Debug, Default)]
struct Book {
    accepted: AtomicU64,
    rejected: AtomicU64,
    ended_well: AtomicU64,
    captured: AtomicI64,
}

impl Round {
    fn new(rng: &mut Rng, other: &Runtime) -> Self {
        let alive: [Arc<()>; EXECUTORS] = Default::default();
        let bounds = [(); EXECUTORS].map(|()| rng.usize(1..24));
        let executors = [0, 1, 2].map(|which| {
            let alive = alive[which].clone();
            let builder = Executor::builder()
                .concurrency(bounds[which])
                .capacity(rng.usize(8..600))
                .blocking_concurrency(BLOCKING)
                .dead_letters(rng.usize(0..40))
                .timeout(Duration::from_millis(rng.u64(20..80)))
                .retry(retry(rng))
                .retry_budget(RetryBudget::new(rng.u32(50..2000), rng.u32(10..200)))
                .overflow([Overflow::Reject, Overflow::DropOldest][rng.usize(..2)])
                .on_dead_letter(move |_| {
                    let _ = &alive;
                    if fastrand::u8(..) == 0 {
                        panic!("part of the soak: in the hook");
                    }
                });
            match which {
                1 => builder.runtime(other.handle().clone()).build(),
                _ => builder.build(),
            }
        });
        let layer = DeferLayer::new()
            .executor(executors[0].clone())
            .max_tasks_per_request(rng.usize(4..12))
            .max_hold(Duration::from_millis(rng.u64(50..400)));
        let inner = DeferLayer::new().executor(executors[2].clone());
        let app = App {
            executors,
            books: Default::default(),
            alive,
            bounds,
        };
        Self { app, layer, inner }
    }

    async fn run(self, rng: &mut Rng) -> Result<String, Failure> {
        let Self { app, layer, inner } = self;
        let inner = Router::new()
            .route("/{kind}/{seed}", get(handle_inner))
            .layer(inner);
        let router = Router::new()
            .route("/{kind}/{seed}", get(handle))
            .nest("/inner", inner)
            .layer(layer.clone())
            .with_state(app.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;

        let mut load = JoinSet::new();
        for _ in 0..CLIENTS {
            load.spawn(client(address, rng.fork()));
        }
        load.spawn(submit(app.clone(), rng.fork()));
        let looking = tokio::spawn(look(app.clone(), rng.fork()));

        let ending = [Ending::Patient, Ending::Impatient, Ending::Shutdown][rng.usize(..3)];
        let busy = Duration::from_millis(rng.u64(1000..4000));
        let deadline = Duration::from_millis(rng.u64(0..600));
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move { stopped.await.unwrap_or_default() };
        let shutdown = Shutdown::new(&layer)
            .and(&app.executors[1])
            .and(&app.executors[2])
            .deadline(deadline);
        let server = if let Ending::Shutdown = ending {
            let served = shutdown.serve(stopped, |stop| {
                axum::serve(listener, router)
                    .with_graceful_shutdown(stop)
                    .into_future()
            });
            tokio::spawn(async move { served.await.map(|report| report.timed_out) })
        } else {
            let served = axum::serve(listener, router)
                .with_graceful_shutdown(stopped)
                .into_future();
            tokio::spawn(async move { served.await.map(|()| false) })
        };

        sleep(busy).await;
        let mut timed_out = false;
        match ending {
            Ending::Patient => {
                let all = drain(&app, Duration::from_secs(60));
                let mut all = pin!(all);
                // The first moments of the drain meet requests that still register tasks.
                let early = timeout(Duration::from_millis(50), &mut all).await;
                load.shutdown().await;
                timed_out = match early {
                    Ok(timed_out) => timed_out,
                    Err(_) => all.await,
                };
                if timed_out {
                    return Err(held(&app, "a drain took more than 60 s").into());
                }
                let _ = stop.send(());
            }
            Ending::Impatient => {
                timed_out |= drain(&app, deadline).await;
                let _ = stop.send(());
            }
            Ending::Shutdown => {
                let _ = stop.send(());
            }
        }
        if let Ending::Impatient | Ending::Shutdown = ending {
            sleep(deadline).await;
        }
        load.shutdown().await;
        let Ok(served) = timeout(Duration::from_secs(20), server).await else {
            return Err(held(&app, "the server does not end").into());
        };
        timed_out |= served??;
        looking.abort();
        if let Ok(found) = looking.await {
            found?;
        }
        settled(&app, ending, timed_out).await
    }
}

/// Drains all; whether a deadline came first.
async fn drain(app: &App, within: Duration) -> bool {
    let [a, b, c] = &app.executors;
    let (a, b, c) = tokio::join!(a.drain(within), b.drain(within), c.drain(within));
    a.timed_out || b.timed_out || c.timed_out
}

/// The laws at the end of a round.
async fn settled(app: &App, ending: Ending, timed_out: bool) -> Result<String, Failure> {
    // A blocking attempt that outlived the deadline ends a little later, and so do connections.
    let quiet = probe(Duration::from_secs(10), || {
        app.executors.iter().all(|executor| {
            let now = executor.snapshot();
            now.outstanding == 0 && now.open_requests == 0 && now.running.is_empty()
        })
    });
    if !quiet.await {
        return Err(held(app, "it does not become quiet").into());
    }
    for executor in &app.executors {
        executor.dead_letters().discard_where(|_| true);
    }
    let dropped = probe(Duration::from_secs(10), || {
        app.books
            .iter()
            .all(|book| book.captured.load(Ordering::SeqCst) == 0)
    });
    if !dropped.await {
        return Err(held(app, "what tasks captured is not dropped").into());
    }
    let mut sum = [0; 6];
    for (which, (executor, book)) in app.executors.iter().zip(&app.books).enumerate() {
        let end = executor.snapshot();
        law(&end, book, timed_out).map_err(|broken| {
            format!(
                "{} executor: {broken}, after {ending:?} (deadline first: {timed_out}): {book:?}, {end:#?}",
                NAMES[which]
            )
        })?;
        let counts = [
            end.accepted,
            end.completed,
            end.discarded,
            end.skipped,
            end.cancelled,
            end.rejected_full + end.rejected_request_limit + end.rejected_closed,
        ];
        (0..6).for_each(|at| sum[at] += counts[at]);
    }
    let [accepted, completed, discarded, skipped, cancelled, rejected] = sum;
    Ok(format!(
        "{ending:?}, {accepted} accepted = {completed} completed + {discarded} discarded + \
         {skipped} skipped + {cancelled} cancelled; {rejected} rejected"
    ))
}

fn law(end: &Snapshot, book: &Book, timed_out: bool) -> Result<(), &'static str> {
    let ended = end.completed + end.discarded + end.skipped + end.cancelled;
    let rejected = end.rejected_full + end.rejected_request_limit + end.rejected_closed;
    let ended_well = book.ended_well.load(Ordering::SeqCst);
    let rules = [
        (end.accepted == ended, "accepted is not what ended"),
        (end.outstanding == 0, "something is outstanding"),
        (
            end.collected + end.queued + end.waiting + end.reserved == 0 && end.running.is_empty(),
            "something is still there",
        ),
        (end.open_requests == 0, "a request is open"),
        (
            end.accepted == book.accepted.load(Ordering::SeqCst) + end.replayed,
            "accepted is not what the handlers were told",
        ),
        (
            rejected == book.rejected.load(Ordering::SeqCst),
            "rejected is not what the handlers were told",
        ),
        (
            end.completed == ended_well || (timed_out && end.completed < ended_well),
            "completed is not what the tasks counted",
        ),
        (end.oldest_wait.is_none(), "something waits"),
        (end.dead_letters == 0, "dead letters were not discarded"),
    ];
    rules
        .into_iter()
        .find_map(|(holds, broken)| (!holds).then_some(Err(broken)))
        .unwrap_or(Ok(()))
}

fn held(app: &App, what: &str) -> String {
    let mut text = what.to_owned();
    for ((executor, book), name) in app.executors.iter().zip(&app.books).zip(NAMES) {
        let captured = book.captured.load(Ordering::SeqCst);
        text += &format!(
            "\n{name}: captures of {captured} tasks, {:#?}",
            executor.snapshot()
        );
    }
    text
}

/// Reads snapshots and replays dead letters while the load lasts.
async fn look(app: App, mut rng: Rng) -> Result<(), Failure> {
    loop {
        sleep(Duration::from_millis(rng.u64(5..50))).await;
        let which = rng.usize(..EXECUTORS);
        let executor = &app.executors[which];
        let now = executor.snapshot();
        if now.running.len() > app.bounds[which] + BLOCKING {
            return Err(held(&app, "more run than may").into());
        }
        let letters = executor.dead_letters();
        for group in letters.groups() {
            if rng.u8(..4) == 0 {
                let replay = letters.replay_where(|letter| letter.name == group.name);
                let _ = timeout(Duration::from_millis(20), replay).await;
            }
        }
    }
}

// The tasks.

/// What a task captures. It counts itself.
struct Captured {
    book: Arc<Book>,
    panics: bool,
    _room: Vec<u8>,
}

impl Captured {
    fn new(book: &Arc<Book>, panics: bool) -> Arc<Self> {
        book.captured.fetch_add(1, Ordering::SeqCst);
        Arc::new(Self {
            book: book.clone(),
            panics,
            _room: vec![1; 1024],
        })
    }

    fn ends_well(&self) -> Result<(), TaskError> {
        self.book.ended_well.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.book.captured.fetch_sub(1, Ordering::SeqCst);
        if self.panics && !std::thread::panicking() {
            panic!("part of the soak: in a drop");
        }
    }
}

fn retry(rng: &mut Rng) -> Retry {
    match rng.u8(..4) {
        0 => Retry::never(),
        1 => Retry::fixed(rng.u32(2..5), Duration::from_millis(rng.u64(1..40))),
        _ => Retry::exponential(rng.u32(2..7))
            .first_delay(Duration::from_millis(rng.u64(1..20)))
            .max_delay(Duration::from_millis(100))
            .give_up_after(Duration::from_millis(rng.u64(50..2000))),
    }
}

fn task(rng: &mut Rng, book: &Arc<Book>, nested: Option<(Defer, Arc<Book>)>) -> Task {
    let captured = Captured::new(book, false);
    let pause = Duration::from_millis(rng.u64(1..15));
    let times = rng.u32(1..4);
    let task = match rng.u8(..16) {
        0 => Task::once(async move {
            sleep(pause).await;
            captured.ends_well()
        }),
        1 => Task::once(async move {
            let _captured = captured;
            Err::<(), _>(TaskError::new("once and never again"))
        }),
        2 => Task::blocking(move || {
            std::thread::sleep(pause);
            captured.ends_well()
        }),
        3 => Task::blocking(move || {
            if captured.book.ended_well.load(Ordering::SeqCst) % 2 == 0 {
                panic!("part of the soak: in a blocking task");
            }
            Err::<(), _>(TaskError::new("blocked in vain"))
        }),
        4 => Task::with_context(move |context| {
            let captured = captured.clone();
            async move {
                if context.attempt() <= times {
                    return Err(TaskError::new("not yet"));
                }
                captured.ends_well()
            }
        }),
        5 => Task::with(captured, |_captured| async {
            Err::<(), _>(TaskError::fatal("there is no hope"))
        }),
        6 => Task::with(captured, |_captured| async {
            Err::<(), _>(TaskError::new("always"))
        }),
        7 => Task::with(captured, move |captured| async move {
            sleep(pause).await;
            if captured.book.ended_well.load(Ordering::SeqCst) < u64::MAX {
                panic!("part of the soak: in a task");
            }
        }),
        8 => Task::with(captured, |_captured| async {
            // Longer than its timeout.
            sleep(Duration::from_secs(5)).await;
        })
        .timeout(pause),
        9 => Task::with(captured, move |_captured| async move {
            Err::<(), _>(TaskError::retry_after(pause, "come back"))
        }),
        10 => {
            // No other reference is left when the executor drops the task.
            drop(captured);
            let captured = Captured::new(book, true);
            Task::with_context(move |_| {
                let ended = captured.ends_well();
                async move { ended }
            })
        }
        11 => match nested {
            None => Task::with(captured, |captured| async move { captured.ends_well() }),
            Some((defer, inner)) => Task::with(captured, move |captured| {
                let (defer, inner) = (defer.clone(), inner.clone());
                async move {
                    let mut rng = Rng::with_seed(times.into());
                    inner.note(&defer.run(task(&mut rng, &inner, None)));
                    captured.ends_well()
                }
            }),
        },
        _ => Task::with(captured, move |captured| async move {
            if times > 1 {
                sleep(pause / times).await;
            }
            captured.ends_well()
        }),
    };
    let task = match rng.u8(..6) {
        0 => task.retry(retry(rng)),
        1 => task.name("named"),
        _ => task,
    };
    match rng.u8(..8) {
        0 => task.when(When::success()),
        1 => task.when(When::complete()),
        2 => task.when(When::failure()),
        3 => task.when(When::aborted()),
        4 => task.when(When::always()),
        5 => task.when(When::new(|info| {
            if info.bytes % 7 == 1 {
                panic!("part of the soak: in a condition");
            }
            info.bytes % 2 == 0
        })),
        _ => task,
    }
}

impl Book {
    fn note(&self, handle: &TaskHandle) {
        self.count(handle.is_accepted());
    }

    /// Counts first: a task that comes back is dropped here, and that may panic.
    fn note_result(&self, result: Result<TaskHandle, Rejected>) {
        self.count(result.is_ok());
    }

    fn count(&self, accepted: bool) {
        let count = if accepted {
            &self.accepted
        } else {
            &self.rejected
        };
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// Tasks without a request.
async fn submit(app: App, mut rng: Rng) -> Infallible {
    loop {
        let which = rng.usize(..EXECUTORS);
        let (executor, book) = (&app.executors[which], &app.books[which]);
        let task = task(&mut rng, book, None);
        match rng.u8(..3) {
            0 => book.note(&executor.submit(task)),
            1 => book.note_result(executor.try_submit(task)),
            _ => {
                let patience = Duration::from_millis(rng.u64(..5));
                if let Ok(Ok(permit)) = timeout(patience, executor.reserve()).await {
                    book.note(&permit.submit(task));
                }
            }
        }
        sleep(Duration::from_millis(rng.u64(..4))).await;
    }
}

// The server.

async fn handle(state: State<App>, path: Path<(String, u64)>, request: Request) -> Answer {
    answer(state, path, request, 0).await
}

async fn handle_inner(state: State<App>, path: Path<(String, u64)>, request: Request) -> Answer {
    answer(state, path, request, 2).await
}

type Answer = Result<Response<Body>, (StatusCode, &'static str)>;

async fn answer(
    State(app): State<App>,
    Path((kind, seed)): Path<(String, u64)>,
    request: Request,
    own: usize,
) -> Answer {
    let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
    let mut rng = Rng::with_seed(seed);
    for _ in 0..rng.usize(..8) {
        register(&app, &defer, own, &mut rng).await;
    }
    match kind.as_str() {
        "small" => Ok("hello".into_response()),
        "empty" => Ok(StatusCode::NO_CONTENT.into_response()),
        "big" => Ok(Bytes::from_static(&BIG).into_response()),
        "slow" => {
            sleep(Duration::from_millis(rng.u64(..40))).await;
            register(&app, &defer, own, &mut rng).await;
            Ok("at last".into_response())
        }
        "panic" => panic!("part of the soak: in a handler"),
        "failing" => Err((StatusCode::INTERNAL_SERVER_ERROR, "no")),
        kind => Ok(streamed(kind, app, defer, own, rng).into_response()),
    }
}

async fn register(app: &App, defer: &Defer, own: usize, rng: &mut Rng) {
    let named = rng.u8(..4) == 0;
    let which = if named { 1 } else { own };
    let defer = if named {
        defer.on(&app.executors[1])
    } else {
        defer.clone()
    };
    let book = &app.books[which];
    let task = task(rng, book, Some((defer.clone(), book.clone())));
    match rng.u8(..6) {
        0 => book.note_result(defer.try_run(task)),
        1 => {
            let patience = Duration::from_millis(rng.u64(..10));
            if let Ok(Ok(permit)) = timeout(patience, defer.reserve()).await {
                book.note_result(permit.run(task));
            }
        }
        2 => {
            let handle = defer.run(task);
            book.note(&handle);
            handle.cancel();
        }
        _ => book.note(&defer.run(task)),
    }
}

/// "stream" ends, "idle" never does, "broken" ends in an error.
fn streamed(kind: &str, app: App, defer: Defer, own: usize, rng: Rng) -> Body {
    let (idle, broken) = (kind == "idle", kind == "broken");
    let chunks = stream::unfold((0, rng), move |(number, mut rng)| {
        let (app, defer) = (app.clone(), defer.clone());
        async move {
            let last = rng.u8(..8) == 0;
            if last && !idle {
                let error = broken.then(|| Err(std::io::Error::other("the stream broke")));
                return error.map(|error| (error, (number, rng)));
            }
            sleep(Duration::from_millis(if idle { 50 } else { 2 })).await;
            register(&app, &defer, own, &mut rng).await;
            let chunk = Bytes::from(vec![b'x'; rng.usize(1..20_000)]);
            Some((Ok(chunk), (number + 1, rng)))
        }
    });
    Body::from_stream(chunks)
}

// The clients.

async fn client(server: SocketAddr, mut rng: Rng) -> Infallible {
    loop {
        // What a client meets is its own affair: the server's account is what is examined.
        let visit = rng.fork();
        let _ = timeout(Duration::from_secs(3), async {
            if rng.bool() {
                visit_http1(server, visit).await
            } else {
                visit_http2(server, visit).await
            }
        })
        .await;
        sleep(Duration::from_millis(rng.u64(..3))).await;
    }
}

fn path(rng: &mut Rng) -> String {
    let outer = if rng.u8(..4) == 0 { "/inner" } else { "" };
    let kind = KINDS[rng.usize(..KINDS.len())];
    format!("{outer}/{kind}/{}", rng.u64(..))
}

/// One connection, which may end at any stage.
async fn visit_http1(server: SocketAddr, mut rng: Rng) -> Result<(), Failure> {
    let mut stream = TcpStream::connect(server).await?;
    for _ in 0..rng.usize(1..5) {
        let method = if rng.u8(..8) == 0 { "HEAD" } else { "GET" };
        let request = format!("{method} {} HTTP/1.1\r\nhost: soak\r\n\r\n", path(&mut rng));
        if rng.u8(..8) == 0 {
            let part = rng.usize(..request.len());
            return Ok(stream.write_all(&request.as_bytes()[..part]).await?);
        }
        stream.write_all(request.as_bytes()).await?;
        match rng.u8(..8) {
            0 => return Ok(()),
            1 => stream.shutdown().await?,
            2 => sleep(Duration::from_millis(rng.u64(..500))).await,
            3 => return reset(stream, &mut rng).await,
            _ => {}
        }
        let most = if rng.bool() {
            usize::MAX
        } else {
            rng.usize(..3_000_000)
        };
        read_some(&mut stream, most).await?;
    }
    Ok(())
}

/// Until nothing comes for a moment: good enough as the end of a response, and idle streams have none.
async fn read_some(stream: &mut TcpStream, most: usize) -> Result<(), Failure> {
    let mut buffer = vec![0; 64 << 10];
    let mut read = 0;
    while read < most {
        match timeout(Duration::from_millis(60), stream.read(&mut buffer)).await {
            Ok(Ok(0)) => return Err("the server closed".into()),
            Ok(count) => read += count?,
            Err(_) => return Ok(()),
        }
    }
    Ok(())
}

/// Closed with data unread, the kernel answers by a reset.
async fn reset(mut stream: TcpStream, rng: &mut Rng) -> Result<(), Failure> {
    sleep(Duration::from_millis(rng.u64(..30))).await;
    let mut one = [0];
    let _ = timeout(Duration::from_millis(10), stream.read(&mut one)).await;
    Ok(())
}

/// The task that drives a connection. Dropped, it takes the connection with it.
struct Driver(JoinHandle<Result<(), h2::Error>>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn visit_http2(server: SocketAddr, mut rng: Rng) -> Result<(), Failure> {
    let stream = TcpStream::connect(server).await?;
    let (client, connection) = h2::client::handshake(stream).await?;
    let _driver = Driver(tokio::spawn(connection));
    let leaving = AtomicBool::new(false);
    let requests = (0..rng.usize(1..6)).map(|_| {
        let (client, rng) = (client.clone(), rng.fork());
        request_http2(client, rng, &leaving)
    });
    let all = futures_util::future::join_all(requests.collect::<Vec<_>>());
    if rng.u8(..4) == 0 {
        let _ = timeout(Duration::from_millis(rng.u64(..60)), all).await;
    } else {
        all.await;
    }
    Ok(())
}

async fn request_http2(
    client: h2::client::SendRequest<Bytes>,
    mut rng: Rng,
    leaving: &AtomicBool,
) -> Result<(), Failure> {
    let request = axum::http::Request::get(format!("http://soak{}", path(&mut rng))).body(())?;
    let mut client = client.ready().await?;
    let (response, mut stream) = client.send_request(request, true)?;
    let moment = Duration::from_millis(rng.u64(..40));
    match rng.u8(..6) {
        0 => {
            sleep(moment).await;
            stream.send_reset(h2::Reason::CANCEL);
            return Ok(());
        }
        1 => {
            let _ = timeout(moment, response).await;
            return Ok(());
        }
        _ => {}
    }
    let mut body = response.await?.into_body();
    let most = if rng.bool() {
        usize::MAX
    } else {
        rng.usize(..2_000_000)
    };
    let keeps_window_shut = rng.u8(..4) == 0;
    let mut read = 0;
    while read < most && !leaving.load(Ordering::Relaxed) {
        match timeout(Duration::from_millis(400), body.data()).await {
            Ok(Some(chunk)) => {
                let count = chunk?.len();
                read += count;
                if !keeps_window_shut {
                    body.flow_control().release_capacity(count)?;
                }
            }
            Ok(None) | Err(_) => break,
        }
    }
    if rng.u8(..4) == 0 {
        stream.send_reset(h2::Reason::INTERNAL_ERROR);
    }
    if rng.u8(..16) == 0 {
        // The others of this connection leave with it.
        leaving.store(true, Ordering::Relaxed);
    }
    Ok(())
}
