//! The thread that owns a connection: it takes requests from a bounded queue and commits them in
//! groups.
//!
//! Not a pool, and not async: SQLite has one writer at a time, and a commit blocks on the disk. Not
//! on a timer: what arrives during one sync is the next group, so a lone request pays one sync and
//! sixty-four share one.
//!
//! Invariants:
//!
//! 1. A request is answered after the commit of its group, never before; if the commit fails,
//!    with the error.
//! 2. A request that fails for reasons of its own does not fail its group: the group is rolled
//!    back and each request gets a transaction of its own. If the fault is the store's (a full
//!    disk), the group fails as one.
//! 3. The thread ends by being closed, or when nobody can reach it any more; never by an error or
//!    a panic.
//! 4. After an error the connection is rolled back, and opened anew if that did not help.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use rusqlite::Connection;
use tokio::sync::{Notify, mpsc, oneshot};

use super::connection::{self, Access, LOCK_STEP_MS};
use super::fault::Fault;
use super::flow;
use super::row::Key;
use crate::event::store::StoreError;
use crate::event::store::query::{Health, Trouble};
use crate::sync::Mutex;

/// How many requests may wait: beyond, callers wait for room.
pub(super) const QUEUE: usize = 1_024;

/// How many deliveries may be skipped because their pages are damaged. A file that has more of them
/// needs a repair: then the claim fails and says so.
const MAX_SKIPPED: usize = 10_000;

/// What a store's threads and its handle share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) health: Mutex<Health>,
    pub(super) wakeups: Arc<Notify>,
}

/// What a request works on: the connection, inside a transaction.
#[derive(Debug)]
pub(super) struct Desk {
    path: PathBuf,
    access: Access,
    conn: Option<Connection>,
    /// Deliveries that damage keeps out of every claim.
    pub(super) skipped: HashSet<Key>,
    /// Those among them that are still to be set aside, and why.
    damaged: Vec<(Key, String)>,
    shared: Arc<Shared>,
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

    /// The last act of an orderly close.
    pub(super) fn checkpoint(&self) {
        self.conn.as_ref().map(connection::checkpoint);
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
        mut work: impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        loop {
            let result = self.transact_once(now_ms, patience_ms, &mut work);
            let damaged = std::mem::take(&mut self.damaged);
            if result.is_ok() || damaged.is_empty() {
                return result;
            }
            for (key, damage) in damaged {
                let aside = self.transact_once(now_ms, patience_ms, &mut |desk| {
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
        work: &mut impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let result = self.begin(now_ms, patience_ms).and_then(|()| {
            let result = catch_unwind(AssertUnwindSafe(|| work(self)))
                .unwrap_or_else(|_| Err(Fault::Own(StoreError::invalid("a request panicked"))));
            result.and_then(|value| {
                self.control("COMMIT")?;
                Ok(value)
            })
        });
        result.map_err(|fault| {
            self.roll_back();
            StoreError::from(fault)
        })
    }

    fn begin(&mut self, now_ms: i64, patience_ms: u64) -> Result<(), Fault> {
        if self.conn.is_none() {
            self.conn = Some(connection::open(&self.path, self.access)?);
        }
        let sql = match self.access {
            Access::Write => "BEGIN IMMEDIATE",
            Access::Read => "BEGIN",
        };
        let mut waited_ms = 0;
        loop {
            match self.control(sql).map_err(Fault::from) {
                Err(fault) if fault.is_busy() && waited_ms < patience_ms => {
                    // SQLite itself has waited for one step of its busy timeout.
                    waited_ms += LOCK_STEP_MS;
                    self.report(now_ms, Err(&StoreError::from(fault)));
                }
                result => return result.map(drop),
            }
        }
    }

    /// Begins or commits; prepared, because parsing them was a twentieth of a lone append.
    fn control(&self, sql: &str) -> rusqlite::Result<()> {
        self.conn().prepare_cached(sql)?.execute([]).map(drop)
    }

    /// Invariant 4.
    fn roll_back(&mut self) {
        let Some(conn) = &self.conn else { return };
        if !conn.is_autocommit() && conn.execute_batch("ROLLBACK").is_err() {
            self.conn = None;
        }
    }

    fn report(&self, now_ms: i64, result: Result<(), &StoreError>) {
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

/// A request. It may be run more than once, if its group was rolled back in between.
pub(super) trait Job: Send {
    fn run(&mut self, desk: &mut Desk) -> Result<(), Fault>;
    fn answer(self: Box<Self>, result: Result<(), StoreError>);
    fn now_ms(&self) -> Option<i64>;
    fn wakes(&self) -> bool;
}

/// A message to a worker.
pub(super) enum Message {
    Job(Box<dyn Job>),
    Close(Closer),
}

/// Who waits for the end.
pub(super) type Closer = oneshot::Sender<Result<(), StoreError>>;

/// A request made of a closure, and the one who waits for it.
pub(super) struct Op<T, F> {
    pub(super) work: F,
    pub(super) result: Option<T>,
    pub(super) reply: oneshot::Sender<Result<T, StoreError>>,
    pub(super) now_ms: Option<i64>,
    pub(super) wakes: bool,
}

impl<T, F> Job for Op<T, F>
where
    T: Send,
    F: FnMut(&mut Desk) -> Result<T, Fault> + Send,
{
    fn run(&mut self, desk: &mut Desk) -> Result<(), Fault> {
        self.result = Some((self.work)(desk)?);
        Ok(())
    }

    fn answer(self: Box<Self>, result: Result<(), StoreError>) {
        let Self {
            result: value,
            reply,
            ..
        } = *self;
        let answer = result
            .and_then(|()| value.ok_or_else(|| StoreError::invalid("a request without a result")));
        // Whoever has stopped waiting does not undo what was done.
        let _ = reply.send(answer);
    }

    fn now_ms(&self) -> Option<i64> {
        self.now_ms
    }

    fn wakes(&self) -> bool {
        self.wakes
    }
}

/// One thread's loop.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) desk: Desk,
    pub(super) queue: mpsc::Receiver<Message>,
    /// How long a group waits for a foreign lock before it fails.
    pub(super) patience_ms: u64,
    /// The last time that a request brought with it: this thread reads no clock.
    pub(super) now_ms: i64,
}

impl Worker {
    /// Works until it is closed, or nobody can reach it any more. Returns who waits for the end.
    pub(super) fn run(
        &mut self,
        goodbye: impl FnMut(&mut Desk) -> Result<(), Fault>,
    ) -> (Vec<Closer>, Result<(), StoreError>) {
        let mut closers = Vec::new();
        let mut group = Vec::new();
        while let Some(message) = self.queue.blocking_recv() {
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    Message::Job(job) => group.push(job),
                    Message::Close(closer) => {
                        // What is in the queue was accepted, and is still done.
                        self.queue.close();
                        closers.push(closer);
                    }
                }
                next = if group.len() < QUEUE {
                    self.queue.try_recv().ok()
                } else {
                    None
                };
            }
            let group = std::mem::take(&mut group);
            // Invariant 3: also when a log subscriber of the user's panics.
            let _ = catch_unwind(AssertUnwindSafe(|| self.commit(group)));
        }
        let result = self.desk.transact(self.now_ms, self.patience_ms, goodbye);
        (closers, result)
    }

    /// Invariants 1 and 2.
    fn commit(&mut self, mut group: Vec<Box<dyn Job>>) {
        if group.is_empty() {
            return;
        }
        let result = self.attempt(&mut group);
        let is_shared = result
            .as_ref()
            .err()
            .is_none_or(StoreError::is_of_the_store);
        if is_shared || group.len() == 1 {
            self.answer(group, &result);
            return;
        }
        for job in group {
            let mut alone = vec![job];
            let result = self.attempt(&mut alone);
            self.answer(alone, &result);
        }
    }

    fn attempt(&mut self, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        self.now_ms = group
            .iter()
            .filter_map(|job| job.now_ms())
            .fold(self.now_ms, i64::max);
        self.desk.transact(self.now_ms, self.patience_ms, |desk| {
            group.iter_mut().try_for_each(|job| job.run(desk))
        })
    }

    fn answer(&self, group: Vec<Box<dyn Job>>, result: &Result<(), StoreError>) {
        if matches!(self.desk.access, Access::Write) {
            match result {
                Err(error) if error.is_invalid() => {}
                result => self.desk.report(self.now_ms, result.as_ref().map(drop)),
            }
            if result.is_ok() && group.iter().any(|job| job.wakes()) {
                self.desk.shared.wakeups.notify_one();
            }
        }
        for job in group {
            job.answer(result.clone());
        }
    }
}
