//! Between rows and a delivery's life: the only file that names these columns one by one.
//!
//! Not a mapper of anything else, and no decisions: those are [`Life`]'s.

use std::sync::Arc;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::fault::Fault;
use super::schema;
use super::tally::Tally;
use crate::event::store::grouping::error_group;
use crate::event::store::life::{Fate, Life, State};
use crate::event::store::record::{EventId, StoredEvent};

/// A delivery is known by its event and its subscriber.
pub(super) type Key = (i64, Arc<str>);

/// The two tables that hold whole lives; they have the same columns.
#[derive(Clone, Copy, Debug)]
pub(super) enum Table {
    Deliveries,
    DeadLetters,
}

/// The columns of a life, in the order in which [`life`] reads them.
pub(super) const LIFE: &str = "d.state, d.due_ms, d.attempt, d.generation, d.crashes, d.reason, d.error, d.changed_ms, \
     d.since_ms";

/// The first column after those of [`LIFE`].
pub(super) const AFTER_LIFE: usize = 9;

/// Reads a life from nine columns that begin at `at`.
pub(super) fn life(row: &Row<'_>, at: usize) -> rusqlite::Result<Life> {
    let name = row.get_ref(at)?.as_str()?;
    let state = State::from_name(name).ok_or_else(|| {
        let error = format!("{name:?} is no state").into();
        rusqlite::Error::FromSqlConversionFailure(at, Type::Text, error)
    })?;
    Ok(Life {
        state,
        due_ms: row.get(at + 1)?,
        attempt: row.get(at + 2)?,
        generation: row.get(at + 3)?,
        crashes: row.get(at + 4)?,
        reason: row.get(at + 5)?,
        error: row.get(at + 6)?,
        changed_ms: row.get(at + 7)?,
        since_ms: row.get(at + 8)?,
    })
}

/// The unfinished delivery with this key.
pub(super) fn find(conn: &Connection, key: &Key) -> Result<Option<Life>, Fault> {
    let mut statement = conn.prepare_cached(
        "SELECT d.state, d.due_ms, d.attempt, d.generation, d.crashes, d.reason, d.error,
                d.changed_ms, d.since_ms
         FROM defer_deliveries d WHERE d.event = ?1 AND d.subscriber = ?2",
    )?;
    Ok(statement
        .query_row(params![key.0, key.1], |row| life(row, 0))
        .optional()?)
}

/// Whether this pair of event and subscriber is known at all, in whatever state.
pub(super) fn exists(conn: &Connection, key: &Key) -> Result<bool, Fault> {
    let mut statement = conn.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM defer_deliveries WHERE event = ?1 AND subscriber = ?2)
             OR EXISTS (SELECT 1 FROM defer_dead_letters WHERE event = ?1 AND subscriber = ?2)
             OR EXISTS (SELECT 1 FROM defer_history WHERE event = ?1 AND subscriber = ?2)",
    )?;
    Ok(statement.query_row(params![key.0, key.1], |row| row.get(0))?)
}

/// Writes a new row.
pub(super) fn insert(conn: &Connection, table: Table, key: &Key, life: &Life) -> Result<(), Fault> {
    let sql = match table {
        Table::Deliveries => {
            "INSERT INTO defer_deliveries VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)"
        }
        Table::DeadLetters => {
            "INSERT INTO defer_dead_letters VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)"
        }
    };
    conn.prepare_cached(sql)?.execute(params![
        key.0,
        key.1,
        life.state.as_str(),
        life.due_ms,
        life.attempt,
        life.generation,
        life.crashes,
        life.reason,
        life.error,
        life.error.as_deref().map(error_group),
        life.changed_ms,
        life.since_ms,
    ])?;
    Ok(())
}

/// Removes a row; whether it was there.
pub(super) fn remove(conn: &Connection, table: Table, key: &Key) -> Result<bool, Fault> {
    let sql = match table {
        Table::Deliveries => "DELETE FROM defer_deliveries WHERE event = ?1 AND subscriber = ?2",
        Table::DeadLetters => "DELETE FROM defer_dead_letters WHERE event = ?1 AND subscriber = ?2",
    };
    Ok(conn.prepare_cached(sql)?.execute(params![key.0, key.1])? > 0)
}

/// Writes that a delivery is finished.
pub(super) fn finish(
    conn: &Connection,
    key: &Key,
    outcome: &str,
    attempt: u32,
    now_ms: i64,
) -> Result<(), Fault> {
    conn.prepare_cached("INSERT OR REPLACE INTO defer_history VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![key.0, key.1, outcome, attempt, now_ms])?;
    Ok(())
}

/// Writes what a decision has made of an unfinished delivery that was in state `from`, where it
/// belongs.
pub(super) fn put(
    conn: &Connection,
    tally: &mut Tally,
    key: &Key,
    from: State,
    life: &Life,
    fate: Fate,
    now_ms: i64,
) -> Result<(), Fault> {
    match fate {
        Fate::Unfinished | Fate::Dead => tally.moved(from, life.state),
        Fate::Finished => tally.finished(from),
    }
    match fate {
        Fate::Unfinished => {
            conn.prepare_cached(
                "UPDATE defer_deliveries SET state = ?3, due_ms = ?4, attempt = ?5,
                     generation = ?6, crashes = ?7, reason = ?8, error = ?9, error_group = ?10,
                     changed_ms = ?11, since_ms = ?12
                 WHERE event = ?1 AND subscriber = ?2",
            )?
            .execute(params![
                key.0,
                key.1,
                life.state.as_str(),
                life.due_ms,
                life.attempt,
                life.generation,
                life.crashes,
                life.reason,
                life.error,
                life.error.as_deref().map(error_group),
                life.changed_ms,
                life.since_ms,
            ])?;
        }
        Fate::Dead => {
            remove(conn, Table::Deliveries, key)?;
            insert(conn, Table::DeadLetters, key, life)?;
        }
        Fate::Finished => {
            remove(conn, Table::Deliveries, key)?;
            finish(conn, key, "completed", life.attempt, now_ms)?;
        }
    }
    Ok(())
}

/// Reads an event; the flag says whether its checksum holds.
pub(super) fn event(conn: &Connection, id: i64) -> Result<Option<(StoredEvent, bool)>, Fault> {
    let mut statement = conn.prepare_cached(
        "SELECT key, name, payload, context, recorded_ms, sum FROM defer_events WHERE id = ?1",
    )?;
    let found = statement
        .query_row([id], |row| {
            let event = StoredEvent {
                id: EventId::new(id),
                key: row.get(0)?,
                name: row.get(1)?,
                payload: row.get(2)?,
                context: row.get(3)?,
                recorded_ms: row.get(4)?,
            };
            let sum: Option<i64> = row.get(5)?;
            let context = event.context.as_deref();
            let holds = sum.is_none_or(|s| s == schema::sum(&event.name, &event.payload, context));
            Ok((event, holds))
        })
        .optional()?;
    Ok(found)
}
