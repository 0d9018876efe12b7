//! Each example is run as its head comment tells a user to, and keeps what that comment promises.
//!
//! What this is not: a test of the library's corners. Here real processes are started, talked to over
//! real sockets, and ended by SIGTERM; what is asserted is what they answer and what they print.
//!
//! Nothing waits for a fixed time: every wait reads what the process prints, until a deadline that is
//! long enough for a busy machine.
#![cfg(all(
    unix,
    feature = "axum",
    feature = "hyper",
    feature = "signal",
    feature = "sqlite",
    feature = "tonic"
))]
#![expect(
    clippy::disallowed_methods,
    reason = "processes and sockets live in real time, and so does the deadline of a wait for them"
)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};

const NAMES: [&str; 6] = [
    "signup",
    "deliveries",
    "tonic",
    "hyper",
    "streaming",
    "graceful_shutdown",
];

/// For whatever a process or a socket should do at once.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn the_lines_to_try_name_the_features_that_cargo_asks_for() {
    let read = |path: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"))
    };
    let (manifest, readme) = (read("Cargo.toml"), read("README.md"));
    for name in NAMES {
        let (_, features) = manifest
            .split_once(&format!("name = \"{name}\"\nrequired-features = ["))
            .unwrap_or_else(|| panic!("Cargo.toml does not say what {name} needs"));
        let features = features.split(']').next().unwrap_or_default();
        let features = features.replace(['"', ' '], "");
        let command = format!("cargo run --example {name} --features {features}\n");
        let head = read(&format!("examples/{name}.rs"));
        assert!(
            head.contains(&format!("//! {command}")),
            "{name}: {command}"
        );
        assert!(name != "signup" || readme.contains(&command), "{command}");
        assert!(
            readme.contains(&format!("`{name}`")) || name == "signup",
            "{name}"
        );
    }
}

#[test]
fn signup_answers_at_once_survives_a_kill_and_replays_what_was_repaired() {
    let file = scratch("signup.db");
    let example = Example::start_with("signup", Some(&file));
    let answer = example.send(SIGN_UP);
    assert!(answer.starts_with("HTTP/1.1 303 See Other\r\n"), "{answer}");
    assert!(answer.contains("location: /dashboard"), "{answer}");

    // Recorded before the response, started after it, each on its own.
    let begins = example.wait_for("trial begins");
    let returned = example.wait_for("handler returns");
    let recorded = example.wait_for("events recorded events=1");
    let out = example.wait_for("response is out, tasks released tasks=4");
    assert!(returned < recorded && recorded < out, "{example}");
    assert!(out < begins, "{example}");
    let audited = example.wait_for("audited");
    assert!(audited > out, "{example}");
    let mail = r#"task.name="welcome-mail""#;
    example.wait_for("mail sent");
    let failures = example.all(&format!("task failed, will be retried {mail}"));
    assert_eq!(failures.len(), 2, "{example}");
    let sent = example.wait_for(&format!("task completed {mail}"));
    assert!(example.line(sent).contains("task.attempt=3"), "{example}");
    let dead = example.wait_for("task discarded, now a dead letter task.name=\"newsletter\"");
    assert!(example.line(dead).contains("reason=\"fatal\""), "{example}");
    let trial = example.line(begins);
    assert!(trial.contains("key=\"1/start-trial\" attempt=1"), "{trial}");
    assert!(example.all("trial started").is_empty(), "{example}");
    // Not before its end is in the file: the process prints it a moment earlier.
    example.get_until("/status", |body| body.contains("finished: 1,"));
    example.kill();

    // The trial had not ended: it starts again, as the same delivery.
    let example = Example::start_with("signup", Some(&file));
    let again = example.line(example.wait_for("trial begins"));
    assert!(again.contains("key=\"1/start-trial\" attempt=2"), "{again}");
    example.wait_for("trial started");
    assert!(example.all("mail sent").is_empty(), "{example}");
    let status = example.get_until("/status", |body| body.contains("finished: 2,"));
    let letter = "dead letters: 1 of newsletter: the newsletter has no list 0";
    assert!(status.contains(letter), "{status}");

    let repair = "POST /newsletter/repair HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\
                  content-length: 0\r\n\r\n";
    assert!(example.send(repair).ends_with("replayed: 1\n"), "{example}");
    example.wait_for("on the newsletter's list");
    assert!(example.send(repair).ends_with("replayed: 0\n"), "{example}");
    let status = example.get_until("/status", |body| body.contains("finished: 3,"));
    assert!(!status.contains("dead letters"), "{status}");
    let report = example.terminate().wait_for("drained in");
    assert!(example.line(report).contains("0 cancelled"), "{example}");
    remove(&file);
}

#[test]
fn signup_keeps_what_a_shutdown_does_not_finish() {
    let file = scratch("kept.db");
    let example = Example::start_with("signup", Some(&file));
    // The mail's second failure waits for its next attempt, which is the file's affair.
    example.send(SIGN_UP);
    example.wait_for("trial begins");
    example.wait_for("task failed, will be retried task.name=\"welcome-mail\"");
    let report = example.terminate().wait_for("drained in");
    // The running trial was let to its end.
    example.wait_for("trial started");
    assert!(example.line(report).contains("0 cancelled"), "{example}");
    // An orderly end leaves one file that can be copied as it is, and an empty one to lock.
    let name = file.file_name().expect("a name").to_string_lossy();
    for suffix in ["-wal", "-shm", "-log"] {
        let beside = file.with_file_name(format!("{name}{suffix}"));
        assert!(!beside.exists(), "{beside:?}");
    }

    let example = Example::start_with("signup", Some(&file));
    example.wait_for("mail sent");
    example.get_until("/status", |body| body.contains("finished: 2,"));
    assert!(example.all("trial begins").is_empty(), "{example}");
    example.terminate();
    remove(&file);
}

#[test]
fn deliveries_looks_into_a_file_that_a_server_has_open_and_moves_its_dead_letters() {
    let file = scratch("deliveries.db");
    let tool = |arguments: &[&str]| {
        let mut tool = Command::new(executable("deliveries"));
        let done = tool.arg(&file).args(arguments).output();
        let done = done.expect("the tool starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
        (done.status.code(), text(done.stdout), text(done.stderr))
    };
    let (code, _, complaint) = tool(&["counts"]);
    assert_eq!(code, Some(1), "{complaint}");
    assert!(complaint.contains("there is no event store here"));
    assert!(!file.exists());

    let example = Example::start_with("signup", Some(&file));
    example.send(SIGN_UP);
    example.get_until("/status", |body| body.contains("finished: 2,"));
    let (code, groups, complaint) = tool(&["group"]);
    assert_eq!(code, Some(0), "{complaint}");
    let group = "the newsletter has no list #";
    assert!(
        groups.starts_with("       1  newsletter  ") && groups.contains(group),
        "{groups}"
    );
    let (_, listed, _) = tool(&["list", "--subscriber", "newsletter", "--limit", "5"]);
    assert!(
        listed.starts_with("1/newsletter  user.created {"),
        "{listed}"
    );
    assert!(
        listed.contains("fatal: the newsletter has no list 0"),
        "{listed}"
    );
    assert_eq!(tool(&["list", "--state", "parked"]).1, "");

    // The server notices by itself, and fails again.
    let discarded = "task discarded, now a dead letter task.name=\"newsletter\"";
    let replay = ["replay", "--name", "again", "--error-group", group];
    assert!(tool(&replay).1.starts_with("replayed: 1 (each once"));
    let deadline = Instant::now() + PATIENCE;
    while example.all(discarded).len() < 2 {
        assert!(Instant::now() < deadline, "never replayed: {example}");
        thread::yield_now();
    }
    example.get_until("/status", |body| body.contains("discarded: 1,"));
    assert!(tool(&replay).1.starts_with("replayed: 0 (each once"));

    let (code, _, complaint) = tool(&["discard"]);
    assert_eq!(code, Some(2));
    assert!(
        complaint.contains("say which ones, or --all"),
        "{complaint}"
    );
    let discard = ["discard", "--subscriber", "newsletter"];
    assert_eq!(tool(&discard).1, "discarded: 1\n");
    let (_, counts, _) = tool(&["counts"]);
    assert!(counts.contains("discarded 0\nfinished  3\n"), "{counts}");
    example.get_until("/status", |body| body.contains("finished: 3,"));
    example.terminate();

    park(&file);
    let (code, _, complaint) = tool(&["discard", "--all", "--state", "queued"]);
    assert_eq!(code, Some(2), "{complaint}");
    assert_eq!(
        tool(&["discard", "--all", "--state", "parked"]).1,
        "discarded: 1\n"
    );
    let (_, counts, _) = tool(&["counts"]);
    assert!(counts.contains("parked    0\ndiscarded 0\nfinished  4\n"));
    remove(&file);
}

/// Leaves a delivery that nobody can run.
fn park(file: &Path) {
    use tower_defer::event::store::{NewEvent, Settle, Sqlite, Start, Store};
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(async {
        let store = Sqlite::open(file).expect("nobody has it");
        let event = NewEvent::new("a", "{}").deliver("gone", Start::At(0));
        store.append(vec![event], 0).await.expect("recorded");
        let [claimed] = &store.claim(1, 0).await.expect("claimed")[..] else {
            panic!("it is due");
        };
        let (reason, error) = ("unknown_subscriber".to_owned(), String::new());
        let settles = vec![(claimed.token.clone(), Settle::Park { reason, error })];
        store.settle(settles, 0).await.expect("settled");
        store.close().await.expect("closed");
    });
}

const SIGN_UP: &str = "POST /users HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\
                       content-type: application/x-www-form-urlencoded\r\ncontent-length: 23\r\n\r\n\
                       email=ada%40example.org";

/// A file of this test's own, which is not there yet.
fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("defer-{}-{name}", std::process::id()));
    remove(&path);
    path
}

/// With what SQLite and the store keep beside it.
fn remove(file: &Path) {
    for suffix in ["", "-wal", "-shm", "-lock"] {
        let mut path = file.as_os_str().to_owned();
        path.push(suffix);
        // It need not be there.
        let _ = std::fs::remove_file(path);
    }
}

#[test]
fn tonic_reads_the_status_of_grpc_and_waits_for_the_trailers() {
    let example = Example::start("tonic");
    let client = Command::new(executable("tonic"))
        .arg("client")
        .env("PORT", example.address.port().to_string())
        .output()
        .expect("the client starts");
    assert_eq!(
        String::from_utf8_lossy(&client.stdout),
        "Greet: hello ada\nGreet: InvalidArgument: who?\n\
         Count: 1\nCount: 2\nCount: 3\nCount: end\n",
        "{}",
        String::from_utf8_lossy(&client.stderr)
    );

    let after = r#"task.name="after-the-stream""#;
    example.wait_for(&format!("task completed {after}"));
    let last = example.wait_for("message yielded value=3");
    let started = example.wait_for(&format!("task started {after}"));
    assert!(last < started, "{example}");

    let greeted = example.wait_for(r#"task at work what="greeted""#);
    let refused = example.wait_for(r#"task at work what="refused""#);
    assert!(greeted < refused && refused < started, "{example}");
    let skipped = example.all("task skipped");
    assert_eq!(skipped.len(), 2, "{example}");
    for (skipped, name, code) in [(skipped[0], "on-failure", 0), (skipped[1], "on-success", 3)] {
        let line = example.line(skipped);
        assert!(line.contains(&format!("task.name=\"{name}\"")), "{line}");
        assert!(line.contains("http.response.status_code=200"), "{line}");
        let code = format!("rpc.grpc.status_code={code}");
        assert!(line.contains(&code), "{line}");
    }
    example.terminate().wait_for("drained in");
}

#[test]
fn hyper_serves_both_versions_without_a_framework() {
    let example = Example::start("hyper");
    let answer = example.get("/");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nhello\n"), "{answer}");
    let at_work = example.wait_for("task at work version=HTTP/1.1");
    let out = example.wait_for("response is out");
    let returned = example.wait_for("handler returns status=200");
    assert!(returned < out && out < at_work, "{example}");

    assert_eq!(get_by_http2(example.address), "hello\n");
    example.wait_for("task at work version=HTTP/2.0");

    let answer = example.get("/nowhere");
    assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
    let skipped = example.wait_for("task skipped");
    let line = example.line(skipped);
    assert!(line.contains("http.response.status_code=404"), "{line}");
    assert_eq!(example.all("task at work").len(), 2, "{example}");
    example.terminate().wait_for("drained in");
}

#[test]
fn streaming_runs_nothing_before_the_last_byte() {
    let example = Example::start("streaming");
    let answer = example.get("/export");
    assert!(answer.contains("row 5 of 5\n"), "{answer}");
    example.wait_for("row marked row=5");
    let yielded = example.all("row yielded");
    let out = example.wait_for("response is out, tasks released tasks=7");
    let started = example.wait_for("task started");
    assert_eq!(yielded.len(), 5, "{example}");
    assert!(
        yielded.iter().all(|at| *at < out) && out < started,
        "{example}"
    );
    example.wait_for("end=complete bytes=55");
    example.wait_for("the export counts as done");

    let known = "what became of the response";
    for responses in 2.. {
        let mut client = example.connect();
        write!(client, "GET /export HTTP/1.1\r\nhost: a\r\n\r\n").expect("the request is sent");
        read_until(&mut client, "row 1 of 5");
        drop(client);
        example.wait_until(|lines| count(lines, known) == responses);
        if !example.all("end=aborted").is_empty() {
            break;
        }
        // This machine is so busy that the stream had ended before the client could leave.
    }
    let skipped = example.wait_for("task skipped");
    let line = example.line(skipped);
    assert!(line.contains(r#"task.name="whole-export""#), "{line}");
    assert!(line.contains(r#"response.end="aborted""#), "{line}");
    let yielded = example.all("row yielded").len();
    example.wait_until(|lines| count(lines, "row marked") == yielded);
    example.terminate().wait_for("drained in");
}

#[test]
fn graceful_shutdown_ends_in_time_and_accounts_for_every_task() {
    let example = Example::start("graceful_shutdown");
    let mut endless = example.connect();
    write!(endless, "GET /events HTTP/1.1\r\nhost: a\r\n\r\n").expect("the request is sent");
    read_until(&mut endless, "tick 2");
    let endless_too = endless_by_http2(example.address);
    assert!(example.get("/slow").ends_with("accepted\n"));

    let accepted = AtomicU64::new(0);
    let began = thread::scope(|scope| {
        let load = || {
            while let Ok(answer) = exchange(example.address, &get_request("/work")) {
                if answer.ends_with("accepted\n") {
                    accepted.fetch_add(1, Ordering::Relaxed);
                } else if !answer.starts_with("HTTP/1.1 200") {
                    break; // the server closed the connection instead of answering
                }
            }
        };
        let clients = [(); 4].map(|()| scope.spawn(load));
        example.wait_until(|_| accepted.load(Ordering::Relaxed) >= 50);
        let began = Instant::now();
        example.terminate();
        drop(clients);
        began
    });
    let took = began.elapsed();
    drop(endless);
    endless_too.join().expect("its end is the server's");

    // The deadline is 4 s. A process that waited for the stream would wait for ever; how exactly the
    // deadline is kept, the process says itself.
    assert!(took < Duration::from_secs(4) + PATIENCE / 4, "{took:?}");
    let ended = example.numbers(example.wait_for("ms after the signal"));
    assert!((4000..9000).contains(&ended[0]), "{example}");

    let stalled = example.all(r#"response.end="stalled""#);
    let after = example.all(r#"task completed task.name="after-the-stream""#);
    assert_eq!((stalled.len(), after.len()), (2, 2), "{example}");
    assert!(stalled[0] < after[0], "{example}");

    let report = example.wait_for("drained in");
    let line = example.line(report);
    assert!(line.contains("(the deadline came first)"), "{line}");
    let (_, counts) = line.split_once("): ").expect("counts follow");
    let [_, _, discarded, cancelled, ..] = numbers(counts)[..] else {
        panic!("four counts: {line}");
    };
    let named: Vec<String> = (report + 1..)
        .map(|at| example.line(at))
        .take_while(|line| line.starts_with("  "))
        .collect();
    assert_eq!(named.len() as u64, discarded + cancelled, "{example}");
    let slow = |line: &String| line.contains("slow-report") && line.ends_with("interrupted");
    assert_eq!(named.iter().filter(|line| slow(line)).count(), 1);

    let sums = example.numbers(example.wait_for("since the start:"));
    let [all, completed, skipped, all_discarded, all_cancelled] = sums[..] else {
        panic!("five sums: {example}");
    };
    assert_eq!(
        all,
        completed + skipped + all_discarded + all_cancelled,
        "{example}"
    );
    assert_eq!((all_discarded, all_cancelled), (discarded, cancelled));
    let own = example.numbers(example.wait_for("the handlers' own count:"));
    assert_eq!(own, [all, completed], "{example}");
    // What a client was told, the two streams' and the slow one's; an answer may have been lost.
    assert!(
        accepted.load(Ordering::Relaxed) + 3 <= all,
        "{accepted:?}: {example}"
    );
}

/// A running example. Killed when dropped.
struct Example {
    child: Mutex<Child>,
    printed: Arc<Printed>,
    address: SocketAddr,
}

/// What it has printed so far.
#[derive(Default)]
struct Printed {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    open_ends: usize,
}

impl Example {
    fn start(name: &str) -> Self {
        Self::start_with(name, None)
    }

    fn start_with(name: &str, events: Option<&Path>) -> Self {
        let mut command = Command::new(executable(name));
        if let Some(file) = events {
            command.env("EVENTS_DB", file);
        }
        let mut child = command
            .env("PORT", "0")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let printed = Arc::<Printed>::default();
        printed.read(child.stdout.take().expect("stdout is piped"));
        printed.read(child.stderr.take().expect("stderr is piped"));
        let mut example = Self {
            child: Mutex::new(child),
            printed,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        example.wait_for("kill -TERM");
        let listening = example.line(example.wait_for("listening on "));
        example.address = listening
            .trim_start_matches("listening on ")
            .split(';')
            .next()
            .and_then(|address| address.parse().ok())
            .unwrap_or_else(|| panic!("no address: {listening}"));
        example
    }

    fn connect(&self) -> TcpStream {
        connect(self.address).expect("the example accepts connections")
    }

    fn get(&self, path: &str) -> String {
        self.send(&get_request(path))
    }

    fn send(&self, request: &str) -> String {
        exchange(self.address, request).expect("the example answers")
    }

    fn get_until(&self, path: &str, good: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.get(path);
            if good(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{answer}");
        }
    }

    /// SIGKILL, and waits for the end.
    fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.kill().expect("it runs");
        let _ = child.wait();
    }

    /// SIGTERM, and waits for the end.
    fn terminate(&self) -> &Self {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // The shell's own `kill`: a small machine need not have the program.
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -TERM {}", child.id())])
            .status();
        assert!(sent.expect("there is a shell").success());
        self.printed.wait("its end", |lines| lines.open_ends == 0);
        let status = child.wait().expect("the child can be waited for");
        assert!(status.success(), "{status}: {self}");
        self
    }

    /// The place of the first line that contains `text`.
    fn wait_for(&self, text: &str) -> usize {
        self.printed.wait(text, |printed| {
            printed.lines.iter().any(|line| line.contains(text))
        });
        self.all(text)[0]
    }

    fn wait_until(&self, good: impl Fn(&[String]) -> bool) {
        self.printed
            .wait("the condition", |printed| good(&printed.lines));
    }

    /// The places of all lines that contain `text`.
    fn all(&self, text: &str) -> Vec<usize> {
        let printed = self.printed.lock();
        let places = printed.lines.iter().enumerate();
        places
            .filter(|(_, line)| line.contains(text))
            .map(|(at, _)| at)
            .collect()
    }

    /// Empty beyond the last one.
    fn line(&self, at: usize) -> String {
        self.printed
            .lock()
            .lines
            .get(at)
            .cloned()
            .unwrap_or_default()
    }

    fn numbers(&self, at: usize) -> Vec<u64> {
        numbers(&self.line(at))
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Both fail where it has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl std::fmt::Display for Example {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it printed:\n{}", self.printed.lock().lines.join("\n"))
    }
}

impl Printed {
    fn lock(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(self: &Arc<Self>, from: impl Read + Send + 'static) {
        self.lock().open_ends += 1;
        let printed = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                printed.lock().lines.push(line);
                printed.changed.notify_all();
            }
            printed.lock().open_ends -= 1;
            printed.changed.notify_all();
        });
    }

    /// Looks again whenever a line comes, and now and then for conditions on something else.
    fn wait(&self, what: &str, good: impl Fn(&Lines) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lock();
        while !good(&lines) {
            assert!(
                Instant::now() < deadline,
                "waited for {what}; it printed:\n{}",
                lines.lines.join("\n")
            );
            lines = self
                .changed
                .wait_timeout(lines, Duration::from_millis(100))
                .map_or_else(|error| error.into_inner().0, |(lines, _)| lines);
        }
    }
}

/// The path of an example's executable, which is built on the first call.
///
/// `cargo test --all-targets` builds the examples as test harnesses, not as programs.
fn executable(name: &str) -> &'static Path {
    static BUILT: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = scratch.parent().expect("it lies in the target directory");
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--all-features", "--message-format=json"])
            .arg("--target-dir")
            .arg(target);
        for name in NAMES {
            cargo.args(["--example", name]);
        }
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo.output().expect("cargo can be started");
        let messages = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{messages}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let paths = messages.lines().filter_map(|message| {
            let (_, rest) = message.split_once("\"executable\":\"")?;
            Some(PathBuf::from(rest.split_once('"')?.0))
        });
        paths
            .filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), path)))
            .collect()
    });
    let path = built.get(name);
    path.unwrap_or_else(|| panic!("cargo named no executable for {name}: {built:?}"))
}

fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends a request and reads until the server closes.
fn exchange(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn read_until(stream: &mut TcpStream, text: &str) {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(text) {
        let n = stream.read(&mut buffer).expect("the stream goes on");
        assert!(n > 0, "it ended before `{text}`: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
}

fn get_by_http2(address: SocketAddr) -> String {
    let exchange = async {
        let response = send_by_http2(address, "/").await;
        response.into_body().collect().await.expect("a body")
    };
    let body = runtime()
        .block_on(async { tokio::time::timeout(PATIENCE, exchange).await })
        .expect("in time");
    String::from_utf8_lossy(&body.to_bytes()).into_owned()
}

/// Opens a stream that never ends, and reads it until the server does. Returns when it has begun.
fn endless_by_http2(address: SocketAddr) -> thread::JoinHandle<()> {
    let (begun, begins) = std::sync::mpsc::sync_channel(1);
    let reader = thread::spawn(move || {
        runtime().block_on(async {
            let mut body = send_by_http2(address, "/events").await.into_body();
            while let Some(Ok(frame)) = body.frame().await {
                if frame
                    .data_ref()
                    .is_some_and(|data| data.ends_with(b"tick 2\n\n"))
                {
                    begun.send(()).expect("the test waits for it");
                }
            }
        });
    });
    begins.recv_timeout(PATIENCE).expect("the stream begins");
    reader
}

async fn send_by_http2(address: SocketAddr, path: &str) -> http::Response<Incoming> {
    let stream = tokio::net::TcpStream::connect(address).await;
    let io = TokioIo::new(stream.expect("the example accepts connections"));
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
    let (mut sender, connection) = handshake.expect("it speaks HTTP/2");
    tokio::spawn(connection);
    let request = http::Request::get(format!("http://{address}{path}"))
        .body(Empty::<Bytes>::new())
        .expect("a request");
    sender.send_request(request).await.expect("it answers")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

fn count(lines: &[String], text: &str) -> usize {
    lines.iter().filter(|line| line.contains(text)).count()
}

/// The whole numbers in a text.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}
