//! The operator's hand on a store: beside a server that has the file open, and on files that are none.
#![cfg(all(feature = "sqlite", feature = "axum", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "clients, operators and deadlines of tests are no deferred work"
)]

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract;
use axum::routing::post;
use event::event;
use http::{Request, StatusCode};
use scratch::Scratch;
use serde::{Deserialize, Serialize};
use tower::ServiceExt;
use tower_defer::event::store::{
    Counts, Filter, Replay, Settle, Sqlite, SqliteOperator, State, Store,
};
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer, TaskError};

/// Far above the courier's look into the store (5 s), after which it finds what nobody told it of.
const NOTICED: Duration = Duration::from_secs(30);

#[derive(Clone, Serialize, Deserialize)]
struct Made {
    id: u64,
}

impl Event for Made {
    const NAME: &'static str = "thing.made";
}

/// Mails fail until they are mended, and are counted from then on; audits always fail.
#[derive(Clone, Default)]
struct App {
    mended: Arc<AtomicBool>,
    mails: Arc<Mutex<BTreeMap<u64, usize>>>,
}

async fn mail(app: App, made: Made) -> Result<(), TaskError> {
    if !app.mended.load(Ordering::SeqCst) {
        return Err(TaskError::fatal("no mail server"));
    }
    *app.mails.lock().unwrap().entry(made.id).or_default() += 1;
    Ok(())
}

async fn audit(_: App, made: Made) -> Result<(), TaskError> {
    Err(TaskError::fatal(format!("no ledger for {}", made.id)))
}

async fn make(defer: Defer, extract::Path(id): extract::Path<u64>) -> StatusCode {
    defer.emit(Made { id });
    StatusCode::CREATED
}

/// A server on this file, and the operator beside it.
struct Beside {
    app: App,
    events: Events<App>,
    router: Router,
    operator: SqliteOperator,
}

impl Beside {
    fn open(path: &Path) -> Self {
        let app = App::default();
        let events = Events::new(app.clone())
            .on("mail", mail)
            .on("audit", audit)
            .store(Sqlite::open(path).unwrap());
        let layer = DeferLayer::new().events(events.clone());
        Self {
            app,
            events,
            router: Router::new().route("/{id}", post(make)).layer(layer),
            operator: SqliteOperator::open(path).unwrap(),
        }
    }

    /// So many events of which every delivery has failed for good.
    async fn fail(&self, count: u64) {
        for id in 0..count {
            assert_eq!(request(&self.router, id).await, StatusCode::CREATED);
        }
        self.until(|counts| counts.discarded == 2 * count).await;
    }

    async fn until(&self, is_so: impl Fn(&Counts) -> bool) -> Counts {
        let began = Instant::now();
        loop {
            let counts = self.events.counts().await.unwrap();
            if is_so(&counts) {
                return counts;
            }
            assert!(began.elapsed() < NOTICED, "never: {counts:?}");
            tokio::time::sleep(Duration::from_millis(5)).await; // the probe's pause
        }
    }
}

async fn request(router: &Router, id: u64) -> StatusCode {
    let request = Request::post(format!("/{id}")).body(Body::empty()).unwrap();
    router.clone().oneshot(request).await.unwrap().status()
}

fn of(subscriber: &str) -> Filter {
    Filter {
        subscriber: Some(subscriber.into()),
        ..Filter::default()
    }
}

fn replay(limit: usize) -> Replay {
    Replay {
        name: "mended".into(),
        filter: of("mail"),
        limit,
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

#[tokio::test]
async fn an_idle_server_runs_what_is_replayed_beside_it() {
    let scratch = Scratch::new("operator");
    let mut beside = Beside::open(&scratch.path("events.db"));
    beside.fail(3).await;
    let theirs = beside.events.counts().await.unwrap();
    let operator = &mut beside.operator;
    assert_eq!(operator.counts().unwrap(), theirs);
    let groups = operator.group(&Filter::default(), 10).unwrap();
    let groups: Vec<_> = groups
        .iter()
        .map(|group| (&*group.subscriber, group.count))
        .collect();
    assert_eq!(groups, [("audit", 3), ("mail", 3)]);
    let letters = operator
        .list(State::Discarded, &of("mail"), None, 2)
        .unwrap();
    let cursor = letters[1].cursor();
    let rest = operator.list(State::Discarded, &of("mail"), Some(&cursor), 2);
    assert_eq!((letters.len(), rest.unwrap().len()), (2, 1));

    beside.app.mended.store(true, Ordering::SeqCst);
    assert_eq!(operator.replay(&replay(2), now_ms()).unwrap(), 2);
    assert_eq!(operator.replay(&replay(2), now_ms()).unwrap(), 1);
    assert_eq!(operator.discard(&of("audit"), 2, now_ms()).unwrap(), 2);
    let counts = beside.until(|counts| counts.finished == 5).await;
    assert_eq!((counts.discarded, counts.events), (1, 3), "{counts:?}");
    let mails = beside.app.mails.lock().unwrap().clone();
    assert_eq!(mails, BTreeMap::from([(0, 1), (1, 1), (2, 1)]));
}

#[tokio::test]
async fn one_name_is_one_replay_whoever_makes_it() {
    let scratch = Scratch::new("operator");
    let mut beside = Beside::open(&scratch.path("events.db"));
    beside.fail(4).await;
    // Two by the operator, which fail again, and the others by the server.
    assert_eq!(
        beside.operator.replay(&replay(2), now_ms()).unwrap(),
        2,
        "replayed"
    );
    beside.until(|counts| counts.discarded == 8).await;
    let letters = beside.events.dead_letters();
    let rest = letters.replay("mended", of("mail")).run().await;
    assert_eq!(rest.unwrap(), 2);
    beside.until(|counts| counts.discarded == 8).await;
    assert_eq!(beside.operator.replay(&replay(9), now_ms()).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_no_request_fails_and_no_update_is_lost() {
    const LETTERS: u64 = 300;
    const STEP: usize = 20;
    let scratch = Scratch::new("operator");
    let path = scratch.path("events.db");
    let beside = Beside::open(&path);
    beside.fail(LETTERS).await;
    beside.app.mended.store(true, Ordering::SeqCst);

    let (next, over) = (
        Arc::new(AtomicU64::new(LETTERS)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (router, next, over) = (beside.router.clone(), next.clone(), over.clone());
        clients.spawn(async move {
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::SeqCst) {
                let id = next.fetch_add(1, Ordering::SeqCst);
                let began = Instant::now();
                assert_eq!(request(&router, id).await, StatusCode::CREATED, "{id}");
                slowest = slowest.max(began.elapsed());
            }
            slowest
        });
    }
    let Beside {
        app,
        events,
        router,
        mut operator,
    } = beside;
    let hand = tokio::task::spawn_blocking(move || {
        let until_ms = now_ms();
        let audits = Filter {
            until_ms: Some(until_ms),
            ..of("audit")
        };
        let (mut replayed, mut discarded, mut slowest) = (0, 0, Duration::ZERO);
        loop {
            let began = Instant::now();
            let some = operator.replay(&replay(STEP), now_ms()).unwrap();
            let others = operator.discard(&audits, STEP, now_ms()).unwrap();
            slowest = slowest.max(began.elapsed());
            // As the documentation says: without pauses the server hardly gets the lock.
            std::thread::sleep(began.elapsed()); // the task's own work
            replayed += some;
            discarded += others;
            if (some, others) == (0, 0) {
                return (operator, replayed, discarded, slowest);
            }
        }
    });
    let (operator, replayed, discarded, slowest) = hand.await.unwrap();
    over.store(true, Ordering::SeqCst);
    let mut waited = Duration::ZERO;
    while let Some(client) = clients.join_next().await {
        waited = waited.max(client.unwrap());
    }
    let beside = Beside {
        app,
        events,
        router,
        operator,
    };
    let events = next.load(Ordering::SeqCst);
    assert_eq!(replayed, LETTERS);
    let counts = beside
        .until(|counts| counts.queued + counts.running + counts.retrying == 0)
        .await;
    assert!(beside.events.health().unwrap().trouble.is_none());
    let mails = beside.app.mails.lock().unwrap().clone();
    assert_eq!(mails, (0..events).map(|id| (id, 1)).collect());
    assert_eq!(counts.events, events);
    assert_eq!(counts.finished, events + discarded, "{counts:?}");
    assert_eq!(counts.discarded, events - discarded, "{counts:?}");
    println!(
        "{} requests, none failed, the slowest {waited:?}; {replayed} replayed and {discarded} discarded beside them, {STEP} and \
         {STEP} within {slowest:?}",
        events - LETTERS
    );
    // The counters are a row; these are the rows.
    let shell = rusqlite::Connection::open(&path).unwrap();
    let count = |table: &str| {
        let sql = format!("SELECT count(*) FROM defer_{table}");
        shell
            .query_row(&sql, [], |row| row.get::<_, u64>(0))
            .unwrap()
    };
    let rows = ["events", "deliveries", "dead_letters", "history", "replays"].map(count);
    let expected = [events, 0, counts.discarded, counts.finished, LETTERS];
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn an_operator_runs_nothing_and_stands_in_nobodys_way() {
    let scratch = Scratch::new("operator");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    store.append(vec![event("a", "mail", 0)], 0).await.unwrap();
    let claimed = store.claim(1, 0).await.unwrap();
    let mut operator = SqliteOperator::open(&path).unwrap();
    assert_eq!(operator.counts().unwrap().running, 1);
    // It has neither recovered the attempt nor made its token void.
    let settles = vec![(claimed[0].token.clone(), Settle::Complete)];
    store.settle(settles, 1).await.unwrap();
    assert_eq!(operator.counts().unwrap().finished, 1);
    store.close().await.unwrap();
    assert!(
        !scratch
            .path("events.db-wal")
            .metadata()
            .is_ok_and(|log| log.len() > 0)
    );

    // Nobody has the file: it works all the same, and a server can have it.
    assert_eq!(operator.counts().unwrap().finished, 1);
    assert_eq!(operator.replay(&replay(1), 2).unwrap(), 0);
    let store = Sqlite::open(&path).unwrap();
    assert_eq!(operator.counts().unwrap(), store.counts().await.unwrap());
}

#[tokio::test]
async fn what_is_parked_is_discarded_beside_the_server() {
    let scratch = Scratch::new("operator");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let events = ["gone", "gone", "mail"].map(|subscriber| event("a", subscriber, 0));
    store.append(events.into(), 0).await.unwrap();
    let park = |it: tower_defer::event::store::Claimed| {
        let (reason, error) = ("unknown_subscriber".to_owned(), String::new());
        (it.token, Settle::Park { reason, error })
    };
    let claimed = store.claim(3, 0).await.unwrap();
    store
        .settle(claimed.into_iter().map(park).collect(), 1)
        .await
        .unwrap();
    let mut operator = SqliteOperator::open(&path).unwrap();
    assert_eq!(operator.discard(&Filter::default(), 9, 2).unwrap(), 0);
    let gone = of("gone");
    assert_eq!(operator.discard_parked(&gone, 1, 2).unwrap(), 1);
    assert_eq!(operator.discard_parked(&gone, 9, 2).unwrap(), 1);
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.parked, counts.finished), (1, 2));
    store.close().await.unwrap();
}

#[test]
fn what_is_no_store_is_called_so_and_left_alone() {
    let scratch = Scratch::new("operator");
    let path = scratch.path("events.db");
    let error = SqliteOperator::open(&path).unwrap_err();
    assert!(error.is_missing(), "{error}");
    assert!(!path.exists());

    let database = {
        let path = scratch.path("users.db");
        let theirs = rusqlite::Connection::open(&path).unwrap();
        theirs.execute_batch("CREATE TABLE users (id)").unwrap();
        drop(theirs);
        std::fs::read(path).unwrap()
    };
    for content in [&b""[..], b"name,email\n", &[b'x'; 9_000], &database] {
        std::fs::write(&path, content).unwrap();
        let error = SqliteOperator::open(&path).unwrap_err();
        assert!(error.is_no_store(), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
}

#[test]
fn tables_of_another_version_are_left_alone() {
    let scratch = Scratch::new("operator");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let mut operator = SqliteOperator::open(&path).unwrap();
    let shell = rusqlite::Connection::open(&path).unwrap();
    for (version, says) in [(99, "use a newer version"), (1, "open it first")] {
        shell
            .execute("UPDATE defer_meta SET value = ?1", [version])
            .unwrap();
        let errors = [
            SqliteOperator::open(&path).unwrap_err(),
            // Opened before the tables were changed under it.
            operator.counts().unwrap_err(),
            operator.discard(&Filter::default(), 1, 0).unwrap_err(),
        ];
        for error in errors {
            assert!(error.is_schema(), "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
    }
    drop(store);
}
