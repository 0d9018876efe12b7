//! The process that is killed: a real HTTP server whose events are kept in a file.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract;
use axum::routing::post;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tower_defer::event::store::{Filter, Sqlite};
use tower_defer::event::{DeliveryContext, Event, Events, Subscriber};
use tower_defer::{Defer, DeferLayer, Retry, TaskError};

use super::ledger::{Kind, Ledger};
use super::support::{Flavor, soon};

/// How many deliveries a process may have in flight, and so how many a kill may repeat.
pub(crate) const WINDOW: usize = 32;

pub(crate) const SUBSCRIBERS: [&str; 3] = ["mail", "trial", "audit"];

/// The event that one subscriber never comes to the end of.
pub(crate) const POISON: &str = "poison";

/// Events whose mail fails for good begin so.
pub(crate) const BROKEN: &str = "broken";

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) id: String,
}

impl Event for Made {
    const NAME: &'static str = "thing.made";
}

#[derive(Clone)]
pub(crate) struct App {
    ledger: Arc<Ledger>,
    /// The subscriber that the poison killed has been mended.
    mended: bool,
}

async fn mail(app: App, event: Made) -> Result<(), TaskError> {
    app.ledger.note(Kind::Handled, "mail", &event.id);
    if event.id.starts_with(BROKEN) {
        // So that a kill finds some in flight.
        tokio::time::sleep(Duration::from_millis(30)).await; // the task's own work
        return Err(TaskError::fatal("no such mailbox"));
    }
    Ok(())
}

/// Fails at first now and then, and takes some time.
async fn trial(app: App, event: Made, delivery: DeliveryContext) -> Result<(), TaskError> {
    if event.id == POISON && !app.mended {
        app.ledger.note(Kind::Stuck, "trial", &event.id);
        std::future::pending::<()>().await;
    }
    if event.id.ends_with('7') && delivery.attempt() == 1 {
        app.ledger.note(Kind::Failed, "trial", &event.id);
        return Err(TaskError::from("not yet"));
    }
    app.ledger.note(Kind::Handled, "trial", &event.id);
    tokio::time::sleep(Duration::from_micros(500)).await; // the task's own work
    Ok(())
}

async fn audit(app: App, event: Made) {
    app.ledger.note(Kind::Handled, "audit", &event.id);
    tokio::task::yield_now().await;
}

/// Who listens, on the file in this directory.
pub(crate) fn events(directory: &Path, run: usize, mended: bool) -> Events<App> {
    let store = Sqlite::open(directory.join("events.db")).expect("the store opens");
    let app = App {
        ledger: Arc::new(Ledger::open(directory, run)),
        mended,
    };
    let soon = Retry::exponential(8).first_delay(Duration::from_millis(5));
    Events::new(app)
        .on("mail", mail)
        .on("trial", Subscriber::with_context(trial).retry(soon))
        .on("audit", audit)
        .max_in_flight(WINDOW)
        .store(store)
}

async fn plain(defer: Defer, extract::Path(id): extract::Path<String>) -> StatusCode {
    defer.emit(Made { id });
    StatusCode::CREATED
}

/// Both or neither.
async fn twice(defer: Defer, extract::Path(id): extract::Path<String>) -> StatusCode {
    defer.emit(Made { id: id.clone() });
    defer.emit(Made {
        id: format!("{id}-b"),
    });
    StatusCode::CREATED
}

async fn awaited(defer: Defer, extract::Path(id): extract::Path<String>) -> StatusCode {
    match defer.emit(Made { id }).recorded().await {
        Ok(()) => StatusCode::CREATED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// What fails has not happened.
async fn refused(defer: Defer, extract::Path(id): extract::Path<String>) -> StatusCode {
    defer.emit(Made { id });
    StatusCode::UNPROCESSABLE_ENTITY
}

/// In a child: serves until it is killed. False in the parent.
pub(crate) fn is_child() -> bool {
    let Ok(directory) = std::env::var("DEFER_DIR") else {
        return false;
    };
    let run: usize = std::env::var("DEFER_RUN")
        .ok()
        .and_then(|run| run.parse().ok())
        .expect("a number");
    let flavor = if run % 2 == 0 {
        Flavor::MultiThread(2)
    } else {
        Flavor::CurrentThread
    };
    flavor
        .build()
        .block_on(serve(&PathBuf::from(directory), run));
    true
}

async fn serve(directory: &Path, run: usize) {
    println!("\n@opening ;");
    let events = events(directory, run, false);
    println!("\n@opened ;");
    let replay = {
        let events = events.clone();
        move |extract::Path(name): extract::Path<String>| async move {
            // At a rate, so that a kill finds it under way.
            let letters = events.dead_letters();
            let replay = letters.replay(&name, Filter::default()).per_second(400);
            replay.run().await.expect("the replay ends").to_string()
        }
    };
    let router = Router::new()
        .route("/plain/{id}", post(plain))
        .route("/twice/{id}", post(twice))
        .route("/awaited/{id}", post(awaited))
        .route("/refused/{id}", post(refused))
        .route("/replay/{name}", post(replay))
        .layer(DeferLayer::new().events(events));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    println!(
        "\n@address {} ;",
        listener.local_addr().expect("an address")
    );
    axum::serve(listener, router).await.expect("it serves");
}

/// The server's process, as its parent sees it.
pub(crate) struct Process {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts the calling test again as a child, up to where it opens the store.
    pub(crate) async fn start(test: &str, directory: &Path, run: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a test binary"))
            .args(["--exact", test, "--nocapture"])
            .env("DEFER_DIR", directory)
            .env("DEFER_RUN", run.to_string())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("a process");
        let output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut process = Self { child, output };
        process.said("@opening").await;
        process
    }

    /// The store is open.
    pub(crate) async fn opened(&mut self) {
        self.said("@opened").await;
    }

    /// Where it listens.
    pub(crate) async fn address(&mut self) -> std::net::SocketAddr {
        let line = self.said("@address ").await;
        line.parse().expect("an address")
    }

    async fn said(&mut self, mark: &str) -> String {
        soon(mark, async {
            loop {
                let line = self.output.next_line().await.expect("a pipe");
                let line = line.unwrap_or_else(|| panic!("the server ended before {mark}"));
                let rest = line.strip_prefix(mark);
                if let Some(rest) = rest.and_then(|rest| rest.strip_suffix(" ;")) {
                    return rest.to_owned();
                }
            }
        })
        .await
    }

    /// SIGKILL, and the wait until it is gone.
    pub(crate) async fn kill(mut self) {
        use std::os::unix::process::ExitStatusExt;
        self.child.start_kill().expect("it runs");
        let status: ExitStatus = soon("its end", self.child.wait()).await.expect("it ends");
        assert_eq!(status.signal(), Some(9), "it ended by itself: {status:?}");
    }
}
