//! What an attack on the timer of the retries tried: a hundred thousand delays of every size, a clock that
//! jumps and one that goes back, and a drain in the middle of it.
#![expect(
    clippy::disallowed_methods,
    reason = "the tests measure paused time, and end runtimes"
)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, service_fn};
use tower_defer::{Defer, DeferLayer, Executor, Retry, RetryBudget, Task, TaskContext, TaskError};

const NS: Duration = Duration::from_nanos(1);
const MS: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The runtime's timer counts milliseconds, and so does ours: each rounds up.
const TICK: Duration = Duration::from_millis(2);

/// Nobody waits for anything but its time.
fn executor(tasks: usize) -> Executor {
    Executor::builder()
        .capacity(tasks)
        .concurrency(4)
        .retry_budget(RetryBudget::new(u32::MAX, u32::MAX))
        .retry(Retry::exponential(2).give_up_after(Duration::MAX))
        .build()
}

/// Spreads numbers; it need not be good.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 20) % bound
    }

    /// Of every size up to a day, and often near the border of a slot of some level.
    fn delay(&mut self) -> Duration {
        let border = MS * (1 << (6 * self.below(5))) * (1 + self.below(63) as u32);
        let delay = match self.below(8) {
            0 => Duration::ZERO,
            1 => NS,
            2 => border,
            3 => border + NS,
            4 => border - NS,
            5 => Duration::from_micros(self.below(5_000)),
            6 => Duration::from_millis(self.below(300_000)),
            _ => Duration::from_secs(self.below(24 * 3600)),
        };
        delay.min(DAY)
    }
}

/// When the first attempt failed and the second one began, for each task.
#[derive(Default)]
struct Seen(Mutex<Vec<Vec<Instant>>>);

impl Seen {
    /// Fails once, and is to be tried again after so long.
    fn task(self: &Arc<Self>, number: usize, delay: Duration) -> Task {
        let seen = self.clone();
        Task::with_context(move |context: TaskContext| {
            seen.0.lock().expect("not poisoned")[number].push(Instant::now());
            let first = context.attempt() == 1;
            async move {
                if first {
                    return Err(TaskError::retry_after(delay, "down"));
                }
                Ok(())
            }
        })
    }

    fn new(tasks: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![Vec::new(); tasks])))
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_hundred_thousand_retries_each_goes_off_once_and_at_its_time() {
    const TASKS: usize = 100_000;
    let executor = executor(TASKS);
    let seen = Seen::new(TASKS);
    let mut random = Random(11);
    let mut delays = Vec::new();
    for number in 0..TASKS {
        delays.push(random.delay());
        executor.submit(seen.task(number, delays[number]));
        if number % 1_000 == 0 {
            // Between the milliseconds, too.
            let pause = Duration::from_micros(random.below(30_000));
            sleep(pause).await; // paused time
        }
    }
    executor.idle().await;
    assert_eq!(executor.snapshot().retries, TASKS as u64);
    let seen = seen.0.lock().expect("not poisoned");
    for (attempts, delay) in seen.iter().zip(delays) {
        assert_eq!(attempts.len(), 2, "after {delay:?}");
        let waited = attempts[1] - attempts[0];
        assert!(
            waited >= delay && waited <= delay + TICK,
            "{waited:?} instead of {delay:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_over_days_loses_none_and_a_drain_takes_what_waits_for_ever() {
    const TASKS: usize = 2_000;
    let executor = executor(TASKS);
    let seen = Seen::new(TASKS);
    let mut random = Random(3);
    for number in 0..TASKS {
        let far = [DAY * 36_500, DAY * 400_000, Duration::MAX / 2];
        let delay = match number % 4 {
            3 => far[number / 4 % 3],
            _ => random.delay(),
        };
        executor.submit(seen.task(number, delay));
    }
    let second = |seen: &Seen| {
        let seen = seen.0.lock().expect("not poisoned");
        assert!(seen.iter().all(|attempts| attempts.len() <= 2));
        seen.iter().filter(|attempts| attempts.len() == 2).count()
    };
    sleep(MS).await; // paused time
    for _ in 0..3 {
        advance(DAY * 30).await;
        // The timer's turn, and the tasks'.
        sleep(TICK).await; // paused time
        assert_eq!(second(&seen), TASKS / 4 * 3);
    }
    assert_eq!(executor.snapshot().waiting, TASKS as u64 / 4);
    let report = executor.drain(DAY).await;
    assert_eq!((second(&seen), report.unfinished.len()), (TASKS, 0));
    assert_eq!(executor.snapshot().completed, TASKS as u64);
}

/// All of them are due at once, in as many milliseconds: more than the timer hands over in one go.
#[tokio::test(start_paused = true)]
async fn between_its_portions_the_timer_lets_the_tasks_run() {
    const TASKS: usize = 1_000;
    let executor = executor(TASKS);
    let still_waiting = Arc::new(AtomicU64::new(u64::MAX));
    for number in 0..TASKS {
        let (lowest, watched) = (still_waiting.clone(), executor.clone());
        executor.submit(Task::with_context(move |context: TaskContext| {
            let first = context.attempt() == 1;
            if !first {
                let waiting = watched.snapshot().waiting;
                let _ =
                    lowest.compare_exchange(u64::MAX, waiting, Ordering::SeqCst, Ordering::SeqCst);
            }
            async move {
                if first {
                    return Err(TaskError::retry_after(MS * (number as u32 + 1), "down"));
                }
                Ok(())
            }
        }));
    }
    while executor.snapshot().waiting < TASKS as u64 {
        tokio::task::yield_now().await;
    }
    advance(MS * 2 * TASKS as u32).await;
    executor.idle().await;
    // When the first one ran, most had not even been handed over.
    let waiting = still_waiting.load(Ordering::SeqCst);
    assert!(
        (TASKS as u64 / 2..TASKS as u64).contains(&waiting),
        "{waiting} waited"
    );
}

fn paused() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    builder.build().expect("a runtime")
}

/// Tests that share an executor do this: the time of the first one's runtime is ahead, and goes with it.
#[test]
fn a_retry_goes_off_in_the_next_runtime_also_where_its_clock_is_behind() {
    let executor = executor(8);
    let ran = Arc::new(AtomicUsize::new(0));
    let task = |delay: Duration| {
        let ran = ran.clone();
        Task::with_context(move |context: TaskContext| {
            let first = context.attempt() == 1;
            ran.fetch_add(usize::from(!first), Ordering::SeqCst);
            async move {
                if first {
                    return Err(TaskError::retry_after(delay, "down"));
                }
                Ok(())
            }
        })
    };
    paused().block_on(async {
        executor.submit(task(DAY * 10));
        executor.submit(task(DAY * 30));
        sleep(DAY * 20).await; // paused time
        assert_eq!(ran.load(Ordering::SeqCst), 1);
    });
    paused().block_on(async {
        let began = Instant::now();
        executor.submit(task(MS));
        while ran.load(Ordering::SeqCst) < 2 {
            sleep(MS).await; // paused time
        }
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        executor.idle().await;
        assert_eq!(ran.load(Ordering::SeqCst), 3);
    });
}

/// The times of a request's response, and how long its tasks are tried, begin with it and not with the executor.
#[tokio::test(start_paused = true)]
async fn a_task_of_a_request_has_its_whole_time_from_the_release() {
    const S: Duration = Duration::from_secs(1);
    let layer = DeferLayer::new().executor(
        Executor::builder()
            .retry(Retry::fixed(100, 10 * S).give_up_after(100 * S))
            .build(),
    );
    sleep(DAY).await; // paused time
    let told = Arc::new(Mutex::new(Vec::new()));
    let tells = told.clone();
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let tells = tells.clone();
        async move {
            let defer = Defer::from_extensions(request.extensions()).expect("there is a layer");
            defer.run(Task::with_context(move |context: TaskContext| {
                let info = context.response().expect("of a request");
                let times = (info.to_head, info.to_release);
                tells
                    .lock()
                    .expect("not poisoned")
                    .push((Instant::now(), times));
                async { Err::<(), _>("down") }
            }));
            sleep(2 * S).await; // paused time
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }
    }));
    let Ok(response) = service.call(Request::new(())).await;
    sleep(3 * S).await; // paused time
    let released = Instant::now();
    drop(response);
    layer.get_executor().idle().await;
    let told = told.lock().expect("not poisoned");
    // At 0, 10, … 90 s.
    assert_eq!(told.len(), 10);
    for (number, (at, times)) in told.iter().enumerate() {
        let waited = *at - released;
        let due = 10 * S * number as u32;
        assert!(
            waited >= due && waited < due + S,
            "{waited:?} instead of {due:?}"
        );
        assert_eq!(*times, (Some(2 * S), 5 * S));
    }
}
