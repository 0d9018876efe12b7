//! What the tests of events share: a fact, a book that subscribers write into, and where events are
//! kept: nowhere, in memory, in a file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tower_defer::event::store::{
    AddPast, AttemptToken, Claimed, Counts, Cursor, Filter, Group, Health, Listed, Memory,
    NewEvent, Prune, Pruned, Receipt, Replay, Settle, Settled, Sqlite, SqliteOptions, State, Store,
    StoreError, StoreFuture, Walked,
};
use tower_defer::event::{DeliveryContext, Event, Events, Subscriber};
use tower_defer::{Defer, Retry, TaskError};

use super::body::Script;
use super::{DEADLINE, Flavor, Gate, Http, Setting, eventually, on, soon};

#[path = "../store_support/scratch.rs"]
mod scratch;
pub(crate) use scratch::Scratch;

/// The fact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Paid {
    pub(crate) id: i64,
}

impl Event for Paid {
    const NAME: &'static str = "order.paid";
}

/// Another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sent {
    pub(crate) id: i64,
}

impl Event for Sent {
    const NAME: &'static str = "order.sent";
}

/// What a subscriber does when it has written itself down.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Well,
    Fail(&'static str),
    /// Not to be tried again before.
    Later(Duration),
    Fatal(&'static str),
    Panic,
    /// Ends well when the gate is open.
    Wait(Gate),
    /// Never ends.
    Never,
}

/// A line of the book.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) subscriber: String,
    pub(crate) id: i64,
    pub(crate) attempt: u32,
    pub(crate) delivery: String,
    pub(crate) status: Option<u16>,
    pub(crate) last_error: Option<String>,
}

/// The state of the subscribers: who ran, and what each is to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Book(Arc<Pages>);

#[derive(Debug, Default)]
struct Pages {
    runs: Mutex<Vec<Run>>,
    acts: Mutex<HashMap<String, Act>>,
}

impl Book {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// From now on this subscriber does so.
    pub(crate) fn act(&self, subscriber: &str, act: Act) {
        lock(&self.0.acts).insert(subscriber.to_owned(), act);
    }

    pub(crate) fn runs(&self) -> Vec<Run> {
        lock(&self.0.runs).clone()
    }

    pub(crate) fn of(&self, subscriber: &str) -> Vec<Run> {
        let mut runs = self.runs();
        runs.retain(|run| run.subscriber == subscriber);
        runs
    }

    pub(crate) fn count(&self, subscriber: &str) -> usize {
        self.of(subscriber).len()
    }

    /// The events that it has had, in their order.
    pub(crate) fn ids(&self, subscriber: &str) -> Vec<i64> {
        let mut ids: Vec<_> = self.of(subscriber).iter().map(|run| run.id).collect();
        ids.sort_unstable();
        ids
    }

    /// Waits until it has run so often.
    pub(crate) async fn awaits(&self, subscriber: &str, runs: usize) {
        let what = format!("{runs} runs of {subscriber}");
        eventually(&what, || self.count(subscriber) >= runs).await;
    }

    /// Writes a run down; what the subscriber does then is its own affair.
    pub(crate) fn note(&self, id: i64, delivery: &DeliveryContext) {
        drop(self.write(id, delivery));
    }

    /// The same, of a subscriber that is told nothing of its delivery.
    pub(crate) fn heard(&self, subscriber: &str, id: i64) {
        lock(&self.0.runs).push(Run {
            subscriber: subscriber.to_owned(),
            id,
            ..Run::default()
        });
    }

    fn write(&self, id: i64, delivery: &DeliveryContext) -> Act {
        let subscriber = delivery.subscriber().to_owned();
        let act = lock(&self.0.acts).get(&subscriber).cloned();
        lock(&self.0.runs).push(Run {
            subscriber,
            id,
            attempt: delivery.attempt(),
            delivery: delivery.id(),
            status: delivery
                .response()
                .and_then(|response| response.status)
                .map(|status| status.as_u16()),
            last_error: delivery.last_error().map(str::to_owned),
        });
        act.unwrap_or(Act::Well)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn perform(act: Act) -> Result<(), TaskError> {
    match act {
        Act::Well => Ok(()),
        Act::Fail(text) => Err(TaskError::new(text)),
        Act::Later(delay) => Err(TaskError::retry_after(delay, "later")),
        Act::Fatal(text) => Err(TaskError::fatal(text)),
        Act::Panic => panic!("the subscriber's own panic"),
        Act::Wait(gate) => {
            gate.passed().await;
            Ok(())
        }
        Act::Never => std::future::pending().await,
    }
}

/// Listens to [`Paid`], and does what the book says.
pub(crate) fn listener() -> Subscriber<Book, Paid> {
    Subscriber::with_context(
        |book: Book, event: Paid, delivery: DeliveryContext| async move {
            perform(book.write(event.id, &delivery)).await
        },
    )
    .retry(Retry::fixed(3, Duration::from_millis(1)))
}

/// Listens to [`Sent`].
pub(crate) fn sent_listener() -> Subscriber<Book, Sent> {
    Subscriber::with_context(
        |book: Book, event: Sent, delivery: DeliveryContext| async move {
            perform(book.write(event.id, &delivery)).await
        },
    )
    .retry(Retry::fixed(3, Duration::from_millis(1)))
}

/// Subscribers of these names listen to [`Paid`].
pub(crate) fn events(book: &Book, names: &[&str]) -> Events<Book> {
    names
        .iter()
        .fold(Events::new(book.clone()), |events, name| {
            events.on(name, listener())
        })
}

/// Where events are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    Nowhere,
    Memory,
    Sqlite,
}

impl Keep {
    pub(crate) const ALL: [Self; 3] = [Self::Nowhere, Self::Memory, Self::Sqlite];
    pub(crate) const STORES: [Self; 2] = [Self::Memory, Self::Sqlite];

    /// Events with such a store, the file in `scratch`.
    pub(crate) async fn give(self, events: Events<Book>, scratch: &Scratch) -> Events<Book> {
        match self {
            Self::Nowhere => events,
            Self::Memory => events.store(Memory::new()),
            Self::Sqlite => events.store(open(&scratch.path("events.db")).await),
        }
    }
}

/// Opens the file, as soon as the store that had it before has let go.
pub(crate) async fn open(path: &Path) -> Sqlite {
    open_with(SqliteOptions::new(path)).await
}

pub(crate) async fn open_with(options: SqliteOptions) -> Sqlite {
    soon("the file is free", async {
        loop {
            match options.clone().open() {
                Ok(store) => return store,
                // What ran on this runtime lets go when it has a turn.
                Err(error) if error.is_in_use() => tokio::task::yield_now().await,
                Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
            }
        }
    })
    .await
}

/// Both versions of HTTP, each on another runtime.
pub(crate) fn both<F, Fut>(body: F)
where
    F: Fn(Setting) -> Fut,
    Fut: Future<Output = ()>,
{
    for (http, flavor) in [
        (Http::One, Flavor::CurrentThread),
        (Http::Two, Flavor::MultiThread(2)),
    ] {
        on(Setting { http, flavor }, &body);
    }
}

/// One version, one runtime: where neither matters.
pub(crate) fn once<F, Fut>(body: F)
where
    F: FnOnce(Setting) -> Fut,
    Fut: Future<Output = ()>,
{
    let (http, flavor) = (Http::One, Flavor::MultiThread(2));
    on(Setting { http, flavor }, body);
}

/// The handle of a request.
pub(crate) fn defer_of(request: &Request<Incoming>) -> Defer {
    Defer::from_extensions(request.extensions()).expect("the layer is there")
}

/// A small answer.
pub(crate) fn answer(status: u16) -> Response<Script> {
    respond(status, Script::new().data("done").tells_end().hint(4))
}

pub(crate) fn respond(status: u16, body: Script) -> Response<Script> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

/// A connection of our own to the file, as a person with a shell has one.
pub(crate) fn look_into(path: &Path) -> rusqlite::Connection {
    let conn = rusqlite::Connection::open(path).expect("opens");
    conn.busy_timeout(DEADLINE).expect("a timeout");
    conn
}

pub(crate) fn count(conn: &rusqlite::Connection, sql: &str) -> i64 {
    conn.query_row(sql, [], |row| row.get(0)).expect(sql)
}

pub(crate) const EVENTS: &str = "SELECT count(*) FROM defer_events";

/// The number at the end of a path.
pub(crate) fn id_of(request: &Request<Incoming>) -> i64 {
    let path = request.uri().path();
    path.rsplit('/')
        .next()
        .and_then(|id| id.parse().ok())
        .unwrap_or(0)
}

/// A file for a store, and how to open it again.
pub(crate) struct File {
    pub(crate) scratch: Scratch,
}

impl File {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            scratch: Scratch::new(name),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.path("events.db")
    }

    pub(crate) async fn open(&self) -> Sqlite {
        open(&self.path()).await
    }
}

/// A store that can be looked into, held up and made to fail, around a real one. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Tap(Arc<Taps>);

#[derive(Debug)]
struct Taps {
    store: Box<dyn Store>,
    appends: AtomicUsize,
    claims: AtomicUsize,
    settles: AtomicUsize,
    fail_appends: AtomicUsize,
    fail_claims: AtomicUsize,
    fail_settles: AtomicUsize,
    held: Mutex<Option<Gate>>,
    held_claims: Mutex<Option<Gate>>,
    held_settles: Mutex<Option<Gate>>,
    settled: Mutex<Vec<(AttemptToken, Settle)>>,
}

impl Tap {
    pub(crate) fn new(store: impl Store) -> Self {
        Self(Arc::new(Taps {
            store: Box::new(store),
            appends: AtomicUsize::new(0),
            claims: AtomicUsize::new(0),
            settles: AtomicUsize::new(0),
            fail_appends: AtomicUsize::new(0),
            fail_claims: AtomicUsize::new(0),
            fail_settles: AtomicUsize::new(0),
            held: Mutex::default(),
            held_claims: Mutex::default(),
            held_settles: Mutex::default(),
            settled: Mutex::default(),
        }))
    }

    /// How many batches were to be recorded.
    pub(crate) fn appends(&self) -> usize {
        self.0.appends.load(Ordering::SeqCst)
    }

    pub(crate) fn claims(&self) -> usize {
        self.0.claims.load(Ordering::SeqCst)
    }

    /// How many times something was to be settled, also in vain.
    pub(crate) fn settles(&self) -> usize {
        self.0.settles.load(Ordering::SeqCst)
    }

    pub(crate) fn settled(&self) -> Vec<(AttemptToken, Settle)> {
        lock(&self.0.settled).clone()
    }

    /// The next so many fail.
    pub(crate) fn fail_appends(&self, times: usize) {
        self.0.fail_appends.store(times, Ordering::SeqCst);
    }

    pub(crate) fn fail_claims(&self, times: usize) {
        self.0.fail_claims.store(times, Ordering::SeqCst);
    }

    pub(crate) fn fail_settles(&self, times: usize) {
        self.0.fail_settles.store(times, Ordering::SeqCst);
    }

    /// From now on batches wait at this gate before they are recorded.
    pub(crate) fn hold(&self, gate: &Gate) {
        *lock(&self.0.held) = Some(gate.clone());
    }

    /// From now on claims that were made wait at this gate with their answer.
    pub(crate) fn hold_claims(&self, gate: &Gate) {
        *lock(&self.0.held_claims) = Some(gate.clone());
    }

    /// From now on what is to be settled waits at this gate before it is.
    pub(crate) fn hold_settles(&self, gate: &Gate) {
        *lock(&self.0.held_settles) = Some(gate.clone());
    }

    fn fails(left: &AtomicUsize) -> Result<(), StoreError> {
        let took = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match took {
            Ok(_) => Err(StoreError::io(std::io::Error::other("a fault of the test"))),
            Err(_) => Ok(()),
        }
    }
}

impl Store for Tap {
    fn append(&self, events: Vec<NewEvent>, now_ms: i64) -> StoreFuture<'_, Vec<Receipt>> {
        Box::pin(async move {
            self.0.appends.fetch_add(1, Ordering::SeqCst);
            let held = lock(&self.0.held).clone();
            if let Some(gate) = held {
                gate.passed().await;
            }
            Self::fails(&self.0.fail_appends)?;
            self.0.store.append(events, now_ms).await
        })
    }

    fn claim(&self, limit: usize, now_ms: i64) -> StoreFuture<'_, Vec<Claimed>> {
        Box::pin(async move {
            self.0.claims.fetch_add(1, Ordering::SeqCst);
            Self::fails(&self.0.fail_claims)?;
            let claimed = self.0.store.claim(limit, now_ms).await;
            let held = lock(&self.0.held_claims).clone();
            if let Some(gate) = held {
                gate.passed().await;
            }
            claimed
        })
    }

    fn settle(
        &self,
        settles: Vec<(AttemptToken, Settle)>,
        now_ms: i64,
    ) -> StoreFuture<'_, Vec<Settled>> {
        Box::pin(async move {
            self.0.settles.fetch_add(1, Ordering::SeqCst);
            let held = lock(&self.0.held_settles).clone();
            if let Some(gate) = held {
                gate.passed().await;
            }
            Self::fails(&self.0.fail_settles)?;
            lock(&self.0.settled).extend(settles.iter().cloned());
            self.0.store.settle(settles, now_ms).await
        })
    }

    fn unpark(
        &self,
        filter: Filter,
        rename: Option<Arc<str>>,
        limit: usize,
        now_ms: i64,
    ) -> StoreFuture<'_, u64> {
        self.0.store.unpark(filter, rename, limit, now_ms)
    }

    fn list(
        &self,
        state: State,
        filter: Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> StoreFuture<'_, Vec<Listed>> {
        self.0.store.list(state, filter, after, limit)
    }

    fn group(&self, filter: Filter, limit: usize) -> StoreFuture<'_, Vec<Group>> {
        self.0.store.group(filter, limit)
    }

    fn replay(&self, replay: Replay, now_ms: i64) -> StoreFuture<'_, u64> {
        self.0.store.replay(replay, now_ms)
    }

    fn discard(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64> {
        self.0.store.discard(filter, limit, now_ms)
    }

    fn discard_parked(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64> {
        self.0.store.discard_parked(filter, limit, now_ms)
    }

    fn add_past(&self, past: AddPast, now_ms: i64) -> StoreFuture<'_, Walked> {
        self.0.store.add_past(past, now_ms)
    }

    fn prune(&self, policy: Prune) -> StoreFuture<'_, Pruned> {
        self.0.store.prune(policy)
    }

    fn counts(&self) -> StoreFuture<'_, Counts> {
        self.0.store.counts()
    }

    fn next_due(&self) -> StoreFuture<'_, Option<i64>> {
        self.0.store.next_due()
    }

    fn wakeups(&self) -> Arc<Notify> {
        self.0.store.wakeups()
    }

    fn health(&self) -> Health {
        self.0.store.health()
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        self.0.store.close()
    }
}
