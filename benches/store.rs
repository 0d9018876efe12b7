//! What the embedded store costs, against the least that durability can cost on the same disk.
//!
//! Not a benchmark of the disk: the figures that count are the ratios, made in one run, in
//! interleaved rounds. `cargo bench --bench store --features sqlite`; `-- quick` for a short one,
//! `-- --dir PATH` for another disk, `-- appends` or `-- deliveries` for a half.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tower_defer::event::store::{NewEvent, Settle, Sqlite, Start, Store};
use tower_defer_measure::{Arguments, Figure, Length, Spread, Target, cpu_of, median};

/// The record of the reference measurements: 200 bytes.
const RECORD: usize = 200;

/// Where the time begins for the store; it only has to rise.
const EPOCH_MS: i64 = 1_700_000_000_000;

fn main() {
    let Some(arguments) = Arguments::of_bench() else {
        return;
    };
    let directory = arguments.scratch();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    if arguments.wanted("appends") {
        appends(&runtime, directory.path(), arguments.length);
    }
    if arguments.wanted("deliveries") {
        deliveries(&runtime, directory.path(), arguments.length);
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures time")]
fn now() -> Instant {
    Instant::now()
}

/// What the process has spent, which a busy machine disturbs less than the time that it takes:
/// processor time in ticks of 10 ms, and bytes that went to the disk. Zero where there is no `/proc`.
#[derive(Clone, Copy, Default)]
struct Spent {
    cpu: Duration,
    bytes: f64,
    calls: f64,
}

impl Spent {
    fn now() -> Self {
        let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
        let bytes = io
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes: "));
        Self {
            cpu: cpu_of("self"),
            bytes: bytes.and_then(|bytes| bytes.parse().ok()).unwrap_or(0.0),
            calls: 0.0,
        }
    }

    fn add(&mut self, before: &Self, calls: f64) {
        let now = Self::now();
        self.cpu += now.cpu - before.cpu;
        self.bytes += now.bytes - before.bytes;
        self.calls += calls;
    }
}

impl std::fmt::Display for Spent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = self.cpu.as_secs_f64() * 1e6;
        write!(
            f,
            "{:.1} µs of CPU, {:.0} bytes",
            micros / self.calls,
            self.bytes / self.calls
        )
    }
}

/// Durable appends by concurrent writers, each of whom waits for its own. The files stay open over
/// all rounds, so that what is measured is the steady state, checkpoints included.
fn appends(runtime: &Runtime, directory: &Path, length: Length) {
    let (rounds, round) = length.choose((1, 20), (3, 300), (9, 1_000));
    let round = Duration::from_millis(round);
    println!("durable appends/s, {RECORD} bytes, median (best) of {rounds} interleaved rounds");
    println!("writers | file + fdatasync | store, due | ratio | store, claimed | ratio");
    println!("        | each append: CPU and written | the same | the same");
    let mut lines = Vec::new();
    for writers in [1, 16, 64] {
        let mut figures = [Vec::new(), Vec::new(), Vec::new()];
        let mut spent = [Spent::default(), Spent::default(), Spent::default()];
        let path = |name: &str| directory.join(format!("{name}-{writers}"));
        let log = Log::create(&path("log"));
        let stores = ["due", "claimed"].map(|name| {
            let store = Sqlite::open(path(name)).expect("open");
            (
                Arc::new(store),
                if name == "due" {
                    Start::At(EPOCH_MS)
                } else {
                    Start::Claimed
                },
            )
        });
        for number in 0..rounds {
            // A different order in every round, so that none always follows the same neighbour.
            for i in (0..3).map(|i| (i + number) % 3) {
                let before = Spent::now();
                let rate = match i {
                    0 => log_rate(runtime, writers, round, &log),
                    i => store_rate(runtime, writers, round, &stores[i - 1]),
                };
                figures[i].push(rate);
                spent[i].add(&before, rate * round.as_secs_f64());
            }
        }
        for (store, _) in stores {
            runtime.block_on(store.close()).expect("close");
        }
        let best = figures
            .each_ref()
            .map(|f| f.iter().copied().fold(0.0, f64::max));
        // A noisy neighbour disturbs a round and its neighbours alike: the ratio is that of each
        // round, and then the median of those.
        let ratio = |i: usize| {
            let rounds = figures[i].iter().zip(&figures[0]);
            Spread::of(rounds.map(|(store, bare)| store / bare))
        };
        let ratios = [ratio(1), ratio(2)];
        let [bare, due, claimed] = figures.map(median);
        println!(
            "{writers:7} | {bare:7.0} ({:6.0}) | {due:7.0} ({:6.0}) | {:.2} | {claimed:7.0} ({:6.0}) \
             | {:.2}",
            best[0], best[1], ratios[0].median, best[2], ratios[1].median
        );
        // Claimed: as an emit records it while there is room.
        let figure = |target| Figure {
            number: 14,
            what: format!(
                "durable emits a second, {writers} concurrent, against a bare file with group commit"
            ),
            reference: format!("{bare:.0}"),
            ours: format!("{claimed:.0}"),
            ratio: ratios[1],
            target: Some(Target::AtLeast(target)),
            instead: None,
        };
        lines.extend(match writers {
            16 => Some(figure(0.6)),
            64 => Some(figure(0.5)),
            _ => None,
        });
        let [bare, due, claimed] = spent.map(|spent| spent.to_string());
        println!("        | {bare} | {due} | {claimed}");
    }
    println!();
    lines.iter().for_each(|line| println!("{line}"));
}

fn log_rate(runtime: &Runtime, writers: usize, round: Duration, log: &Log) -> f64 {
    let log = log.clone();
    rate(runtime, writers, round, move || {
        let log = log.clone();
        async move { log.append(vec![b'x'; RECORD]).await }
    })
}

fn store_rate(
    runtime: &Runtime,
    writers: usize,
    round: Duration,
    (store, start): &(Arc<Sqlite>, Start),
) -> f64 {
    let (store, start) = (Arc::clone(store), *start);
    let name: Arc<str> = "user.created".into();
    let subscriber: Arc<str> = "welcome-email".into();
    rate(runtime, writers, round, move || {
        let store = Arc::clone(&store);
        let event = NewEvent::new(name.clone(), payload()).deliver(subscriber.clone(), start);
        async move { drop(store.append(vec![event], EPOCH_MS).await.expect("append")) }
    })
}

fn payload() -> String {
    format!("\"{}\"", "x".repeat(RECORD - 2))
}

/// How often per second `writers` tasks together get `work` done.
fn rate<F>(
    runtime: &Runtime,
    writers: usize,
    round: Duration,
    work: impl Fn() -> F + Clone + Send + 'static,
) -> f64
where
    F: Future<Output = ()> + Send,
{
    runtime.block_on(async {
        let start = now();
        let tasks: Vec<_> = (0..writers)
            .map(|_| {
                let work = work.clone();
                #[expect(clippy::disallowed_methods, reason = "no executor of ours is measured")]
                tokio::spawn(async move {
                    let mut count = 0_u32;
                    while start.elapsed() < round {
                        work().await;
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        let mut total = 0.0;
        for task in tasks {
            total += f64::from(task.await.expect("a writer"));
        }
        total / start.elapsed().as_secs_f64()
    })
}

/// The reference: one thread appends what has arrived to a file, syncs once, and answers all.
#[derive(Clone)]
struct Log(mpsc::Sender<(Vec<u8>, oneshot::Sender<()>)>);

impl Log {
    fn create(path: &Path) -> Self {
        let mut file = File::create(path).expect("a log");
        let (sender, mut queue) = mpsc::channel::<(Vec<u8>, oneshot::Sender<()>)>(1_024);
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let mut waiting = Vec::new();
            while let Some(first) = queue.blocking_recv() {
                let mut next = Some(first);
                while let Some((record, reply)) = next {
                    bytes.extend_from_slice(&record);
                    waiting.push(reply);
                    next = queue.try_recv().ok();
                }
                file.write_all(&bytes)
                    .and_then(|()| file.sync_data())
                    .expect("a write");
                bytes.clear();
                for reply in waiting.drain(..) {
                    let _ = reply.send(());
                }
            }
        });
        Self(sender)
    }

    async fn append(&self, record: Vec<u8>) {
        let (reply, done) = oneshot::channel();
        self.0
            .send((record, reply))
            .await
            .expect("the log's thread");
        done.await.expect("the log's thread");
    }
}

/// Claim, run nothing, settle, with so many stored; then how soon a new process has its first.
fn deliveries(runtime: &Runtime, directory: &Path, length: Length) {
    let (rounds, large) = length.choose((1, 40_000), (3, 100_000), (5, 1_000_000));
    println!("\nclaim + no-op + durable settle, median of {rounds} rounds of 20,000");
    println!("stored unfinished | batches of 10, /s | of 100, /s | each delivery, of both");
    for stored in [20_000, large] {
        let path = directory.join(format!("deliveries-{stored}"));
        let store = Sqlite::open(&path).expect("open");
        runtime.block_on(fill(&store, stored));
        let mut spent = [Spent::default(); 2];
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (i, batch) in [10, 100].into_iter().enumerate() {
                let before = Spent::now();
                rates[i].push(runtime.block_on(run(&store, batch, 20_000)));
                spent[i].add(&before, 20_000.0);
                runtime.block_on(fill(&store, 20_000));
            }
        }
        let [tens, hundreds] = rates.map(median);
        println!(
            "{stored:17} | {tens:17.0} | {hundreds:10.0} | {} | {}",
            spent[0], spent[1]
        );
        if stored == large {
            let mut running = 0;
            for more in [1_024, 65_536] {
                let claimed = runtime
                    .block_on(store.claim(more, EPOCH_MS))
                    .expect("claim");
                running += claimed.len();
                recovery(runtime, directory, &path, running);
            }
        }
    }
}

async fn fill(store: &Sqlite, count: usize) {
    for _ in 0..count.div_ceil(1_000) {
        let batch = (0..1_000)
            .map(|_| NewEvent::new("user.created", payload()).deliver("a", Start::At(EPOCH_MS)))
            .collect();
        store.append(batch, EPOCH_MS).await.expect("append");
    }
}

/// Delivers `count`.
async fn run(store: &Sqlite, batch: usize, count: usize) -> f64 {
    let start = now();
    let mut ended = Vec::new();
    for _ in 0..count / batch {
        // As the delivery loop does: what has ended is written down while the next are claimed.
        let (claimed, settled) = tokio::join!(
            store.claim(batch, EPOCH_MS),
            store.settle(std::mem::take(&mut ended), EPOCH_MS)
        );
        settled.expect("settle");
        let claimed = claimed.expect("claim");
        assert_eq!(claimed.len(), batch, "the store ran dry");
        ended.extend(claimed.into_iter().map(|c| (c.token, Settle::Complete)));
    }
    store.settle(ended, EPOCH_MS).await.expect("settle");
    f64::from(u32::try_from(count).expect("a count")) / start.elapsed().as_secs_f64()
}

/// Opens the image that a killed process would leave, until the first claim is in hand.
fn recovery(runtime: &Runtime, directory: &Path, path: &Path, running: usize) {
    let image = directory.join("image");
    for suffix in ["", "-wal"] {
        let name = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        std::fs::copy(name(path), name(&image)).expect("an image");
    }
    let start = now();
    let store = Sqlite::open(&image).expect("open");
    let opened = start.elapsed();
    let claimed = runtime.block_on(store.claim(1, i64::MAX)).expect("claim");
    let first = start.elapsed();
    assert_eq!(claimed.len(), 1, "nothing to recover");
    let start = now();
    let counts = runtime.block_on(store.counts()).expect("counts");
    println!(
        "\nrecovery: {} unfinished, {running} of them running when killed: open {opened:.1?}, \
         first claim {first:.1?} after the start; counts take {:.1?}",
        counts.queued + counts.retrying + counts.running,
        start.elapsed()
    );
}
