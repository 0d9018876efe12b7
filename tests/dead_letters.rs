//! Tasks that failed for good: kept, grouped, replayed, lost with a word (issue: dead letters).
#![expect(
    clippy::disallowed_methods,
    reason = "the tests measure paused time and spawn what runs beside"
)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower_defer::{
    Defer, DeferLayer, DiscardReason, End, Executor, RejectReason, ReplayError, Retry, Task,
    TaskContext, TaskError, When,
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

/// Fails for good while `up` is not set; notes the attempts that it makes.
fn fails(up: &Arc<AtomicBool>, attempts: &Arc<Mutex<Vec<u32>>>) -> Task {
    let (up, attempts) = (up.clone(), attempts.clone());
    Task::with_context(move |context: TaskContext| {
        attempts.lock().unwrap().push(context.attempt());
        let is_up = up.load(Ordering::SeqCst);
        async move { if is_up { Ok(()) } else { Err("down") } }
    })
}

#[tokio::test(start_paused = true)]
async fn a_replayed_task_runs_as_new_and_keeps_its_identity_and_its_history() {
    let executor = Executor::new();
    let (up, attempts) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let task = fails(&up, &attempts).name("kept");
    let policy = Retry::fixed(3, Duration::from_secs(1)).give_up_after(Duration::from_secs(5));
    let id = executor.submit(task.retry(policy)).id().expect("accepted");
    executor.idle().await;
    let first = executor.dead_letters().list()[0].clone();
    assert_eq!((first.id, first.history.len()), (id, 3));
    assert_eq!(
        (first.reason, &*first.error),
        (DiscardReason::Attempts, "down")
    );
    assert!(first.first_failure() <= first.last_failure());
    assert!(first.last_failure() <= first.discarded_at);
    assert!(first.replayable && first.location.file().ends_with("dead_letters.rs"));

    // Far beyond its give_up_after, which is counted anew.
    tokio::time::sleep(Duration::from_secs(60)).await; // paused time
    assert_eq!(executor.dead_letters().replay(id), Ok(()));
    assert_eq!(
        executor.dead_letters().replay(id),
        Err(ReplayError::NotFound)
    );
    executor.idle().await;
    assert_eq!(*attempts.lock().unwrap(), [1, 2, 3, 1, 2, 3]);
    let second = executor.dead_letters().list()[0].clone();
    assert_eq!((second.id, second.history.len()), (id, 6));
    let numbers: Vec<u32> = second.history.iter().map(|r| r.attempt).collect();
    assert_eq!(numbers, [1, 2, 3, 1, 2, 3]);
    assert_eq!(second.first_failure(), first.first_failure());

    up.store(true, Ordering::SeqCst);
    assert_eq!(executor.dead_letters().replay(id), Ok(()));
    executor.idle().await;
    let now = executor.snapshot();
    assert_eq!((now.completed, now.discarded, now.replayed), (1, 2, 2));
    assert_eq!((now.accepted, now.dead_letters), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn the_history_is_bounded_over_all_replays() {
    let executor = Executor::new();
    let (up, attempts) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let task = fails(&up, &attempts).retry(Retry::fixed(7, Duration::ZERO));
    let id = executor.submit(task).id().expect("accepted");
    executor.idle().await;
    let first = executor.dead_letters().list()[0].history[0].at;
    for _ in 0..4 {
        executor.dead_letters().replay(id).expect("there is one");
        executor.idle().await;
    }
    let letter = &executor.dead_letters().list()[0];
    let numbers: Vec<u32> = letter.history.iter().map(|r| r.attempt).collect();
    // The first one, and the latest fifteen.
    let latest = [7, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7];
    assert_eq!(numbers, [&[1], &latest[..]].concat());
    assert_eq!(letter.first_failure(), first);
}

#[tokio::test]
async fn what_falls_out_is_the_oldest_counted_and_logged() {
    let log = global_log();
    let executor = Executor::builder().dead_letters(2).build();
    for name in ["falls-1", "falls-2", "stays-1", "stays-2"] {
        executor.submit(Task::new(|| async { Err::<(), _>(TaskError::fatal("no")) }).name(name));
        executor.idle().await;
    }
    let letters = executor.dead_letters();
    let names: Vec<_> = letters.list().iter().map(|l| l.name.clone()).collect();
    assert_eq!(names, ["stays-1", "stays-2"]);
    let now = executor.snapshot();
    assert_eq!(
        (now.discarded, now.dead_letters, now.dead_letters_lost),
        (4, 2, 2)
    );
    for (name, lost) in [("falls-1", 1), ("falls-2", 1), ("stays-1", 0)] {
        assert_eq!(log.about(name, "dead letter lost"), lost, "{name}");
    }

    let none = Executor::builder().dead_letters(0).build();
    none.submit(Task::new(|| async { Err::<(), _>(TaskError::fatal("no")) }).name("never-kept"));
    none.idle().await;
    assert!(none.dead_letters().is_empty());
    assert_eq!(none.snapshot().dead_letters_lost, 1);
    assert_eq!(log.about("never-kept", "dead letter lost"), 1);
}

#[tokio::test]
async fn the_hook_sees_each_one_as_it_is_born_and_may_use_the_executor() {
    let born = Arc::new(Mutex::new(Vec::new()));
    let seen = born.clone();
    let held: Arc<Mutex<Option<Executor>>> = Arc::default();
    let inside = held.clone();
    let executor = Executor::builder()
        .on_dead_letter(move |letter| {
            seen.lock()
                .unwrap()
                .push((letter.name.clone(), letter.reason));
            let executor = inside.lock().unwrap().clone().expect("set");
            assert!(executor.snapshot().outstanding >= 1);
            executor.submit(Task::new(|| async {}).name("alert"));
        })
        .build();
    *held.lock().unwrap() = Some(executor.clone());
    executor.submit(Task::new(|| async { Err::<(), _>(TaskError::fatal("no")) }).name("one"));
    executor.idle().await;
    assert_eq!(
        *born.lock().unwrap(),
        [("one".to_owned(), DiscardReason::Fatal)]
    );
    assert_eq!(executor.snapshot().completed, 1);
    *held.lock().unwrap() = None;
}

#[tokio::test]
async fn by_groups_by_filter_and_discarded() {
    let executor = Executor::builder().concurrency(1).build();
    let fatal = |text: String| {
        Task::new(move || {
            let text = text.clone();
            async move { Err::<(), _>(TaskError::fatal(text)) }
        })
    };
    for user in 0..3 {
        executor.submit(fatal(format!("user {user} is gone")).name("mail"));
    }
    executor.submit(fatal("user 7 is gone".to_owned()).name("audit"));
    let spent = Task::once(async { Err::<(), _>(TaskError::fatal("spent")) });
    let spent = executor.submit(spent.name("once")).id().expect("accepted");
    executor.idle().await;
    let letters = executor.dead_letters();
    let groups: Vec<_> = letters
        .groups()
        .into_iter()
        .map(|g| (g.name, g.error, g.count))
        .collect();
    assert_eq!(
        groups,
        [
            ("mail".to_owned(), "user # is gone".to_owned(), 3),
            ("audit".to_owned(), "user # is gone".to_owned(), 1),
            ("once".to_owned(), "spent".to_owned(), 1),
        ]
    );
    // A future that was polled cannot run again: it stays, whoever asks.
    assert_eq!(letters.replay(spent), Err(ReplayError::Spent));
    assert_eq!(letters.replay_where(|l| l.name == "once").await, 0);
    assert_eq!(
        letters.replay_where(|l| l.error.contains("user 1 ")).await,
        1
    );
    executor.idle().await;
    assert_eq!(executor.snapshot().replayed, 1);
    assert_eq!(letters.len(), 5, "it failed again");
    assert_eq!(letters.discard_where(|l| l.name == "mail"), 3);
    assert!(letters.discard(spent) && !letters.discard(spent));
    assert_eq!(letters.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn replays_at_a_rate_and_stops_where_it_is_dropped() {
    let executor = Executor::new();
    let (up, starts) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(Mutex::new(Vec::new())),
    );
    for _ in 0..20 {
        let state = (up.clone(), starts.clone());
        executor.submit(Task::with(state, |(up, starts)| async move {
            if !up.load(Ordering::SeqCst) {
                return Err(TaskError::fatal("down"));
            }
            starts.lock().unwrap().push(Instant::now());
            Ok(())
        }));
    }
    executor.idle().await;
    up.store(true, Ordering::SeqCst);
    let letters = executor.dead_letters();
    let some = tokio::time::timeout(
        Duration::from_millis(990),
        letters.replay_where_at_rate(10, |_| true),
    );
    assert!(some.await.is_err());
    executor.idle().await;
    assert_eq!(letters.len(), 10, "the rest is where it was");
    let begun = Instant::now();
    assert_eq!(letters.replay_where_at_rate(10, |_| true).await, 10);
    executor.idle().await;
    assert!(begun.elapsed() >= Duration::from_millis(900));
    let starts = starts.lock().unwrap();
    for window in starts.windows(2) {
        assert!(window[1] - window[0] >= Duration::from_millis(90));
    }
}

#[tokio::test]
async fn a_replay_needs_room_and_waits_for_it_or_says_so() {
    let executor = Executor::builder().concurrency(1).capacity(1).build();
    let (up, attempts) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let mut ids = Vec::new();
    for _ in 0..3 {
        let task = fails(&up, &attempts).retry(Retry::never());
        ids.push(executor.submit(task).id().expect("room"));
        executor.idle().await;
    }
    up.store(true, Ordering::SeqCst);
    let gate = Arc::new(Semaphore::new(0));
    executor.submit(Task::with(gate.clone(), |gate| async move {
        gate.acquire().await.expect("open").forget();
    }));
    let letters = executor.dead_letters();
    let full = Err(ReplayError::Rejected(RejectReason::Full));
    assert_eq!(letters.replay(ids[0]), full);
    assert_eq!(letters.len(), 3);
    let all = tokio::spawn({
        let letters = letters.clone();
        async move { letters.replay_where(|_| true).await }
    });
    gate.add_permits(1);
    assert_eq!(all.await.expect("no panic"), 3);
    executor.idle().await;
    assert_eq!(executor.snapshot().completed, 4);

    let lost = executor.submit(Task::new(|| async { Err::<(), _>(TaskError::fatal("no")) }));
    executor.drain(LONG).await;
    let closed = Err(ReplayError::Rejected(RejectReason::Closed));
    assert_eq!(letters.replay(lost.id().expect("accepted")), closed);
    assert_eq!(letters.replay_where(|_| true).await, 0);
    assert_eq!(letters.len(), 1, "it stays");
}

#[tokio::test]
async fn a_dead_letter_keeps_what_became_of_its_response_also_for_its_replay() {
    let executor = Executor::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (up, asked) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let state = (seen.clone(), up.clone(), asked.clone());
    let service = tower::service_fn(move |request: http::Request<axum::body::Body>| {
        let (seen, up, asked) = state.clone();
        async move {
            let defer = Defer::from_extensions(request.extensions()).expect("layered");
            let task = Task::with_context(move |context: TaskContext| {
                let response = context.response().expect("it came from a request");
                seen.lock().unwrap().push((response.status, response.end));
                let is_up = up.load(Ordering::SeqCst);
                async move {
                    if is_up {
                        Ok(())
                    } else {
                        Err(TaskError::fatal("no"))
                    }
                }
            });
            defer.run(task.when(When::new(move |_| {
                asked.fetch_add(1, Ordering::SeqCst);
                true
            })));
            Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
        }
    });
    let layer = DeferLayer::new().executor(executor.clone());
    let service = tower::Layer::layer(&layer, service);
    let request = http::Request::new(axum::body::Body::empty());
    drop(tower::ServiceExt::oneshot(service, request).await);
    executor.idle().await;
    let letter = executor.dead_letters().list()[0].clone();
    let response = letter.response.as_ref().expect("kept");
    assert_eq!(response.status, Some(http::StatusCode::OK));
    assert_eq!(response.end, End::Complete);
    up.store(true, Ordering::SeqCst);
    executor
        .dead_letters()
        .replay(letter.id)
        .expect("there is room");
    executor.idle().await;
    let ok = (Some(http::StatusCode::OK), End::Complete);
    assert_eq!(*seen.lock().unwrap(), [ok, ok]);
    assert_eq!(asked.load(Ordering::SeqCst), 1, "its condition held once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_that_race_with_a_drain_are_run_or_stay() {
    for _ in 0..50 {
        let executor = Executor::builder().concurrency(4).build();
        let (up, attempts) = (Arc::new(AtomicBool::new(false)), Arc::default());
        for _ in 0..20 {
            executor.submit(fails(&up, &attempts).retry(Retry::never()));
        }
        executor.idle().await;
        up.store(true, Ordering::SeqCst);
        let replay = tokio::spawn({
            let letters = executor.dead_letters();
            async move { letters.replay_where(|_| true).await as u64 }
        });
        let report = executor.drain(LONG).await;
        let replayed = replay.await.expect("no panic");
        let now = executor.snapshot();
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!((now.replayed, now.completed), (replayed, replayed));
        assert_eq!(now.dead_letters, 20 - replayed);
        assert_eq!(now.outstanding, 0);
    }
}
