//! Dead letters and parked deliveries, inside a transaction: list, group, replay, discard, unpark.
//!
//! Not on the hot path: each step takes a limit, so that none holds the writer for long.

use std::sync::Arc;

use rusqlite::{Connection, named_params, params};

use super::desk::Desk;
use super::fault::Fault;
use super::row::{self, Key, LIFE, Table};
use crate::event::store::life::{Fate, Life, State};
use crate::event::store::query::{Cursor, Filter, Group, Listed, Replay};
use crate::event::store::record::EventId;

/// A filter in SQL, over a delivery `d` and its event `e`. Every parameter is named in it, so that
/// one set of parameters fits every statement.
const MATCHES: &str = "(:subscriber IS NULL OR d.subscriber = :subscriber)
    AND (:event_name IS NULL OR e.name = :event_name)
    AND (:reason IS NULL OR d.reason = :reason)
    AND (:error_group IS NULL OR coalesce(d.error_group, '') = :error_group)
    AND (:from_ms IS NULL OR d.changed_ms >= :from_ms)
    AND (:until_ms IS NULL OR d.changed_ms < :until_ms)";

macro_rules! filter_params {
    ($filter:expr, $($name:literal : $value:expr),* $(,)?) => {
        named_params! {
            ":subscriber": $filter.subscriber.as_deref(),
            ":event_name": $filter.event_name.as_deref(),
            ":reason": $filter.reason,
            ":error_group": $filter.error_group,
            ":from_ms": $filter.from_ms,
            ":until_ms": $filter.until_ms,
            $($name: $value),*
        }
    };
}

fn at_most(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub(super) fn list(
    conn: &Connection,
    state: State,
    filter: &Filter,
    after: Option<&Cursor>,
    limit: usize,
) -> Result<Vec<Listed>, Fault> {
    let table = match state {
        State::Discarded => "defer_dead_letters",
        _ => "defer_deliveries",
    };
    let mut statement = conn.prepare_cached(&format!(
        "SELECT {LIFE}, d.event, d.subscriber, coalesce(e.name, ''), coalesce(e.payload, '')
         FROM {table} d LEFT JOIN defer_events e ON e.id = d.event
         WHERE d.state = :state AND (d.event, d.subscriber) > (:event, :after) AND {MATCHES}
         ORDER BY d.event, d.subscriber LIMIT :limit"
    ))?;
    let rows = statement.query_map(
        filter_params! {
            filter,
            ":state": state.as_str(),
            ":event": after.map_or(i64::MIN, |cursor| cursor.event.get()),
            ":after": after.map_or("", |cursor| &*cursor.subscriber),
            ":limit": at_most(limit),
        },
        |row| {
            let life = row::life(row, 0)?;
            Ok(Listed {
                event: EventId::new(row.get(8)?),
                subscriber: row.get(9)?,
                event_name: row.get(10)?,
                payload: text(row, 11),
                state: life.state,
                attempt: life.attempt,
                crashes: life.crashes,
                due_ms: life.due_ms,
                reason: life.reason,
                error: life.error,
                changed_ms: life.changed_ms,
            })
        },
    )?;
    Ok(readable(rows)?)
}

/// A text to look at, also if a flipped byte has made it no text.
fn text(row: &rusqlite::Row<'_>, at: usize) -> String {
    row.get_ref(at)
        .ok()
        .and_then(|value| value.as_bytes().ok())
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .unwrap_or_default()
}

/// The rows that can be read; one that cannot does not hide the others.
fn readable<T>(rows: impl Iterator<Item = rusqlite::Result<T>>) -> rusqlite::Result<Vec<T>> {
    let mut found = Vec::new();
    for row in rows {
        match row {
            Err(error) if error.sqlite_error_code().is_none() => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a row was left out"
                );
            }
            row => found.push(row?),
        }
    }
    Ok(found)
}

pub(super) fn group(conn: &Connection, filter: &Filter, limit: usize) -> Result<Vec<Group>, Fault> {
    let mut statement = conn.prepare_cached(&format!(
        "SELECT d.subscriber, coalesce(d.error_group, ''), count(*), coalesce(min(d.error), ''),
                min(d.changed_ms), max(d.changed_ms)
         FROM defer_dead_letters d LEFT JOIN defer_events e ON e.id = d.event
         WHERE {MATCHES} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT :limit"
    ))?;
    let rows = statement.query_map(filter_params! { filter, ":limit": at_most(limit) }, |row| {
        Ok(Group {
            subscriber: row.get(0)?,
            error_group: row.get(1)?,
            count: row.get(2)?,
            example: row.get(3)?,
            first_ms: row.get(4)?,
            last_ms: row.get(5)?,
        })
    })?;
    Ok(readable(rows)?)
}

/// Takes a page of dead letters or parked deliveries to work on.
fn page(
    conn: &Connection,
    from: &str,
    condition: &str,
    filter: &Filter,
    name: &str,
    limit: usize,
) -> Result<Vec<(Key, Life)>, Fault> {
    let mut statement = conn.prepare_cached(&format!(
        "SELECT {LIFE}, d.event, d.subscriber FROM {from}
         WHERE {condition} AND {MATCHES} ORDER BY d.event, d.subscriber LIMIT :limit"
    ))?;
    let rows = statement.query_map(
        filter_params! { filter, ":name": name, ":limit": at_most(limit) },
        |row| Ok(((row.get(8)?, row.get(9)?), row::life(row, 0)?)),
    )?;
    Ok(readable(rows)?)
}

pub(super) fn replay(desk: &mut Desk, replay: &Replay, now_ms: i64) -> Result<u64, Fault> {
    let (conn, tally) = desk.parts();
    let letters = page(
        conn,
        "defer_dead_letters d JOIN defer_events e ON e.id = d.event",
        "NOT EXISTS (SELECT 1 FROM defer_replays r WHERE r.event = d.event
                     AND r.subscriber = d.subscriber AND r.name = :name)",
        &replay.filter,
        &replay.name,
        replay.limit,
    )?;
    let count = letters.len() as u64;
    for (key, mut life) in letters {
        life.replay(now_ms);
        tally.moved(State::Discarded, life.state);
        row::remove(conn, Table::DeadLetters, &key)?;
        row::insert(conn, Table::Deliveries, &key, &life)?;
        // In the same transaction: this is what makes the replay idempotent across a crash.
        conn.prepare_cached("INSERT INTO defer_replays VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![key.0, key.1, replay.name, now_ms])?;
    }
    Ok(count)
}

pub(super) fn discard(
    desk: &mut Desk,
    filter: &Filter,
    limit: usize,
    now_ms: i64,
) -> Result<u64, Fault> {
    let (conn, tally) = desk.parts();
    let from = "defer_dead_letters d LEFT JOIN defer_events e ON e.id = d.event";
    let letters = page(conn, from, ":name = ''", filter, "", limit)?;
    let count = letters.len() as u64;
    for (key, life) in letters {
        row::remove(conn, Table::DeadLetters, &key)?;
        row::finish(conn, &key, "discarded", life.attempt, now_ms)?;
        tally.finished(State::Discarded);
    }
    Ok(count)
}

pub(super) fn unpark(
    desk: &mut Desk,
    filter: &Filter,
    rename: Option<&Arc<str>>,
    limit: usize,
    now_ms: i64,
) -> Result<u64, Fault> {
    let parked = page(
        desk.conn(),
        "defer_deliveries d LEFT JOIN defer_events e ON e.id = d.event",
        // Without a new name, or under the same one, nothing can be in the way.
        "d.state = 'parked' AND (:name = '' OR :name = d.subscriber OR NOT (
             EXISTS (SELECT 1 FROM defer_deliveries o
                     WHERE o.event = d.event AND o.subscriber = :name)
             OR EXISTS (SELECT 1 FROM defer_dead_letters o
                     WHERE o.event = d.event AND o.subscriber = :name)
             OR EXISTS (SELECT 1 FROM defer_history o
                     WHERE o.event = d.event AND o.subscriber = :name)))",
        filter,
        rename.map_or("", |name| name),
        limit,
    )?;
    let mut count = 0;
    for (old, mut life) in parked {
        desk.skipped.remove(&old);
        life.unpark(now_ms);
        let (conn, tally) = desk.parts();
        let new = (old.0, Arc::clone(rename.unwrap_or(&old.1)));
        if new == old {
            row::put(
                conn,
                tally,
                &old,
                State::Parked,
                &life,
                Fate::Unfinished,
                now_ms,
            )?;
        } else if row::exists(conn, &new)? {
            // Two old names of one event in one page: the second finds the first's new row.
            continue;
        } else {
            row::remove(conn, Table::Deliveries, &old)?;
            row::insert(conn, Table::Deliveries, &new, &life)?;
            tally.moved(State::Parked, life.state);
        }
        count += 1;
    }
    Ok(count)
}
