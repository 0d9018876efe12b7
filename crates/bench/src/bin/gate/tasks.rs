//! What a task pays: submitted in bursts, each burst run to its end.

use std::error::Error;
use std::fmt::{self, Display, Formatter};
use std::future::{Future, poll_fn};
use std::hint::black_box;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tower_defer::{BoxError, Executor, Retry, Task, TaskError};

use crate::allocations;

/// 64 bytes.
type Captured = [u64; 8];

const CAPTURED: Captured = [1, 2, 3, 4, 5, 6, 7, 8];
const LIMIT: Duration = Duration::from_secs(60);

static LEFT: AtomicUsize = AtomicUsize::new(0);
static LAST: Notify = Notify::const_new();

/// Waits for the tasks of a burst: the last one wakes the waiter, the same for ours and for the
/// references.
pub struct Done(usize);

impl Done {
    pub fn expect(tasks: usize) -> Self {
        LEFT.store(tasks, Relaxed);
        Self(tasks)
    }

    pub async fn wait(self) {
        if self.0 > 0 {
            LAST.notified().await;
        }
    }
}

/// The work of every task here: look at what was captured, and say that it is done.
pub fn ready_task<T>(captured: T) {
    black_box(&captured);
    if LEFT.fetch_sub(1, Relaxed) == 1 {
        LAST.notify_one();
    }
}

/// The same after having waited once.
async fn waiting_task(captured: Captured) {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
    ready_task(captured);
}

async fn bursts(n: usize, burst: usize, submit: impl Fn(Captured)) {
    for _ in 0..n / burst {
        let done = Done::expect(burst);
        (0..burst).for_each(|_| submit(black_box(CAPTURED)));
        done.wait().await;
    }
}

/// A variant by its name (`spawn/64`: bursts of 64), for `n` tasks.
pub async fn run_named(name: &str, n: usize) -> bool {
    let Some((kind, Ok(burst))) = name.split_once('/').map(|(k, b)| (k, b.parse::<usize>())) else {
        return false;
    };
    let executor = Executor::new();
    match kind {
        "spawn" => {
            bursts(n, burst, |captured| {
                drop(tokio::spawn(async move { ready_task(captured) }));
            })
            .await;
        }
        "tracker" => {
            let tracker = TaskTracker::new();
            bursts(n, burst, |captured| {
                drop(tracker.spawn(async move { ready_task(captured) }));
            })
            .await;
        }
        "by hand" => {
            let hand = ByHand::new();
            bursts(n, burst, |captured| {
                hand.spawn(async move { ready_task(captured) });
            })
            .await;
        }
        "submit" => {
            bursts(n, burst, |captured| {
                executor.submit(move || async move { ready_task(captured) });
            })
            .await;
        }
        "submit once" => {
            bursts(n, burst, |captured| {
                executor.submit(Task::once(async move { ready_task(captured) }));
            })
            .await;
        }
        "submit, no retry" => {
            let executor = Executor::builder().retry(Retry::never()).build();
            bursts(n, burst, |captured| {
                executor.submit(move || async move { ready_task(captured) });
            })
            .await;
        }
        "submit, no bounds" => {
            let executor = Executor::builder()
                .concurrency(usize::MAX)
                .capacity(usize::MAX)
                .build();
            bursts(n, burst, |captured| {
                executor.submit(move || async move { ready_task(captured) });
            })
            .await;
        }
        "submit, fatal" => fatal(n, burst, &executor).await,
        "submit, fatal, no letters" => {
            let executor = Executor::builder().dead_letters(0).build();
            fatal(n, burst, &executor).await;
        }
        "submit, no timeout, waits" => {
            let executor = Executor::builder().timeout(Duration::MAX).build();
            bursts(n, burst, |captured| {
                executor.submit(move || waiting_task(captured));
            })
            .await;
        }
        "spawn, waits" => {
            bursts(n, burst, |captured| {
                drop(tokio::spawn(waiting_task(captured)));
            })
            .await;
        }
        "spawn+timeout, waits" => {
            bursts(n, burst, |captured| {
                drop(tokio::spawn(timeout(LIMIT, waiting_task(captured))));
            })
            .await;
        }
        "submit, fails bare" => fails(n, burst, || Bare).await,
        "submit, fails" => fails(n, burst, || "down").await,
        "submit, fails apart" => {
            let number = AtomicUsize::new(0);
            fails(n, burst, move || Apart(number.fetch_add(1, Relaxed))).await;
        }
        "spawn, sleeps" => {
            bursts(n, burst, |captured| {
                drop(tokio::spawn(async move {
                    ready_task(captured);
                    tokio::time::sleep(LIMIT).await;
                }));
            })
            .await;
        }
        "by hand, fails" => {
            bursts(n, burst, |captured| {
                drop(tokio::spawn(async move {
                    ready_task(captured);
                    let error: Box<dyn Error + Send + Sync> = "down".into();
                    let errors = vec![error.to_string()];
                    drop(error);
                    tokio::time::sleep(LIMIT).await;
                    black_box(errors);
                }));
            })
            .await;
        }
        "by hand, waits" => {
            let hand = ByHand::new();
            bursts(n, burst, |captured| hand.spawn(waiting_task(captured))).await;
        }
        "submit, waits" => {
            bursts(n, burst, |captured| {
                executor.submit(move || waiting_task(captured));
            })
            .await;
        }
        _ => return false,
    }
    true
}

/// An error that costs nothing to make: the box of a type without a size allocates nothing.
#[derive(Debug)]
struct Bare;

impl Display for Bare {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("down")
    }
}

impl Error for Bare {}

/// An error of which no two say the same.
#[derive(Debug)]
struct Apart(usize);

impl Display for Apart {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "job {} is down", self.0)
    }
}

impl Error for Apart {}

/// Each task fails once and waits for its retry until the end of the run.
async fn fails<E, F>(n: usize, burst: usize, error: F)
where
    E: Into<BoxError>,
    F: Fn() -> E + Send + Sync + 'static,
{
    let executor = Executor::builder().capacity(n).build();
    let error: &'static F = Box::leak(Box::new(error));
    bursts(n, burst, |captured| {
        executor.submit(move || async move {
            ready_task(captured);
            Err::<(), _>(TaskError::retry_after(LIMIT, error()))
        });
    })
    .await;
}

/// Each task fails for good: a dead letter, or where none is kept, only counted.
async fn fatal(n: usize, burst: usize, executor: &Executor) {
    bursts(n, burst, |captured| {
        executor.submit(move || async move {
            ready_task(captured);
            Err::<(), _>(TaskError::fatal(Bare))
        });
    })
    .await;
}

/// What people write: a bound on what is accepted, one on what runs, a tracker for the shutdown, a
/// timeout, and `catch_unwind`.
struct ByHand {
    accepted: Arc<Semaphore>,
    running: Arc<Semaphore>,
    tracker: TaskTracker,
}

impl ByHand {
    fn new() -> Self {
        Self {
            accepted: Arc::new(Semaphore::new(16_384)),
            running: Arc::new(Semaphore::new(64)),
            tracker: TaskTracker::new(),
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let Ok(place) = self.accepted.clone().try_acquire_owned() else {
            return;
        };
        let running = self.running.clone();
        drop(self.tracker.spawn(async move {
            let slot = running.acquire_owned().await;
            let attempt = AssertUnwindSafe(timeout(LIMIT, task)).catch_unwind();
            let _ = black_box(attempt.await);
            drop((slot, place));
        }));
    }
}

/// Live bytes per task while nothing runs: of a plain spawn, of ours, and the size of the future.
pub fn queued_bytes(n: usize) -> Queued {
    let task = |captured: Captured| async move { ready_task(captured) };
    let future = size_of_val(&task(CAPTURED)) as u64;
    let per_task = |submit: &dyn Fn(Captured)| {
        let before = allocations::live();
        (0..n).for_each(|_| submit(black_box(CAPTURED)));
        (allocations::live() - before) / n as u64
    };
    let executor = Executor::builder().capacity(n + 1).build();
    // The worker and its place exist before the count.
    executor.submit(|| async {});
    Queued {
        future,
        spawned: per_task(&|captured| drop(tokio::spawn(task(captured)))),
        once: per_task(&|captured| drop(executor.submit(Task::once(task(captured))))),
    }
}

pub struct Queued {
    pub future: u64,
    pub spawned: u64,
    pub once: u64,
}
