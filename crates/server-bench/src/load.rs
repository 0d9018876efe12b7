//! One run: a server on the first core, oha on the second.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What one run found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    pub(crate) per_second: f64,
    /// Of the response, in microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Of the server's process until its last side effect has ended, per request, in microseconds.
    pub(crate) cpu: f64,
    /// Of the side effects.
    pub(crate) counts: Counts,
}

/// What became of the side effects: of every request that came to the handler.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) completed: u64,
    pub(crate) refused: u64,
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            completed: self.completed - before.completed,
            refused: self.refused - before.refused,
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            completed: self.completed + other.completed,
            refused: self.refused + other.refused,
        }
    }

    pub(crate) fn all_completed(self) -> bool {
        self.completed == self.requests
    }

    fn outstanding(self) -> bool {
        self.completed + self.refused < self.requests
    }
}

/// As fast as it goes, or so many requests a second, however long each takes: then a response's time
/// counts from when its request was due (no coordinated omission).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rate {
    Closed,
    Fixed(u32),
}

/// Connections, all of them kept alive.
const CLIENTS: u32 = 32;

/// No side effect here takes long; what is not done by then is lost, and the counts say so.
const SETTLE: Duration = Duration::from_secs(10);

/// Where there is no second core, the two share one.
fn on_core(core: usize) -> Command {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.min(cores - 1).to_string());
    command
}

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(variant: &str, effect: &str) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut child = on_core(0)
            .arg(this)
            .args(["serve", variant, effect])
            .stdout(Stdio::piped())
            .spawn()
            .expect("taskset (Debian: util-linux)");
        let mut address = String::new();
        let out = child.stdout.as_mut().expect("piped");
        BufReader::new(out)
            .read_line(&mut address)
            .expect("the server's address");
        Self {
            child,
            address: address.trim().to_owned(),
        }
    }

    fn counts(&self) -> Counts {
        let mut stream = TcpStream::connect(&self.address).expect("the server");
        let ask = "GET /counts HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(ask.as_bytes()).expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let body = text.rsplit("\r\n").next().unwrap_or_default();
        let numbers: Vec<u64> = body.split(' ').filter_map(|n| n.parse().ok()).collect();
        let [requests, completed, refused] = numbers[..] else {
            panic!("the server's counts: {text}");
        };
        Counts {
            requests,
            completed,
            refused,
        }
    }

    /// Waits until no side effect is left. Of a handler that does it inline one is lost with each client
    /// that leaves, so it also ends when nothing has changed for a second.
    fn settle(&self) -> Counts {
        let (until, mut last, mut looks) = (Instant::now() + SETTLE, self.counts(), 0);
        while last.outstanding() && looks < 20 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
            let counts = self.counts();
            looks = if counts.completed == last.completed {
                looks + 1
            } else {
                0
            };
            last = counts;
        }
        last
    }

    /// User and system time of the process. Ticks of 10 ms: enough over seconds.
    fn cpu(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.child.id());
        let text = std::fs::read_to_string(path).expect("the server runs");
        let after = text.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|n| n.parse::<u64>().ok())
            .sum();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn run(variant: &str, effect: &str, rate: Rate, length: Duration) -> Run {
    let server = Server::start(variant, effect);
    load(&server, Rate::Fixed(500), Duration::from_millis(300));
    let (counts, cpu) = (server.settle(), server.cpu());
    let mut run = load(&server, rate, length);
    run.counts = server.settle().since(counts);
    let cpu = server.cpu() - cpu;
    run.cpu = cpu.as_secs_f64() * 1e6 / run.counts.requests.max(1) as f64;
    run
}

fn load(server: &Server, rate: Rate, length: Duration) -> Run {
    let mut oha = on_core(1);
    oha.args(["oha", "--no-tui", "--output-format", "json"])
        .args(["-c", &CLIENTS.to_string()])
        .args(["-z", &format!("{}ms", length.as_millis())]);
    if let Rate::Fixed(per_second) = rate {
        oha.args(["--latency-correction", "-q", &per_second.to_string()]);
    }
    let said = oha
        .arg(format!("http://{}/", server.address))
        .stdin(Stdio::null())
        .output()
        .expect("taskset (Debian: util-linux)");
    assert!(
        said.status.success(),
        "oha (cargo install oha): {}",
        String::from_utf8_lossy(&said.stderr)
    );
    let report: Value = serde_json::from_slice(&said.stdout).expect("oha's report");
    let answered = report["statusCodeDistribution"]["200"].as_f64();
    let percentile = |p: &str| report["latencyPercentiles"][p].as_f64().unwrap_or(f64::NAN) * 1e6;
    Run {
        per_second: answered.unwrap_or(0.0) / length.as_secs_f64(),
        p50: percentile("p50"),
        p99: percentile("p99"),
        ..Run::default()
    }
}
