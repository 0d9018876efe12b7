//! What a request works on: the connection, inside a transaction, and what the thread that owns it
//! remembers.
//!
//! Not a queue: the [`worker`](super::worker) brings the requests.
//!
//! Invariants:
//!
//! 1. After an error the connection is rolled back, and opened anew if that did not help.
//! 2. A transaction that need not be durable is written to SQLite's log without a sync: it survives the
//!    process, and the next one that SQLite syncs makes it survive the power too. One that only records
//!    events is made durable by the [redo log](super::redo), while that has room; where only that cannot be
//!    synced, by SQLite.
//! 3. After a sync of SQLite's log that failed, what was written to it before may be lost, whatever a later
//!    sync says: it is moved into the database, and begun anew, before anything else is synced. Whichever
//!    thread meets it tells the writer; what the writer syncs between the reader's failing and its saying so
//!    rests on the kernel, which reports a failed sync to every handle of the file (Linux does).
//! 4. The writer writes only while its epoch stands in the database. Where another process was let in, because
//!    what kept it out was deleted by hand, that one has drawn a new epoch: this one has lost the file, says so
//!    ([`StoreError::is_in_use`]), and removes nothing.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use rusqlite::Connection;

use super::checkpoint;
use super::connection::{self, Access, LOCK_STEP_MS};
use super::fault::{self, Fault};
use super::flow;
use super::redo::Redo;
use super::row::Key;
use super::schema;
use super::shared::Shared;
use super::tally::Tally;
use crate::event::store::StoreError;
use crate::event::store::query::Trouble;

/// How many deliveries may be skipped because their pages are damaged. A file that has more of them
/// needs a repair: then the claim fails and says so.
const MAX_SKIPPED: usize = 10_000;

/// What a transaction must survive when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durable {
    /// The process.
    No,
    /// The power; it records so many bytes of events, and what else is in it need not.
    Events(usize),
    /// The power.
    Yes,
}

/// What a request works on: the connection, inside a transaction.
#[derive(Debug)]
pub(super) struct Desk {
    path: PathBuf,
    pub(super) access: Access,
    conn: Option<Connection>,
    /// Whether commits are synced now: what the connection was last told.
    syncs: bool,
    /// The writer's: what stands in the database as long as nobody else has taken it (invariant 4).
    pub(super) epoch: Option<i64>,
    /// The writer's, where there was room for it.
    pub(super) redo: Option<Redo>,
    /// Whether this transaction is made durable by it.
    logs: bool,
    /// Whether it could not be, because the redo log was not synced.
    log_failed: bool,
    /// What this transaction has changed.
    pub(super) tally: Tally,
    /// Deliveries that damage keeps out of every claim.
    pub(super) skipped: HashSet<Key>,
    /// Those among them that are still to be set aside, and why.
    damaged: Vec<(Key, String)>,
    pub(super) shared: Arc<Shared>,
}

impl Desk {
    pub(super) fn new(
        path: PathBuf,
        access: Access,
        conn: Connection,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            path,
            access,
            conn: Some(conn),
            syncs: true,
            epoch: None,
            redo: None,
            logs: false,
            log_failed: false,
            tally: Tally::default(),
            skipped: HashSet::new(),
            damaged: Vec::new(),
            shared,
        }
    }

    /// The connection. [`begin`](Self::begin) has seen to it that there is one.
    pub(super) fn conn(&self) -> &Connection {
        self.conn
            .as_ref()
            .expect("a request runs only inside a transaction that was begun")
    }

    /// The connection and the tally, for what needs both.
    pub(super) fn parts(&mut self) -> (&Connection, &mut Tally) {
        let conn = self.conn.as_ref();
        (conn.expect("as in `conn`"), &mut self.tally)
    }

    /// The same, to record events; with the redo log, if it makes them durable.
    pub(super) fn parts_to_record(&mut self) -> (&Connection, &mut Tally, Option<&mut Redo>) {
        let conn = self.conn.as_ref();
        (
            conn.expect("as in `conn`"),
            &mut self.tally,
            self.redo.as_mut().filter(|_| self.logs),
        )
    }

    /// The connection, if there is one.
    pub(super) fn idle_conn(&self) -> Option<&Connection> {
        self.conn.as_ref()
    }

    pub(super) fn skip(&mut self, key: Key) {
        self.skipped.insert(key);
    }

    /// Keeps a delivery out of what follows, and has it set aside when this transaction is over.
    pub(super) fn set_aside_later(&mut self, key: Key, damage: String) {
        if self.skipped.len() < MAX_SKIPPED && self.skipped.insert(key.clone()) {
            self.damaged.push((key, damage));
        }
    }

    pub(super) fn report_damage(&self, key: &Key, damage: &str) {
        tracing::error!(
            event = key.0,
            subscriber = &*key.1,
            damage,
            "delivery set aside"
        );
        let mut health = self.shared.health.lock();
        health.damaged += 1;
        health.last_damage = Some(format!("event {} for {}: {damage}", key.0, key.1));
    }

    /// Runs `work` in a transaction of its own, waiting for a foreign lock at most `patience_ms`.
    /// If it finds a damaged page, what is on it is set aside and `work` is run again: each time at
    /// least one delivery fewer stands in its way.
    pub(super) fn transact<T>(
        &mut self,
        now_ms: i64,
        patience_ms: u64,
        durable: Durable,
        mut work: impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        loop {
            let mut result = self.transact_once(now_ms, patience_ms, durable, &mut work);
            if self.log_failed {
                result = self.transact_once(now_ms, patience_ms, Durable::Yes, &mut work);
                if result.is_ok() {
                    self.give_up_log();
                }
            }
            let damaged = std::mem::take(&mut self.damaged);
            if result.is_ok() || damaged.is_empty() {
                return result;
            }
            for (key, damage) in damaged {
                let aside = self.transact_once(now_ms, patience_ms, Durable::Yes, &mut |desk| {
                    flow::set_aside(desk, key.clone(), &damage, now_ms)
                });
                if aside.is_err() {
                    self.report_damage(&key, &damage);
                }
            }
        }
    }

    fn transact_once<T>(
        &mut self,
        now_ms: i64,
        patience_ms: u64,
        durable: Durable,
        work: &mut impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        self.tally = Tally::default();
        self.logs = false;
        self.log_failed = false;
        if let (Durable::Events(bytes), Some(redo)) = (durable, &mut self.redo) {
            if redo.fits(bytes) {
                redo.begin();
                self.logs = true;
            }
        }
        let syncs = durable != Durable::No && !self.logs;
        let result = self.begin(now_ms, patience_ms, syncs).and_then(|()| {
            let result = catch_unwind(AssertUnwindSafe(|| work(self)))
                .unwrap_or_else(|_| Err(Fault::Own(StoreError::invalid("a request panicked"))));
            result.and_then(|value| self.commit(syncs).map(|()| value))
        });
        result.map_err(|fault| {
            self.roll_back();
            StoreError::from(fault)
        })
    }

    fn begin(&mut self, now_ms: i64, patience_ms: u64, syncs: bool) -> Result<(), Fault> {
        if self.conn.is_none() {
            self.conn = Some(connection::open(&self.path, self.access)?);
            self.syncs = true;
            if self.access == Access::Write {
                // What a sync has met is told to the files that were open then, and these are closed.
                self.shared.suspect();
            }
        }
        let mut waited_ms = 0;
        loop {
            match self.begin_once(syncs) {
                Err(fault) if fault.is_busy() && waited_ms < patience_ms => {
                    // SQLite itself has waited for one step of its busy timeout.
                    waited_ms += LOCK_STEP_MS;
                    self.report(now_ms, Err(&StoreError::from(fault)));
                }
                result => return result,
            }
        }
    }

    fn begin_once(&mut self, syncs: bool) -> Result<(), Fault> {
        if self.access == Access::Read {
            return Ok(self.control("BEGIN")?);
        }
        if self.access == Access::Write {
            self.set_syncs(syncs)?;
            // Before it is mended, because the reader's thread may say it meanwhile.
            if syncs && self.shared.trust() {
                checkpoint::empty(self.conn()).inspect_err(|_| self.shared.suspect())?;
            }
        }
        self.control("BEGIN IMMEDIATE")?;
        match self.epoch {
            // Invariant 4.
            Some(epoch) if schema::epoch(self.conn())? != Some(epoch) => {
                Err(Fault::Own(StoreError::in_use(None, None)))
            }
            _ => Ok(()),
        }
    }

    fn commit(&mut self, syncs: bool) -> Result<(), Fault> {
        let logs = self.logs;
        let logged = self.redo.as_ref().and_then(|redo| match (logs, syncs) {
            (true, _) => redo.number(),
            (false, true) => redo.void(),
            (false, false) => None,
        });
        self.tally.write(self.conn(), logged)?;
        if let Some(redo) = self.redo.as_mut().filter(|_| logs) {
            let synced = redo.sync();
            self.log_failed = synced.is_err();
            synced?;
        }
        self.control("COMMIT").inspect_err(|error| {
            if fault::is_failed_sync(error) {
                self.shared.suspect();
            }
        })?;
        if let Some(redo) = &mut self.redo {
            if logs {
                redo.committed();
            } else if syncs && !self.tally.is_empty() && !self.shared.is_suspect() {
                // Without a change there was nothing to sync.
                redo.restart();
            }
        }
        Ok(())
    }

    /// The redo log cannot be synced, and SQLite's can: that is slower, and loses nothing. The transaction
    /// that has just been synced took the number of the record that was not.
    fn give_up_log(&mut self) {
        tracing::warn!(
            "the redo log of the event store cannot be synced: until the store is opened again, SQLite \
             syncs what is recorded"
        );
        if let Some(redo) = &mut self.redo {
            redo.give_up();
        }
    }

    fn set_syncs(&mut self, syncs: bool) -> Result<(), Fault> {
        if self.syncs != syncs {
            connection::sync(self.conn(), syncs)?;
            self.syncs = syncs;
        }
        Ok(())
    }

    /// While nothing is asked, gets ready for what somebody waits for: an event.
    pub(super) fn rest(&mut self) {
        if self.redo.is_some() && self.conn.is_some() {
            // If it fails, the next transaction says so.
            let _ = self.set_syncs(false);
        }
    }

    /// Begins or commits; prepared, because parsing them was a twentieth of a lone append.
    fn control(&self, sql: &str) -> rusqlite::Result<()> {
        self.conn().prepare_cached(sql)?.execute([]).map(drop)
    }

    /// Invariant 1.
    fn roll_back(&mut self) {
        if let Some(redo) = self.redo.as_mut().filter(|_| self.logs) {
            redo.rolled_back();
        }
        let Some(conn) = &self.conn else { return };
        if !conn.is_autocommit() && conn.execute_batch("ROLLBACK").is_err() {
            self.conn = None;
        }
    }

    pub(super) fn report(&self, now_ms: i64, result: Result<(), &StoreError>) {
        let mut health = self.shared.health.lock();
        match result {
            Ok(()) => {
                if health.trouble.take().is_some() {
                    tracing::info!("the event store can be written again");
                }
            }
            Err(error) => {
                let since_ms = health
                    .trouble
                    .as_ref()
                    .map_or(now_ms, |trouble| trouble.since_ms);
                if health.trouble.is_none() {
                    tracing::error!(error = error as &dyn std::error::Error, "{error}");
                }
                health.trouble = Some(Trouble {
                    error: error.clone(),
                    since_ms,
                });
            }
        }
    }
}
