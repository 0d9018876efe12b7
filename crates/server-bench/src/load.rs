//! The load.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::{Server, on_core};

/// As fast as it goes, or so many requests a second, however long each takes: then a response's time
/// counts from when its request was due.
#[derive(Clone, Copy, Debug)]
pub enum Rate {
    /// Each connection sends its next request when it has the answer to the last one.
    Closed,
    /// Requests a second.
    Fixed(u32),
}

/// What the clients saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answers {
    /// A second, of those that succeeded.
    pub per_second: f64,
    /// Of the response, in microseconds.
    pub p50: f64,
    /// Of the response, in microseconds.
    pub p99: f64,
    /// By a success.
    pub answered: u64,
    /// By a 503.
    pub unavailable: u64,
    /// By anything else, or not at all. What is on its way at the end is not among them.
    pub failed: u64,
}

/// For so long, over so many connections, all of them kept alive.
pub fn load(server: &Server, rate: Rate, connections: u32, length: Duration) -> Answers {
    let mut oha = on_core(1);
    oha.args(["oha", "--no-tui", "--output-format", "json"])
        .args(["-c", &connections.to_string()])
        .args(["-z", &format!("{}ms", length.as_millis())]);
    if let Rate::Fixed(per_second) = rate {
        oha.args(["--latency-correction", "-q", &per_second.to_string()]);
    }
    let said = oha
        .arg(format!("http://{}/", server.address))
        .stdin(Stdio::null())
        .output()
        .expect("taskset, which was asked for");
    assert!(
        said.status.success(),
        "oha: {}",
        String::from_utf8_lossy(&said.stderr)
    );
    let report: Value = serde_json::from_slice(&said.stdout).expect("oha's report");
    let percentile = |p: &str| report["latencyPercentiles"][p].as_f64().unwrap_or(f64::NAN) * 1e6;
    let mut answers = Answers {
        p50: percentile("p50"),
        p99: percentile("p99"),
        ..Answers::default()
    };
    for (status, count) in entries(&report["statusCodeDistribution"]) {
        match status {
            "200" | "202" => answers.answered += count,
            "503" => answers.unavailable += count,
            _ => answers.failed += count,
        }
    }
    for (error, count) in entries(&report["errorDistribution"]) {
        if error != "aborted due to deadline" {
            answers.failed += count;
        }
    }
    answers.per_second = answers.answered as f64 / length.as_secs_f64();
    answers
}

fn entries(object: &Value) -> impl Iterator<Item = (&str, u64)> {
    let entries = object.as_object().into_iter().flatten();
    entries.map(|(name, count)| (name.as_str(), count.as_u64().unwrap_or(0)))
}
