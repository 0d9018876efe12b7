//! What recording an event adds to its response.
//!
//! `cargo bench --bench recorded --features axum,sqlite`; `-- quick` for a short one, `-- --dir PATH` for
//! another disk. A server over a real connection, idle but for one client, who asks in turn: a handler
//! that emits nothing, one that emits an event of about 200 bytes (the response waits until that is
//! durable), and beside them the least that it can cost: a record of 200 bytes appended to a file, and
//! `fdatasync`. The subscriber has nothing to do; between two requests there is time to settle its
//! delivery, which is a commit of its own. Medians of interleaved rounds; for the p99 all rounds together, each
//! response less the median of those without an event.
#![expect(
    clippy::disallowed_methods,
    reason = "a program that measures reads the clock; its pauses are part of what is measured"
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tower_defer::event::store::Sqlite;
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer};
use tower_defer_measure::{Arguments, Figure, Spread, Target, median};

const RECORD: usize = 200;

/// Long enough that the delivery before is settled.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Serialize, Deserialize)]
struct UserCreated {
    text: String,
}

impl Event for UserCreated {
    const NAME: &'static str = "user.created";
}

fn main() -> io::Result<()> {
    let Some(arguments) = Arguments::of_bench() else {
        return Ok(());
    };
    let directory = arguments.scratch();
    let (rounds, requests) = arguments.length.choose((1, 4), (3, 40), (9, 100));
    let measured = measure(directory.path(), rounds, requests)?;
    print(&measured, requests);
    Ok(())
}

/// Medians of a round, in microseconds.
struct Round {
    plain: f64,
    event: f64,
    file: f64,
    /// All of the last two.
    all: [Vec<f64>; 2],
}

impl Round {
    fn added(&self) -> f64 {
        self.event - self.plain
    }
}

fn measure(directory: &Path, rounds: usize, requests: usize) -> io::Result<Vec<Round>> {
    let mut client = Client::new(serve(&directory.join("events.db"))?)?;
    let mut file = File::create(directory.join("file"))?;
    // What is made once is made now.
    for path in ["/plain", "/event"] {
        client.ask(path)?;
    }
    let mut all = Vec::new();
    for _ in 0..rounds {
        let mut times = [const { Vec::new() }; 3];
        for at in 0..requests {
            // Another order each time, so that none always follows the same neighbour.
            for which in (0..3).map(|which| (which + at) % 3) {
                std::thread::sleep(PAUSE);
                let start = Instant::now();
                match which {
                    0 => client.ask("/plain")?,
                    1 => client.ask("/event")?,
                    _ => {
                        file.write_all(&[b'x'; RECORD])?;
                        file.sync_data()?;
                    }
                }
                times[which].push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        let [plain, event, file] = times.each_ref().map(|times| median(times.clone()));
        let [_, events, files] = times;
        all.push(Round {
            plain,
            event,
            file,
            all: [events, files],
        });
    }
    Ok(all)
}

fn print(rounds: &[Round], requests: usize) {
    println!("p50 of {requests} requests each, in µs");
    println!("round | no event | one event | added | append + fdatasync | ratio");
    for (number, round) in rounds.iter().enumerate() {
        let Round {
            plain, event, file, ..
        } = round;
        let added = round.added();
        println!(
            "{:5} | {plain:8.0} | {event:9.0} | {added:5.0} | {file:18.0} | {:5.2}",
            number + 1,
            added / file
        );
    }
    let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure));
    let figure = Figure {
        number: 15,
        what: "what recording an event adds to a response, p50, idle, against one append and `fdatasync`"
            .to_owned(),
        reference: format!("{:.0} µs", of(|round| round.file)),
        ours: format!("{:.0} µs", of(Round::added)),
        ratio: Spread::of(rounds.iter().map(|r| r.added() / r.file)),
        target: Some(Target::AtMost(1.5)),
        instead: None,
    };
    println!("\n{figure}");
    let plain = of(|round| round.plain);
    let [events, file] =
        [0, 1].map(|which| p99(rounds.iter().flat_map(|round| round.all[which].clone())));
    let added = events - plain;
    let figure = Figure {
        number: 15,
        what: "the same, p99".to_owned(),
        reference: format!("{file:.0} µs"),
        ours: format!("{added:.0} µs"),
        ratio: Spread::exact(added / file),
        target: None,
        instead: None,
    };
    println!("{figure}");
}

fn p99(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() * 99 / 100]
}

/// On a thread of its own.
fn serve(store: &Path) -> io::Result<SocketAddr> {
    let store = Sqlite::open(store).map_err(io::Error::other)?;
    let events = Events::new(()).on("nobody", async |(): (), _: UserCreated| {});
    let layer = DeferLayer::new().events(events.store(store));
    let plain = async |_: Defer| "hello";
    let event = async |defer: Defer| {
        defer.emit(UserCreated {
            text: "x".repeat(RECORD - "{\"text\":\"\"}".len()),
        });
        "hello"
    };
    let router = Router::new()
        .route("/plain", get(plain))
        .route("/event", get(event))
        .layer(layer);
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            axum::serve(listener, router).await.expect("a server");
        });
    });
    Ok(address)
}

struct Client(TcpStream);

impl Client {
    fn new(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self(stream))
    }

    /// Until the last byte of the answer.
    fn ask(&mut self, path: &str) -> io::Result<()> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n");
        self.0.write_all(request.as_bytes())?;
        let (mut answer, mut chunk) = (Vec::new(), [0; 1024]);
        while !answer.ends_with(b"hello") {
            let read = self.0.read(&mut chunk)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            answer.extend_from_slice(&chunk[..read]);
        }
        if answer.starts_with(b"HTTP/1.1 200 ") {
            return Ok(());
        }
        Err(io::Error::other(
            String::from_utf8_lossy(&answer).into_owned(),
        ))
    }
}
