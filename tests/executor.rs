//! Running: isolation, bounds, stuck tasks, runtimes (CASES.md 17, 21, 22, 25, 28).
#![expect(
    clippy::disallowed_methods,
    reason = "the tests play the server's part: they spawn, probe and measure"
)]

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::routing::get;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, Semaphore};
use tower_defer::{
    Defer, DeferLayer, DiscardReason, Executor, ExecutorBuilder, Retry, Task, TaskContext,
    TaskError, When,
};

#[path = "executor/log.rs"]
mod log;
use log::Log;

/// For what must happen; a failing test waits as long.
const LONG: Duration = Duration::from_secs(30);

/// All threads of this test binary write into one log; look for names of your own in it.
fn global_log() -> Log {
    static GLOBAL: OnceLock<Log> = OnceLock::new();
    let log = GLOBAL.get_or_init(|| {
        let log = Log::default();
        tracing::subscriber::set_global_default(log.subscriber()).expect("the first");
        log
    });
    log.clone()
}

fn runtimes() -> [Runtime; 2] {
    [
        Builder::new_current_thread().enable_all().build(),
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build(),
    ]
    .map(|runtime| runtime.expect("a runtime"))
}

/// Runs a test on a current-thread and on a multi-thread runtime.
fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for runtime in runtimes() {
        runtime.block_on(async {
            let ended = tokio::time::timeout(LONG, test()).await;
            assert!(ended.is_ok(), "still waiting after {LONG:?}");
        });
    }
}

/// Looks until it is so.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LONG, "not so after {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(5)); // the probe's pause
    }
}

/// How many are in a region at once, and how many there were at most.
#[derive(Clone, Default)]
struct Gauge(Arc<(AtomicUsize, AtomicUsize)>);

impl Gauge {
    fn enter(&self) -> Inside {
        let now = self.0.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.1.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }

    fn most(&self) -> usize {
        self.0.1.load(Ordering::SeqCst)
    }
}

struct Inside(Gauge);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn case_17_a_task_defers_a_task_that_defers_a_task_and_a_drain_waits_for_all() {
    on_both(|| async {
        let executor = Executor::new();
        let ran = Arc::new(Mutex::new(Vec::new()));
        let inner = (executor.clone(), ran.clone());
        executor.submit(Task::with(inner, |(executor, ran)| async move {
            tokio::task::yield_now().await;
            ran.lock().unwrap().push(1);
            let inner = (executor.clone(), ran);
            executor.submit(Task::with(inner, |(executor, ran)| async move {
                tokio::task::yield_now().await;
                ran.lock().unwrap().push(2);
                executor.submit(Task::blocking(move || ran.lock().unwrap().push(3)));
            }));
        }));
        let report = executor.drain(LONG).await;
        assert_eq!(*ran.lock().unwrap(), [1, 2, 3]);
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(executor.snapshot().completed, 3);
    });
}

#[test]
fn case_21_what_fails_and_what_panics_harms_no_other_task() {
    on_both(|| async {
        let executor = Executor::builder().concurrency(1).build();
        let ran = Arc::new(AtomicUsize::new(0));
        let good = || {
            Task::with(ran.clone(), |ran| async move {
                ran.fetch_add(1, Ordering::SeqCst);
            })
        };
        executor.submit(good());
        let fatal = || async { Err::<(), _>(TaskError::fatal("no such user")) };
        executor.submit(Task::new(fatal).name("fails"));
        executor.submit(Task::new(|| async { panic_here("a bug") }).name("panics"));
        executor.submit(good());
        executor.idle().await;

        assert_eq!(ran.load(Ordering::SeqCst), 2);
        let letters = executor.dead_letters().list();
        let told: Vec<_> = letters
            .iter()
            .map(|l| (l.name.as_str(), l.reason, &*l.error))
            .collect();
        assert_eq!(
            told,
            [
                ("fails", DiscardReason::Fatal, "no such user"),
                ("panics", DiscardReason::Panicked, "panicked: a bug"),
            ]
        );
        let now = executor.snapshot();
        assert_eq!((now.completed, now.discarded, now.outstanding), (2, 2, 0));
    });
}

fn panic_here(text: &str) {
    panic!("{text}");
}

#[test]
fn case_22_never_more_than_the_concurrency_run_and_no_response_waits_for_them() {
    const N: usize = 4;
    on_both(|| async {
        let executor = Executor::builder().concurrency(N).build();
        let (gate, gauge) = (Arc::new(Semaphore::new(0)), Gauge::default());
        let slow = (gate.clone(), gauge.clone());
        let handler = get(move |Extension(defer): Extension<Defer>| async move {
            defer.run_with(slow.clone(), |(gate, gauge)| async move {
                let _inside = gauge.enter();
                gate.acquire().await.expect("open").forget();
            });
            "hello"
        });
        let app = axum::Router::new().route("/", handler);
        let address = serve(app.layer(DeferLayer::new().executor(executor.clone()))).await;
        // Every response arrives while not one task can end.
        let mut clients = Vec::new();
        for _ in 0..10 * N {
            clients.push(tokio::spawn(fetch(address)));
        }
        for client in clients {
            assert!(client.await.expect("no panic").ends_with("hello"));
        }
        // Not until the snapshot says so: an attempt runs before its task's first line does.
        while gauge.most() < N {
            tokio::task::yield_now().await;
        }
        gate.add_permits(10 * N);
        executor.idle().await;
        assert_eq!(gauge.most(), N);
        assert_eq!(executor.snapshot().completed, 10 * N as u64);
    });
}

async fn serve(app: axum::Router) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

async fn fetch(address: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).await.expect("read");
    response
}

#[test]
fn tasks_that_never_end_early_leave_the_thread_to_the_short_ones() {
    on_both(|| async {
        let executor = Executor::builder().concurrency(3).build();
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..2 {
            executor.submit(Task::with(stop.clone(), |stop| async move {
                while !stop.load(Ordering::SeqCst) {
                    tokio::task::yield_now().await;
                }
            }));
        }
        let done = Arc::new((AtomicUsize::new(0), Notify::new()));
        for _ in 0..1000 {
            executor.submit(Task::with(done.clone(), |done| async move {
                if done.0.fetch_add(1, Ordering::SeqCst) + 1 == 1000 {
                    done.1.notify_one();
                }
            }));
        }
        done.1.notified().await;
        stop.store(true, Ordering::SeqCst);
        executor.idle().await;
    });
}

#[test]
fn a_worker_with_a_full_queue_lets_others_of_its_thread_go_first() {
    let [runtime, _] = runtimes();
    runtime.block_on(async {
        let executor = Executor::builder().concurrency(1).build();
        let ran = Arc::new(AtomicUsize::new(0));
        for _ in 0..10_000 {
            executor.submit(Task::with(ran.clone(), |ran| async move {
                ran.fetch_add(1, Ordering::SeqCst);
            }));
        }
        let mut before = 0;
        while before < 10_000 {
            tokio::task::yield_now().await;
            let now = ran.load(Ordering::SeqCst);
            assert!(now - before <= 64, "{} tasks in one go", now - before);
            before = now;
        }
    });
}

// Case 25.

#[tokio::test(start_paused = true)]
async fn case_25_a_task_that_outlives_its_timeout_is_dropped_and_retried() {
    let executor = Executor::builder().concurrency(1).build();
    let (gauge, tries) = (Gauge::default(), Arc::new(AtomicUsize::new(0)));
    let state = (gauge.clone(), tries.clone());
    let task = Task::with(state, |(gauge, tries)| async move {
        let _inside = gauge.enter();
        if tries.fetch_add(1, Ordering::SeqCst) < 2 {
            std::future::pending::<()>().await;
        }
    });
    let task = task.timeout(Duration::from_secs(5));
    executor.submit(task.retry(Retry::fixed(3, Duration::from_secs(1))));
    executor.submit(|| async {});
    let begun = tokio::time::Instant::now();
    executor.idle().await;
    let took = begun.elapsed().as_secs_f64();
    assert!((12.0..12.1).contains(&took), "5 + 1 + 5 + 1, not {took} s");
    assert_eq!((gauge.most(), tries.load(Ordering::SeqCst)), (1, 3));
    let now = executor.snapshot();
    assert_eq!((now.completed, now.retries, now.stuck), (2, 2, 0));
}

#[tokio::test(start_paused = true)]
async fn case_25_a_timeout_is_reported_and_may_be_the_last_word() {
    let executor = Executor::new();
    let hang = || Task::new(std::future::pending::<()>).timeout(Duration::from_millis(1500));
    executor.submit(hang().retry(Retry::fixed(5, Duration::ZERO).on_timeout(false)));
    executor.submit(hang().retry(Retry::fixed(2, Duration::ZERO)));
    executor.idle().await;
    let letters = executor.dead_letters().list();
    assert_eq!(letters[0].reason, DiscardReason::TimedOut);
    assert_eq!(&*letters[0].error, "timed out after 1.5s");
    assert_eq!(letters[1].reason, DiscardReason::Attempts);
    assert_eq!(letters[1].history.len(), 2);
}

/// The runtime's timers answer nothing to a task that has used up its turn, also the worker's own alarm.
#[tokio::test(start_paused = true)]
async fn case_25_a_task_that_has_used_up_its_turn_times_out_all_the_same() {
    let executor = Executor::builder()
        .timeout(Duration::from_secs(1))
        .retry(Retry::never())
        .build();
    let greedy = || async {
        let mut spent = false;
        std::future::poll_fn(|cx| {
            while !spent {
                let unit = std::pin::pin!(tokio::task::coop::consume_budget());
                spent = unit.poll(cx).is_pending();
            }
            Poll::<()>::Pending
        })
        .await;
    };
    for _ in 0..2 {
        executor.submit(greedy);
        executor.submit(Task::new(greedy).name("greedy, too"));
        let took = tokio::time::Instant::now();
        executor.idle().await;
        assert_eq!(took.elapsed().as_secs(), 1);
    }
    let now = executor.snapshot();
    assert_eq!((now.discarded, now.stuck), (4, 0));
}

#[tokio::test(start_paused = true)]
async fn case_25_the_token_of_a_timed_out_attempt_is_cancelled() {
    let executor = Executor::new();
    let seen = Arc::new(Mutex::new(None));
    let slot = seen.clone();
    let task = Task::with_context(move |context: TaskContext| {
        *slot.lock().unwrap() = Some(context.cancellation());
        std::future::pending::<()>()
    });
    executor.submit(task.timeout(Duration::from_secs(1)).retry(Retry::never()));
    executor.idle().await;
    let token = seen.lock().unwrap().take().expect("it ran");
    assert!(token.is_cancelled());
}

#[test]
fn case_25_a_task_that_never_yields_is_reported_as_stuck() {
    let log = global_log();
    for (runtime, name) in runtimes().into_iter().zip(["stuck-current", "stuck-multi"]) {
        let executor = Executor::builder()
            .timeout(Duration::from_millis(100))
            .build();
        let release = Arc::new(AtomicBool::new(false));
        let task = Task::with(release.clone(), |release| async move {
            while !release.load(Ordering::SeqCst) {
                std::hint::spin_loop();
                std::thread::yield_now();
            }
        });
        let task = task.name(name);
        let mine = executor.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                mine.submit(task);
                mine.idle().await;
            });
        });
        // From a thread that is none of the runtime's.
        until("stuck", || {
            executor.snapshot().running.iter().any(|r| r.stuck)
        });
        let running = executor.snapshot().running;
        assert_eq!(running.len(), 1);
        assert_eq!((running[0].name.as_str(), running[0].attempt), (name, 1));
        assert!(running[0].age >= Duration::from_millis(100));
        until("said", || log.about(name, "task is stuck") == 1);
        release.store(true, Ordering::SeqCst);
        thread.join().expect("no panic");
        // It ended well, late as it was: nothing could have stopped it.
        let now = executor.snapshot();
        assert_eq!((now.completed, now.stuck, now.outstanding), (1, 1, 0));
        assert_eq!(log.about(name, "task is stuck"), 1);
    }
}

#[test]
fn case_25_a_blocking_task_that_ignores_its_token_keeps_its_slot_and_is_not_run_twice() {
    let log = global_log();
    on_both(|| async {
        let said = || log.about("stuck-blocking", "task is stuck");
        let before = said();
        let executor = Executor::builder().blocking_concurrency(1).build();
        let (release, gauge) = (Arc::new(AtomicBool::new(false)), Gauge::default());
        let runs = Arc::new(AtomicUsize::new(0));
        let token = Arc::new(Mutex::new(None));
        let state = (release.clone(), gauge.clone(), runs.clone(), token.clone());
        let task = Task::blocking_with_context(move |context| {
            let (release, gauge, runs, token) = &state;
            let _inside = gauge.enter();
            *token.lock().unwrap() = Some(context.cancellation());
            runs.fetch_add(1, Ordering::SeqCst);
            while !release.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            Err::<(), _>("late")
        });
        let task = task
            .name("stuck-blocking")
            .timeout(Duration::from_millis(50));
        executor.submit(task.retry(Retry::fixed(2, Duration::ZERO)));
        let next = Arc::new(AtomicBool::new(false));
        let flag = next.clone();
        executor.submit(Task::blocking(move || flag.store(true, Ordering::SeqCst)));
        while !executor.snapshot().running.iter().any(|r| r.stuck) {
            tokio::time::sleep(Duration::from_millis(5)).await; // the probe's pause
        }
        assert!(
            token
                .lock()
                .unwrap()
                .as_ref()
                .is_some_and(|t| t.is_cancelled())
        );
        while said() == before {
            tokio::task::yield_now().await;
        }
        assert_eq!(said() - before, 1);
        // Its slot is the only one: what comes next waits, an async task does not.
        let quick = Arc::new(Notify::new());
        let told = quick.clone();
        executor.submit(Task::with(told, |told| async move { told.notify_one() }));
        quick.notified().await;
        assert!(!next.load(Ordering::SeqCst));
        release.store(true, Ordering::SeqCst);
        executor.idle().await;
        assert!(next.load(Ordering::SeqCst));
        assert_eq!((gauge.most(), runs.load(Ordering::SeqCst)), (1, 2));
        let letter = &executor.dead_letters().list()[0];
        assert_eq!(
            (letter.reason, &*letter.error),
            (DiscardReason::Attempts, "late")
        );
    });
}

fn park_for_ever() {
    loop {
        std::thread::park();
    }
}

const CHILD: &str = "TOWER_DEFER_TEST_CHILD";

/// Runs in the child process only: its last act is to leave a blocked task behind.
#[test]
fn child_with_a_stuck_blocking_task() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let executor = Executor::new();
        let (started, begun) = tokio::sync::oneshot::channel();
        let started = Mutex::new(Some(started));
        executor.submit(Task::blocking(move || {
            if let Some(started) = started.lock().unwrap().take() {
                let _ = started.send(());
            }
            park_for_ever();
        }));
        begun.await.expect("it runs");
        let report = executor.drain(Duration::from_millis(10)).await;
        println!("the child's report: {report}");
    });
    drop(runtime);
}

#[test]
fn case_25_a_stuck_blocking_task_does_not_keep_the_process_from_ending() {
    let this = std::env::current_exe().expect("a path");
    let mut child = Command::new(this)
        .args(["--exact", "child_with_a_stuck_blocking_task", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if begun.elapsed() > LONG {
            let _ = child.kill();
            panic!("the process has not ended after {LONG:?}");
        }
        std::thread::sleep(Duration::from_millis(5)); // the probe's pause
    };
    assert!(status.success());
    let mut said = String::new();
    let mut out = child.stdout.take().expect("piped");
    std::io::Read::read_to_string(&mut out, &mut said).expect("text");
    assert!(said.contains("still_running"), "{said}");
}

// Case 28.

/// Panics when it is dropped.
struct Bomb(&'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("{}", self.0);
    }
}

/// A payload whose drop panics with its like, without end.
struct Endless;

impl Drop for Endless {
    fn drop(&mut self) {
        std::panic::panic_any(Endless);
    }
}

/// A future whose own drop panics, ready with this at once, or never.
struct Hostile<E>(Option<Result<(), E>>);

impl<E: Unpin> Future for Hostile<E> {
    type Output = Result<(), E>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl<E> Drop for Hostile<E> {
    fn drop(&mut self) {
        panic!("in the drop of the future");
    }
}

/// Writes a long text, then panics.
#[derive(Debug)]
struct BadDisplay;

impl fmt::Display for BadDisplay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = f.write_str(&"é".repeat(5000));
        panic!("in Display");
    }
}

impl std::error::Error for BadDisplay {}

#[derive(Debug)]
struct BadDrop;

impl fmt::Display for BadDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&"ö".repeat(5000))
    }
}

impl std::error::Error for BadDrop {}

impl Drop for BadDrop {
    fn drop(&mut self) {
        panic!("in the drop of the error");
    }
}

fn panic_with(payload: impl Send + 'static) {
    std::panic::panic_any(payload);
}

fn hostile_tasks() -> Vec<(&'static str, Task, DiscardReason, &'static str)> {
    use DiscardReason::{Attempts, Panicked};
    let once = Retry::never;
    let long: &'static str = Box::leak("ß".repeat(5000).into_boxed_str());
    vec![
        (
            "panic",
            Task::new(|| async { panic_here("in the task") }),
            Panicked,
            "panicked: in the task",
        ),
        (
            "long panic",
            Task::new(move || async move { panic_here(long) }),
            Panicked,
            "panicked: ßß",
        ),
        (
            "panic in the closure",
            Task::new(|| -> std::future::Ready<()> { panic!("before its future") }),
            Panicked,
            "panicked: before its future",
        ),
        (
            "panic in a blocking task",
            Task::blocking(|| panic_here("on a thread")),
            Panicked,
            "panicked: on a thread",
        ),
        (
            "a local's drop",
            Task::new(|| async {
                let _bomb = Bomb("in the drop of a local");
                tokio::task::yield_now().await;
            }),
            Panicked,
            "panicked: in the drop of a local",
        ),
        (
            "drop after success",
            Task::new(|| Hostile::<&str>(Some(Ok(())))),
            Panicked,
            "panicked: in the drop of the future",
        ),
        (
            "drop after failure",
            Task::new(|| Hostile(Some(Err("failed")))).retry(once()),
            Panicked,
            "panicked: in the drop of the future",
        ),
        (
            "drop of the future and of its error",
            Task::new(|| Hostile(Some(Err(BadDrop)))),
            Panicked,
            "panicked: in the drop of the future",
        ),
        (
            "both drops of a plain future",
            Task::once(Hostile(Some(Err(BadDrop)))),
            Panicked,
            "panicked: in the drop of the future",
        ),
        (
            "drop at timeout",
            Task::new(|| Hostile::<&str>(None)).timeout(Duration::from_millis(20)),
            Panicked,
            "panicked: in the drop of the future",
        ),
        (
            "the error's Display",
            Task::new(|| async { Err::<(), _>(BadDisplay) }).retry(once()),
            Attempts,
            "éé",
        ),
        (
            "the error's drop",
            Task::new(|| async { Err::<(), _>(BadDrop) }).retry(once()),
            Attempts,
            "öö",
        ),
        (
            "only_if",
            Task::new(|| async { Err::<(), _>("asked about") })
                .retry(Retry::exponential(5).only_if(|_| panic!("in the predicate"))),
            Panicked,
            "panicked in `Retry::only_if`: in the predicate, asked about: asked about",
        ),
        (
            "a payload's drop",
            Task::new(|| async { panic_with(Bomb("in the drop of a payload")) }),
            Panicked,
            "panicked: (a panic without a text)",
        ),
        (
            "a payload without end",
            Task::new(|| async { panic_with(Endless) }),
            Panicked,
            "panicked: (a panic without a text)",
        ),
    ]
}

fn one_slot() -> ExecutorBuilder {
    Executor::builder().concurrency(1).blocking_concurrency(1)
}

/// The one slot takes another task, of either kind.
async fn survives(executor: &Executor) {
    let ran = Arc::new(AtomicUsize::new(0));
    let (a, b) = (ran.clone(), ran.clone());
    executor.submit(Task::with(a, |a| async move {
        a.fetch_add(1, Ordering::SeqCst);
    }));
    executor.submit(Task::blocking(move || {
        b.fetch_add(1, Ordering::SeqCst);
    }));
    executor.idle().await;
    assert_eq!(ran.load(Ordering::SeqCst), 2);
    let now = executor.snapshot();
    assert_eq!(now.outstanding, 0);
    assert_eq!(
        now.accepted,
        now.completed + now.discarded + now.skipped + now.cancelled
    );
}

#[test]
fn case_28_each_panic_is_one_bounded_record_and_the_slot_survives() {
    let log = global_log();
    on_both(|| async {
        for (name, task, reason, error) in hostile_tasks() {
            let executor = one_slot().build();
            let id = executor.submit(task.name(name)).id().expect("accepted");
            executor.idle().await;
            let letters = executor.dead_letters().list();
            assert_eq!(letters.len(), 1, "{name}");
            let letter = &letters[0];
            assert_eq!(letter.reason, reason, "{name}");
            assert!(letter.error.starts_with(error), "{name}: {}", letter.error);
            assert!(letter.error.len() <= 1024, "{name}: {}", letter.error.len());
            assert_eq!(letter.history.len(), 1, "{name}");
            let id = id.to_string();
            let told = log.count(|line| {
                line.field("task.id") == id && line.message.starts_with("task discarded")
            });
            assert_eq!(told, 1, "{name}");
            survives(&executor).await;
        }
    });
}

#[test]
fn case_28_a_panic_in_the_drop_of_what_a_task_captured() {
    let log = global_log();
    on_both(|| async {
        for (text, fails) in [("captured, succeeded", false), ("captured, failed", true)] {
            let executor = one_slot().build();
            let before = log.count(|line| line.field("panic") == text);
            let bomb = Bomb(text);
            let task = Task::new(move || {
                let _held = &bomb;
                async move { if fails { Err("no") } else { Ok(()) } }
            });
            executor.submit(task.retry(Retry::never()));
            executor.idle().await;
            let now = executor.snapshot();
            assert_eq!(
                (now.completed, now.discarded),
                (u64::from(!fails), u64::from(fails))
            );
            // A dead letter keeps what it captured until it is discarded.
            assert_eq!(
                executor.dead_letters().discard_where(|_| true),
                usize::from(fails)
            );
            let told = log.count(|line| line.field("panic") == text);
            assert_eq!(told - before, 1, "{text}");
            survives(&executor).await;
        }
    });
}

#[test]
fn case_28_a_panic_in_the_condition() {
    on_both(|| async {
        let executor = one_slot().build();
        let service = tower::service_fn(|request: http::Request<axum::body::Body>| async move {
            let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
            let when = When::new(|_| panic!("in the condition"));
            defer.run(Task::new(|| async {}).when(when));
            Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
        });
        let layer = DeferLayer::new().executor(executor.clone());
        let service = tower::Layer::layer(&layer, service);
        let request = http::Request::new(axum::body::Body::empty());
        drop(tower::ServiceExt::oneshot(service, request).await);
        executor.idle().await;
        let letters = executor.dead_letters().list();
        assert_eq!(letters.len(), 1);
        assert_eq!(
            &*letters[0].error,
            "panicked: in its condition: in the condition"
        );
        assert_eq!(letters[0].reason, DiscardReason::Panicked);
        survives(&executor).await;
    });
}

#[test]
fn case_28_a_panic_in_the_hook() {
    let log = global_log();
    on_both(|| async {
        let hook = |_: &_| panic!("in the hook of case 28");
        let executor = one_slot().on_dead_letter(hook).build();
        let said = || log.count(|line| line.field("panic") == "in the hook of case 28");
        let before = said();
        executor.submit(|| async { Err::<(), _>(TaskError::fatal("no")) });
        executor.idle().await;
        assert_eq!(said() - before, 1);
        assert_eq!(executor.dead_letters().len(), 1);
        survives(&executor).await;
    });
}

/// What a drain gave up on may still fail in every way.
#[test]
fn a_hostile_error_of_an_abandoned_blocking_task_harms_nobody() {
    on_both(|| async {
        let executor = one_slot().build();
        let release = Arc::new(AtomicBool::new(false));
        let gate = release.clone();
        executor.submit(Task::blocking(move || {
            while !gate.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            Err::<(), _>(BadDrop)
        }));
        while executor.snapshot().running.is_empty() {
            tokio::task::yield_now().await;
        }
        let report = executor.drain(Duration::ZERO).await;
        assert_eq!(report.cancelled, 1);
        release.store(true, Ordering::SeqCst);
        assert_eq!(executor.snapshot().cancelled, 1);
    });
}

// Runtimes.

#[test]
fn a_runtime_of_its_own_runs_the_tasks() {
    let [ours, _] = runtimes();
    let theirs = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("theirs")
        .enable_all()
        .build()
        .unwrap();
    let executor = Executor::builder().runtime(theirs.handle().clone()).build();
    ours.block_on(async {
        let names = Arc::new(Mutex::new(Vec::new()));
        executor.submit(Task::with(names.clone(), |names| async move {
            let name = std::thread::current().name().map(str::to_owned);
            names.lock().unwrap().push(name);
            tokio::task::yield_now().await;
        }));
        executor.idle().await;
        assert_eq!(*names.lock().unwrap(), [Some("theirs".to_owned())]);
    });
}

#[test]
fn what_is_submitted_outside_of_any_runtime_runs_once_it_is_used_within_one() {
    let executor = Executor::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = |ran: Arc<AtomicUsize>| async move {
        ran.fetch_add(1, Ordering::SeqCst);
    };
    assert!(
        executor
            .submit(Task::with(ran.clone(), count))
            .is_accepted()
    );
    assert_eq!(executor.snapshot().queued, 1);
    // Waiting for it is using it.
    let [runtime, second] = runtimes();
    runtime.block_on(async { tokio::time::timeout(LONG, executor.idle()).await.unwrap() });
    assert_eq!(ran.load(Ordering::SeqCst), 1);
    drop(runtime);
    // The last runtime is gone, and again there is none here.
    executor.submit(Task::with(ran.clone(), count));
    let report = second.block_on(executor.drain(LONG));
    assert_eq!((report.completed, report.timed_out), (1, false), "{report}");
    assert_eq!(ran.load(Ordering::SeqCst), 2);
}

#[test]
fn a_retry_that_outlives_its_runtime_runs_on_the_next() {
    let executor = Executor::new();
    let tries = Arc::new(AtomicUsize::new(0));
    let [first, second] = runtimes();
    first.block_on(async {
        let task = Task::with(tries.clone(), |tries| async move {
            match tries.fetch_add(1, Ordering::SeqCst) {
                0 => Err("not yet"),
                _ => Ok(()),
            }
        });
        executor.submit(task.retry(Retry::fixed(2, Duration::from_millis(1))));
        while executor.snapshot().retries == 0 {
            tokio::task::yield_now().await;
        }
    });
    drop(first);
    assert_eq!(executor.snapshot().outstanding, 1);
    second.block_on(async { tokio::time::timeout(LONG, executor.idle()).await.unwrap() });
    assert_eq!(executor.snapshot().completed, 1);
}

#[test]
fn a_runtime_without_a_timer_is_a_clear_error_and_loses_nothing() {
    let log = global_log();
    let executor = Executor::new();
    let poor = Builder::new_current_thread().build().unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    poor.block_on(async {
        let task = Task::with(ran.clone(), |ran| async move {
            tokio::task::yield_now().await;
            ran.fetch_add(1, Ordering::SeqCst);
        });
        assert!(executor.submit(task).is_accepted());
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    });
    let now = executor.snapshot();
    assert_eq!((now.queued, now.cancelled), (1, 0));
    let said = log.lines(|line| line.message.contains("build it with `enable_time`"));
    assert_eq!(said.len(), 1);
    assert_eq!(said[0].field("level"), "ERROR");
    drop(poor);
    let [runtime, _] = runtimes();
    runtime.block_on(async { tokio::time::timeout(LONG, executor.idle()).await.unwrap() });
    assert_eq!(ran.load(Ordering::SeqCst), 1);
}

#[test]
fn a_runtime_that_ends_with_queued_tasks_says_so_and_keeps_them() {
    let log = global_log();
    let executor = Executor::builder().concurrency(1).build();
    let [runtime, second] = runtimes();
    runtime.block_on(async {
        executor.submit(Task::new(std::future::pending::<()>).name("interrupted-by-the-end"));
        executor.submit(|| async {});
        while executor.snapshot().running.is_empty() {
            tokio::task::yield_now().await;
        }
    });
    let said = || log.count(|l| l.message.starts_with("the runtime ended with unfinished"));
    let before = said();
    drop(runtime);
    assert!(said() > before);
    let now = executor.snapshot();
    assert_eq!((now.cancelled, now.queued, now.outstanding), (1, 1, 1));
    assert_eq!(
        log.about("interrupted-by-the-end", "task cancelled before its end"),
        1
    );
    second.block_on(async { tokio::time::timeout(LONG, executor.idle()).await.unwrap() });
    assert_eq!(executor.snapshot().completed, 1);
}

// The blocking lane.

#[test]
fn blocking_tasks_have_a_bound_of_their_own_and_take_no_async_slot() {
    on_both(|| async {
        let executor = Executor::builder()
            .concurrency(1)
            .blocking_concurrency(2)
            .build();
        let (release, gauge) = (Arc::new(AtomicBool::new(false)), Gauge::default());
        for _ in 0..6 {
            let (release, gauge) = (release.clone(), gauge.clone());
            executor.submit(Task::blocking(move || {
                let _inside = gauge.enter();
                while !release.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }));
        }
        while executor.snapshot().running.len() < 2 || gauge.most() < 2 {
            tokio::task::yield_now().await;
        }
        let now = executor.snapshot();
        assert_eq!((now.running.len(), now.queued), (2, 4));
        assert!(now.oldest_wait.is_some());
        let quick = Arc::new(Notify::new());
        executor.submit(Task::with(quick.clone(), |quick| async move {
            quick.notify_one();
        }));
        quick.notified().await;
        release.store(true, Ordering::SeqCst);
        executor.idle().await;
        assert_eq!(gauge.most(), 2);
        assert_eq!(executor.snapshot().completed, 7);
    });
}

/// The thread of a blocking task knows no runtime; its retry's timer needs one all the same.
#[test]
fn an_executor_that_only_ever_blocks_retries_all_the_same() {
    on_both(|| async {
        let executor = Executor::new();
        let tries = Arc::new(AtomicUsize::new(0));
        let count = tries.clone();
        let task = Task::blocking_with_context(move |context| {
            count.fetch_add(1, Ordering::SeqCst);
            match context.attempt() {
                1 => Err("once"),
                2 => {
                    assert_eq!(context.last_error(), Some("once"));
                    Err("twice")
                }
                _ => Ok(()),
            }
        });
        executor.submit(task.retry(Retry::fixed(3, Duration::from_millis(1))));
        executor.idle().await;
        assert_eq!(tries.load(Ordering::SeqCst), 3);
        assert_eq!(executor.snapshot().completed, 1);
    });
}

#[test]
fn a_due_retry_goes_before_new_work_on_the_blocking_lane_too() {
    on_both(|| async {
        let executor = Executor::builder().blocking_concurrency(1).build();
        let order = Arc::new(Mutex::new(Vec::new()));
        let release = Arc::new(AtomicBool::new(false));
        let mine = order.clone();
        let task = Task::blocking_with_context(move |context| {
            mine.lock().unwrap().push("retried");
            if context.attempt() == 1 {
                Err("again")
            } else {
                Ok(())
            }
        });
        let (gate, mine) = (release.clone(), order.clone());
        let holds_the_lane = Task::blocking(move || {
            mine.lock().unwrap().push("holds");
            while !gate.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        });
        executor.submit(task.retry(Retry::fixed(2, Duration::ZERO)));
        executor.submit(holds_the_lane);
        for _ in 0..3 {
            let mine = order.clone();
            executor.submit(Task::blocking(move || mine.lock().unwrap().push("new")));
        }
        // Either the retry has had its turn before the lane was held, or it is due behind those who
        // are queued: three that are new, and itself.
        let retried = |order: &[&str]| order.iter().filter(|name| **name == "retried").count();
        loop {
            let order = order.lock().unwrap().clone();
            let due = executor.snapshot().queued == 4 && executor.snapshot().waiting == 0;
            if order.contains(&"holds") && (retried(&order) == 2 || due) {
                break;
            }
            tokio::task::yield_now().await;
        }
        release.store(true, Ordering::SeqCst);
        executor.idle().await;
        let order = order.lock().unwrap();
        assert_eq!(order[3..], ["new"; 3], "{order:?}");
    });
}

#[test]
fn executors_can_be_shared_between_layers_and_a_task_can_name_another() {
    on_both(|| async {
        let shared = Executor::builder().concurrency(1).build();
        let other = Executor::new();
        let named = other.clone();
        let service = tower::service_fn(move |request: http::Request<axum::body::Body>| {
            let named = named.clone();
            async move {
                let defer = Defer::from_extensions(request.extensions()).expect("layered");
                defer.run(|| async {});
                defer.on(&named).run(|| async {});
                Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
            }
        });
        for _ in 0..2 {
            let layer = DeferLayer::new().executor(shared.clone());
            let service = tower::Layer::layer(&layer, service.clone());
            let request = http::Request::new(axum::body::Body::empty());
            drop(tower::ServiceExt::oneshot(service, request).await);
        }
        shared.idle().await;
        other.idle().await;
        assert_eq!(shared.snapshot().completed, 2);
        assert_eq!(other.snapshot().completed, 2);
    });
}

#[test]
fn a_snapshot_tells_what_waits_and_what_runs_and_for_how_long() {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let executor = Executor::builder().concurrency(1).build();
        executor.submit(Task::new(std::future::pending::<()>).name("first"));
        executor.submit(Task::new(|| async {}).name("second"));
        tokio::time::sleep(Duration::from_secs(7)).await; // paused time
        let now = executor.snapshot();
        assert_eq!((now.accepted, now.outstanding, now.queued), (2, 2, 1));
        assert_eq!((now.collected, now.waiting, now.reserved), (0, 0, 0));
        let [running] = &now.running[..] else {
            panic!("{now:?}")
        };
        assert_eq!((running.name.as_str(), running.attempt), ("first", 1));
        assert!(!running.blocking && !running.stuck);
        for age in [running.age, now.oldest_wait.expect("one is queued")] {
            assert!((6.9..7.1).contains(&age.as_secs_f64()), "{age:?}");
        }
    });
}
