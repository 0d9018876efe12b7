//! The numbers: what is counted, under which names, and that gauges tell the truth.
#![cfg(all(feature = "axum", feature = "metrics"))]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::get;
use metrics_util::MetricKind;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tower_defer::{Defer, DeferLayer, Executor, Retry, Task, TaskError, When};

/// What a recorder was told, added up: its snapshots reset what they read.
struct Numbers {
    snapshotter: Snapshotter,
    counters: BTreeMap<String, u64>,
    gauges: BTreeMap<String, f64>,
    /// How many values, and their sum.
    histograms: BTreeMap<String, (usize, f64)>,
    labels: BTreeMap<(&'static str, String), BTreeSet<String>>,
}

impl Numbers {
    fn new(recorder: &DebuggingRecorder) -> Self {
        Self {
            snapshotter: recorder.snapshotter(),
            counters: BTreeMap::new(),
            gauges: BTreeMap::new(),
            histograms: BTreeMap::new(),
            labels: BTreeMap::new(),
        }
    }

    fn read(&mut self) {
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (kind, key) = key.into_parts();
            let mut labels: Vec<_> = key
                .labels()
                .map(|l| format!("{}={}", l.key(), l.value()))
                .collect();
            labels.sort();
            let name = format!("{}{{{}}}", key.name(), labels.join(","));
            let kind = match kind {
                MetricKind::Counter => "counter",
                MetricKind::Gauge => "gauge",
                MetricKind::Histogram => "histogram",
            };
            let known = self
                .labels
                .entry((kind, key.name().to_owned()))
                .or_default();
            known.extend(key.labels().map(|label| label.key().to_owned()));
            match value {
                DebugValue::Counter(value) => *self.counters.entry(name).or_default() += value,
                DebugValue::Gauge(value) => {
                    *self.gauges.entry(name).or_default() += value.into_inner();
                }
                DebugValue::Histogram(values) => {
                    let sum = self.histograms.entry(name).or_default();
                    sum.0 += values.len();
                    sum.1 += values.iter().map(|value| value.into_inner()).sum::<f64>();
                }
            }
        }
    }

    /// The sum of the counters of this name that have all of these labels.
    fn count(&mut self, name: &str, labels: &[&str]) -> u64 {
        self.read();
        let fits = |key: &str| {
            key.starts_with(&format!("{name}{{")) && labels.iter().all(|l| key.contains(l))
        };
        self.counters
            .iter()
            .filter(|(key, _)| fits(key))
            .map(|(_, value)| value)
            .sum()
    }

    fn gauges(&mut self, executor: &str) -> [f64; 3] {
        self.read();
        ["queued", "running", "waiting"].map(|state| {
            let key = format!("tower_defer.tasks.{state}{{messaging.destination.name={executor}}}");
            self.gauges.get(&key).copied().unwrap_or_default()
        })
    }
}

fn gauges_of(executor: &Executor) -> [f64; 3] {
    let now = executor.snapshot();
    [
        now.queued as f64,
        now.running.len() as f64,
        now.waiting as f64,
    ]
}

async fn fails() -> Result<(), &'static str> {
    Err("down")
}

/// One of everything, in an executor of this name.
async fn one_of_everything(name: &'static str) -> Executor {
    let executor = Executor::builder()
        .name(name)
        .capacity(8)
        .dead_letters(1)
        .build();
    let defer = DeferLayer::new()
        .executor(executor.clone())
        .max_tasks_per_request(6);
    let handler = |defer: Defer| async move {
        defer.run(Task::new(|| async {}).name("good"));
        defer.run(
            Task::new(|| async {})
                .name("unwanted")
                .when(When::failure()),
        );
        defer.run(Task::new(fails).name("flaky").retry(Retry::exponential(3)));
        defer.run(
            Task::new(|| async {
                if true {
                    panic!("boo")
                }
            })
            .name("bad"),
        );
        defer.run(
            Task::new(std::future::pending::<()>)
                .name("slow")
                .timeout(Duration::from_secs(1))
                .retry(Retry::never()),
        );
        defer.run(Task::new(|| async {}).name("regretted")).cancel();
        assert!(
            !defer
                .run(Task::new(|| async {}).name("seventh"))
                .is_accepted()
        );
    };
    let app = Router::new().route("/", get(handler)).layer(defer);
    let answer = app.oneshot(Request::new(Body::empty())).await.unwrap();
    drop(answer);
    executor.idle().await;
    let letters = executor.dead_letters();
    letters.replay(letters.list()[0].id).unwrap();
    executor.idle().await;
    let gate = Arc::new(Semaphore::new(0));
    for _ in 0..9 {
        let gate = gate.clone();
        executor.submit(Task::once(async move { drop(gate.acquire().await) }).name("hog"));
    }
    gate.add_permits(9);
    executor.drain(Duration::from_secs(1)).await;
    assert!(
        !executor
            .submit(Task::new(|| async {}).name("late"))
            .is_accepted()
    );
    executor
}

#[tokio::test(start_paused = true)]
async fn every_transition_is_counted_once() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let executor = one_of_everything("mixed").await;
    let now = executor.snapshot();

    let ended = "tower_defer.tasks.ended";
    let sent = "messaging.client.sent.messages";
    let outcome = |numbers: &mut Numbers, outcome: &str| {
        numbers.count(ended, &[&format!("task.outcome={outcome}")])
    };
    assert_eq!(outcome(&mut numbers, "completed"), now.completed);
    assert_eq!(outcome(&mut numbers, "discarded"), now.discarded);
    assert_eq!(outcome(&mut numbers, "skipped"), now.skipped);
    assert_eq!(outcome(&mut numbers, "cancelled"), now.cancelled);
    assert!(now.completed > 0 && now.discarded > 0 && now.skipped > 0 && now.cancelled > 0);
    let rejected = |numbers: &mut Numbers, reason: &str| {
        numbers.count(sent, &[&format!("error.type={reason}")])
    };
    assert_eq!(rejected(&mut numbers, "full"), now.rejected_full);
    assert_eq!(
        rejected(&mut numbers, "request_limit"),
        now.rejected_request_limit
    );
    assert_eq!(rejected(&mut numbers, "closed"), now.rejected_closed);
    assert!(now.rejected_full > 0 && now.rejected_request_limit > 0 && now.rejected_closed > 0);
    let all = numbers.count(sent, &[]);
    assert_eq!(
        all,
        now.accepted + now.rejected_full + now.rejected_request_limit + now.rejected_closed
    );
    assert_eq!(numbers.count(ended, &[]), now.accepted);
    assert_eq!(
        numbers.count("tower_defer.tasks.retries", &["task.name=flaky"]),
        now.retries
    );
    assert_eq!(numbers.count("tower_defer.dead_letters.replayed", &[]), 1);
    assert_eq!(
        numbers.count("tower_defer.dead_letters.lost", &[]),
        now.dead_letters_lost
    );
    assert_eq!(
        numbers.count("tower_defer.responses.released", &["response.end=complete"]),
        1
    );
    for reason in ["attempts", "panicked"] {
        assert!(
            numbers.count(
                ended,
                &["task.outcome=discarded", &format!("error.type={reason}")]
            ) > 0,
            "{reason}"
        );
    }
    assert_eq!(numbers.gauges("mixed"), [0.0; 3]);
}

#[tokio::test(start_paused = true)]
async fn the_histograms_measure() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let executor = Executor::builder().concurrency(1).build();
    for _ in 0..2 {
        let work = || tokio::time::sleep(Duration::from_secs(5)); // the task's own work
        executor.submit(Task::new(work).name("work"));
    }
    executor.idle().await;

    numbers.read();
    let of = |name: &str| {
        let found = numbers
            .histograms
            .iter()
            .find(|(key, _)| key.starts_with(name));
        *found.unwrap_or_else(|| panic!("no {name}")).1
    };
    let close = |(count, sum): (usize, f64), expected: f64| {
        assert_eq!(count, 2);
        assert!((sum - expected).abs() < 0.1, "{sum} instead of {expected}");
    };
    close(of("tower_defer.task.queue_wait"), 0.0 + 5.0);
    close(of("messaging.process.duration"), 5.0 + 5.0);
    close(of("tower_defer.task.age"), 5.0 + 10.0);
}

#[tokio::test(start_paused = true)]
async fn gauges_follow_the_executor() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let executor = Executor::builder().name("a").concurrency(2).build();
    let gate = Arc::new(Semaphore::new(0));
    let hold = || {
        let gate = gate.clone();
        Task::once(async move { drop(gate.acquire().await) })
    };
    let retry = Retry::fixed(2, Duration::from_secs(60));
    executor.submit(Task::new(fails).retry(retry));
    let handles: Vec<_> = (0..4).map(|_| executor.submit(hold())).collect();
    // Paused time moves on only when nothing can run any more.
    tokio::time::advance(Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(1)).await; // paused time

    assert_eq!(numbers.gauges("a"), [2.0, 2.0, 1.0]);
    assert_eq!(numbers.gauges("a"), gauges_of(&executor));
    assert!(handles[3].cancel());
    assert_eq!(numbers.gauges("a"), [1.0, 2.0, 1.0]);

    let report = executor.drain(Duration::from_secs(1)).await;
    assert!(report.timed_out);
    assert_eq!(numbers.gauges("a"), [0.0; 3]);
}

/// The runtime ends with two tasks that run, and three that are queued and stay so.
#[test]
fn gauges_outlive_the_runtime_and_end_with_the_executor() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let executor = Executor::builder().name("b").concurrency(2).build();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for _ in 0..5 {
            executor.submit(std::future::pending::<()>);
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(numbers.gauges("b"), [3.0, 2.0, 0.0]);
    drop(runtime);
    assert_eq!(numbers.gauges("b"), gauges_of(&executor));
    assert_eq!(numbers.gauges("b")[1], 0.0);
    let cancelled = executor.snapshot().cancelled;
    assert_eq!(
        numbers.count("tower_defer.tasks.ended", &["task.outcome=cancelled"]),
        cancelled
    );
    drop(executor);
    assert_eq!(numbers.gauges("b"), [0.0; 3]);
}

#[tokio::test]
async fn executors_of_one_name_add_up() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let [one, two] = [(); 2].map(|()| Executor::builder().name("c").build());
    for executor in [&one, &two] {
        executor.submit(std::future::pending::<()>);
    }
    while gauges_of(&one)[1] + gauges_of(&two)[1] < 2.0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(numbers.gauges("c"), [0.0, 2.0, 0.0]);
    one.drain(Duration::ZERO).await;
    assert_eq!(numbers.gauges("c"), [0.0, 1.0, 0.0]);
}

/// A recorder that comes late is told of the present, not of what it missed.
#[tokio::test]
async fn a_late_recorder_gets_the_gauges_in_full() {
    let executor = Executor::builder().name("d").build();
    executor.submit(std::future::pending::<()>);
    while gauges_of(&executor)[1] < 1.0 {
        tokio::task::yield_now().await;
    }
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    executor.submit(|| async {});
    while executor.snapshot().completed < 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(numbers.gauges("d"), [0.0, 1.0, 0.0]);
}

/// Different requests, ids, paths: no new label.
#[tokio::test]
async fn nothing_of_a_request_becomes_a_label() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    let defer = DeferLayer::new();
    let handler = |defer: Defer| async move {
        defer.run(|| async {
            Err::<(), _>(TaskError::fatal(format!("user {}", std::process::id())))
        });
    };
    let app = Router::new()
        .route("/{id}", get(handler))
        .layer(defer.clone());
    let mut keys = Vec::new();
    for id in 0..3 {
        let request = Request::get(format!("/{id}")).body(Body::empty()).unwrap();
        app.clone().oneshot(request).await.unwrap();
        defer.get_executor().idle().await;
        numbers.read();
        keys.push(numbers.counters.len() + numbers.gauges.len() + numbers.histograms.len());
    }
    assert_eq!(keys, [keys[0]; 3]);
}

/// The facade's stand-in has no state, and is how "no recorder" is known; the docs say so.
#[tokio::test]
async fn a_recorder_without_state_is_none() {
    struct Unit;
    impl metrics::Recorder for Unit {
        fn describe_counter(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn describe_gauge(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn describe_histogram(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn register_counter(
            &self,
            key: &metrics::Key,
            _: &metrics::Metadata<'_>,
        ) -> metrics::Counter {
            panic!("{key}")
        }
        fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
            panic!("{key}")
        }
        fn register_histogram(
            &self,
            key: &metrics::Key,
            _: &metrics::Metadata<'_>,
        ) -> metrics::Histogram {
            panic!("{key}")
        }
    }
    let _here = metrics::set_default_local_recorder(&Unit);
    let executor = Executor::new();
    executor.submit(|| async {});
    executor.idle().await;
}

// The table.

type Row = (&'static str, BTreeSet<String>);

fn table() -> BTreeMap<String, Row> {
    let docs = read("docs/observability.md");
    let table = docs
        .split_once("| metric | kind | unit | labels | meaning |")
        .unwrap()
        .1;
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let kind = ["counter", "gauge", "histogram"]
            .into_iter()
            .find(|kind| *kind == cells[1]);
        let labels = cells[3]
            .split_whitespace()
            .map(|label| label.trim_matches('`').to_owned());
        (
            cells[0].trim_matches('`').to_owned(),
            (kind.unwrap(), labels.collect()),
        )
    })
    .collect()
}

fn read(path: &str) -> String {
    let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(top.join(path)).unwrap()
}

#[test]
fn every_metric_of_the_code_stands_in_the_table_and_the_other_way_round() {
    let code = read("src/observe/metrics.rs");
    let constants = code.lines().filter_map(|line| {
        let value = line.strip_prefix("const ")?.split_once(": &str = \"")?.1;
        value.strip_suffix("\";").map(str::to_owned)
    });
    let labels: BTreeSet<String> = table()
        .into_values()
        .flat_map(|(_, labels)| labels)
        .collect();
    let metrics: BTreeSet<String> = table().into_keys().collect();
    assert_eq!(constants.collect::<BTreeSet<_>>(), &labels | &metrics);

    let docs = read("docs/observability.md");
    let explained = docs.split_once("| label | value |").unwrap().1;
    let explained = explained
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let explained: BTreeSet<_> = explained
        .map(|row| row.split('`').nth(1).unwrap().to_owned())
        .collect();
    assert_eq!(explained, labels);
}

/// One of everything gives every metric but one, each with the kind and the labels of the table.
#[tokio::test(start_paused = true)]
async fn kinds_and_labels_are_those_of_the_table() {
    let recorder = DebuggingRecorder::new();
    let mut numbers = Numbers::new(&recorder);
    let _here = metrics::set_default_local_recorder(&recorder);
    one_of_everything("all").await;
    numbers.read();

    let mut table = table();
    for ((kind, name), labels) in &numbers.labels {
        let (said, allowed) = table
            .remove(name)
            .unwrap_or_else(|| panic!("not in the table: {name}"));
        assert_eq!(*kind, said, "{name}");
        assert_eq!(*labels, allowed, "{name}");
    }
    // It is told by a thread that this recorder does not hear: see `tests/metrics_stuck.rs`.
    assert_eq!(
        table.into_keys().collect::<Vec<_>>(),
        ["tower_defer.tasks.stuck"]
    );
}

// The example.

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn executable(example: &str) -> String {
    let build = Command::new(env!("CARGO"))
        .args([
            "build",
            "--all-features",
            "--message-format=json",
            "--example",
            example,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        build.status.success(),
        "{}",
        String::from_utf8_lossy(&build.stderr)
    );
    let messages = String::from_utf8(build.stdout).unwrap();
    let artefacts = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let path = artefacts
        .filter(|artefact| artefact["target"]["name"] == example)
        .find_map(|artefact| artefact["executable"].as_str().map(str::to_owned));
    path.expect("cargo names the executable")
}

fn get_raw(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[tokio::test]
async fn the_example_is_scraped() {
    let mut child = Command::new(executable("metrics"))
        .arg("0")
        .stdout(Stdio::piped())
        .spawn()
        .map(Killed)
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line
        .trim()
        .strip_prefix("listening on http://")
        .expect(&line)
        .to_owned();
    for _ in 0..3 {
        get_raw(&address, "/");
    }
    let executor = r#"messaging_destination_name="background""#;
    let welcome = r#"task_name="welcome""#;
    let expected = |text: &str, name: &str, labels: &[&str], value: &str| {
        let fits =
            |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
        text.lines()
            .find(fits)
            .is_some_and(|line| line.ends_with(&format!(" {value}")))
    };
    let arrived = |text: &str| {
        let ended = "tower_defer_tasks_ended";
        let completed = r#"task_outcome="completed""#;
        let discarded = r#"task_outcome="discarded""#;
        expected(text, ended, &[executor, welcome, completed], "3")
            && expected(
                text,
                ended,
                &[r#"task_name="invoice""#, discarded, r#"error_type="fatal""#],
                "3",
            )
            && expected(
                text,
                "messaging_process_duration_count",
                &[executor, welcome],
                "3",
            )
            && expected(text, "tower_defer_tasks_queued{", &[executor], "0")
            && expected(text, "tower_defer_tasks_running{", &[executor], "0")
    };
    let mut text = String::new();
    for _ in 0..6000 {
        text = get_raw(&address, "/metrics");
        if arrived(&text) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await; // the probe's pause
    }
    panic!("{text}");
}
