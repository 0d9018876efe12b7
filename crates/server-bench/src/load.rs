//! One run: a server on the first core, h2load on the second.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What one run found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    pub(crate) per_second: f64,
    /// Of the response, in microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Of the server's process, per answered request, in microseconds.
    pub(crate) cpu: f64,
    pub(crate) answered: u64,
    pub(crate) completed: u64,
    pub(crate) refused: u64,
}

/// As fast as it goes, or so many requests a second.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rate {
    Closed,
    Fixed(u32),
}

const CLIENTS: u32 = 32;

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(variant: &str, effect: &str) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut child = Command::new("taskset")
            .args(["-c", "0"])
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

    /// Completed and refused side effects.
    fn stats(&self) -> (u64, u64) {
        let mut stream = TcpStream::connect(&self.address).expect("the server");
        write!(
            stream,
            "GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        .expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let body = text.rsplit("\r\n").next().unwrap_or_default();
        let mut numbers = body.split(' ').filter_map(|n| n.parse().ok());
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
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

pub(crate) fn run(variant: &str, effect: &str, rate: Rate, seconds: u32) -> Run {
    let server = Server::start(variant, effect);
    load(&server, Rate::Fixed(500), 1);
    let settled = settle(&server);
    let cpu_before = server.cpu();
    let mut run = load(&server, rate, seconds);
    let cpu = server.cpu() - cpu_before;
    let (completed, refused) = settle(&server);
    run.cpu = cpu.as_micros() as f64 / run.answered.max(1) as f64;
    run.completed = completed - settled.0;
    run.refused = refused - settled.1;
    run
}

/// Waits until no side effect is left: the counts have stood still for a second.
fn settle(server: &Server) -> (u64, u64) {
    let until = Instant::now() + Duration::from_secs(30);
    let mut last = server.stats();
    let mut still = 0;
    while still < 10 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
        let now = server.stats();
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
    last
}

fn load(server: &Server, rate: Rate, seconds: u32) -> Run {
    let log = std::env::temp_dir().join(format!("tower-defer-h2load-{}", std::process::id()));
    let _ = std::fs::remove_file(&log);
    let mut command = Command::new("taskset");
    command
        .args(["-c", "1", "h2load", "--h1", "-t1"])
        .arg(format!("-c{CLIENTS}"));
    command
        .arg(format!("-D{seconds}"))
        .arg(format!("--log-file={}", log.display()));
    if let Rate::Fixed(per_second) = rate {
        command.arg(format!(
            "--rps={:.3}",
            f64::from(per_second) / f64::from(CLIENTS)
        ));
    }
    command.arg(format!("http://{}/", server.address));
    let done = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("h2load (Debian: nghttp2-client)");
    assert!(done.success(), "h2load failed");
    let text = std::fs::read_to_string(&log).expect("h2load's log");
    let _ = std::fs::remove_file(&log);
    // Start (µs), status, time to the end of the response (µs).
    let mut times: Vec<f64> = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            (fields.next()? == "200").then_some(())?;
            fields.next()?.parse().ok()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = times.len().saturating_sub(1);
        times
            .get((times.len() as f64 * share) as usize)
            .or(times.get(last))
            .copied()
            .unwrap_or(0.0)
    };
    Run {
        per_second: times.len() as f64 / f64::from(seconds),
        p50: at(0.5),
        p99: at(0.99),
        answered: times.len() as u64,
        ..Run::default()
    }
}
