//! What is accepted, what is refused, and who is told (CASES.md 20, 23, 24).
#![expect(
    clippy::disallowed_methods,
    reason = "the tests play the server and its callers, who spawn"
)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use axum::Extension;
use axum::http::StatusCode;
use axum::routing::get;
use futures_util::poll;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tower_defer::{
    Defer, DeferLayer, DiscardReason, Executor, Overflow, RejectReason, Task, UnfinishedState,
};

#[path = "executor/log.rs"]
mod log;
use log::Log;

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

/// A task that waits until the test lets it go.
fn gated(gate: &Arc<Semaphore>) -> Task {
    Task::with(gate.clone(), |gate| async move {
        gate.acquire().await.expect("never closed").forget();
    })
}

async fn running(executor: &Executor, tasks: usize) {
    while executor.snapshot().running.len() < tasks {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn case_20_a_handle_takes_its_task_back_before_the_release() {
    let executor = Executor::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = ran.clone();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let seen = answers.clone();
    let service = tower::service_fn(move |request: http::Request<axum::body::Body>| {
        let (count, seen) = (count.clone(), seen.clone());
        async move {
            let defer = Defer::from_extensions(request.extensions()).expect("layered");
            let task = |n: usize| {
                Task::with(count.clone(), move |count| async move {
                    count.fetch_add(n, Ordering::SeqCst);
                })
            };
            let first = defer.run(task(1));
            let _second = defer.run(task(10));
            seen.lock()
                .unwrap()
                .extend([first.cancel(), first.cancel()]);
            Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
        }
    });
    let layer = DeferLayer::new().executor(executor.clone());
    let service = tower::Layer::layer(&layer, service);
    let request = http::Request::new(axum::body::Body::empty());
    drop(tower::ServiceExt::oneshot(service, request).await);
    executor.idle().await;
    assert_eq!(*answers.lock().unwrap(), [true, false]);
    assert_eq!(ran.load(Ordering::SeqCst), 10);
    let now = executor.snapshot();
    assert_eq!((now.accepted, now.completed, now.cancelled), (2, 1, 1));
}

#[tokio::test]
async fn a_submitted_task_can_be_taken_back_until_a_worker_takes_it() {
    let executor = Executor::builder().concurrency(1).build();
    let gate = Arc::new(Semaphore::new(0));
    let first = executor.submit(gated(&gate));
    let second = executor.submit(gated(&gate));
    running(&executor, 1).await;
    let blocked = executor.submit(Task::blocking(|| ()));
    assert!(!first.cancel(), "it runs");
    assert!(second.cancel() && !second.cancel());
    gate.add_permits(1);
    executor.idle().await;
    assert!(!first.cancel() && !blocked.cancel(), "they have ended");
    let now = executor.snapshot();
    assert_eq!((now.completed, now.cancelled), (2, 1));
}

// Case 23, over a real server and without one.

async fn serve(app: axum::Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// The status of `GET path`.
async fn status(address: SocketAddr, path: &str) -> u16 {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).await.expect("read");
    response[9..12].parse().expect("a status")
}

/// What a task captures, counted: the memory that an overload could take.
struct Captured(Arc<AtomicUsize>);

impl Captured {
    fn new(alive: &Arc<AtomicUsize>, most: &AtomicUsize) -> Arc<Self> {
        let now = alive.fetch_add(1, Ordering::SeqCst) + 1;
        most.fetch_max(now, Ordering::SeqCst);
        Arc::new(Self(alive.clone()))
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn case_23_a_long_overload_is_answered_by_503_and_takes_no_more_memory() {
    const CAPACITY: usize = 8;
    let executor = Executor::builder()
        .concurrency(2)
        .capacity(CAPACITY)
        .build();
    let gate = Arc::new(Semaphore::new(0));
    let (alive, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let state = (gate.clone(), alive.clone(), most.clone());
    let handler = get(move |Extension(defer): Extension<Defer>| async move {
        let (gate, alive, most) = state.clone();
        let captured = Captured::new(&alive, &most);
        let task = Task::with((gate, captured), |(gate, _captured)| async move {
            gate.acquire().await.expect("open").forget();
        });
        match defer.try_run(task) {
            Ok(_) => StatusCode::OK,
            Err(rejected) => {
                assert_eq!(rejected.reason(), RejectReason::Full);
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    });
    let app = axum::Router::new().route("/", handler);
    let address = serve(app.layer(DeferLayer::new().executor(executor.clone()))).await;
    let mut seen = [0, 0];
    for _ in 0..500 {
        match status(address, "/").await {
            200 => seen[0] += 1,
            503 => seen[1] += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!(seen, [CAPACITY, 500 - CAPACITY]);
    // One more than is accepted: the one that is being refused.
    assert_eq!(most.load(Ordering::SeqCst), CAPACITY + 1);
    gate.add_permits(CAPACITY);
    let report = executor.drain(LONG).await;
    assert!(report.is_clean(), "{report}");
    let now = executor.snapshot();
    assert_eq!((now.completed, now.rejected_full), (8, 492));
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn case_23_without_room_each_way_of_submitting_does_what_it_says() {
    let executor = Executor::builder().concurrency(1).capacity(2).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    executor.submit(gated(&gate));

    let handle = executor.submit(gated(&gate));
    assert!(!handle.is_accepted() && handle.id().is_none() && !handle.cancel());
    assert_eq!(handle.rejection(), Some(RejectReason::Full));

    let task = gated(&gate).name("given back");
    let rejected = executor.try_submit(task).expect_err("no room");
    assert_eq!(rejected.reason(), RejectReason::Full);
    assert!(rejected.to_string().contains("the executor is full"));
    let task = rejected.into_task();

    // Three wait; the second loses patience.
    let mut line: Vec<_> = (0..3).map(|_| Some(Box::pin(executor.reserve()))).collect();
    for waiting in line.iter_mut().flatten() {
        assert!(poll!(waiting).is_pending());
    }
    line[1] = None;
    gate.add_permits(1);
    let permit = line[0].take().expect("waits").await.expect("open");
    // Nobody overtakes the one who still waits.
    assert!(executor.try_submit(gated(&gate)).is_err());
    assert!(poll!(line[2].as_mut().expect("waits")).is_pending());
    assert_eq!(executor.snapshot().reserved, 1);
    let handle = permit.submit(task);
    assert!(handle.is_accepted());
    gate.add_permits(1);
    let unused = line[2].take().expect("waits").await.expect("open");
    drop(unused);
    gate.add_permits(2);
    assert!(executor.submit(gated(&gate)).is_accepted());
    executor.idle().await;
    let now = executor.snapshot();
    assert_eq!((now.accepted, now.completed, now.rejected_full), (4, 4, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn case_23_a_hundred_who_wait_are_served_in_order_and_none_is_forgotten() {
    let executor = Executor::builder().concurrency(1).capacity(1).build();
    let order = Arc::new(Mutex::new(Vec::new()));
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    let mut waiting = Vec::new();
    for n in 0..100 {
        let mut place = Box::pin(executor.reserve());
        assert!(poll!(&mut place).is_pending());
        let order = order.clone();
        waiting.push(tokio::spawn(async move {
            let permit = place.await.expect("open");
            order.lock().unwrap().push(n);
            permit.submit(|| async {});
        }));
    }
    gate.add_permits(1);
    for one in waiting {
        one.await.expect("no panic");
    }
    executor.idle().await;
    assert_eq!(*order.lock().unwrap(), (0..100).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_room_is_told_that_there_will_be_none() {
    let executor = Executor::builder().capacity(1).build();
    executor.submit(std::future::pending::<()>);
    let mut place = Box::pin(executor.reserve());
    assert!(poll!(&mut place).is_pending());
    let report = executor.drain(Duration::from_secs(1)).await;
    assert!(report.timed_out);
    let closed = place.await.expect_err("closed");
    assert!(closed.to_string().contains("drained"));
    assert!(executor.reserve().await.is_err());
    let late = executor.submit(|| async {});
    assert_eq!(late.rejection(), Some(RejectReason::Closed));
    assert_eq!(executor.snapshot().rejected_closed, 1);
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_told_when_a_served_waiter_leaves_with_the_last_place() {
    let executor = Executor::builder().capacity(1).build();
    let held = executor.reserve().await.expect("open");
    let mut waiting = Box::pin(executor.reserve());
    assert!(poll!(&mut waiting).is_pending());
    drop(held);
    let drain = tokio::spawn({
        let executor = executor.clone();
        async move { executor.drain(LONG).await }
    });
    // The drain waits by now; the place that the waiter was given is the only one that is taken.
    tokio::task::yield_now().await;
    drop(waiting);
    let report = drain.await.expect("drained");
    assert!(!report.timed_out, "{report}");
    assert_eq!(report.took, Duration::ZERO);
}

// Overflow::DropOldest.

#[tokio::test]
async fn drop_oldest_makes_room_by_the_oldest_that_has_not_started() {
    let builder = Executor::builder().concurrency(1).blocking_concurrency(1);
    let executor = builder.capacity(4).overflow(Overflow::DropOldest).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate).name("runs"));
    running(&executor, 1).await;
    for name in ["a", "b", "c", "d", "e"] {
        assert!(
            executor.submit(gated(&gate).name(name)).is_accepted(),
            "{name}"
        );
    }
    // Not for the one that would rather have its task back, nor for the one that waits.
    assert!(executor.try_submit(gated(&gate)).is_err());
    assert!(poll!(&mut Box::pin(executor.reserve())).is_pending());
    let dropped = |executor: &Executor| {
        let letters = executor.dead_letters().list();
        assert!(letters.iter().all(|l| l.reason == DiscardReason::Overflow));
        letters.iter().map(|l| l.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(dropped(&executor), ["a", "b"]);
    let now = executor.snapshot();
    assert_eq!((now.outstanding, now.discarded, now.accepted), (4, 2, 6));

    gate.add_permits(4);
    executor.idle().await;
    assert_eq!(executor.snapshot().completed, 4);
    // What made room comes home by a replay.
    gate.add_permits(2);
    assert_eq!(executor.dead_letters().replay_where(|_| true).await, 2);
    executor.idle().await;
    assert_eq!(executor.snapshot().completed, 6);
}

#[tokio::test]
async fn drop_oldest_sees_the_blocking_lane_and_spares_what_runs() {
    let builder = Executor::builder().concurrency(1).blocking_concurrency(1);
    let executor = builder.capacity(3).overflow(Overflow::DropOldest).build();
    let gate = Arc::new(std::sync::Barrier::new(2));
    let held = gate.clone();
    executor.submit(Task::blocking(move || {
        held.wait();
    }));
    running(&executor, 1).await;
    for name in ["older", "newer", "newest"] {
        let task = Task::blocking(|| ()).name(name);
        assert!(executor.submit(task).is_accepted());
    }
    let letters = executor.dead_letters().list();
    let dropped: Vec<_> = letters.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(dropped, ["older"]);
    gate.wait();
    executor.idle().await;

    // Nothing but what runs: the new one is refused.
    let builder = Executor::builder().concurrency(1).capacity(1);
    let executor = builder.overflow(Overflow::DropOldest).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    running(&executor, 1).await;
    let refused = executor.submit(gated(&gate));
    assert_eq!(refused.rejection(), Some(RejectReason::Full));
    gate.add_permits(1);
    executor.idle().await;
}

// Case 24.

#[tokio::test]
async fn case_24_a_request_that_registers_ten_thousand_tasks_is_held_to_its_limit() {
    for overflow in [Overflow::Reject, Overflow::DropOldest] {
        let builder = Executor::builder().concurrency(1).capacity(200);
        let executor = builder.overflow(overflow).build();
        let gate = Arc::new(Semaphore::new(0));
        let greedy = gate.clone();
        let reasons = Arc::new(Mutex::new(Vec::new()));
        let seen = reasons.clone();
        let app = axum::Router::new()
            .route(
                "/greedy",
                get(move |Extension(defer): Extension<Defer>| async move {
                    for _ in 0..10_000 {
                        let handle = defer.run(gated(&greedy));
                        seen.lock().unwrap().push(handle.rejection());
                    }
                }),
            )
            .route(
                "/modest",
                get(|Extension(defer): Extension<Defer>| async move {
                    assert!(
                        defer
                            .run(Task::new(|| async {}).name("modest"))
                            .is_accepted()
                    );
                }),
            );
        let layer = DeferLayer::new().executor(executor.clone());
        let address = serve(app.layer(layer.max_tasks_per_request(50))).await;
        // A hundred that wait already: nobody's limit is another one's loss.
        for _ in 0..140 {
            executor.submit(gated(&gate));
        }
        assert_eq!(status(address, "/greedy").await, 200);
        assert_eq!(status(address, "/modest").await, 200);
        let reasons = std::mem::take(&mut *reasons.lock().unwrap());
        assert!(reasons[..50].iter().all(Option::is_none));
        let limit = Some(RejectReason::RequestLimit);
        assert!(reasons[50..].iter().all(|reason| *reason == limit));
        gate.add_permits(10_000);
        let report = executor.drain(LONG).await;
        assert!(report.is_clean(), "{overflow:?}: {report}");
        let now = executor.snapshot();
        assert_eq!((now.completed, now.rejected_request_limit), (191, 9_950));
        assert_eq!(now.discarded, 0, "{overflow:?}");
    }
}

// The warning.

#[tokio::test(start_paused = true)]
async fn the_first_rejection_and_then_one_a_minute_say_what_fills_the_capacity() {
    let log = global_log();
    let executor = Executor::builder().concurrency(1).capacity(4).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate).name("hog"));
    running(&executor, 1).await;
    executor.submit(gated(&gate).name("filler"));
    executor.submit(gated(&gate).name("filler"));
    let permit = executor.reserve().await.expect("room");
    let refuse = || assert!(!executor.submit(gated(&gate).name("refused")).is_accepted());
    let warnings =
        || log.lines(|line| line.field("level") == "WARN" && line.field("task.name") == "refused");
    for _ in 0..100 {
        refuse();
    }
    let first = warnings();
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].field("reason"), "full");
    assert_eq!(first[0].field("capacity"), "4");
    assert!(first[0].field("task.location").contains("admission.rs"));
    assert_eq!(
        first[0].field("filling"),
        "2 queued (filler × 2); 1 running (hog × 1); 1 reserved or held by responses under way"
    );
    tokio::time::sleep(Duration::from_secs(59)).await; // paused time
    refuse();
    assert_eq!(warnings().len(), 1);
    tokio::time::sleep(Duration::from_secs(1)).await; // paused time
    refuse();
    refuse();
    let second = warnings();
    assert_eq!(second.len(), 2);
    assert_eq!(second[1].field("rejected_so_far"), "102");
    drop(permit);
    gate.add_permits(3);
    // Another reason has a minute of its own.
    executor.drain(LONG).await;
    refuse();
    let third = warnings();
    assert_eq!(third.len(), 3);
    assert_eq!(third[2].field("reason"), "closed");
    // Each is said at the level of chatter, and counted.
    assert_eq!(log.about("refused", "task rejected"), 104);
    assert_eq!(executor.snapshot().rejected_full, 103);
}

#[tokio::test]
async fn what_was_accepted_and_is_cancelled_by_its_handle_is_named_in_the_drains_report() {
    let executor = Executor::builder().concurrency(1).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    let second = executor.submit(gated(&gate).name("second"));
    running(&executor, 1).await;
    let drain = tokio::spawn({
        let executor = executor.clone();
        async move { executor.drain(LONG).await }
    });
    tokio::task::yield_now().await;
    assert!(second.cancel());
    gate.add_permits(1);
    let report = drain.await.expect("drained");
    assert_eq!((report.completed, report.cancelled), (1, 1));
    assert_eq!(report.unfinished[0].name, "second");
    assert_eq!(report.unfinished[0].state, UnfinishedState::TakenBack);
    assert!(report.is_clean(), "it was its own wish");
}
