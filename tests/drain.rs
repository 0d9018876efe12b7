//! The end: finished or named, by a deadline (CASES.md 29, 30).
#![expect(
    clippy::disallowed_methods,
    reason = "the tests play the server, which spawns, and measure paused time"
)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;
use tower_defer::{
    Defer, DeferLayer, DrainReport, Executor, RejectReason, Retry, Task, TaskError, UnfinishedState,
};

const LONG: Duration = Duration::from_secs(30);
const S: Duration = Duration::from_secs(1);

fn gated(gate: &Arc<Semaphore>) -> Task {
    Task::with(gate.clone(), |gate| async move {
        gate.acquire().await.expect("never closed").forget();
    })
}

fn states(report: &DrainReport) -> Vec<(&str, UnfinishedState)> {
    let mut states: Vec<_> = report
        .unfinished
        .iter()
        .map(|task| (task.name.as_str(), task.state))
        .collect();
    states.sort_by_key(|(name, _)| *name);
    states
}

async fn until(is_so: impl Fn() -> bool) {
    while !is_so() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn case_29_a_drain_waits_for_all_that_was_accepted_and_for_what_that_registers() {
    let executor = Executor::builder().concurrency(2).build();
    let ran = Arc::new(Mutex::new(Vec::new()));
    let note = |name: &'static str| {
        let ran = ran.clone();
        move || ran.lock().unwrap().push((name, Instant::now()))
    };
    let begun = Instant::now();

    // One waits for a retry that is an hour away.
    let (tries, noted) = (Arc::new(AtomicUsize::new(0)), note("retried"));
    let retried = Task::new(move || {
        let first = tries.fetch_add(1, Ordering::SeqCst) == 0;
        noted();
        async move { if first { Err("later") } else { Ok(()) } }
    });
    let policy = Retry::fixed(9, 3600 * S).give_up_after(9000 * S);
    executor.submit(retried.retry(policy.clone()));
    // One fails whatever it is given: its last chance is its last.
    let last = Task::new(|| async { Err::<(), _>("always") }).name("hopeless");
    executor.submit(last.retry(policy));
    until(|| executor.snapshot().waiting == 2).await;

    // One runs, and registers another that registers another.
    let (inner, noted, nested) = (executor.clone(), note("nested"), note("nested twice"));
    let (noted, nested) = (Arc::new(noted), Arc::new(nested));
    executor.submit(Task::new(move || {
        let (inner, noted, nested) = (inner.clone(), noted.clone(), nested.clone());
        async move {
            tokio::time::sleep(S).await; // the task's own work
            let again = inner.clone();
            inner.submit(Task::new(move || {
                noted();
                let nested = nested.clone();
                again.submit(Task::new(move || {
                    nested();
                    async {}
                }));
                async {}
            }));
        }
    }));
    // Some are queued behind it.
    for _ in 0..3 {
        executor.submit(|| async {
            tokio::time::sleep(S).await; // the task's own work
        });
    }
    // And a request is in flight that will register one more.
    let (answer, answered) = oneshot::channel::<()>();
    let answered = Arc::new(Mutex::new(Some(answered)));
    let noted = note("of the request");
    let noted = Arc::new(noted);
    let service = tower::service_fn(move |request: http::Request<axum::body::Body>| {
        let answered = answered.lock().unwrap().take().expect("once");
        let noted = noted.clone();
        async move {
            let defer = Defer::from_extensions(request.extensions()).expect("layered");
            answered.await.expect("told");
            let handle = defer.run(Task::new(move || {
                noted();
                async {}
            }));
            assert!(
                handle.is_accepted(),
                "before the deadline nothing is refused"
            );
            Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
        }
    });
    let layer = DeferLayer::new().executor(executor.clone());
    let service = tower::Layer::layer(&layer, service);
    let request = http::Request::new(axum::body::Body::empty());
    let request = tokio::spawn(async move {
        drop(tower::ServiceExt::oneshot(service, request).await);
    });
    until(|| executor.snapshot().open_requests == 1).await;

    let drain = tokio::spawn({
        let executor = executor.clone();
        async move { executor.drain(100 * S).await }
    });
    tokio::time::sleep(10 * S).await; // paused time
    assert!(!drain.is_finished(), "a request is still in flight");
    answer.send(()).expect("it waits");
    request.await.expect("no panic");
    let report = drain.await.expect("no panic");

    let names: Vec<_> = ran.lock().unwrap().iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        [
            "retried",
            "retried",
            "nested",
            "nested twice",
            "of the request"
        ]
    );
    let (_, second) = ran.lock().unwrap()[1];
    assert!(second - begun < 2 * S, "its last attempt came at once");
    assert_eq!((report.completed, report.timed_out), (8, false), "{report}");
    assert_eq!((report.discarded, report.cancelled), (1, 0));
    assert_eq!(report.unfinished.len(), 1);
    let hopeless = &report.unfinished[0];
    assert_eq!(
        (hopeless.name.as_str(), hopeless.failed_attempts),
        ("hopeless", 2)
    );
    assert_eq!(hopeless.error.as_deref(), Some("always"));
    assert!(matches!(hopeless.state, UnfinishedState::Discarded(_)));
    assert!(!report.is_clean());

    // After a drain the executor still answers.
    assert_eq!(
        executor.submit(|| async {}).rejection(),
        Some(RejectReason::Closed)
    );
}

#[tokio::test(start_paused = true)]
async fn case_30_the_deadline_passes_and_what_never_started_is_told_from_what_was_interrupted() {
    let executor = Executor::builder().concurrency(1).build();
    let policy = Retry::fixed(9, 3600 * S).give_up_after(9000 * S);
    let fails = Task::new(|| async { Err::<(), _>("down") });
    executor.submit(fails.name("waiting").retry(policy));
    until(|| executor.snapshot().waiting == 1).await;
    executor.submit(Task::new(std::future::pending::<()>).name("interrupted"));
    until(|| executor.snapshot().running.len() == 1).await;
    executor.submit(Task::new(|| async {}).name("queued"));
    let begun = Instant::now();
    let report = executor.drain(5 * S).await;
    assert_eq!(begun.elapsed().as_secs(), 5);
    assert_eq!(
        states(&report),
        [
            ("interrupted", UnfinishedState::Interrupted),
            ("queued", UnfinishedState::NeverStarted),
            ("waiting", UnfinishedState::Waiting),
        ]
    );
    let waiting = report
        .unfinished
        .iter()
        .find(|t| t.name == "waiting")
        .unwrap();
    assert_eq!(
        (waiting.failed_attempts, waiting.error.as_deref()),
        (1, Some("down"))
    );
    assert_eq!((report.cancelled, report.timed_out), (3, true));
    let text = report.to_string();
    assert!(text.contains("the deadline came first") && text.contains("tests/drain.rs"));
    let now = executor.snapshot();
    assert_eq!(
        (now.cancelled, now.outstanding, now.running.len()),
        (3, 0, 0)
    );
}

#[test]
fn case_30_what_cannot_be_stopped_is_named_and_counted_once() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let executor = Executor::builder().blocking_concurrency(1).build();
    let release = Arc::new(AtomicBool::new(false));
    let spin = |release: &Arc<AtomicBool>| {
        while !release.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    };
    let report = runtime.block_on(async {
        let gate = release.clone();
        let never_yields = Task::new(move || {
            let gate = gate.clone();
            async move { spin(&gate) }
        });
        executor.submit(never_yields.name("never yields"));
        let gate = release.clone();
        executor.submit(Task::blocking(move || spin(&gate)).name("blocks"));
        executor.submit(Task::blocking(|| ()).name("queued behind it"));
        until(|| executor.snapshot().running.len() == 2).await;
        tokio::time::timeout(LONG, executor.drain(Duration::from_millis(1)))
            .await
            .expect("it ends")
    });
    assert_eq!(
        states(&report),
        [
            ("blocks", UnfinishedState::StillRunning),
            ("never yields", UnfinishedState::StillRunning),
            ("queued behind it", UnfinishedState::NeverStarted),
        ]
    );
    let law = || {
        let now = executor.snapshot();
        (
            now.accepted,
            now.cancelled,
            now.outstanding,
            now.running.len(),
        )
    };
    assert_eq!(law(), (3, 3, 0, 0));
    // They end after all, and are not counted again.
    release.store(true, Ordering::SeqCst);
    drop(runtime);
    assert_eq!(law(), (3, 3, 0, 0));
    assert_eq!(executor.snapshot().completed, 0);
}

#[test]
fn case_30_a_dropped_runtime_never_panics_and_what_was_lost_with_it_is_counted() {
    for threads in [0, 2] {
        let runtime = match threads {
            0 => Builder::new_current_thread().enable_all().build(),
            n => Builder::new_multi_thread()
                .worker_threads(n)
                .enable_all()
                .build(),
        }
        .unwrap();
        let executor = Executor::builder().concurrency(4).build();
        runtime.block_on(async {
            for _ in 0..10 {
                executor.submit(std::future::pending::<()>);
            }
            let fails = Task::new(|| async { Err::<(), _>("no") });
            until(|| executor.snapshot().running.len() == 4).await;
            executor.submit(fails);
        });
        drop(runtime);
        let now = executor.snapshot();
        assert_eq!((now.cancelled, now.queued, now.outstanding), (4, 7, 7));
        assert_eq!((now.running.len(), now.accepted), (0, 11));
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_of_zero_cancels_at_once_and_an_empty_executor_is_clean() {
    let executor = Executor::builder().concurrency(1).build();
    executor.submit(Task::new(std::future::pending::<()>).name("a"));
    executor.submit(Task::new(|| async {}).name("b"));
    let report = executor.drain(Duration::ZERO).await;
    assert_eq!((report.cancelled, report.timed_out), (2, true), "{report}");
    assert_eq!(executor.snapshot().outstanding, 0);

    let report = Executor::new().drain(Duration::ZERO).await;
    assert!(report.is_clean() && !report.timed_out);
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_idempotent_and_may_be_awaited_by_several() {
    let executor = Executor::builder().concurrency(1).build();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    let drains: Vec<_> = [5, 7, 90]
        .map(|secs| {
            let executor = executor.clone();
            tokio::spawn(async move { executor.drain(secs * S).await })
        })
        .into();
    tokio::time::sleep(2 * S).await; // paused time
    gate.add_permits(1);
    for drain in drains {
        let report = drain.await.expect("no panic");
        assert_eq!((report.completed, report.timed_out), (1, false));
        assert_eq!(report.took.as_secs(), 2);
    }
    tokio::time::sleep(60 * S).await; // paused time
    let again = executor.drain(S).await;
    assert_eq!(
        (again.completed, again.took.as_secs()),
        (1, 2),
        "the same report"
    );
}

#[tokio::test(start_paused = true)]
async fn of_several_drains_the_earliest_deadline_holds_for_all() {
    let executor = Executor::new();
    executor.submit(std::future::pending::<()>);
    let begun = Instant::now();
    let later = tokio::spawn({
        let executor = executor.clone();
        async move { executor.drain(90 * S).await }
    });
    tokio::task::yield_now().await;
    let earlier = executor.drain(3 * S).await;
    let later = later.await.expect("no panic");
    assert_eq!(begun.elapsed().as_secs(), 3);
    for report in [earlier, later] {
        assert_eq!((report.cancelled, report.timed_out), (1, true));
        assert_eq!(report.unfinished.len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_drain_leaves_the_executor_open() {
    let executor = Executor::new();
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(gated(&gate));
    assert!(tokio::time::timeout(S, executor.drain(LONG)).await.is_err());
    assert!(executor.submit(gated(&gate)).is_accepted());
    gate.add_permits(2);
    let report = executor.drain(LONG).await;
    assert_eq!((report.completed, report.timed_out), (2, false));
}

#[test]
fn a_task_that_drains_its_own_executor_ends_with_the_deadline() {
    for threads in [0, 2] {
        let runtime = match threads {
            0 => Builder::new_current_thread().enable_all().build(),
            n => Builder::new_multi_thread()
                .worker_threads(n)
                .enable_all()
                .build(),
        }
        .unwrap();
        runtime.block_on(async {
            let executor = Executor::new();
            let inner = executor.clone();
            executor.submit(Task::with(inner, |executor| async move {
                executor.drain(Duration::from_millis(20)).await;
            }));
            tokio::time::timeout(LONG, executor.idle())
                .await
                .expect("it ends");
            let now = executor.snapshot();
            assert_eq!((now.cancelled, now.outstanding), (1, 0));
            let report = executor.drain(LONG).await;
            assert_eq!(report.unfinished[0].state, UnfinishedState::Interrupted);
        });
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_running_task_registers_after_the_deadline_is_refused_visibly() {
    let executor = Executor::new();
    let (told, told_again) = (Arc::new(Notify::new()), Arc::new(Mutex::new(None)));
    let state = (executor.clone(), told.clone(), told_again.clone());
    let outside = tokio::spawn(async move {
        let (executor, told, answer) = state;
        told.notified().await;
        *answer.lock().unwrap() = executor.submit(|| async {}).rejection();
    });
    executor.submit(std::future::pending::<()>);
    executor.drain(S).await;
    told.notify_one();
    outside.await.expect("no panic");
    assert_eq!(*told_again.lock().unwrap(), Some(RejectReason::Closed));
    assert_eq!(executor.snapshot().rejected_closed, 1);
}

#[tokio::test(start_paused = true)]
async fn idle_waits_for_all_and_closes_nothing() {
    let executor = Executor::builder().concurrency(1).build();
    tokio::time::timeout(S, executor.idle())
        .await
        .expect("nothing is outstanding");
    for fails in [true, false, true] {
        executor.submit(Task::new(move || async move {
            tokio::time::sleep(S).await; // the task's own work
            if fails {
                Err(TaskError::fatal("no"))
            } else {
                Ok(())
            }
        }));
    }
    let begun = Instant::now();
    let (a, b) = tokio::join!(
        async {
            executor.idle().await;
            begun.elapsed()
        },
        async {
            executor.idle().await;
            begun.elapsed()
        },
    );
    assert_eq!((a.as_secs(), b.as_secs()), (3, 3));
    assert!(executor.submit(|| async {}).is_accepted());
    executor.idle().await;
    assert_eq!(executor.snapshot().completed, 2);
}

/// Ends, failures and registrations race with the deadline; whoever wins, each task has one end.
#[test]
fn the_law_holds_when_a_deadline_falls_into_the_middle_of_everything() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for round in 0..100 {
            let executor = Executor::builder().concurrency(8).capacity(64).build();
            let stop = Arc::new(AtomicBool::new(false));
            let feeders: Vec<_> = (0..2)
                .map(|_| {
                    let (executor, stop) = (executor.clone(), stop.clone());
                    tokio::spawn(async move {
                        let mut n = 0_u32;
                        while !stop.load(Ordering::SeqCst) {
                            n += 1;
                            let kind = n % 5;
                            let task = Task::new(move || async move {
                                match kind {
                                    0 => Err("again"),
                                    1 => {
                                        tokio::task::yield_now().await;
                                        Ok(())
                                    }
                                    2 => std::future::pending().await,
                                    _ => Ok(()),
                                }
                            });
                            let blocking = n % 50 == 7;
                            let handle = if blocking {
                                executor.submit(Task::blocking(std::thread::yield_now))
                            } else {
                                executor.submit(task.retry(Retry::fixed(2, Duration::ZERO)))
                            };
                            if n % 7 == 0 {
                                handle.cancel();
                            }
                            tokio::task::yield_now().await;
                        }
                    })
                })
                .collect();
            until(|| executor.snapshot().accepted > 20).await;
            let within = Duration::from_micros(round * 20);
            let report = executor.drain(within).await;
            let at_the_report = executor.snapshot();
            stop.store(true, Ordering::SeqCst);
            for feeder in feeders {
                feeder.await.expect("no panic");
            }
            let now = executor.snapshot();
            assert_eq!(now.outstanding, 0, "{report}\n{now:?}");
            assert_eq!(
                (now.reserved, now.queued, now.waiting),
                (0, 0, 0),
                "{now:?}"
            );
            assert_eq!(
                now.accepted,
                now.completed + now.discarded + now.skipped + now.cancelled
            );
            assert_eq!(at_the_report.accepted, now.accepted, "closed is closed");
            assert_eq!(at_the_report.cancelled, now.cancelled, "named once");
        }
    });
}
