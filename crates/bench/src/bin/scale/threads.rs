//! Threads that submit to one executor at the same time: what its one queue costs where they meet.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tower_defer::{Executor, Task};
use tower_defer_measure::{cpu_of, median};

pub(crate) fn run(most: usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let tasks = most;
    println!(
        "\n## Threads that submit at the same time ({tasks} tasks, run meanwhile by a runtime with as many threads as there are cores: {cores})\n"
    );
    println!(
        "| threads | ns a task, from the first submission to the last end | CPU ns a task | `tokio::spawn`: ns a task | CPU ns a task | ratio | ratio of the CPU |"
    );
    println!("|{}", " ---: |".repeat(7));
    for threads in [1, 2, 4, 8] {
        let rounds: Vec<_> = (0..3)
            .map(|_| (ours(cores, threads, tasks), spawned(cores, threads, tasks)))
            .collect();
        let of = |figure: &dyn Fn(&(Spent, Spent)) -> f64| median(rounds.iter().map(figure));
        println!(
            "| {threads} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} |",
            of(&|r| r.0.time),
            of(&|r| r.0.cpu),
            of(&|r| r.1.time),
            of(&|r| r.1.cpu),
            of(&|r| r.0.time / r.1.time),
            of(&|r| r.0.cpu / r.1.cpu),
        );
    }
}

/// Of one task, in nanoseconds.
struct Spent {
    time: f64,
    cpu: f64,
}

static LEFT: AtomicUsize = AtomicUsize::new(0);
static LAST: Notify = Notify::const_new();

/// The last of them tells the waiter.
async fn task() {
    if LEFT.fetch_sub(1, Relaxed) == 1 {
        LAST.notify_one();
    }
}

fn ours(cores: usize, threads: usize, tasks: usize) -> Spent {
    let executor = Executor::builder().capacity(tasks).build();
    spend(cores, threads, tasks, || {
        executor.submit(Task::once(task()));
    })
}

fn spawned(cores: usize, threads: usize, tasks: usize) -> Spent {
    spend(cores, threads, tasks, || drop(tokio::spawn(task())))
}

fn spend(cores: usize, threads: usize, tasks: usize, submit: impl Fn() + Sync) -> Spent {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores)
        .enable_time()
        .build()
        .expect("a runtime");
    let (handle, barrier) = (runtime.handle(), Barrier::new(threads + 1));
    LEFT.store(tasks / threads * threads, Relaxed);
    let (mut start, mut cpu) = (Instant::now(), Duration::ZERO);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let _inside = handle.enter();
                barrier.wait();
                (0..tasks / threads).for_each(|_| submit());
            });
        }
        cpu = cpu_of("self");
        start = Instant::now();
        barrier.wait();
    });
    runtime.block_on(LAST.notified());
    let each = |time: Duration| time.as_nanos() as f64 / tasks as f64;
    Spent {
        time: each(start.elapsed()),
        cpu: each(cpu_of("self") - cpu),
    }
}
