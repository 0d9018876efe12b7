//! The embedded store: one SQLite file, one process, every promise of [`Store`] across a crash.
//!
//! Not a shared store: a second process is told who has the file, and other machines cannot use it
//! at all. Not a cache in front of anything: an append is answered when it is on the disk.
//!
//! | file | is |
//! | --- | --- |
//! | [`connection`] | how a connection is set up, and why so |
//! | [`fault`] | SQLite's errors in the store's words |
//! | [`flow`] | append, claim, settle, recovery |
//! | [`letters`] | list, group, replay, discard, unpark |
//! | [`lock`] | one process at a time |
//! | [`row`] | between rows and a delivery's life |
//! | [`schema`] | the tables, documented |
//! | [`walk`] | past events, pruning, counts |
//! | [`worker`] | the threads and the group commit |

mod connection;
mod fault;
mod flow;
mod letters;
mod lock;
mod row;
mod schema;
mod walk;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Transaction;
use tokio::sync::{Notify, mpsc, oneshot};

use self::connection::Access;
use self::fault::Fault;
use self::lock::Lock;
use self::worker::{Desk, Message, Op, QUEUE, Shared, Worker};
use super::StoreError;
use super::contract::{Store, StoreFuture, check};
use super::life::{Settle, State};
use super::query::{
    AddPast, Counts, Cursor, Filter, Group, Health, Listed, Prune, Pruned, Replay, Walked,
};
use super::record::{AttemptToken, Claimed, NewEvent, Receipt, Settled};

/// The embedded store: events in one SQLite file.
///
/// It holds an OS lock on a file beside the database for as long as it is open. Two threads serve
/// it: one writes, one reads. When it is dropped they finish what was accepted and end; use
/// [`close`](Store::close) to know when.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_defer::event::store::Sqlite;
///
/// # let directory = std::env::temp_dir().join(format!("defer-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("events.db");
/// let store = Sqlite::open(&path)?;
/// # drop(store);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sqlite {
    writer: mpsc::Sender<Message>,
    reader: mpsc::Sender<Message>,
    shared: Arc<Shared>,
}

/// How an embedded store is opened.
#[derive(Clone, Debug)]
#[must_use]
pub struct SqliteOptions {
    path: PathBuf,
    patience_ms: u64,
}

impl SqliteOptions {
    /// The file at `path`, with the defaults.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            patience_ms: 30_000,
        }
    }

    /// How long a write waits while somebody else (a shell, a backup, the user's own transaction)
    /// keeps the database locked, before it fails with [`StoreError::is_locked`]. In steps of
    /// 250 ms; 30 s by default, since requests wait meanwhile, and a client rarely waits longer.
    pub fn lock_patience(mut self, patience: std::time::Duration) -> Self {
        self.patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// Opens the file, creates or updates its tables, and makes due again what was running when
    /// the last process died. Blocks on the disk: call it before serving.
    ///
    /// # Errors
    ///
    /// [`is_in_use`](StoreError::is_in_use): another process has it;
    /// [`is_read_only`](StoreError::is_read_only), [`is_corrupt`](StoreError::is_corrupt),
    /// [`is_schema`](StoreError::is_schema) (written by a newer version),
    /// [`is_full`](StoreError::is_full), [`is_io`](StoreError::is_io).
    pub fn open(self) -> Result<Sqlite, StoreError> {
        let lock = Lock::take(&self.path)?;
        let shared = Arc::<Shared>::default();
        let desk = |access| {
            let conn = connection::open(&self.path, access)?;
            Ok::<_, Fault>(Desk::new(
                self.path.clone(),
                access,
                conn,
                Arc::clone(&shared),
            ))
        };
        let mut writing = desk(Access::Write)?;
        writing.transact(0, self.patience_ms, |desk| {
            schema::migrate(desk.conn())?;
            flow::recover(desk)
        })?;
        let reading = desk(Access::Read)?;
        let writer = spawn("defer-store-write", writing, self.patience_ms, Some(lock))?;
        let reader = spawn("defer-store-read", reading, self.patience_ms, None)?;
        Ok(Sqlite {
            writer,
            reader,
            shared,
        })
    }
}

fn spawn(
    name: &str,
    desk: Desk,
    patience_ms: u64,
    lock: Option<Lock>,
) -> Result<mpsc::Sender<Message>, StoreError> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let mut worker = Worker {
        desk,
        queue,
        patience_ms,
        now_ms: 0,
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let (closers, result) = worker.run(|desk| match lock {
                Some(_) => flow::hand_back(desk),
                None => Ok(()),
            });
            if lock.is_some() {
                worker.desk.checkpoint();
            }
            drop(worker);
            // Last, so that the next process finds everything done.
            drop(lock);
            for closer in closers {
                let _ = closer.send(result.clone());
            }
        })
        .map_err(StoreError::io)?;
    Ok(sender)
}

impl Sqlite {
    /// Opens the file at `path` with the defaults; see [`SqliteOptions::open`].
    ///
    /// # Errors
    ///
    /// As [`SqliteOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        SqliteOptions::new(path).open()
    }

    /// Records events inside the user's own transaction, on the user's own connection to the same
    /// file: they are recorded if and when that transaction commits, with whatever else it did.
    /// The store finds them when it next looks; [`appended`](Self::appended), called after the
    /// commit, makes it look at once.
    ///
    /// [`Start::Claimed`](super::Start::Claimed) counts as due at once here, since nobody can hold
    /// a claim on what may yet be rolled back. Durability is that of the user's connection
    /// (`PRAGMA synchronous`).
    ///
    /// # Errors
    ///
    /// [`is_invalid`](StoreError::is_invalid), or what SQLite says, [`is_locked`] among it. Roll
    /// the transaction back then: a part of the events may be in it.
    ///
    /// [`is_locked`]: StoreError::is_locked
    pub fn append_in(
        transaction: &Transaction<'_>,
        events: &[NewEvent],
        now_ms: i64,
    ) -> Result<Vec<Receipt>, StoreError> {
        check(events)?;
        Ok(flow::append(transaction, events, now_ms, false)?)
    }

    /// Tells the store that a transaction with [`append_in`](Self::append_in) has committed.
    pub fn appended(&self) {
        self.shared.wakeups.notify_one();
    }

    fn ask<'a, T: Send + 'static>(
        &'a self,
        queue: &'a mpsc::Sender<Message>,
        now_ms: Option<i64>,
        wakes: bool,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'a, T> {
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            let job = Box::new(Op {
                work,
                result: None,
                reply,
                now_ms,
                wakes,
            });
            queue
                .send(Message::Job(job))
                .await
                .map_err(|_| StoreError::closed())?;
            answer.await.unwrap_or_else(|_| Err(StoreError::closed()))
        })
    }

    fn write<T: Send + 'static>(
        &self,
        now_ms: i64,
        wakes: bool,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        self.ask(&self.writer, Some(now_ms), wakes, work)
    }

    fn read<T: Send + 'static>(
        &self,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        self.ask(&self.reader, None, false, work)
    }
}

impl Store for Sqlite {
    fn append(&self, events: Vec<NewEvent>, now_ms: i64) -> StoreFuture<'_, Vec<Receipt>> {
        if let Err(error) = check(&events) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.write(now_ms, true, move |desk| {
            flow::append(desk.conn(), &events, now_ms, true)
        })
    }

    fn claim(&self, limit: usize, now_ms: i64) -> StoreFuture<'_, Vec<Claimed>> {
        self.write(now_ms, false, move |desk| flow::claim(desk, limit, now_ms))
    }

    fn settle(
        &self,
        settles: Vec<(AttemptToken, Settle)>,
        now_ms: i64,
    ) -> StoreFuture<'_, Vec<Settled>> {
        let wakes = settles
            .iter()
            .any(|(_, settle)| matches!(settle, Settle::Retry { .. } | Settle::Release));
        self.write(now_ms, wakes, move |desk| {
            flow::settle(desk, &settles, now_ms)
        })
    }

    fn unpark(
        &self,
        filter: Filter,
        rename: Option<Arc<str>>,
        limit: usize,
        now_ms: i64,
    ) -> StoreFuture<'_, u64> {
        self.write(now_ms, true, move |desk| {
            letters::unpark(desk, &filter, rename.as_ref(), limit, now_ms)
        })
    }

    fn list(
        &self,
        state: State,
        filter: Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> StoreFuture<'_, Vec<Listed>> {
        self.read(move |desk| letters::list(desk.conn(), state, &filter, after.as_ref(), limit))
    }

    fn group(&self, filter: Filter, limit: usize) -> StoreFuture<'_, Vec<Group>> {
        self.read(move |desk| letters::group(desk.conn(), &filter, limit))
    }

    fn replay(&self, replay: Replay, now_ms: i64) -> StoreFuture<'_, u64> {
        self.write(now_ms, true, move |desk| {
            letters::replay(desk, &replay, now_ms)
        })
    }

    fn discard(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64> {
        self.write(now_ms, false, move |desk| {
            letters::discard(desk, &filter, limit, now_ms)
        })
    }

    fn add_past(&self, past: AddPast, now_ms: i64) -> StoreFuture<'_, Walked> {
        self.write(now_ms, true, move |desk| {
            walk::add_past(desk, &past, now_ms)
        })
    }

    fn prune(&self, policy: Prune) -> StoreFuture<'_, Pruned> {
        self.ask(&self.writer, None, false, move |desk| {
            walk::prune(desk, &policy)
        })
    }

    fn counts(&self) -> StoreFuture<'_, Counts> {
        self.read(|desk| walk::counts(desk.conn()))
    }

    fn next_due(&self) -> StoreFuture<'_, Option<i64>> {
        self.read(|desk| walk::next_due(desk.conn()))
    }

    fn wakeups(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.wakeups)
    }

    fn health(&self) -> Health {
        self.shared.health.lock().clone()
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let mut result = Ok(());
            // The reader first: its snapshot would keep the log from being emptied.
            for queue in [&self.reader, &self.writer] {
                let (closer, closed) = oneshot::channel();
                if queue.send(Message::Close(closer)).await.is_ok() {
                    result = closed.await.unwrap_or(Ok(()));
                }
            }
            result
        })
    }
}
