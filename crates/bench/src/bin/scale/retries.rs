//! Waiting retries, beside as many tasks that sleep. What is counted is CPU time of the one thread
//! that does it all, so that the rest of the machine matters little.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tower_defer::{Executor, Retry, RetryBudget, Task, TaskError};

use crate::plot::{self, Line};
use crate::{decades, heap, median, runtime};

/// The size that the target speaks of.
const TARGET: usize = 100_000;

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!(
        "\n## Waiting retries (each task fails once, waits, and succeeds): CPU time each, medians of interleaved rounds\n"
    );
    println!(
        "| waiting | ns until it waits | of that, to fail and wait | ns of its whole life | bytes while it waits | a `tokio::time::sleep` task: ns until it waits | ns of its whole life | bytes | a spawned task that fails, keeps the text, sleeps, succeeds: ns until it waits | ns of its whole life | bytes |"
    );
    println!("|{}", " ---: |".repeat(11));
    let mut lines = [const { Vec::new() }; 3];
    for waiting in decades(most) {
        let rounds = if waiting > TARGET { 3 } else { 9 };
        let rounds: Vec<_> = (0..rounds).map(|_| Round::run(waiting)).collect();
        let of = |figure: &dyn Fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
        let lives = [
            of(&|r| r.ours.life),
            of(&|r| r.sleep.life),
            of(&|r| r.by_hand.life),
        ];
        println!(
            "| {waiting} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} |",
            of(&|r| r.ours.arm),
            of(&Round::arming),
            lives[0],
            of(&|r| r.ours.bytes),
            of(&|r| r.sleep.arm),
            lives[1],
            of(&|r| r.sleep.bytes),
            of(&|r| r.by_hand.arm),
            lives[2],
            of(&|r| r.by_hand.bytes),
        );
        for (line, life) in lines.iter_mut().zip(lives) {
            line.push((waiting as f64, life));
        }
        if waiting == TARGET {
            targets(&rounds);
        }
    }
    let names = [
        "tower-defer: run, fail, wait, run",
        "a tokio task that sleeps",
        "a tokio task: run, fail, sleep, run",
    ];
    let lines = names.into_iter().zip(lines);
    plot::write(
        docs,
        "scale-retries.svg",
        "Waiting retries",
        "waiting",
        "CPU ns each, over its whole life",
        &lines
            .map(|(name, points)| Line { name, points })
            .collect::<Vec<_>>(),
    );
}

/// The lines that the report collects.
fn targets(rounds: &[Round]) {
    let line = |what: &str, ours: Figure<'_>, reference: Figure<'_>, target: Option<f64>| {
        let ratio = median(rounds.iter().map(|r| ours(r) / reference(r)).collect());
        let (least, most) = rounds
            .iter()
            .map(|r| ours(r) / reference(r))
            .fold((f64::MAX, f64::MIN), |(a, b), r| (a.min(r), b.max(r)));
        let of = |figure: Figure<'_>| median(rounds.iter().map(figure).collect());
        let met = match target {
            Some(target) if ratio <= target => "met",
            Some(_) => "NOT MET",
            None => "",
        };
        let target = target.map_or(String::new(), |target| format!("≤ {target}"));
        println!(
            "target 13 | {what} | {:.0} ns | {:.0} ns | {ratio:.2} ({least:.2} to {most:.2}) | {target} | {met}",
            of(reference),
            of(ours),
        );
    };
    line(
        "100,000 waiting retries, arming one (to fail and wait), against starting a sleeping task",
        &Round::arming,
        &|r| r.sleep.arm,
        Some(0.5),
    );
    line(
        "the same, CPU: whole life less two attempts, against a sleeping task's life",
        &|r| r.ours.life - 2.0 * r.completing,
        &|r| r.sleep.life,
        Some(0.5),
    );
    line(
        "the same, whole life with both attempts, against a spawned task that does the same",
        &|r| r.ours.life,
        &|r| r.by_hand.life,
        None,
    );
}

type Figure<'a> = &'a dyn Fn(&Round) -> f64;

struct Round {
    ours: Figures,
    sleep: Figures,
    by_hand: Figures,
    /// Nanoseconds to submit and run a task that succeeds.
    completing: f64,
}

/// Of one task.
struct Figures {
    /// Nanoseconds until it waits.
    arm: f64,
    /// Nanoseconds until it has ended.
    life: f64,
    bytes: f64,
}

impl Round {
    fn run(waiting: usize) -> Self {
        let sleeping = |number| tokio::spawn(tokio::time::sleep(delay(waiting, number)));
        let by_hand = |number| tokio::spawn(by_hand(delay(waiting, number)));
        Self {
            ours: runtime().block_on(ours(waiting)),
            sleep: runtime().block_on(spawned(waiting, sleeping)),
            by_hand: runtime().block_on(spawned(waiting, by_hand)),
            completing: runtime().block_on(completing(waiting)),
        }
    }

    /// What failing and waiting adds to a task.
    fn arming(&self) -> f64 {
        self.ours.arm - self.completing
    }
}

/// Long enough that all wait at the same time, and not all until the same moment.
fn delay(waiting: usize, number: usize) -> Duration {
    let all_wait = Duration::from_millis(50) + Duration::from_micros(4) * waiting as u32;
    all_wait + Duration::from_millis(number as u64 % 100)
}

fn executor(waiting: usize) -> Executor {
    Executor::builder()
        .capacity(waiting + 1)
        .retry(Retry::exponential(2))
        .retry_budget(RetryBudget::new(1_000_000, 1_000_000))
        .build()
}

/// Fails once, or never.
fn task(fails: bool, delay: Duration) -> Task {
    let fails = AtomicBool::new(fails);
    Task::new(move || {
        let fails = fails.swap(false, Relaxed);
        async move {
            if fails {
                return Err(TaskError::retry_after(delay, "down"));
            }
            Ok(())
        }
    })
}

async fn ours(waiting: usize) -> Figures {
    let executor = executor(waiting);
    let before = heap::alive();
    let start = cpu();
    for number in 0..waiting {
        executor.submit(task(true, delay(waiting, number)));
    }
    reached(&executor).await;
    let arm = cpu() - start;
    let bytes = heap::alive() - before;
    assert_eq!(executor.snapshot().waiting, waiting as u64, "all wait");
    let start = cpu();
    executor.idle().await;
    let rest = cpu() - start;
    assert_eq!(executor.snapshot().completed, waiting as u64 + 1);
    Figures::new(waiting, arm, rest, bytes)
}

async fn completing(waiting: usize) -> f64 {
    let executor = executor(waiting);
    let start = cpu();
    for number in 0..waiting {
        executor.submit(task(false, delay(waiting, number)));
    }
    reached(&executor).await;
    (cpu() - start).as_nanos() as f64 / waiting as f64
}

/// Every task before has been run once: the queue is in order, and no attempt here ever waits.
async fn reached(executor: &Executor) {
    let (end, ended) = oneshot::channel();
    executor.submit(Task::once(async move {
        let _ = end.send(());
    }));
    ended.await.expect("the last task runs");
}

/// What people write who want one retry and the error of the first attempt.
async fn by_hand(delay: Duration) {
    let attempt = |fails| async move {
        if fails {
            return Err::<(), Box<dyn Error + Send + Sync>>("down".into());
        }
        Ok(())
    };
    let mut errors = Vec::new();
    while let Err(error) = attempt(errors.is_empty()).await {
        errors.push(error.to_string());
        tokio::time::sleep(delay).await;
    }
    black_box(errors);
}

async fn spawned(waiting: usize, spawn: impl Fn(usize) -> JoinHandle<()>) -> Figures {
    let before = heap::alive();
    let start = cpu();
    (0..waiting).for_each(|number| drop(spawn(number)));
    // Each has been polled once when the last one has: the queue is in order.
    tokio::spawn(async {}).await.expect("it ends");
    let arm = cpu() - start;
    let bytes = heap::alive() - before;
    let metrics = tokio::runtime::Handle::current().metrics();
    let start = cpu();
    while metrics.num_alive_tasks() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Figures::new(waiting, arm, cpu() - start, bytes)
}

impl Figures {
    fn new(waiting: usize, arm: Duration, rest: Duration, bytes: isize) -> Self {
        let each = |time: Duration| time.as_nanos() as f64 / waiting as f64;
        Self {
            arm: each(arm),
            life: each(arm + rest),
            bytes: bytes as f64 / waiting as f64,
        }
    }
}

/// User and system time of the main thread, on which all of this runs.
pub(crate) fn cpu() -> Duration {
    // The kernel adds up what has run when it is asked to run something else.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|n| n.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}
