//! The embedded store: one SQLite file, one process, every promise of [`Store`] across a crash.
//!
//! Not a shared store: a second process is told who has the file, and other machines cannot use it
//! at all. Not a cache in front of anything: an append is answered when it is on the disk.
//!
//! | file | is |
//! | --- | --- |
//! | [`append`] | the batches of a group, as few statements |
//! | [`checkpoint`] | when the log is moved, and by whom |
//! | [`connection`] | how a connection is set up, and why so |
//! | [`desk`] | a connection inside a transaction |
//! | [`fault`] | SQLite's errors in the store's words |
//! | [`flow`] | claim, settle, recovery |
//! | [`lent`] | what was claimed, on its way to whoever asked |
//! | [`letters`] | list, group, replay, discard, unpark |
//! | [`lock`] | one process at a time |
//! | [`open`] | options, and what happens at open |
//! | [`operator`] | the same file beside the server that has it |
//! | [`redo`] | what makes an append durable |
//! | [`row`] | between rows and a delivery's life |
//! | [`schema`] | the tables, documented |
//! | [`shared`] | what the threads and the handle share |
//! | [`tally`] | the counters |
//! | [`walk`] | past events, pruning |
//! | [`worker`] | the threads and the group commit |

mod append;
mod checkpoint;
mod connection;
mod desk;
mod fault;
mod flow;
mod lent;
mod letters;
mod lock;
mod open;
mod operator;
mod redo;
mod row;
mod schema;
mod shared;
mod tally;
mod walk;
mod worker;

use std::path::Path;
use std::sync::Arc;

use rusqlite::Transaction;
use tokio::sync::{Notify, mpsc, oneshot};

use self::desk::Desk;
use self::fault::Fault;
use self::lent::Lent;
pub use self::open::SqliteOptions;
pub use self::operator::SqliteOperator;
use self::shared::Shared;
use self::tally::Tally;
use self::worker::{Append, Message, Op, Reply, Request, Terms};
use super::StoreError;
use super::contract::{Store, StoreFuture, check};
use super::life::{Settle, State};
use super::query::{
    AddPast, Counts, Cursor, Filter, Group, Health, Listed, Prune, Pruned, Replay, Walked,
};
use super::record::{AttemptToken, Claimed, NewEvent, Receipt, Settled};

/// The embedded store: events in one SQLite file.
///
/// Beside the file it keeps, while it is open, SQLite's own two (`-wal`, `-shm`), a log of a MiB of what it has
/// recorded last (`-log`), and one that it holds an OS lock on (`-lock`). After a crash they belong to the
/// database: whoever moves it moves them, whoever copies it asks SQLite for a backup, and whoever puts a backup
/// in its place removes them. While it is open nobody deletes them:
///
/// - Without `-lock` the lock on `-log` still keeps a second process out.
/// - Without both (or without `-lock`, where there was no room for `-log`) it gets in, and the first one is out:
///   whatever that is asked to write fails with [`is_in_use`](StoreError::is_in_use) from then on, and what
///   it was running runs once more. The database itself is not locked against this: a process that closes any
///   handle of its file loses SQLite's locks on it, also those of the user's own connections.
/// - Without `-wal` or `-shm` what was recorded since is lost, as with any SQLite database.
///
/// Two threads serve it: one writes, one reads. When it is dropped they finish what was accepted and end; use
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
/// # let _ = std::fs::remove_dir_all(directory);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sqlite {
    writer: mpsc::Sender<Message>,
    reader: mpsc::Sender<Message>,
    shared: Arc<Shared>,
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
    /// After a power cut, let the store be opened before: what it then makes good has lost its numbers and
    /// keys until then. An event whose number was given away meanwhile gets another one, and one whose key was
    /// is taken for recorded.
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
        tally::lock(transaction)?;
        let mut tally = Tally::default();
        let batch = std::iter::once((events, now_ms));
        let receipts = append::append(transaction, &mut tally, None, batch, false)?;
        tally.write(transaction, None)?;
        Ok(receipts.into_iter().flatten().collect())
    }

    /// Tells the store that a transaction with [`append_in`](Self::append_in) has committed.
    pub fn appended(&self) {
        self.shared.wakeups.notify_one();
    }

    /// Sends a request, waits for the answer, and takes what is in it.
    fn send<'a, T: Send + 'static, U: 'a>(
        &'a self,
        queue: &'a mpsc::Sender<Message>,
        request: impl FnOnce(Reply<T>) -> Request + Send + 'a,
        take: fn(T) -> U,
    ) -> StoreFuture<'a, U> {
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            queue
                .send(Message::Request(request(reply)))
                .await
                .map_err(|_| StoreError::closed())?;
            let answer = answer.await.unwrap_or_else(|_| Err(StoreError::closed()));
            answer.map(take)
        })
    }

    fn ask<'a, T: Send + 'static>(
        &'a self,
        queue: &'a mpsc::Sender<Message>,
        terms: Terms,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'a, T> {
        let request = move |reply| {
            Request::Other(Box::new(Op {
                work,
                result: None,
                wrap: |it, _| it,
                reply,
                terms,
            }))
        };
        self.send(queue, request, |it| it)
    }

    fn write<T: Send + 'static>(
        &self,
        now_ms: i64,
        wakes: bool,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        let terms = Terms {
            now_ms: Some(now_ms),
            wakes,
            durable: true,
        };
        self.ask(&self.writer, terms, work)
    }

    fn read<T: Send + 'static>(
        &self,
        work: impl FnMut(&mut Desk) -> Result<T, Fault> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        let terms = Terms {
            now_ms: None,
            wakes: false,
            durable: false,
        };
        self.ask(&self.reader, terms, work)
    }
}

impl Store for Sqlite {
    fn append(&self, events: Vec<NewEvent>, now_ms: i64) -> StoreFuture<'_, Vec<Receipt>> {
        if let Err(error) = check(&events) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let request = move |reply| {
            Request::Append(Append {
                events,
                now_ms,
                receipts: Vec::new(),
                reply,
            })
        };
        self.send(&self.writer, request, Lent::take)
    }

    fn claim(&self, limit: usize, now_ms: i64) -> StoreFuture<'_, Vec<Claimed>> {
        let terms = Terms {
            now_ms: Some(now_ms),
            wakes: false,
            // Promise 4: it must survive the process, not the power.
            durable: false,
        };
        let request = move |reply| {
            Request::Other(Box::new(Op {
                work: move |desk: &mut Desk| flow::claim(desk, limit, now_ms),
                result: None,
                wrap: |claimed, shared| Lent::new(claimed, Arc::clone(shared)),
                reply,
                terms,
            }))
        };
        self.send(&self.writer, request, Lent::take)
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

    fn discard_parked(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64> {
        self.write(now_ms, false, move |desk| {
            letters::discard_parked(desk, &filter, limit, now_ms)
        })
    }

    fn add_past(&self, past: AddPast, now_ms: i64) -> StoreFuture<'_, Walked> {
        self.write(now_ms, true, move |desk| {
            walk::add_past(desk, &past, now_ms)
        })
    }

    fn prune(&self, policy: Prune) -> StoreFuture<'_, Pruned> {
        let terms = Terms {
            now_ms: None,
            wakes: false,
            durable: true,
        };
        self.ask(&self.writer, terms, move |desk| walk::prune(desk, &policy))
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

    fn probe(&self, now_ms: i64) -> StoreFuture<'_, ()> {
        self.write(now_ms, false, move |desk| {
            schema::probe(desk.conn(), now_ms)
        })
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
