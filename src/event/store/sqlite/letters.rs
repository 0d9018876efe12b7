//! Dead letters and parked deliveries, inside a transaction: list, group, replay, discard, unpark.
//!
//! Not on the hot path: each step takes a limit, so that none holds the writer for long.

use std::sync::Arc;

use rusqlite::{Connection, ToSql, params};

use super::desk::Desk;
use super::fault::Fault;
use super::row::{self, AFTER_LIFE, Key, LIFE, Table};
use crate::event::store::life::{Fate, Life, State};
use crate::event::store::query::{Cursor, Filter, Group, Listed, Replay};
use crate::event::store::record::EventId;

/// A filter in SQL, over a delivery `d` and its event `e`: only what it asks for, because SQLite
/// uses no index for a condition that might be `NULL`.
struct Matches<'a> {
    sql: String,
    values: Vec<(&'static str, &'a dyn ToSql)>,
}

impl<'a> Matches<'a> {
    fn new(filter: &'a Filter) -> Self {
        let mut matches = Self {
            sql: String::from("1"),
            values: Vec::new(),
        };
        if let Some(subscriber) = &filter.subscriber {
            matches.and("d.subscriber = :subscriber", ":subscriber", subscriber);
        }
        if let Some(name) = &filter.event_name {
            matches.and("e.name = :event_name", ":event_name", name);
        }
        if let Some(reason) = &filter.reason {
            matches.and("d.reason = :reason", ":reason", reason);
        }
        if let Some(group) = &filter.error_group {
            let sql = if group.is_empty() {
                "coalesce(d.error_group, '') = :error_group"
            } else {
                "d.error_group = :error_group"
            };
            matches.and(sql, ":error_group", group);
        }
        if let Some(from) = &filter.from_ms {
            matches.and("d.changed_ms >= :from_ms", ":from_ms", from);
        }
        if let Some(until) = &filter.until_ms {
            matches.and("d.changed_ms < :until_ms", ":until_ms", until);
        }
        matches
    }

    fn and(&mut self, condition: &str, name: &'static str, value: &'a dyn ToSql) {
        self.sql.push_str(" AND ");
        self.sql.push_str(condition);
        self.values.push((name, value));
    }

    /// The values of the filter, and `more`.
    fn values(
        mut self,
        more: &[(&'static str, &'a dyn ToSql)],
    ) -> Vec<(&'static str, &'a dyn ToSql)> {
        self.values.extend_from_slice(more);
        self.values
    }
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
    // The indexes of single states are partial: SQLite uses them for a state that is in the text.
    let table = match state {
        State::Discarded => "defer_dead_letters d",
        State::Running => "defer_deliveries d INDEXED BY defer_deliveries_running",
        State::Parked => "defer_deliveries d INDEXED BY defer_deliveries_parked",
        State::Queued | State::Retrying => "defer_deliveries d",
    };
    let matches = Matches::new(filter);
    let mut statement = conn.prepare_cached(&format!(
        "SELECT {LIFE}, d.event, d.subscriber, coalesce(e.name, ''), coalesce(e.payload, '')
         FROM {table} LEFT JOIN defer_events e ON e.id = d.event
         WHERE d.state = '{state}' AND (d.event, d.subscriber) > (:event, :after) AND {}
         ORDER BY d.event, d.subscriber LIMIT :limit",
        matches.sql
    ))?;
    let rows = statement.query_map(
        &*matches.values(&[
            (
                ":event",
                &after.map_or(i64::MIN, |cursor| cursor.event.get()),
            ),
            (":after", &after.map_or("", |cursor| &*cursor.subscriber)),
            (":limit", &at_most(limit)),
        ]),
        |row| {
            let life = row::life(row, 0)?;
            Ok(Listed {
                event: EventId::new(row.get(AFTER_LIFE)?),
                subscriber: row.get(AFTER_LIFE + 1)?,
                event_name: row.get(AFTER_LIFE + 2)?,
                payload: text(row, AFTER_LIFE + 3),
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
    Ok(count_readable(rows)?.0)
}

/// The same, and how many rows there were in all.
fn count_readable<T>(
    rows: impl Iterator<Item = rusqlite::Result<T>>,
) -> rusqlite::Result<(Vec<T>, usize)> {
    let (mut found, mut seen) = (Vec::new(), 0);
    for row in rows {
        seen += 1;
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
    Ok((found, seen))
}

pub(super) fn group(conn: &Connection, filter: &Filter, limit: usize) -> Result<Vec<Group>, Fault> {
    let matches = Matches::new(filter);
    let join = match filter.event_name {
        Some(_) => "JOIN defer_events e ON e.id = d.event",
        None => "",
    };
    let mut statement = conn.prepare_cached(&format!(
        "SELECT d.subscriber, coalesce(d.error_group, ''), count(*), coalesce(min(d.error), ''),
                min(d.changed_ms), max(d.changed_ms)
         FROM defer_dead_letters d {join}
         WHERE {} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT :limit",
        matches.sql
    ))?;
    let limit = at_most(limit);
    let values = matches.values(&[(":limit", &limit)]);
    let rows = statement.query_map(&*values, |row| {
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

/// Takes a page of dead letters or parked deliveries to work on: `from` has `{}` where the filter's
/// conditions belong. What cannot be read stays where it is.
fn page<'a>(
    conn: &Connection,
    from: &str,
    filter: &'a Filter,
    more: &[(&'static str, &'a dyn ToSql)],
    limit: usize,
) -> Result<Vec<(Key, Life)>, Fault> {
    let matches = Matches::new(filter);
    let from = from.replace("{}", &matches.sql);
    let mut statement = conn.prepare_cached(&format!(
        "SELECT {LIFE}, d.event, d.subscriber FROM {from} LIMIT :limit"
    ))?;
    let mut asked = limit;
    loop {
        let at_most = at_most(asked);
        let mut values: Vec<(&str, &dyn ToSql)> = Matches::new(filter).values(more);
        values.push((":limit", &at_most));
        let rows = statement.query_map(&*values, |row| {
            Ok((
                (row.get(AFTER_LIFE)?, row.get(AFTER_LIFE + 1)?),
                row::life(row, 0)?,
            ))
        })?;
        let (mut found, seen) = count_readable(rows)?;
        // Less than was asked for means that there is no more: rows that cannot be read must not say so.
        if found.len() >= limit || seen < asked {
            found.truncate(limit);
            return Ok(found);
        }
        asked = asked.saturating_mul(2);
    }
}

pub(super) fn replay(desk: &mut Desk, replay: &Replay, now_ms: i64) -> Result<u64, Fault> {
    let (conn, tally) = desk.parts();
    let letters = page(
        conn,
        "defer_dead_letters d JOIN defer_events e ON e.id = d.event
         WHERE {} AND NOT EXISTS (SELECT 1 FROM defer_replays r WHERE r.event = d.event
             AND r.subscriber = d.subscriber AND r.name = :name)
         ORDER BY d.event, d.subscriber",
        &replay.filter,
        &[(":name", &replay.name)],
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
    let from = "defer_dead_letters d LEFT JOIN defer_events e ON e.id = d.event
                WHERE {} ORDER BY d.event, d.subscriber";
    let letters = page(desk.conn(), from, filter, &[], limit)?;
    into_history(desk, Table::DeadLetters, letters, now_ms)
}

pub(super) fn discard_parked(
    desk: &mut Desk,
    filter: &Filter,
    limit: usize,
    now_ms: i64,
) -> Result<u64, Fault> {
    // In the order of the index, as where they are unparked.
    let from = "defer_deliveries d INDEXED BY defer_deliveries_parked
                    LEFT JOIN defer_events e ON e.id = d.event
                WHERE d.state = 'parked' AND {} ORDER BY d.subscriber, d.event";
    let parked = page(desk.conn(), from, filter, &[], limit)?;
    into_history(desk, Table::Deliveries, parked, now_ms)
}

fn into_history(
    desk: &mut Desk,
    table: Table,
    found: Vec<(Key, Life)>,
    now_ms: i64,
) -> Result<u64, Fault> {
    let (conn, tally) = desk.parts();
    let count = found.len() as u64;
    for (key, life) in found {
        row::remove(conn, table, &key)?;
        row::finish(conn, &key, "discarded", life.attempt, now_ms)?;
        tally.finished(life.state);
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
    // In the order of the index, so that a page of many is read without sorting them all. Without a
    // new name, or under the same one, nothing can be in the way.
    let parked = page(
        desk.conn(),
        "defer_deliveries d INDEXED BY defer_deliveries_parked
             LEFT JOIN defer_events e ON e.id = d.event
         WHERE d.state = 'parked' AND {} AND (:name = '' OR :name = d.subscriber OR NOT (
             EXISTS (SELECT 1 FROM defer_deliveries o
                     WHERE o.event = d.event AND o.subscriber = :name)
             OR EXISTS (SELECT 1 FROM defer_dead_letters o
                     WHERE o.event = d.event AND o.subscriber = :name)
             OR EXISTS (SELECT 1 FROM defer_history o
                     WHERE o.event = d.event AND o.subscriber = :name)))
         ORDER BY d.subscriber, d.event",
        filter,
        &[(":name", &rename.map_or("", |name| name))],
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
