//! Retries: how often, when, for how long, and what they cost (CASES.md 26, 27).
#![expect(
    clippy::disallowed_methods,
    reason = "the tests measure paused time, and one compares with what users do by hand"
)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tower_defer::{
    DiscardReason, Executor, Jitter, Retry, RetryBudget, Task, TaskContext, TaskError,
};

const S: Duration = Duration::from_secs(1);

/// Timers go off within a millisecond.
fn about(found: Duration, expected: f64) -> bool {
    (expected..expected + 0.01).contains(&found.as_secs_f64())
}

/// When an attempt started, its number, and how the last one ended.
type Start = (Instant, u32, Option<String>);

/// A task that notes when each of its attempts starts, and what it was told; the first `failures` fail.
fn noting(log: &Arc<Mutex<Vec<Start>>>, failures: u32) -> Task {
    let log = log.clone();
    Task::with_context(move |context: TaskContext| {
        let last = context.last_error().map(str::to_owned);
        log.lock()
            .unwrap()
            .push((Instant::now(), context.attempt(), last));
        let attempt = context.attempt();
        async move {
            if attempt <= failures {
                return Err(format!("failure {attempt}"));
            }
            Ok(())
        }
    })
}

#[tokio::test(start_paused = true)]
async fn case_26_fails_twice_then_succeeds() {
    let executor = Executor::builder().concurrency(1).build();
    let log = Arc::default();
    let task = noting(&log, 2).retry(Retry::exponential(8).jitter(Jitter::None));
    executor.submit(task);
    // Waiting holds no slot: the only one is free for another task meanwhile.
    let other = Arc::new(AtomicBool::new(false));
    executor.submit(Task::with(other.clone(), |other| async move {
        tokio::time::sleep(Duration::from_millis(100)).await; // paused time
        other.store(true, Ordering::SeqCst);
    }));
    tokio::time::sleep(Duration::from_millis(200)).await; // paused time
    let now = executor.snapshot();
    assert_eq!((now.waiting, now.running.len()), (1, 0));
    assert!(other.load(Ordering::SeqCst));
    executor.idle().await;
    let log = log.lock().unwrap();
    let told: Vec<_> = log
        .iter()
        .map(|(_, n, last)| (*n, last.as_deref()))
        .collect();
    assert_eq!(
        told,
        [(1, None), (2, Some("failure 1")), (3, Some("failure 2"))]
    );
    assert!(about(log[1].0 - log[0].0, 0.5), "{log:?}");
    assert!(about(log[2].0 - log[1].0, 1.0), "{log:?}");
    assert_eq!(executor.snapshot().retries, 2);
}

#[tokio::test(start_paused = true)]
async fn case_26_delays_grow_and_are_jittered() {
    // Budgets are for other tests.
    let builder = Executor::builder().retry_budget(RetryBudget::new(1_000_000, 1_000_000));
    let executor = builder.concurrency(1000).build();
    let logs: Vec<Arc<Mutex<Vec<_>>>> = (0..300).map(|_| Arc::default()).collect();
    for log in &logs {
        executor.submit(noting(log, 3).retry(Retry::exponential(8)));
    }
    executor.idle().await;
    for (gap, most) in [(0, 0.5), (1, 1.0), (2, 2.0)] {
        let gaps: Vec<f64> = logs
            .iter()
            .map(|log| {
                let log = log.lock().unwrap();
                (log[gap + 1].0 - log[gap].0).as_secs_f64()
            })
            .collect();
        assert!(gaps.iter().all(|gap| *gap <= most + 0.01));
        // Full jitter: the mean is half; 300 draws stray by 10 % once in 10⁹ runs.
        let mean = gaps.iter().sum::<f64>() / 300.0 / most;
        assert!((0.4..0.6).contains(&mean), "{mean} of {most} s");
    }
}

#[tokio::test(start_paused = true)]
async fn case_26_fatal_stops_at_once_and_retry_after_is_obeyed() {
    let executor = Executor::new();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let task = Task::with(starts.clone(), |starts| async move {
        starts.lock().unwrap().push(Instant::now());
        match starts.lock().unwrap().len() {
            1 => Err(TaskError::retry_after(30 * S, "too many requests")),
            _ => Err(TaskError::fatal("no such user")),
        }
    });
    executor.submit(task);
    executor.idle().await;
    let starts = starts.lock().unwrap();
    assert_eq!(starts.len(), 2);
    assert!(about(starts[1] - starts[0], 30.0));
    let letter = &executor.dead_letters().list()[0];
    assert_eq!(letter.reason, DiscardReason::Fatal);
    let errors: Vec<_> = letter.history.iter().map(|r| &*r.error).collect();
    assert_eq!(errors, ["too many requests", "no such user"]);
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_bounded_by_give_up_after_and_by_max_attempts() {
    let executor = Executor::new();
    let begun = Instant::now();
    for delay in [Duration::MAX, 3650 * 24 * 3600 * S, 601 * S] {
        let ask = move || async move { Err::<(), _>(TaskError::retry_after(delay, "later")) };
        executor.submit(Task::new(ask));
    }
    let eager = || async { Err::<(), _>(TaskError::retry_after(Duration::ZERO, "now")) };
    executor.submit(Task::new(eager).retry(Retry::exponential(5)));
    executor.idle().await;
    assert!(begun.elapsed() < S, "none of them waited");
    let letters = executor.dead_letters().list();
    let reasons: Vec<_> = letters
        .iter()
        .map(|l| (l.reason, l.history.len()))
        .collect();
    let gave_up = (DiscardReason::GaveUp, 1);
    let attempts = (DiscardReason::Attempts, 5);
    assert_eq!(reasons, [gave_up, gave_up, gave_up, attempts]);
}

#[tokio::test(start_paused = true)]
async fn only_the_errors_that_the_predicate_admits_are_retried() {
    let executor = Executor::new();
    let is_io = |e: &TaskError| e.get_ref().is::<std::io::Error>();
    for io in [true, false] {
        let task = Task::new(move || async move {
            match io {
                true => Err(TaskError::new(std::io::Error::other("disk"))),
                false => Err(TaskError::new("a bug")),
            }
        });
        executor.submit(task.retry(Retry::fixed(3, S).only_if(is_io)));
    }
    executor.idle().await;
    let letters = executor.dead_letters().list();
    let found: Vec<_> = letters
        .iter()
        .map(|l| (l.reason, l.history.len()))
        .collect();
    assert_eq!(
        found,
        [
            (DiscardReason::NotRetryable, 1),
            (DiscardReason::Attempts, 3)
        ]
    );
}

// give_up_after: a bound on the whole task.

#[tokio::test(start_paused = true)]
async fn give_up_after_ends_an_attempt_under_way() {
    let executor = Executor::new();
    let begun = Instant::now();
    // Fails at 4 s, starts again at 5 s, and would run on until 65 s.
    let task = Task::with_context(|context: TaskContext| async move {
        if context.attempt() == 1 {
            tokio::time::sleep(4 * S).await; // paused time
            return Err("slow failure");
        }
        std::future::pending().await
    });
    executor.submit(task.retry(Retry::fixed(9, S).give_up_after(10 * S)));
    executor.idle().await;
    assert!(about(begun.elapsed(), 10.0), "{:?}", begun.elapsed());
    let letter = &executor.dead_letters().list()[0];
    assert_eq!(letter.reason, DiscardReason::GaveUp);
    assert!(
        letter.error.starts_with("timed out after 4.99") || &*letter.error == "timed out after 5s"
    );
}

#[tokio::test(start_paused = true)]
async fn give_up_after_bounds_the_first_attempt_which_always_happens() {
    let executor = Executor::builder().concurrency(1).build();
    let starts = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    for _ in 0..2 {
        let task = Task::with(starts.clone(), |starts| async move {
            starts.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        });
        executor.submit(task.retry(Retry::exponential(9).give_up_after(10 * S)));
    }
    executor.idle().await;
    // The second was queued for all of its time, and has its one attempt all the same.
    assert_eq!(starts.load(Ordering::SeqCst), 2);
    assert!(about(begun.elapsed(), 20.0), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_was_queued_beyond_its_time_does_not_start() {
    let executor = Executor::builder().concurrency(1).build();
    let starts = Arc::new(AtomicUsize::new(0));
    let task = Task::with(starts.clone(), |starts| async move {
        starts.fetch_add(1, Ordering::SeqCst);
        Err::<(), _>("no")
    });
    executor.submit(task.retry(Retry::fixed(9, S).give_up_after(5 * S)));
    executor.submit(|| async {
        tokio::time::sleep(20 * S).await; // paused time
    });
    executor.idle().await;
    assert_eq!(starts.load(Ordering::SeqCst), 1);
    let letter = &executor.dead_letters().list()[0];
    assert_eq!(
        (letter.reason, &*letter.error),
        (DiscardReason::GaveUp, "no")
    );
}

// The budget.

#[tokio::test(start_paused = true)]
async fn the_budget_delays_and_never_discards_and_gives_up_on_time() {
    let builder = Executor::builder().retry_budget(RetryBudget::new(1, 2));
    let executor = builder.concurrency(100).build();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let begun = Instant::now();
    for _ in 0..12 {
        let task = Task::with((starts.clone(), Arc::new(AtomicUsize::new(0))), {
            |(starts, tries)| async move {
                if tries.fetch_add(1, Ordering::SeqCst) == 0 {
                    return Err("once");
                }
                starts.lock().unwrap().push(Instant::now());
                Ok(())
            }
        });
        let patience = Duration::from_millis(6500);
        executor.submit(task.retry(Retry::fixed(2, Duration::ZERO).give_up_after(patience)));
    }
    executor.idle().await;
    // Two at once, then one a second until 6.5 s; the other four had no token by then.
    let starts = starts.lock().unwrap();
    let at: Vec<u64> = starts.iter().map(|t| (*t - begun).as_secs()).collect();
    assert_eq!(at, [0, 0, 1, 2, 3, 4, 5, 6]);
    assert!(about(begun.elapsed(), 6.5), "{:?}", begun.elapsed());
    let letters = executor.dead_letters().list();
    assert_eq!(letters.len(), 4);
    assert!(
        letters
            .iter()
            .all(|l| l.reason == DiscardReason::GaveUp && l.history.len() == 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_short_patience_behind_a_long_one_gives_up_on_time_too() {
    let builder = Executor::builder().retry_budget(RetryBudget::new(1, 1));
    let executor = builder.concurrency(200).build();
    let fails = || async { Err::<(), _>("down") };
    let policy = Retry::fixed(2, Duration::ZERO);
    for _ in 0..100 {
        executor.submit(Task::new(fails).retry(policy.clone().give_up_after(600 * S)));
    }
    let brief = Task::new(fails).retry(policy.give_up_after(3 * S));
    executor.submit(brief.name("brief"));
    tokio::time::sleep(4 * S).await; // paused time
    let letters = executor.dead_letters().list();
    let brief = letters.iter().find(|l| l.name == "brief").expect("gave up");
    assert_eq!(
        (brief.reason, brief.history.len()),
        (DiscardReason::GaveUp, 1)
    );
    executor.idle().await;
    assert_eq!(executor.dead_letters().len(), 101);
}

#[tokio::test(start_paused = true)]
async fn case_27_ten_thousand_fail_within_a_second_and_come_home() {
    const MANY: usize = 10_000;
    let executor = Executor::builder()
        .concurrency(64)
        .capacity(MANY + 100)
        .build();
    let up = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(Mutex::new(Vec::new()));
    let begun = Instant::now();
    for _ in 0..MANY {
        let state = (up.clone(), calls.clone());
        executor.submit(Task::with(state, |(up, calls)| async move {
            if !up.load(Ordering::SeqCst) {
                return Err("the dependency is down");
            }
            calls.lock().unwrap().push(Instant::now());
            Ok(())
        }));
    }
    while executor.snapshot().retries < MANY as u64 {
        tokio::task::yield_now().await;
    }
    assert!(begun.elapsed() < S, "all have failed within a second");
    up.store(true, Ordering::SeqCst);
    // Another task is not starved meanwhile.
    tokio::time::sleep(20 * S).await; // paused time
    assert!(executor.snapshot().waiting > MANY as u64 / 2);
    let other = Arc::new(tokio::sync::Notify::new());
    executor.submit(Task::with(other.clone(), |other| async move {
        other.notify_one()
    }));
    let waited = Instant::now();
    other.notified().await;
    assert!(waited.elapsed() < Duration::from_millis(10));

    executor.idle().await;
    let now = executor.snapshot();
    assert_eq!((now.completed, now.discarded), (MANY as u64 + 1, 0));
    // The budget spread them: the burst, and then a hundred a second.
    let calls = calls.lock().unwrap();
    for window in calls.windows(1000) {
        let took = window[999] - window[0];
        assert!(
            took >= Duration::from_millis(4_980),
            "1,000 within {took:?}"
        );
    }
    assert!(about(*calls.last().expect("some") - begun, 95.0) || begun.elapsed() < 101 * S);
}

#[tokio::test(start_paused = true)]
async fn case_27_what_gave_up_comes_home_by_a_replay_of_its_group() {
    let builder = Executor::builder().retry_budget(RetryBudget::new(10, 10));
    let executor = builder.capacity(2000).build();
    let up = Arc::new(AtomicBool::new(false));
    for n in 0..1000 {
        let task = Task::with(up.clone(), move |up| async move {
            match up.load(Ordering::SeqCst) {
                true => Ok(()),
                false => Err(format!("connect 10.0.0.7:{}: refused", 4000 + n)),
            }
        });
        executor.submit(
            task.name("mail")
                .retry(Retry::exponential(3).give_up_after(30 * S)),
        );
    }
    executor.idle().await;
    up.store(true, Ordering::SeqCst);
    let groups = executor.dead_letters().groups();
    assert_eq!(groups.len(), 1, "{groups:?}");
    let group = &groups[0];
    assert_eq!((group.count, group.name.as_str()), (1000, "mail"));
    assert_eq!(group.error, "connect #: refused");
    let replayed = executor
        .dead_letters()
        .replay_where(|l| l.name == group.name)
        .await;
    assert_eq!(replayed, 1000);
    executor.idle().await;
    let now = executor.snapshot();
    assert_eq!(
        (now.completed, now.dead_letters, now.outstanding),
        (1000, 0, 0)
    );
}

// The cost of waiting.

/// Prints what 100,000 waiting retries take, beside as many sleeping tasks. It asserts what is exact:
/// each comes home, once, and the timer looks as rarely as there are due times.
#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_waiting_retries_stay_cheap() {
    const MANY: usize = 100_000;
    let builder = Executor::builder().retry_budget(RetryBudget::new(1_000_000_000, u32::MAX));
    let executor = builder.capacity(MANY).build();
    let tries = Arc::new(AtomicUsize::new(0));
    let real = std::time::Instant::now();
    for n in 0..MANY {
        let wait = Duration::from_millis(1000 + (n as u64 * 7919) % 60_000);
        let task = Task::with(tries.clone(), |tries| async move {
            match tries.fetch_add(1, Ordering::SeqCst) {
                first if first < MANY => Err("later"),
                _ => Ok(()),
            }
        });
        executor.submit(task.retry(Retry::fixed(2, wait)));
    }
    while executor.snapshot().retries < MANY as u64 {
        tokio::task::yield_now().await;
    }
    assert_eq!(executor.snapshot().waiting, MANY as u64);
    let (failed, real) = (real.elapsed(), std::time::Instant::now());
    executor.idle().await;
    println!(
        "100,000 retries: {failed:?} to fail and wait, {:?} to come home",
        real.elapsed()
    );
    assert_eq!(tries.load(Ordering::SeqCst), 2 * MANY);
    assert_eq!(executor.snapshot().completed, MANY as u64);

    let real = std::time::Instant::now();
    let tasks: Vec<_> = (0..MANY)
        .map(|n| {
            let wait = Duration::from_millis(1000 + (n as u64 * 7919) % 60_000);
            tokio::spawn(async move {
                tokio::time::sleep(wait).await; // paused time
            })
        })
        .collect();
    tokio::task::yield_now().await;
    let (slept, real) = (real.elapsed(), std::time::Instant::now());
    for task in tasks {
        task.await.expect("no panic");
    }
    println!(
        "100,000 sleeping tasks: {slept:?} to spawn and sleep, {:?} to wake",
        real.elapsed()
    );
}
