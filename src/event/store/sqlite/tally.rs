//! How many deliveries are in which state, kept beside the rows, so that counting reads one row
//! and not a million.
//!
//! Not a cache: the counters change in the transaction that changes the rows, whichever connection
//! that is on, and so they are as true as the rows. Not per row either: a transaction adds up what
//! it changes, and writes one row at its end.
//!
//! What the store cannot know (the state of a row that was damaged, an edit by hand) makes them
//! inexact: set aside by [`distrust`], or by whoever edits. Then counting reads the tables, until
//! [`recount`] at the next open.

use rusqlite::{Connection, OptionalExtension, params};

use super::fault::Fault;
use crate::event::store::life::State;
use crate::event::store::query::Counts;

/// What a transaction has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    queued: i64,
    running: i64,
    retrying: i64,
    parked: i64,
    discarded: i64,
    finished: i64,
    events: i64,
    pruned: i64,
}

impl Tally {
    fn slot(&mut self, state: State) -> &mut i64 {
        match state {
            State::Queued => &mut self.queued,
            State::Running => &mut self.running,
            State::Retrying => &mut self.retrying,
            State::Parked => &mut self.parked,
            State::Discarded => &mut self.discarded,
        }
    }

    /// A new delivery.
    pub(super) fn add(&mut self, state: State) {
        *self.slot(state) += 1;
    }

    pub(super) fn moved(&mut self, from: State, to: State) {
        *self.slot(from) -= 1;
        *self.slot(to) += 1;
    }

    pub(super) fn finished(&mut self, from: State) {
        *self.slot(from) -= 1;
        self.finished += 1;
    }

    pub(super) fn recorded(&mut self, events: usize) {
        self.events += i64::try_from(events).unwrap_or(i64::MAX);
    }

    pub(super) fn pruned(&mut self, deliveries: usize) {
        self.events -= 1;
        self.pruned += 1;
        self.finished -= i64::try_from(deliveries).unwrap_or(i64::MAX);
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Writes the changes, if there are any. If there is no row of counters, there is nothing to
    /// keep true. `logged`: the record of the redo log that holds the events of this transaction.
    pub(super) fn write(self, conn: &Connection, logged: Option<i64>) -> Result<(), Fault> {
        if self.is_empty() {
            return Ok(());
        }
        let changed = conn
            .prepare_cached(
                "UPDATE defer_counts SET queued = queued + ?1, running = running + ?2,
                 retrying = retrying + ?3, parked = parked + ?4, discarded = discarded + ?5,
                 finished = finished + ?6, events = events + ?7, pruned = pruned + ?8,
                 logged = coalesce(?9, logged)
             WHERE id = 1",
            )?
            .execute(params![
                self.queued,
                self.running,
                self.retrying,
                self.parked,
                self.discarded,
                self.finished,
                self.events,
                self.pruned,
                logged,
            ])?;
        match logged {
            Some(logged) if changed == 0 => set_logged(conn, logged),
            _ => Ok(()),
        }
    }
}

/// Writes down which record of the redo log is in the tables, also where there are no counters yet.
pub(super) fn set_logged(conn: &Connection, logged: i64) -> Result<(), Fault> {
    conn.prepare_cached(
        "INSERT INTO defer_counts VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ?1)
         ON CONFLICT (id) DO UPDATE SET logged = excluded.logged",
    )?
    .execute([logged])?;
    Ok(())
}

/// The last record of the redo log that is in the tables.
pub(super) fn logged(conn: &Connection) -> Result<i64, Fault> {
    let logged = conn
        .prepare_cached("SELECT logged FROM defer_counts WHERE id = 1")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(logged.unwrap_or(0))
}

/// The counters may not agree with the rows any more.
pub(super) fn distrust(conn: &Connection) -> Result<(), Fault> {
    conn.prepare_cached("UPDATE defer_counts SET is_exact = 0")?
        .execute([])?;
    Ok(())
}

/// Takes the write lock of a transaction that may not have it yet: had it read first, SQLite would
/// not wait for another writer, but refuse.
pub(super) fn lock(conn: &Connection) -> Result<(), Fault> {
    conn.prepare_cached("UPDATE defer_counts SET events = events WHERE id = 1")?
        .execute([])?;
    Ok(())
}

/// Counts the rows if there are no counters. Reads every table once.
pub(super) fn recount(conn: &Connection) -> Result<(), Fault> {
    if read(conn)?.is_some() {
        return Ok(());
    }
    let counts = scan(conn)?;
    conn.execute(
        "INSERT OR REPLACE INTO defer_counts
         VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 1, ?10)",
        params![
            counts.queued,
            counts.running,
            counts.retrying,
            counts.parked,
            counts.discarded,
            counts.finished,
            counts.unknown,
            counts.events,
            counts.pruned,
            logged(conn)?,
        ],
    )?;
    Ok(())
}

/// The counters, all but the oldest due time; or the rows, counted.
pub(super) fn counts(conn: &Connection) -> Result<Counts, Fault> {
    match read(conn)? {
        Some(counts) => Ok(counts),
        None => scan(conn),
    }
}

fn read(conn: &Connection) -> Result<Option<Counts>, Fault> {
    let counts = conn
        .prepare_cached(
            "SELECT queued, running, retrying, parked, discarded, finished, unknown, events,
                    pruned
             FROM defer_counts WHERE id = 1 AND is_exact = 1",
        )?
        .query_row([], |row| {
            Ok(Counts {
                queued: row.get(0)?,
                running: row.get(1)?,
                retrying: row.get(2)?,
                parked: row.get(3)?,
                discarded: row.get(4)?,
                finished: row.get(5)?,
                unknown: row.get(6)?,
                events: row.get(7)?,
                pruned: row.get(8)?,
                oldest_due_ms: None,
            })
        })
        .optional()?;
    Ok(counts)
}

fn scan(conn: &Connection) -> Result<Counts, Fault> {
    let count = |sql: &str| {
        conn.prepare_cached(sql)?
            .query_row([], |row| row.get::<_, u64>(0))
    };
    let mut counts = Counts {
        discarded: count("SELECT count(*) FROM defer_dead_letters")?,
        finished: count("SELECT count(*) FROM defer_history")?,
        events: count("SELECT count(*) FROM defer_events")?,
        // This alone cannot be counted.
        pruned: count("SELECT coalesce(max(pruned), 0) FROM defer_counts")?,
        ..Counts::default()
    };
    let mut statement = conn.prepare_cached(
        "SELECT CAST(state AS BLOB), count(*) FROM defer_deliveries GROUP BY state",
    )?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let count: u64 = row.get(1)?;
        let state = std::str::from_utf8(row.get_ref(0)?.as_blob().unwrap_or_default())
            .ok()
            .and_then(State::from_name);
        match state {
            Some(State::Queued) => counts.queued = count,
            Some(State::Running) => counts.running = count,
            Some(State::Retrying) => counts.retrying = count,
            Some(State::Parked) => counts.parked = count,
            Some(State::Discarded) | None => counts.unknown += count,
        }
    }
    Ok(counts)
}
