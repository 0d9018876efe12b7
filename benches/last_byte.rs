//! Does the work that a response left behind delay the response itself?
//!
//! The client's time to the last byte, over a real connection, with and without a deferred task that
//! keeps its thread busy for 20 ms, and for 50 ms. The client has a thread and a runtime of its own.
//!
//! `cargo bench --bench last_byte`, or `-- quick`, or `-- 200 h2` for 200 requests in each cell whose name
//! contains `h2`. Times are in milliseconds; "late" counts requests that took at least half of the task's time
//! more than the median without a task (in the columns without one: of the shorter task's time). A time is
//! worth what the machine's silence is worth: the columns without a task are there to be compared with.
//! "overtaken" is an order and not a time, and holds on a noisy machine as well: requests whose last write
//! to the socket came after their task had begun. Only these can be late by their own task's doing; of
//! the others the last line says how many were late because a thread waited for a core.
//!
//! Not a gate: it prints what it saw, and beside the target whether the medians meet it.
#![expect(
    clippy::disallowed_methods,
    reason = "a program that measures reads the time, and its connections are not deferred tasks"
)]

use std::convert::Infallible;
use std::fmt::{self, Write as _};
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, service_fn};
use tower_defer::{Defer, DeferLayer, Executor};
use tower_defer_measure::{Arguments, Figure, Spread, Target};

/// How long the task keeps its thread busy.
const BUSY: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(50)];

/// By how much, without a task and with each: half of a task's time. Of the shorter one where there is none,
/// so that what the machine does alone is counted as strictly.
const LATE: [Duration; 3] = [
    Duration::from_millis(10),
    Duration::from_millis(10),
    Duration::from_millis(25),
];

/// What a task may add to the median of a cell.
const TARGET: Duration = Duration::from_millis(10);

/// No cell takes longer, whatever the machine does.
const CELL: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Protocol {
    Http1,
    Http2,
}

#[derive(Clone, Copy, Debug)]
enum Flavor {
    CurrentThread,
    MultiThread,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Empty,
    Small,
    FiveKilobytes,
    LateEnd,
    Trailers,
    LateTrailers,
    EightMebibytes,
}

const KINDS: [Kind; 7] = [
    Kind::Empty,
    Kind::Small,
    Kind::FiveKilobytes,
    Kind::LateEnd,
    Kind::Trailers,
    Kind::LateTrailers,
    Kind::EightMebibytes,
];

type Reply = UnsyncBoxBody<Bytes, Infallible>;

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Empty => "empty",
            Kind::Small => "small",
            Kind::FiveKilobytes => "5 kB",
            Kind::LateEnd => "late end",
            Kind::Trailers => "trailers",
            Kind::LateTrailers => "late trailers",
            Kind::EightMebibytes => "8 MiB",
        }
    }

    fn body(self, large: &Bytes) -> Reply {
        let (data, ending, late) = match self {
            Kind::Empty => return Empty::new().boxed_unsync(),
            Kind::Small => return Full::new(Bytes::from_static(b"hello world")).boxed_unsync(),
            Kind::FiveKilobytes => return Full::new(large.slice(..5_000)).boxed_unsync(),
            Kind::EightMebibytes => return Full::new(large.clone()).boxed_unsync(),
            Kind::LateEnd => (large.slice(..500), false, true),
            Kind::Trailers => (large.slice(..500), true, false),
            Kind::LateTrailers => (large.slice(..500), true, true),
        };
        let frames = stream::unfold(0, move |step| {
            let data = data.clone();
            async move {
                if step == 1 && late {
                    tokio::time::sleep(Duration::from_millis(2)).await; // the task's own work
                }
                let frame = match step {
                    0 => Frame::data(data),
                    1 if ending => {
                        let mut trailers = HeaderMap::new();
                        trailers.insert("x-sum", 12.into());
                        Frame::trailers(trailers)
                    }
                    _ => return None,
                };
                Some((Ok(frame), step + 1))
            }
        });
        StreamBody::new(frames).boxed_unsync()
    }
}

/// When the server last wrote, and when the task last began: what came first.
struct Order {
    epoch: Instant,
    wrote: AtomicU64,
    began: AtomicU64,
    /// The thread that serves, as `/proc` names it.
    server: OnceLock<PathBuf>,
}

impl Order {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            wrote: AtomicU64::new(0),
            began: AtomicU64::new(u64::MAX),
            server: OnceLock::new(),
        })
    }

    fn note(&self, event: &AtomicU64) {
        let nanos = u64::try_from(self.epoch.elapsed().as_nanos());
        event.store(nanos.expect("a short program"), Ordering::SeqCst);
    }

    fn serves_here(&self) {
        self.server
            .get_or_init(|| std::fs::read_link("/proc/thread-self").unwrap_or_default());
    }

    /// So far, the thread that asks and the one that serves: how long they could have run and had no core.
    fn waited(&self) -> Duration {
        let server = self.server.get().map_or(Duration::ZERO, |it| waited(it));
        waited(Path::new("thread-self")) + server
    }

    /// Asked when the request and its task are over.
    fn overtaken(&self) -> bool {
        let began = self.began.swap(u64::MAX, Ordering::SeqCst);
        self.wrote.load(Ordering::SeqCst) > began
    }
}

/// A thread, for a core. Nothing where there is no `/proc`.
fn waited(thread: &Path) -> Duration {
    let file = Path::new("/proc").join(thread).join("schedstat");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let nanos = text.split(' ').nth(1).and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

/// A socket that notes its writes.
struct Noting(TcpStream, Arc<Order>);

impl AsyncRead for Noting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Noting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.0).poll_write(cx, buf));
        self.1.note(&self.1.wrote);
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.0).poll_write_vectored(cx, bufs));
        self.1.note(&self.1.wrote);
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn runtime(flavor: Flavor) -> Runtime {
    let mut builder = match flavor {
        Flavor::CurrentThread => Builder::new_current_thread(),
        Flavor::MultiThread => Builder::new_multi_thread(),
    };
    builder
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A server on a thread of its own, for one connection.
fn serve(
    protocol: Protocol,
    flavor: Flavor,
    kind: Kind,
    executor: Executor,
    order: &Arc<Order>,
) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let address = listener.local_addr().expect("an address");
    let large = Bytes::from(vec![7; 8 << 20]);
    let (noted, order) = (order.clone(), order.clone());
    let service = DeferLayer::new().executor(executor).layer(service_fn(
        move |request: Request<hyper::body::Incoming>| {
            let (body, order) = (kind.body(&large), order.clone());
            let busy = request.uri().path().trim_start_matches('/').parse();
            let busy = Duration::from_millis(busy.expect("milliseconds"));
            order.serves_here();
            async move {
                if !busy.is_zero() {
                    let defer = Defer::from_extensions(request.extensions());
                    defer
                        .expect("the layer is there")
                        .run_with(order, move |order| async move {
                            order.note(&order.began);
                            spin(busy);
                        });
                }
                let response = Response::builder().header("trailer", "x-sum").body(body);
                Ok::<_, Infallible>(response.expect("a valid head"))
            }
        },
    ));
    std::thread::spawn(move || {
        runtime(flavor).block_on(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a socket");
            let stream = TokioIo::new(Noting(stream, noted));
            let service = TowerToHyperService::new(service);
            // Spawned, so that it runs on the worker thread where there is one.
            let connection = tokio::spawn(async move {
                match protocol {
                    Protocol::Http1 => {
                        let server = hyper::server::conn::http1::Builder::new();
                        let _ = server.serve_connection(stream, service).await;
                    }
                    Protocol::Http2 => {
                        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = server.serve_connection(stream, service).await;
                    }
                }
            });
            let _ = connection.await;
        });
    });
    address
}

fn spin(busy: Duration) {
    let began = Instant::now();
    while began.elapsed() < busy {
        std::hint::spin_loop();
    }
}

fn request(busy: Duration) -> Request<Empty<Bytes>> {
    Request::builder()
        .uri(format!("http://localhost/{}", busy.as_millis()))
        .header("host", "localhost")
        .header("te", "trailers")
        .body(Empty::new())
        .expect("a valid request")
}

/// The times to the last byte of so many requests, one after the other.
async fn measure(
    protocol: Protocol,
    address: SocketAddr,
    executor: &Executor,
    order: &Order,
    count: usize,
) -> Cell {
    let stream = TcpStream::connect(address)
        .await
        .expect("the server listens");
    stream.set_nodelay(true).expect("a socket");
    let stream = TokioIo::new(stream);
    match protocol {
        Protocol::Http1 => {
            let (mut client, connection) = hyper::client::conn::http1::handshake(stream)
                .await
                .expect("a connection");
            tokio::spawn(connection);
            repeat(executor, order, count, async |busy| {
                client.ready().await.expect("open");
                read(client.send_request(request(busy))).await
            })
            .await
        }
        Protocol::Http2 => {
            // A window for the whole of the largest body: what is measured is the server, not the
            // round trips of flow control.
            let (mut client, connection) =
                hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                    .initial_stream_window_size(16 << 20)
                    .initial_connection_window_size(16 << 20)
                    .handshake(stream)
                    .await
                    .expect("a connection");
            tokio::spawn(connection);
            repeat(executor, order, count, async |busy| {
                client.ready().await.expect("open");
                read(client.send_request(request(busy))).await
            })
            .await
        }
    }
}

async fn read(
    response: impl Future<Output = hyper::Result<Response<hyper::body::Incoming>>>,
) -> Duration {
    let began = Instant::now();
    let mut body = response.await.expect("a response").into_body();
    while let Some(frame) = body.frame().await {
        frame.expect("a frame");
    }
    began.elapsed()
}

/// Without a task, and with each of those in [`BUSY`], in turn.
async fn repeat(
    executor: &Executor,
    order: &Order,
    count: usize,
    mut one: impl AsyncFnMut(Duration) -> Duration,
) -> Cell {
    let began = Instant::now();
    let mut cell = Cell::default();
    // The first few pay for what is made once.
    for at in 0..count + 3 {
        // Another order each time, so that none always follows the same neighbour.
        for which in (0..3).map(|which| (which + at) % 3) {
            let before = order.waited();
            let time = one([Duration::ZERO, BUSY[0], BUSY[1]][which]).await;
            let waited = order.waited().saturating_sub(before);
            while executor.snapshot().outstanding > 0 {
                tokio::time::sleep(Duration::from_micros(500)).await; // the task's own work
            }
            let overtaken = order.overtaken();
            if at >= 3 {
                cell[which].requests.push(Answered { time, waited });
                cell[which].overtaken += usize::from(overtaken);
            }
        }
        if began.elapsed() > CELL {
            break;
        }
    }
    cell.iter_mut()
        .for_each(|times| times.requests.sort_unstable());
    cell
}

/// Without a task, with the shorter one, with the longer one.
type Cell = [Times; 3];

/// What was seen, the shortest time first.
#[derive(Default)]
struct Times {
    requests: Vec<Answered>,
    overtaken: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Answered {
    time: Duration,
    /// Of it, both threads together, for a core.
    waited: Duration,
}

impl Times {
    fn median(&self) -> Duration {
        self.requests[self.requests.len() / 2].time
    }

    fn late(&self, late: Duration) -> impl Iterator<Item = &Answered> {
        self.requests.iter().filter(move |it| it.time >= late)
    }

    fn columns(&self, late: Duration) -> String {
        let most = self.requests[self.requests.len() - 1].time;
        let late = self.late(late).count();
        format!(
            "{:8.2} {:8.2} {late:4}",
            millis(self.median()),
            millis(most)
        )
    }
}

/// Requests that were late, of all cells.
#[derive(Default)]
struct Late {
    requests: usize,
    late: usize,
    /// Those in which waiting for a core made at least half of what they were late by.
    waited: usize,
}

impl Late {
    fn see(&mut self, times: &Times, usual: Duration, by: Duration) {
        self.requests += times.requests.len();
        for it in times.late(usual + by) {
            self.late += 1;
            self.waited += usize::from(it.waited >= (it.time - usual) / 2);
        }
    }
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            requests,
            late,
            waited,
        } = self;
        write!(f, "{late} of {requests} ({waited} of them by waiting)")
    }
}

fn cell(protocol: Protocol, flavor: Flavor, kind: Kind, count: usize) -> Cell {
    let (executor, order) = (Executor::new(), Order::new());
    let address = serve(protocol, flavor, kind, executor.clone(), &order);
    let client = std::thread::spawn(move || {
        runtime(Flavor::CurrentThread)
            .block_on(measure(protocol, address, &executor, &order, count))
    });
    client.join().expect("the client has measured")
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() {
    let Some(arguments) = Arguments::of_bench() else {
        return;
    };
    let count = arguments.words.iter().find_map(|word| word.parse().ok());
    let count = count.unwrap_or(arguments.length.choose(1, 10, 40));
    let mut words = arguments.words.iter();
    let only = words.find(|word| word.parse::<usize>().is_err());

    println!(
        "client's time to the last byte, ms; {count} requests a cell; late: {} ms or more above the median \
         without a task; {} ms with one of 50 ms",
        LATE[0].as_millis(),
        LATE[2].as_millis()
    );
    println!(
        "{:34} {:^22}   {:^42}   {:^42}",
        "", "without a task", "with one of 20 ms", "with one of 50 ms"
    );
    let head = format!("{:>8} {:>8} {:>4}", "median", "max", "late");
    println!(
        "{:34} {head}   {head} {:>18}   {head} {:>18}",
        "", "overtaken", "overtaken"
    );
    let mut worst = BUSY.map(|busy| (busy, Added::default()));
    let mut late = [(); 3].map(|()| Late::default());
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for flavor in [Flavor::CurrentThread, Flavor::MultiThread] {
            for kind in KINDS {
                let protocol_name = if protocol == Protocol::Http1 {
                    "h1"
                } else {
                    "h2"
                };
                let flavor_name = match flavor {
                    Flavor::CurrentThread => "current_thread",
                    Flavor::MultiThread => "multi_thread(1)",
                };
                let name = format!("{protocol_name}  {flavor_name:16} {}", kind.name());
                if only.is_some_and(|only| !name.contains(only.as_str())) {
                    continue;
                }
                let cell = cell(protocol, flavor, kind, count);
                let usual = cell[0].median();
                for ((late, times), by) in late.iter_mut().zip(&cell).zip(LATE) {
                    late.see(times, usual, by);
                }
                let [without, with @ ..] = cell;
                let mut row = format!("{name:34} {}", without.columns(usual + LATE[0]));
                for (((_, worst), with), late) in worst.iter_mut().zip(with).zip(&LATE[1..]) {
                    let columns = with.columns(usual + *late);
                    let (overtaken, of) = (with.overtaken, with.requests.len());
                    let _ = write!(row, "   {columns} {overtaken:11} of {of:3}");
                    worst.see(&name, usual, &with);
                }
                println!("{row}");
            }
        }
    }
    let [without, shorter, longer] = late;
    println!(
        "\nlate without a task: {without}; with one of 20 ms: {shorter}; with one of 50 ms: {longer}. By waiting: \
         at least half of what the request was late by, the client's thread and the server's, ready to run, \
         had no core."
    );
    println!();
    for (busy, worst) in worst {
        println!("{}", worst.figure(busy));
    }
}

/// The cell to whose median a task added most.
#[derive(Default)]
struct Added {
    cells: usize,
    cell: String,
    without: Duration,
    with: Duration,
    overtaken: usize,
    requests: usize,
}

impl Added {
    fn see(&mut self, cell: &str, without: Duration, with: &Times) {
        self.cells += 1;
        self.overtaken += with.overtaken;
        self.requests += with.requests.len();
        let by = with.median().saturating_sub(without);
        if by >= self.with.saturating_sub(self.without) {
            self.cell = cell.split_whitespace().collect::<Vec<_>>().join(" ");
            (self.without, self.with) = (without, with.median());
        }
    }

    /// For the report of all targets.
    fn figure(&self, busy: Duration) -> Figure {
        let by = self.with.saturating_sub(self.without);
        Figure {
            number: 11,
            what: format!(
                "what a task of {} ms adds to its response's last byte, median, against {} ms: the worst \
                 of {} cells ({}: {:.2} ms with, {:.2} ms without); overtaken: {} of {}",
                busy.as_millis(),
                TARGET.as_millis(),
                self.cells,
                self.cell,
                millis(self.with),
                millis(self.without),
                self.overtaken,
                self.requests,
            ),
            reference: format!("{:.2} ms", millis(TARGET)),
            ours: format!("{:.2} ms", millis(by)),
            ratio: Spread::exact(millis(by) / millis(TARGET)),
            target: Some(Target::AtMost(1.0)),
            instead: None,
        }
    }
}
