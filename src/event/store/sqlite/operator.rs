//! For the operator's hand: looks into a store and moves its dead letters and what is parked, also while a server has it
//! open.
//!
//! Not a second [`Sqlite`](super::Sqlite): it takes no lock of a process, and therefore never claims,
//! settles, recovers or migrates. What it does it does as the server would, by the same functions, in
//! transactions of its own; SQLite keeps those apart.
//!
//! Invariants:
//!
//! 1. A file that is not there is not made, and one that is no store is not changed.
//! 2. It writes nothing into tables of another version, also if a server brought them to that version
//!    since they were looked at.

use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension};

use super::connection::{self, Access};
use super::desk::{Desk, Durable};
use super::fault::Fault;
use super::lock;
use super::shared::Shared;
use super::{letters, schema, walk};
use crate::event::store::StoreError;
use crate::event::store::life::State;
use crate::event::store::query::{Counts, Cursor, Filter, Group, Listed, Replay};

/// Looks into the file of an embedded store, replays or discards its dead letters, and discards what is parked: beside a
/// running server, from another process, or where no server runs.
///
/// Opening [`Sqlite`](super::Sqlite) means to run its deliveries, so only one process can. This one
/// runs none. It keeps the promises of [`Store`](crate::event::store::Store) for what it does: under
/// one name a delivery is replayed at most once, whoever replays it, and what is answered is on the
/// disk. A server that has the file open finds replayed deliveries when it next looks, within 5 s.
///
/// It blocks on the disk. Each call is one transaction: while it writes, the server's requests wait,
/// so keep the limits small (some hundred), and pause for as long as a call took before the next one:
/// whoever takes the lock again at once leaves the other one little of it.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_defer::event::store::{Filter, Replay, Sqlite, SqliteOperator};
///
/// # let directory = std::env::temp_dir().join(format!("defer-doc-op-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("events.db");
/// # let now_ms = 1_700_000_000_000;
/// let server = Sqlite::open(&path)?;
///
/// let mut operator = SqliteOperator::open(&path)?;
/// for group in operator.group(&Filter::default(), 10)? {
///     println!("{} × {}: {}", group.count, group.subscriber, group.error_group);
/// }
/// let replay = Replay {
///     name: "smtp-outage".into(),
///     filter: Filter { subscriber: Some("welcome-email".into()), ..Filter::default() },
///     limit: 200,
/// };
/// loop {
///     let began = std::time::Instant::now();
///     if operator.replay(&replay, now_ms)? < 200 {
///         break;
///     }
///     std::thread::sleep(began.elapsed()); // the server's turn
/// }
/// # drop((operator, server));
/// # let _ = std::fs::remove_dir_all(directory);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SqliteOperator {
    reading: Desk,
    writing: Desk,
    patience_ms: u64,
}

impl SqliteOperator {
    /// Opens the file of a store that is there.
    ///
    /// # Errors
    ///
    /// [`is_missing`](StoreError::is_missing): there is no such file.
    /// [`is_no_store`](StoreError::is_no_store): it is no database, or none with a store in it.
    /// [`is_schema`](StoreError::is_schema): it was written by another version.
    /// Or what SQLite says: [`is_locked`](StoreError::is_locked),
    /// [`is_corrupt`](StoreError::is_corrupt), [`is_io`](StoreError::is_io).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => StoreError::missing(error),
            _ => StoreError::io(error),
        })?;
        // It is opened again after some errors, wherever the process is by then.
        let path = lock::real(path);
        let desk = |access| {
            let conn = connection::open(&path, access).map_err(no_store)?;
            let desk = Desk::new(path.clone(), access, conn, Arc::<Shared>::default());
            Ok::<_, StoreError>(desk)
        };
        let mut operator = Self {
            reading: desk(Access::Read)?,
            writing: desk(Access::Operate)?,
            patience_ms: 30_000,
        };
        operator.read(|_| Ok(()))?;
        Ok(operator)
    }

    /// How long a call waits while somebody else (the server) keeps the database locked, before it
    /// fails with [`StoreError::is_locked`]. In steps of 250 ms; 30 s by default: under load the
    /// server takes the lock again as soon as it has let go.
    #[must_use]
    pub fn lock_patience(mut self, patience: std::time::Duration) -> Self {
        self.patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// How many deliveries are in which state.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn counts(&mut self) -> Result<Counts, StoreError> {
        self.read(walk::counts)
    }

    /// Lists deliveries in a state, by event and subscriber, after `after`, at most `limit`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn list(
        &mut self,
        state: State,
        filter: &Filter,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        self.read(|conn| letters::list(conn, state, filter, after, limit))
    }

    /// Groups the dead letters that match by subscriber and error, the largest groups first, at most
    /// `limit` groups.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn group(&mut self, filter: &Filter, limit: usize) -> Result<Vec<Group>, StoreError> {
        self.read(|conn| letters::group(conn, filter, limit))
    }

    /// Replays dead letters: under one name each at most once, also together with the server. Returns
    /// how many; fewer than the limit means that the replay is over.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was replayed.
    pub fn replay(&mut self, replay: &Replay, now_ms: i64) -> Result<u64, StoreError> {
        self.write(now_ms, |desk| letters::replay(desk, replay, now_ms))
    }

    /// Discards dead letters that match, at most `limit`: they become history. Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was discarded.
    pub fn discard(
        &mut self,
        filter: &Filter,
        limit: usize,
        now_ms: i64,
    ) -> Result<u64, StoreError> {
        self.write(now_ms, |desk| letters::discard(desk, filter, limit, now_ms))
    }

    /// Discards parked deliveries that match, at most `limit`: they become history. Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was discarded.
    pub fn discard_parked(
        &mut self,
        filter: &Filter,
        limit: usize,
        now_ms: i64,
    ) -> Result<u64, StoreError> {
        self.write(now_ms, |desk| {
            letters::discard_parked(desk, filter, limit, now_ms)
        })
    }

    fn read<T>(
        &mut self,
        mut work: impl FnMut(&Connection) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        self.reading
            .transact(0, self.patience_ms, Durable::No, |desk| {
                known(desk.conn())?;
                work(desk.conn())
            })
    }

    fn write<T>(
        &mut self,
        now_ms: i64,
        mut work: impl FnMut(&mut Desk) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let written = self
            .writing
            .transact(now_ms, self.patience_ms, Durable::Yes, |desk| {
                known(desk.conn())?;
                work(desk)
            });
        self.writing.report(now_ms, written.as_ref().map(drop));
        written
    }
}

/// Whether the tables are there, and of our version (invariants 1 and 2).
fn known(conn: &Connection) -> Result<(), Fault> {
    let table: Option<i64> = conn
        .prepare_cached("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'defer_meta'")
        .map_err(no_store)
        .map_err(Fault::Own)?
        .query_row([], |row| row.get(0))
        .optional()
        .map_err(no_store)
        .map_err(Fault::Own)?;
    if table.is_none() {
        return Err(Fault::Own(StoreError::no_store()));
    }
    schema::expect(conn)
}

fn no_store(fault: impl Into<Fault>) -> StoreError {
    match fault.into() {
        Fault::Sql(error)
            if error.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) =>
        {
            StoreError::no_store()
        }
        fault => StoreError::from(fault),
    }
}
