//! Waiting retries, beside as many tasks that sleep. What is counted is CPU time of the one thread
//! that does it all, so that the rest of the machine matters little.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tower_defer::{Executor, Retry, RetryBudget, Task, TaskError};
use tower_defer_measure::{Figure, Spread, Target, median};

use crate::plot::{self, Line, Stroke};
use crate::{decades, fresh, heap, rounds};

/// The size that the target speaks of.
const TARGET: usize = 100_000;

pub(crate) fn run(docs: Option<&Path>, most: usize) {
    println!(
        "\n## Waiting retries (each task fails once, waits, and succeeds): CPU time each, medians of interleaved rounds\n"
    );
    println!(
        "| waiting | ns until it waits | of that, to fail and wait | ns of its whole life | bytes while it waits | late by, ms, p50 | a `tokio::time::sleep` task: ns until it waits | ns of its whole life | bytes | a spawned task that fails, keeps the text, sleeps, succeeds: ns until it waits | ns of its whole life | bytes | late by, ms, p50 (of one that only sleeps) | ratio, whole life, to one that sleeps | to one that does the same |"
    );
    println!("|{}", " ---: |".repeat(15));
    let mut lines = [const { Vec::new() }; 3];
    for waiting in decades(most) {
        let Some((load, rounds)) = measured(waiting) else {
            println!(
                "| {waiting} | the machine is too busy for so many to wait at the same time |"
            );
            continue;
        };
        let of = |figure: &dyn Fn(&Round) -> f64| median(rounds.iter().map(figure));
        let lives = [
            of(&|r| r.ours.life),
            of(&|r| r.sleep.life),
            of(&|r| r.by_hand.life),
        ];
        let (late, late_by_hand) = (fresh(|| late(load)), fresh(|| late_by_hand(load)));
        println!(
            "| {waiting} | {:.0} | {:.0} | {:.0} | {:.0} | {late:.1} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {late_by_hand:.1} | {:.2} | {:.2} |",
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
            of(&|r| r.ours.life / r.sleep.life),
            of(&|r| r.ours.life / r.by_hand.life),
        );
        for (line, life) in lines.iter_mut().zip(lives) {
            line.push((waiting as f64, life));
        }
        if waiting == TARGET {
            targets(&rounds);
        }
    }
    let names = [
        ("tower-defer: run, fail, wait, run", Stroke::Ours),
        ("a tokio task that sleeps", Stroke::Reference),
        (
            "a tokio task: run, fail, keep the text, sleep, run",
            Stroke::SecondReference,
        ),
    ];
    let lines = names.into_iter().enumerate().zip(lines);
    plot::write(
        docs,
        "scale-retries.svg",
        "Waiting retries",
        "waiting",
        "CPU ns each, over its whole life",
        &lines
            .map(|((group, (name, stroke)), points)| Line {
                name: name.to_owned(),
                group,
                stroke,
                points,
            })
            .collect::<Vec<_>>(),
    );
}

/// All rounds with one load. Where the first of the tasks were due before the last one was there, so
/// that never all have waited, it begins again and lets each wait twice as long.
fn measured(waiting: usize) -> Option<(Load, Vec<Round>)> {
    (0..4).find_map(|doubled| {
        let load = Load {
            waiting,
            each: Duration::from_micros(4 << doubled),
        };
        let rounds: Option<Vec<_>> = (0..rounds(waiting)).map(|_| Round::run(load)).collect();
        Some((load, rounds?))
    })
}

/// The lines that the report collects.
fn targets(rounds: &[Round]) {
    let line = |what: &str, ours: Part<'_>, reference: Part<'_>, target: Option<f64>| {
        let of = |part: Part<'_>| format!("{:.0} ns", median(rounds.iter().map(part)));
        let figure = Figure {
            number: 13,
            what: what.to_owned(),
            reference: of(reference),
            ours: of(ours),
            ratio: Spread::of(rounds.iter().map(|r| ours(r) / reference(r))),
            target: target.map(Target::AtMost),
            instead: None,
        };
        println!("{figure}");
    };
    line(
        "CPU of 100,000 waiting retries, arming one (what failing and waiting adds to a task), against starting a sleeping task",
        &Round::arming,
        &|r| r.sleep.arm,
        Some(0.5),
    );
    line(
        "the same, its whole life with both attempts, against a sleeping task's",
        &|r| r.ours.life,
        &|r| r.sleep.life,
        Some(0.5),
    );
    line(
        "the same, what waiting adds: whole life less two attempts, against a sleeping task's less one that ends at once",
        &|r| r.ours.life - 2.0 * r.completing,
        &|r| r.sleep.life - r.ending,
        None,
    );
    line(
        "the same, its whole life, against that of a spawned task that does the same",
        &|r| r.ours.life,
        &|r| r.by_hand.life,
        None,
    );
}

type Part<'a> = &'a dyn Fn(&Round) -> f64;

struct Round {
    ours: Figures,
    sleep: Figures,
    by_hand: Figures,
    /// Nanoseconds to submit and run a task that succeeds.
    completing: f64,
    /// Nanoseconds to spawn and run a task that ends at once.
    ending: f64,
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
    /// None where not all of ours have waited at the same time.
    fn run(load: Load) -> Option<Self> {
        let sleeping = |number| tokio::spawn(tokio::time::sleep(load.delay(number)));
        let by_hand = |number| tokio::spawn(by_hand(load.delay(number)));
        Some(Self {
            ours: fresh(|| ours(load))?,
            sleep: fresh(|| spawned(load, sleeping)),
            by_hand: fresh(|| spawned(load, by_hand)),
            completing: fresh(|| completing(load)),
            ending: fresh(|| ending(load)),
        })
    }

    /// What failing and waiting adds to a task.
    fn arming(&self) -> f64 {
        self.ours.arm - self.completing
    }
}

/// How many wait.
#[derive(Clone, Copy)]
struct Load {
    waiting: usize,
    /// What one more adds to the time that all of them wait.
    each: Duration,
}

impl Load {
    /// Long enough that all wait at the same time, and not all until the same moment.
    fn delay(self, number: usize) -> Duration {
        let all_wait = Duration::from_millis(50) + self.each * self.waiting as u32;
        all_wait + Duration::from_millis(number as u64 % 100)
    }
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

async fn ours(load: Load) -> Option<Figures> {
    let waiting = load.waiting;
    let executor = executor(waiting);
    let before = heap::alive();
    let start = cpu();
    for number in 0..waiting {
        executor.submit(task(true, load.delay(number)));
    }
    reached(&executor).await;
    let arm = cpu() - start;
    let bytes = heap::alive() - before;
    let all_wait = executor.snapshot().waiting == waiting as u64;
    let start = cpu();
    executor.idle().await;
    let rest = cpu() - start;
    assert_eq!(executor.snapshot().completed, waiting as u64 + 1);
    all_wait.then(|| Figures::new(waiting, arm, rest, bytes))
}

/// When each should have gone on, and how much later it did.
type Late = Arc<Mutex<Vec<f64>>>;

fn note(late: &Late, due: Instant) {
    let by = Instant::now().saturating_duration_since(due);
    late.lock()
        .expect("nobody panics")
        .push(by.as_secs_f64() * 1e3);
}

/// In milliseconds, the median: by how much a retry runs after its time. Not part of the rounds, whose
/// tasks do nothing.
async fn late(load: Load) -> f64 {
    let (executor, late) = (executor(load.waiting), Late::default());
    for number in 0..load.waiting {
        let (delay, late, due) = (load.delay(number), late.clone(), OnceLock::new());
        executor.submit(Task::new(move || {
            let first = due.set(Instant::now() + delay).is_ok();
            if !first {
                note(&late, *due.get().expect("it was set"));
            }
            async move {
                if first {
                    return Err(TaskError::retry_after(delay, "down"));
                }
                Ok(())
            }
        }));
    }
    executor.idle().await;
    median(std::mem::take(&mut *late.lock().expect("nobody panics")))
}

async fn late_by_hand(load: Load) -> f64 {
    let late = Late::default();
    for number in 0..load.waiting {
        let (delay, late) = (load.delay(number), late.clone());
        tokio::spawn(async move {
            let due = Instant::now() + delay;
            tokio::time::sleep(delay).await;
            note(&late, due);
        });
    }
    let metrics = tokio::runtime::Handle::current().metrics();
    while metrics.num_alive_tasks() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    median(std::mem::take(&mut *late.lock().expect("nobody panics")))
}

async fn completing(load: Load) -> f64 {
    let waiting = load.waiting;
    let executor = executor(waiting);
    let start = cpu();
    for number in 0..waiting {
        executor.submit(task(false, load.delay(number)));
    }
    reached(&executor).await;
    (cpu() - start).as_nanos() as f64 / waiting as f64
}

async fn ending(load: Load) -> f64 {
    let start = cpu();
    for number in 0..load.waiting {
        let delay = load.delay(number);
        drop(tokio::spawn(async move {
            let _ = black_box(delay);
        }));
    }
    tokio::spawn(async {}).await.expect("it ends");
    (cpu() - start).as_nanos() as f64 / load.waiting as f64
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

async fn spawned(load: Load, spawn: impl Fn(usize) -> JoinHandle<()>) -> Figures {
    let waiting = load.waiting;
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

/// User and system time of this thread, on which all of one figure runs.
pub(crate) fn cpu() -> Duration {
    // The kernel adds up what has run when it is asked to run something else.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|n| n.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}
