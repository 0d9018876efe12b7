//! What overload does to memory and to latency.
//!
//! `cargo bench --bench overload [-- --seconds 20]`: requests arrive at twice the rate at which their
//! tasks can run, each task with 4 KiB of captures. Four servers, one after the other, each in a
//! process of its own (this program, called with `--serve`): a naked `tokio::spawn`, an executor that
//! rejects, one that drops the oldest, and a handler that answers 503 when `try_run` gives its task
//! back.
//!
//! Every task does the same in all four: it takes one of 16 permits, as of a connection pool, and
//! sleeps for 10 ms. So what a naked spawn piles up are futures that wait for a permit. The rate is
//! measured first, not assumed.
//!
//! The load is an open loop: request `n` is due at a time that no earlier response can move, and its
//! latency is counted from then, also where all connections were busy (no coordinated omission). No
//! tool in common use does this over keep-alive connections without a fork, so the generator is here:
//! blocking threads, because a runtime's timer is a millisecond coarse.
//!
//! It fails where a bounded variant took more memory than its bounds allow, or took more the longer it
//! lasted.
#![expect(
    clippy::disallowed_methods,
    reason = "a load generator reads the clock and sleeps until its next request is due; the naked \
              spawn is what is compared"
)]

use std::hint::black_box;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::routing::post;
use tokio::sync::Semaphore;
use tower_defer::{Defer, DeferLayer, Executor, Overflow, Task};

const PERMITS: usize = 16;
const WORK: Duration = Duration::from_millis(10);
const CAPTURED: usize = 4096;
const CAPACITY: usize = 4096;
const CONNECTIONS: usize = 64;
const SERVER_THREADS: usize = 2;
/// What an executor keeps of failed tasks by default.
const DEAD_LETTERS: usize = 1024;
/// Of ours, for each task.
const HEADER: usize = 64;
/// Of a connection: hyper's buffers and its task.
const CONNECTION: usize = 16 * 1024;
/// The part of a run in which the memory reaches its height. What is more afterwards is growth.
const FILLING: f64 = 0.4;
/// How much more it may be: pages that the allocator touches late.
const GROWTH: f64 = 1.25;
/// Longer than the queue of any variant takes to run at the default length.
const DRAIN: Duration = Duration::from_secs(180);

const VARIANTS: [(&str, &str); 4] = [
    ("spawn", "`tokio::spawn`"),
    ("reject", "`run`, `Overflow::Reject`"),
    ("drop-oldest", "`run`, `Overflow::DropOldest`"),
    ("answer-503", "`try_run`, 503 when refused"),
];

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).map(String::as_str)
    };
    if let Some(variant) = value("--serve") {
        return serve(variant);
    }
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("nothing is measured by a test run; say `cargo bench --bench overload`");
        return Ok(());
    }
    let seconds = value("--seconds").map_or(20, |text| text.parse().expect("--seconds N"));
    if compare(Duration::from_secs(seconds))? {
        return Ok(());
    }
    Err(io::Error::other("more memory than the bounds allow"))
}

// The one who measures.

/// Whether the bounds held.
fn compare(length: Duration) -> io::Result<bool> {
    let possible = calibrate();
    let rate = 2.0 * possible;
    print_machine(length, possible, rate);
    println!(
        "| variant | memory at start, MiB | most in the first 40 % of the time | most | p50, ms | p99, ms | requests | answered 503 | failed | accepted | rejected | dropped | completed | drain, s |"
    );
    println!("|{}", " ---: |".repeat(14).replacen("---:", "---", 1));
    let mut memories = Vec::new();
    for (variant, title) in VARIANTS {
        memories.push(measure(variant, title, length, rate)?);
    }
    println!();
    let (naked, bounded) = memories.split_at(1);
    Ok(judge(&naked[0], bounded))
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
fn judge(naked: &Memory, bounded: &[Memory]) -> bool {
    let worst = |figure: fn(&Memory) -> f64| {
        let worst = bounded
            .iter()
            .max_by(|a, b| figure(a).total_cmp(&figure(b)));
        worst.expect("there are bounded variants")
    };
    let tasks = 2 * (CAPACITY + DEAD_LETTERS) * (CAPTURED + HEADER);
    let allowed = (tasks + CONNECTIONS * CONNECTION) as f64 / 1024.0 / 1024.0;
    let met = |met: bool| if met { "met" } else { "NOT MET" };

    let height = worst(|memory| memory.most - memory.start);
    let taken = height.most - height.start;
    let in_bounds = taken <= allowed;
    println!(
        "target 12 | memory that an overload adds, against 2 × (capacity {CAPACITY} + dead letters \
         {DEAD_LETTERS}) × (captures {CAPTURED} + {HEADER} B) + {CONNECTIONS} connections × 16 KiB \
         | {allowed:.0} MiB | {taken:.0} MiB | {:.2} | ≤ 1 | {}",
        taken / allowed,
        met(in_bounds)
    );
    let grown = worst(Memory::growth);
    let flat = grown.growth() <= GROWTH;
    println!(
        "target 12 | the same, most in the whole time against most in its first 40 % (naked spawn: \
         {:.0} against {:.0} MiB) | {:.0} MiB | {:.0} MiB | {:.2} | ≤ {GROWTH} | {}",
        naked.most,
        naked.filling,
        grown.filling,
        grown.most,
        grown.growth(),
        met(flat)
    );
    in_bounds && flat
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

fn print_machine(length: Duration, possible: f64, rate: f64) {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let rustc = Command::new("rustc").arg("--version").output();
    let rustc = rustc.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    );
    println!(
        "{} cores, Linux {}, {rustc}",
        thread::available_parallelism().map_or(0, usize::from),
        kernel.trim()
    );
    println!(
        "cargo bench --bench overload -- --seconds {}",
        length.as_secs()
    );
    println!(
        "{possible:.0} tasks a second can run, {rate:.0} requests a second arrive for {} s; \
         {CAPTURED} bytes captured per task, capacity {CAPACITY}, concurrency {PERMITS}\n",
        length.as_secs()
    );
}

fn measure(variant: &str, title: &str, length: Duration, rate: f64) -> io::Result<Memory> {
    let mut server = Server::start(variant)?;
    let start = server.memory();
    let over = Arc::new(AtomicBool::new(false));
    let sampler = {
        let over = over.clone();
        let id = server.process.id();
        thread::spawn(move || sample(id, length.mul_f64(FILLING), &over))
    };
    let load = load(server.address, length, rate);
    let totals = server.drain()?;
    over.store(true, Ordering::Relaxed);
    let (filling, most) = sampler.join().expect("the sampler");
    println!(
        "| {title} | {start:.0} | {filling:.0} | {most:.0} | {:.2} | {:.2} | {} | {} | {} | {totals}",
        load.percentile(0.50),
        load.percentile(0.99),
        load.latencies.len(),
        load.unavailable,
        load.failed,
    );
    Ok(Memory {
        start,
        filling,
        most,
    })
}

struct Server {
    process: Child,
    answers: BufReader<std::process::ChildStdout>,
    address: SocketAddr,
}

impl Server {
    fn start(variant: &str) -> io::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["--serve", variant])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let address = line.trim().parse().expect("the server says its address");
        Ok(Self {
            process,
            answers,
            address,
        })
    }

    fn memory(&self) -> f64 {
        memory(self.process.id())
    }

    /// Its last columns of the table.
    fn drain(&mut self) -> io::Result<String> {
        let mut orders = self.process.stdin.take().expect("piped");
        orders.write_all(b"drain\n")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        self.process.wait()?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only where the measuring failed: else it has ended, and this finds nothing.
        let _ = self.process.kill();
        let _ = self.process.wait();
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

#[derive(Default)]
struct Load {
    /// Sorted, in milliseconds, of every request that was answered.
    latencies: Vec<f64>,
    unavailable: u64,
    failed: u64,
}

impl Load {
    fn percentile(&self, part: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let at = (last as f64 * part).round() as usize;
        self.latencies.get(at).copied().unwrap_or(f64::NAN)
    }
}

/// Each connection takes the next request that is due, waits until it is, and sends it.
fn load(server: SocketAddr, length: Duration, rate: f64) -> Load {
    let next = Arc::new(AtomicU64::new(0));
    let began = Instant::now() + Duration::from_millis(100);
    let connections: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let next = next.clone();
            thread::spawn(move || {
                let mut load = Load::default();
                let mut connection = None;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let after = Duration::from_secs_f64(number as f64 / rate);
                    if after >= length {
                        return load;
                    }
                    let due = began + after;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    match request(&mut connection, server) {
                        Ok(status) => {
                            load.unavailable += u64::from(status == 503);
                            load.latencies.push(due.elapsed().as_secs_f64() * 1000.0);
                        }
                        Err(_) => {
                            load.failed += 1;
                            connection = None;
                        }
                    }
                }
            })
        })
        .collect();
    let mut sum = Load::default();
    for connection in connections {
        let part = connection.join().expect("a connection's thread");
        sum.latencies.extend(part.latencies);
        sum.unavailable += part.unavailable;
        sum.failed += part.failed;
    }
    sum.latencies.sort_by(f64::total_cmp);
    sum
}

fn request(connection: &mut Option<TcpStream>, server: SocketAddr) -> io::Result<u16> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(server)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            connection.insert(stream)
        }
    };
    stream.write_all(b"POST / HTTP/1.1\r\nhost: bench\r\ncontent-length: 0\r\n\r\n")?;
    // The answers have no body, so the head is all there is.
    let mut head = Vec::with_capacity(256);
    let mut chunk = [0; 256];
    while !head.ends_with(b"\r\n\r\n") {
        let read = stream.read(&mut chunk)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&chunk[..read]);
    }
    let status = head
        .get(9..12)
        .and_then(|digits| std::str::from_utf8(digits).ok());
    status
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

// The one who is measured.

#[derive(Clone)]
struct App {
    permits: Arc<Semaphore>,
    spawned: Arc<AtomicU64>,
    completed: Arc<AtomicU64>,
}

impl App {
    fn work(&self) -> impl Future<Output = ()> + Send + use<> {
        let captured = vec![1_u8; CAPTURED];
        let app = self.clone();
        async move {
            let permit = app.permits.acquire().await;
            tokio::time::sleep(WORK).await;
            black_box(&captured);
            drop(permit);
            app.completed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn serve(variant: &str) -> io::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(SERVER_THREADS)
        .enable_all()
        .build()?
        .block_on(run_server(variant))
}

async fn run_server(variant: &str) -> io::Result<()> {
    let app = App {
        permits: Arc::new(Semaphore::new(PERMITS)),
        spawned: Arc::default(),
        completed: Arc::default(),
    };
    let overflow = match variant {
        "drop-oldest" => Overflow::DropOldest,
        _ => Overflow::Reject,
    };
    let executor = Executor::builder()
        .concurrency(PERMITS)
        .capacity(CAPACITY)
        .overflow(overflow)
        .build();
    let layer = DeferLayer::new().executor(executor.clone());
    let router = match variant {
        "spawn" => Router::new().route("/", post(spawn)),
        "answer-503" => Router::new().route("/", post(try_run)).layer(layer),
        _ => Router::new().route("/", post(run)).layer(layer),
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let server = axum::serve(listener, router.with_state(app.clone()));
    tokio::spawn(server.into_future());

    // Blocks a thread that is not one of the runtime's.
    let ordered = tokio::task::spawn_blocking(|| io::stdin().lock().read_line(&mut String::new()));
    ordered.await.expect("the thread that reads the orders")?;

    let began = Instant::now();
    let (accepted, rejected, dropped) = if variant == "spawn" {
        let spawned = app.spawned.load(Ordering::Relaxed);
        while app.completed.load(Ordering::Relaxed) < spawned && began.elapsed() < DRAIN {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (spawned, 0, 0)
    } else {
        executor.drain(DRAIN).await;
        let end = executor.snapshot();
        assert_eq!(end.completed, app.completed.load(Ordering::Relaxed));
        (end.accepted, end.rejected_full, end.discarded)
    };
    println!(
        "{accepted} | {rejected} | {dropped} | {} | {:.1} |",
        app.completed.load(Ordering::Relaxed),
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

async fn spawn(State(app): State<App>) -> StatusCode {
    app.spawned.fetch_add(1, Ordering::Relaxed);
    tokio::spawn(app.work());
    StatusCode::ACCEPTED
}

async fn run(State(app): State<App>, request: Request) -> StatusCode {
    let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
    defer.run(Task::once(app.work()));
    StatusCode::ACCEPTED
}

async fn try_run(State(app): State<App>, request: Request) -> StatusCode {
    let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
    match defer.try_run(Task::once(app.work())) {
        Ok(_) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}
