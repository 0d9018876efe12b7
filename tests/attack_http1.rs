//! Does a task ever begin before the last byte of its own HTTP/1 response is written?
//!
//! The workers make no turn before the tasks of a short HTTP/1 response (`src/defer/seen.rs`), so all rests on
//! the connection writing in the very poll in which it drops the body. A real hyper over loopback, on one
//! thread; what is compared is an order and not a time: the socket notes what it takes, and the task that it
//! begins.
#![expect(
    clippy::disallowed_methods,
    reason = "a server's connection is no deferred task, and the client is a thread"
)]

use std::convert::Infallible;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream as Client};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::{coop, yield_now};
use tower::{Layer, service_fn};
use tower_defer::{Defer, DeferLayer, Task, When};

const LONG: Duration = Duration::from_secs(10);

type Reply = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Clone, Debug, PartialEq)]
enum Noted {
    Wrote(Vec<u8>),
    Shut,
    /// The task of the request with this path.
    Began(String),
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Noted>>>);

impl Log {
    fn note(&self, noted: Noted) {
        self.all().push(noted);
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Noted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the server had written when the task of this path began.
    fn written_before(&self, path: &str) -> Option<Vec<u8>> {
        let all = self.all();
        let began = |noted: &Noted| matches!(noted, Noted::Began(it) if it == path);
        let at = all.iter().position(began)?;
        let written = all[..at].iter().filter_map(|noted| match noted {
            Noted::Wrote(bytes) => Some(bytes.as_slice()),
            Noted::Shut => Some(b"<shut>".as_slice()),
            Noted::Began(_) => None,
        });
        Some(written.collect::<Vec<_>>().concat())
    }
}

/// How the connection's IO takes what is written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Io {
    Vectored,
    Plain,
    /// As TLS: copies, and sends when it is flushed or has too much.
    Buffers,
}

struct Noting {
    stream: TcpStream,
    io: Io,
    held: Vec<u8>,
    log: Log,
}

impl Noting {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.held))?;
            let sent = self.held.drain(..n).collect();
            self.log.note(Noted::Wrote(sent));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Noting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Noting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.io == Io::Buffers {
            if self.held.len() > 16 << 10 {
                ready!(self.poll_send(cx))?;
            }
            self.held.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        let n = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.log.note(Noted::Wrote(buf[..n].to_vec()));
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        let mut all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        all.truncate(n);
        self.log.note(Noted::Wrote(all));
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.io == Io::Vectored
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        self.log.note(Noted::Shut);
        Poll::Ready(Ok(()))
    }
}

#[derive(Clone, Copy, Debug)]
enum Flavor {
    CurrentThread,
    OneWorker,
}

/// A server for one connection. It ends with the connection.
fn serve(flavor: Flavor, io: Io, builder: http1::Builder, log: &Log) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let address = listener.local_addr().expect("an address");
    let log = log.clone();
    thread::spawn(move || {
        let mut runtime = match flavor {
            Flavor::CurrentThread => tokio::runtime::Builder::new_current_thread(),
            Flavor::OneWorker => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = runtime.worker_threads(1).enable_all().build();
        runtime.expect("a runtime").block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a socket");
            let stream = Noting {
                stream,
                io,
                held: Vec::new(),
                log: log.clone(),
            };
            let layer = DeferLayer::new();
            let service = layer.layer(service_fn(move |request| answer(request, log.clone())));
            let connection = builder
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
                .with_upgrades();
            let connection = tokio::spawn(connection);
            let _ = connection.await;
            layer.get_executor().idle().await;
        });
    });
    address
}

fn frames(frames: Vec<Step>) -> Reply {
    let frames = stream::unfold(frames.into_iter(), |mut frames| async move {
        loop {
            match frames.next()? {
                Step::Later => yield_now().await,
                Step::Frame(frame) => return Some((Ok(frame), frames)),
            }
        }
    });
    StreamBody::new(frames).boxed_unsync()
}

enum Step {
    Frame(Frame<Bytes>),
    Later,
}

fn data(text: &str) -> Step {
    Step::Frame(Frame::data(Bytes::copy_from_slice(text.as_bytes())))
}

fn trailers(bytes: usize) -> Step {
    let mut trailers = HeaderMap::new();
    let sum = "7".repeat(bytes) + "<last>";
    trailers.insert("x-sum", sum.parse().expect("a value"));
    Step::Frame(Frame::trailers(trailers))
}

async fn answer(request: Request<Incoming>, log: Log) -> Result<Response<Reply>, Infallible> {
    let path = request
        .uri()
        .path_and_query()
        .map_or(String::new(), |path| path.as_str().to_owned());
    let began = path.clone();
    Defer::from_extensions(request.extensions())
        .expect("the layer is there")
        .run(
            Task::new(move || {
                log.note(Noted::Began(began.clone()));
                async {}
            })
            .when(When::always()),
        );
    let (kind, number) = path
        .trim_start_matches('/')
        .split_once('?')
        .unwrap_or(("", "0"));
    let number: usize = number.parse().unwrap_or(0);
    let full = |text: String| Full::new(Bytes::from(text)).boxed_unsync();
    let mut response = Response::builder().header("trailer", "x-sum");
    let body = match kind {
        "empty" => Empty::new().boxed_unsync(),
        "bytes" => full("x".repeat(number) + "<last>"),
        "budget" => {
            for _ in 0..number {
                coop::consume_budget().await;
            }
            full("<last>".to_owned())
        }
        "budget-empty" => {
            for _ in 0..number {
                coop::consume_budget().await;
            }
            Empty::new().boxed_unsync()
        }
        "many" => frames((0..number).map(|_| data("x")).collect()),
        "pending-first" => frames(vec![Step::Later, data("a")]),
        "late" => frames(vec![data("a"), Step::Later, data("b"), Step::Later]),
        "trailers" => frames(vec![data("a"), trailers(number)]),
        "late-trailers" => frames(vec![data("a"), Step::Later, trailers(number)]),
        "status" => {
            response = response.status(number as u16);
            Empty::new().boxed_unsync()
        }
        "upgrade" => {
            response = response
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header("connection", "upgrade")
                .header("upgrade", "tea");
            Empty::new().boxed_unsync()
        }
        "head" => {
            response = response.header("x-large", "h".repeat(number));
            full("<last>".to_owned())
        }
        other => panic!("{other}"),
    };
    Ok(response.body(body).expect("a valid head"))
}

fn connect(address: SocketAddr) -> Client {
    let client = Client::connect(address).expect("the server listens");
    client.set_nodelay(true).expect("a socket");
    client.set_read_timeout(Some(LONG)).expect("a socket");
    client
}

/// Sends it, reads until the response ends in this (or at all), and waits for the task. What the server had
/// written when the task began.
fn ask(client: &mut Client, log: &Log, path: &str, request: &str, end: &str) -> Vec<u8> {
    client.write_all(request.as_bytes()).expect("a write");
    let mut got = Vec::new();
    let mut buffer = [0; 64 << 10];
    while end.is_empty() || !got.ends_with(end.as_bytes()) {
        let n = client.read(&mut buffer).expect("an answer");
        got.extend_from_slice(&buffer[..n]);
        if n == 0 {
            break;
        }
    }
    for _ in 0..10_000 {
        if let Some(before) = log.written_before(path) {
            return before;
        }
        thread::sleep(Duration::from_millis(1)); // the probe's pause
    }
    panic!("{path}: no task began: {:?}", log.all());
}

/// Each with the end of its response.
const SHAPES: [(&str, &str, &str); 18] = [
    ("GET", "/empty?0", "\r\n\r\n"),
    ("GET", "/bytes?0", "<last>"),
    ("GET", "/bytes?16378", "<last>"),
    ("GET", "/bytes?100000", "<last>"),
    ("HEAD", "/bytes?100", "\r\n\r\n"),
    ("GET", "/status?204", "\r\n\r\n"),
    ("GET", "/status?304", "\r\n\r\n"),
    ("GET", "/many?2", "\r\n0\r\n\r\n"),
    ("GET", "/many?40", "\r\n0\r\n\r\n"),
    ("GET", "/many?1000", "\r\n0\r\n\r\n"),
    ("GET", "/pending-first?0", "\r\n0\r\n\r\n"),
    ("GET", "/late?0", "\r\n0\r\n\r\n"),
    ("GET", "/trailers?1", "<last>\r\n\r\n"),
    ("GET", "/trailers?100000", "<last>\r\n\r\n"),
    ("GET", "/late-trailers?100000", "<last>\r\n\r\n"),
    ("GET", "/upgrade?0", "\r\n\r\n"),
    ("GET", "/head?100000", "<last>"),
    ("POST", "/bytes?7", "<last>"),
];

fn everywhere(see: impl Fn(Flavor, Io, http1::Builder)) {
    for flavor in [Flavor::CurrentThread, Flavor::OneWorker] {
        for io in [Io::Vectored, Io::Plain, Io::Buffers] {
            let mut small = http1::Builder::new();
            small.max_buf_size(8192).half_close(true);
            for builder in [http1::Builder::new(), small] {
                see(flavor, io, builder);
            }
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_task_begins_after_the_last_byte_of_its_response_whatever_its_shape() {
    everywhere(|flavor, io, builder| {
        for (method, path, end) in SHAPES {
            let log = Log::default();
            let mut client = connect(serve(flavor, io, builder.clone(), &log));
            let more = match method {
                // Which nobody asks for, and nobody sends.
                "POST" => "expect: 100-continue\r\ncontent-length: 100000\r\n",
                _ if path.starts_with("/upgrade") => "connection: upgrade\r\nupgrade: tea\r\n",
                _ => "te: trailers\r\n",
            };
            let request = format!("{method} {path} HTTP/1.1\r\nhost: a\r\n{more}\r\n");
            let before = text(&ask(&mut client, &log, path, &request, end));
            // Which may be closed by then.
            let before = before.strip_suffix("<shut>").unwrap_or(&before);
            assert!(
                before.ends_with(end),
                "{flavor:?} {io:?} {method} {path}: {before}"
            );
        }
        // What ends with its connection.
        for path in ["/bytes?7", "/many?2"] {
            let log = Log::default();
            let mut client = connect(serve(flavor, io, builder.clone(), &log));
            let request = format!("GET {path} HTTP/1.0\r\n\r\n");
            let before = text(&ask(&mut client, &log, path, &request, ""));
            assert!(
                before.ends_with("<shut>"),
                "{flavor:?} {io:?} 1.0 {path}: {before}"
            );
        }
    });
}

/// The turn of a connection's task is 128 steps of tokio's. Its handler takes some of them, and where it takes
/// the last one, the socket takes nothing before the next turn.
#[test]
fn a_task_begins_after_its_response_also_where_the_connection_has_used_up_its_turn() {
    everywhere(|flavor, io, builder| {
        for (kind, end) in [("budget", "<last>"), ("budget-empty", "\r\n\r\n")] {
            let log = Log::default();
            let mut client = connect(serve(flavor, io, builder.clone(), &log));
            for steps in 0..=130 {
                log.all().clear();
                let path = format!("/{kind}?{steps}");
                let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
                let before = text(&ask(&mut client, &log, &path, &request, end));
                assert!(
                    before.ends_with(end),
                    "{flavor:?} {io:?} {path}: {before:?}"
                );
            }
        }
    });
}

#[test]
fn a_task_begins_after_its_response_also_on_a_pipelined_connection() {
    const REQUESTS: usize = 40;
    everywhere(|flavor, io, builder| {
        let log = Log::default();
        let mut client = connect(serve(flavor, io, builder, &log));
        let path = |number: usize| format!("/bytes?{number}");
        let request = |number| format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", path(number));
        let all: String = (0..REQUESTS).map(request).collect();
        let last = REQUESTS - 1;
        let end = "x".repeat(last) + "<last>";
        let _ = ask(&mut client, &log, &path(last), &all, &end);
        for number in 0..REQUESTS {
            let before = log.written_before(&path(number)).expect("it ran");
            let answered = text(&before).matches("<last>").count();
            assert!(
                answered > number,
                "{flavor:?} {io:?} {number}: {answered} answered"
            );
        }
    });
}
