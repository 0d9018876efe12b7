//! What is seen of each server, and whether the bounds held.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tower_defer_measure::{Arguments, Figure, Length, Spread, Target, machine};
use tower_defer_server_bench::{Rate, Server, load};

use crate::serve::{CAPACITY, CAPTURED, PERMITS, WORK};

const CONNECTIONS: u32 = 64;
/// What an executor keeps of failed tasks by default.
const DEAD_LETTERS: usize = 1024;
/// Of ours, for each task.
const HEADER: usize = 64;
/// Of a connection: hyper's buffers and its task.
const CONNECTION: usize = 16 * 1024;
/// The part of a run in which the memory reaches its height: the queue and then the dead letters fill in
/// 4.4 s, whatever the rate of the machine's timers. What is more afterwards is growth.
const FILLING: f64 = 0.5;
/// How much more it may be: pages that the allocator touches late.
const GROWTH: f64 = 1.25;
/// Longer than the queue of any variant takes to run at the full length.
const DRAIN: Duration = Duration::from_secs(60);

/// The first ones have no bound of their own.
const UNBOUNDED: [(&str, &str); 2] = [
    ("spawn", "`tokio::spawn`"),
    ("axum-tasks", "axum-tasks, 503 when refused"),
];
const BOUNDED: [(&str, &str); 3] = [
    ("reject", "`run`, `Overflow::Reject`"),
    ("drop-oldest", "`run`, `Overflow::DropOldest`"),
    ("answer-503", "`try_run`, 503 when refused"),
];

/// Whether the bounds held.
pub(crate) fn report(arguments: &Arguments) -> bool {
    let length = Duration::from_secs(arguments.length.choose(1, 10, 20));
    let possible = calibrate();
    let rate = (2.0 * possible) as u32;
    println!(
        "{}. The server has one thread on the first core, the load (oha, {CONNECTIONS} connections) \
         the second.\n\n{possible:.0} tasks a second can run, {rate} requests a second arrive for {} s; \
         {CAPTURED} bytes captured per task, capacity {CAPACITY}, concurrency {PERMITS}. Memory is what \
         is resident, and its most is looked for until the last task has ended. An accepted task ends \
         as completed or, with `DropOldest`, as refused after all; what is missing is neither.\n",
        machine(),
        length.as_secs()
    );
    println!(
        "| variant | memory at start, MiB | most in the first half of the time | most | at the end | p50, ms | p99, ms | requests | answered | answered 503 | failed | completed | refused | missing | the last one ends after, s |"
    );
    println!("|{}", " ---: |".repeat(15).replacen("---:", "---", 1));
    let of = |(variant, title): (&str, &str)| measure(variant, title, length, rate);
    let [naked, foreign] = UNBOUNDED.map(of);
    let bounded = BOUNDED.map(of);
    println!();
    // A second fills no queue, and what is filled at its end is no growth.
    judge(&naked, &foreign, &bounded) || arguments.length == Length::Check
}

/// In MiB.
#[derive(Clone, Copy)]
struct Memory {
    start: f64,
    filling: f64,
    most: f64,
}

impl Memory {
    fn growth(&self) -> f64 {
        self.most / self.filling
    }
}

/// The lines for the report of all targets: of the variant that comes out worst.
fn judge(naked: &Memory, foreign: &Memory, bounded: &[Memory]) -> bool {
    let worst = |figure: fn(&Memory) -> f64| {
        let worst = bounded
            .iter()
            .max_by(|a, b| figure(a).total_cmp(&figure(b)));
        worst.expect("there are bounded variants")
    };
    let holding = |times: usize| {
        let tasks = times * (CAPACITY + DEAD_LETTERS) * (CAPTURED + HEADER);
        (tasks + CONNECTIONS as usize * CONNECTION) as f64 / 1024.0 / 1024.0
    };
    let allowed = holding(2);

    let height = worst(|memory| memory.most - memory.start);
    let taken = height.most - height.start;
    let in_bounds = Figure {
        number: 12,
        what: format!(
            "resident memory that twice as many tasks as can run add, against twice what the bounds hold: 2 × \
             (capacity {CAPACITY} + dead letters {DEAD_LETTERS}) × (captures {CAPTURED} + {HEADER} B) + \
             {CONNECTIONS} connections × 16 KiB"
        ),
        reference: format!("{allowed:.0} MiB"),
        ours: format!("{taken:.0} MiB"),
        ratio: Spread::exact(taken / allowed),
        target: Some(Target::AtMost(1.0)),
        instead: None,
    };
    let once = Figure {
        what: "the same, against once what the bounds hold, and the connections".to_owned(),
        reference: format!("{:.0} MiB", holding(1)),
        ratio: Spread::exact(taken / holding(1)),
        target: None,
        ..in_bounds.clone()
    };
    let grown = worst(Memory::growth);
    let flat = Figure {
        number: 12,
        what: format!(
            "the same, most in the whole time against most in its first half (naked spawn: {:.0} \
             against {:.0} MiB, axum-tasks: {:.0} against {:.0} MiB)",
            naked.most, naked.filling, foreign.most, foreign.filling
        ),
        reference: format!("{:.0} MiB", grown.filling),
        ours: format!("{:.0} MiB", grown.most),
        ratio: Spread::exact(grown.growth()),
        target: Some(Target::AtMost(GROWTH)),
        instead: None,
    };
    let lines = [in_bounds, once, flat];
    lines.iter().for_each(|line| println!("{line}"));
    let mut judged = lines.iter().filter(|line| line.target.is_some());
    judged.all(|line| line.verdict().starts_with("met"))
}

/// How many tasks a second the permits allow, with this machine's timers.
fn calibrate() -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let began = Instant::now();
    let run = runtime.block_on(async {
        let lanes: Vec<_> = (0..PERMITS)
            .map(|_| {
                tokio::spawn(async move {
                    let mut run = 0_u32;
                    while began.elapsed() < Duration::from_secs(1) {
                        tokio::time::sleep(WORK).await;
                        run += 1;
                    }
                    run
                })
            })
            .collect();
        let mut run = 0;
        for lane in lanes {
            run += lane.await.expect("a lane");
        }
        run
    });
    f64::from(run) / began.elapsed().as_secs_f64()
}

fn measure(variant: &str, title: &str, length: Duration, rate: u32) -> Memory {
    let server = Server::start(&[variant]);
    let start = memory(server.id());
    let over = Arc::new(AtomicBool::new(false));
    let sampler = {
        let (over, id) = (over.clone(), server.id());
        thread::spawn(move || sample(id, length.mul_f64(FILLING), &over))
    };
    let answers = load(&server, Rate::Fixed(rate), CONNECTIONS, length);
    let ended = Instant::now();
    let counts = server.settle(DRAIN);
    let drained = ended.elapsed().as_secs_f64();
    over.store(true, Ordering::Relaxed);
    let (filling, most) = sampler.join().expect("the sampler");
    println!(
        "| {title} | {start:.0} | {filling:.0} | {most:.0} | {:.0} | {:.2} | {:.2} | {} | {} | {} | {} | {} | {} | {} | {drained:.1} |",
        memory(server.id()),
        answers.p50 / 1000.0,
        answers.p99 / 1000.0,
        counts.requests,
        answers.answered,
        answers.unavailable,
        answers.failed,
        counts.completed,
        counts.refused,
        counts.missing(),
    );
    Memory {
        start,
        filling,
        most,
    }
}

/// The highest of many looks: while it fills, and in the whole time.
fn sample(process: u32, filling: Duration, over: &AtomicBool) -> (f64, f64) {
    let began = Instant::now();
    let (mut first, mut most): (f64, f64) = (0.0, 0.0);
    while !over.load(Ordering::Relaxed) {
        most = most.max(memory(process));
        if began.elapsed() <= filling {
            first = most;
        }
        thread::sleep(Duration::from_millis(50));
    }
    (first, most)
}

/// Resident, in MiB; not a number where there is no `/proc`.
fn memory(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        let kibibytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?;
        kibibytes.trim().parse::<f64>().ok()
    });
    resident.map_or(f64::NAN, |kibibytes| kibibytes / 1024.0)
}
