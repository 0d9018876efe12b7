//! The hot path inside a transaction: claim, settle, and recovery at open.
//!
//! Not durable by itself: the [`worker`](super::worker) commits, and answers only then.
//!
//! Invariants:
//!
//! 1. A row that cannot be trusted is set aside (parked as [`DAMAGED`], reported in the health)
//!    and nothing is deleted; the rows around it go on.
//! 2. What is on a damaged page is set aside in a transaction of its own, and skipped for the life
//!    of the process if that fails too.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::params;

use super::desk::Desk;
use super::fault::Fault;
use super::row::{self, Key, Table};
use super::tally;
use crate::event::store::life::{CRASH_LIMIT, DAMAGED, Fate, Life, Settle, State};
use crate::event::store::record::{AttemptToken, Claimed, EventId, Settled, StoredEvent};

/// Claims what is due.
pub(super) fn claim(desk: &mut Desk, limit: usize, now_ms: i64) -> Result<Vec<Claimed>, Fault> {
    let mut claimed = Vec::new();
    let mut events = HashMap::new();
    for (due_ms, key) in due(desk, limit, now_ms)? {
        if claimed.len() == limit {
            break;
        }
        match claim_one(desk, &mut events, &key, due_ms, now_ms, claimed.is_empty()) {
            Ok(Found::Claimed(claim)) => claimed.push(claim),
            Ok(Found::Suspect(claim)) => {
                claimed.extend(claim);
                break;
            }
            Ok(Found::Damaged(damage)) => set_aside(desk, key, damage, now_ms)?,
            Err(fault) if fault.is_damage() => set_aside_unread(desk, key, fault, now_ms)?,
            Err(fault) => return Err(fault),
        }
    }
    Ok(claimed)
}

/// The first due deliveries, by what the index says: it holds all three columns, so that a row is
/// first touched where its damage can be dealt with.
fn due(desk: &Desk, limit: usize, now_ms: i64) -> Result<Vec<(i64, Key)>, Fault> {
    let most = i64::try_from(limit.saturating_add(desk.skipped.len())).unwrap_or(i64::MAX);
    let mut statement = desk.conn().prepare_cached(
        "SELECT due_ms, event, subscriber
         FROM defer_deliveries INDEXED BY defer_deliveries_due
         WHERE due_ms <= ?1 ORDER BY due_ms, event, subscriber LIMIT ?2",
    )?;
    let rows = statement.query_map([now_ms, most], |row| {
        Ok((row.get(0)?, (row.get(1)?, row.get(2)?)))
    })?;
    let mut due = Vec::new();
    for row in rows {
        let (due_ms, key): (i64, Key) = row?;
        if desk.skipped.is_empty() || !desk.skipped.contains(&key) {
            due.push((due_ms, key));
        }
    }
    Ok(due)
}

/// What a claim finds where the index says that a delivery is due.
enum Found {
    Claimed(Claimed),
    /// It ends the claim: it is claimed alone, if it is the first.
    Suspect(Option<Claimed>),
    Damaged(&'static str),
}

/// Claims one delivery.
fn claim_one(
    desk: &mut Desk,
    events: &mut HashMap<i64, Arc<StoredEvent>>,
    key: &Key,
    due_ms: i64,
    now_ms: i64,
    is_first: bool,
) -> Result<Found, Fault> {
    let (conn, tally) = desk.parts();
    let Some(mut life) = row::find(conn, key)? else {
        return Ok(Found::Damaged(
            "the index names a delivery that is not there",
        ));
    };
    if life.due_ms != Some(due_ms) || !matches!(life.state, State::Queued | State::Retrying) {
        return Ok(Found::Damaged("the index and the row disagree"));
    }
    let is_suspect = life.is_suspect();
    if is_suspect && !is_first {
        return Ok(Found::Suspect(None));
    }
    let event = match events.get(&key.0) {
        Some(event) => Arc::clone(event),
        None => match row::event(conn, key.0)? {
            Some((event, true)) => {
                let event = Arc::new(event);
                events.insert(key.0, Arc::clone(&event));
                event
            }
            Some((_, false)) => return Ok(Found::Damaged("the event's checksum does not hold")),
            None => return Ok(Found::Damaged("the event is not there")),
        },
    };
    tally.moved(life.state, State::Running);
    life.start(now_ms);
    conn.prepare_cached(
        "UPDATE defer_deliveries SET state = 'running', due_ms = NULL, attempt = ?3,
             generation = ?4, changed_ms = ?5, since_ms = ?6
         WHERE event = ?1 AND subscriber = ?2",
    )?
    .execute(params![
        key.0,
        key.1,
        life.attempt,
        life.generation,
        life.changed_ms,
        life.since_ms
    ])?;
    let claimed = Claimed {
        token: AttemptToken::new(EventId::new(key.0), Arc::clone(&key.1), life.generation),
        attempt: life.attempt,
        crashes: life.crashes,
        due_ms,
        since_ms: life.since_ms.unwrap_or(now_ms),
        last_error: life.error,
        event,
    };
    Ok(if is_suspect {
        Found::Suspect(Some(claimed))
    } else {
        Found::Claimed(claimed)
    })
}

/// Sets a delivery aside that cannot be trusted (invariant 1).
pub(super) fn set_aside(desk: &mut Desk, key: Key, damage: &str, now_ms: i64) -> Result<(), Fault> {
    desk.conn()
        .prepare_cached(
            "UPDATE defer_deliveries SET state = 'parked', due_ms = NULL, reason = ?3, error = ?4,
                 error_group = ?4, changed_ms = ?5
             WHERE event = ?1 AND subscriber = ?2",
        )?
        .execute(params![key.0, key.1, DAMAGED, damage, now_ms])?;
    // In which state it was, it does not say.
    tally::distrust(desk.conn())?;
    desk.report_damage(&key, damage);
    desk.skip(key);
    Ok(())
}

/// The same for a row that could not be read. If the page under it is damaged, SQLite lets this
/// transaction write no more: it is rolled back, the delivery set aside in one of its own, and
/// begun again (invariant 2).
fn set_aside_unread(desk: &mut Desk, key: Key, fault: Fault, now_ms: i64) -> Result<(), Fault> {
    let damage = match &fault {
        Fault::Sql(error) => format!("the row cannot be read: {error}"),
        Fault::Own(error) => error.to_string(),
    };
    if fault.dooms_the_transaction() {
        desk.set_aside_later(key, damage);
        return Err(fault);
    }
    set_aside(desk, key, &damage, now_ms)
}

/// Settles attempts.
pub(super) fn settle(
    desk: &mut Desk,
    settles: &[(AttemptToken, Settle)],
    now_ms: i64,
) -> Result<Vec<Settled>, Fault> {
    let mut settled = Vec::with_capacity(settles.len());
    for (token, settle) in settles {
        let key = (token.event().get(), Arc::clone(token.subscriber()));
        if desk.skipped.contains(&key) {
            settled.push(Settled::Stale);
            continue;
        }
        let result = match settle {
            Settle::Complete => complete(desk, token, &key, now_ms),
            settle => settle_one(desk, token, &key, settle, now_ms),
        };
        settled.push(match result {
            Err(fault) if fault.is_damage() => {
                set_aside_unread(desk, key, fault, now_ms)?;
                Settled::Stale
            }
            result => result?,
        });
    }
    Ok(settled)
}

/// The commonest end, without reading the row first; the same decision as [`Life::settle`] makes.
/// Not with `RETURNING`, for which SQLite builds a temporary table each time.
fn complete(
    desk: &mut Desk,
    token: &AttemptToken,
    key: &Key,
    now_ms: i64,
) -> Result<Settled, Fault> {
    let (conn, tally) = desk.parts();
    let found = conn
        .prepare_cached(
            "INSERT OR REPLACE INTO defer_history SELECT event, subscriber, 'completed', attempt, ?4
             FROM defer_deliveries
             WHERE event = ?1 AND subscriber = ?2 AND generation = ?3 AND state = 'running'",
        )?
        .execute(params![key.0, key.1, token.generation(), now_ms])?;
    if found == 0 {
        return Ok(Settled::Stale);
    }
    row::remove(conn, Table::Deliveries, key)?;
    tally.finished(State::Running);
    Ok(Settled::Applied)
}

fn settle_one(
    desk: &mut Desk,
    token: &AttemptToken,
    key: &Key,
    settle: &Settle,
    now_ms: i64,
) -> Result<Settled, Fault> {
    match row::find(desk.conn(), key)? {
        Some(mut life) if life.is_held_by(token.generation()) => {
            let fate = life.settle(settle, now_ms);
            let (conn, tally) = desk.parts();
            row::put(conn, tally, key, State::Running, &life, fate, now_ms)?;
            Ok(Settled::Applied)
        }
        _ => Ok(Settled::Stale),
    }
}

/// What was running when the last process died is due again, or dead if that was once too often.
pub(super) fn recover(desk: &mut Desk) -> Result<(), Fault> {
    change_running(desk, |life| life.recover(CRASH_LIMIT))
}

/// What is still running when the store closes in order is due again, unconsumed.
pub(super) fn hand_back(desk: &mut Desk) -> Result<(), Fault> {
    change_running(desk, |life| {
        life.hand_back(life.changed_ms);
        Fate::Unfinished
    })
}

fn change_running(desk: &mut Desk, mut decide: impl FnMut(&mut Life) -> Fate) -> Result<(), Fault> {
    let running: Vec<Key> = desk
        .conn()
        .prepare(
            "SELECT event, subscriber FROM defer_deliveries INDEXED BY defer_deliveries_running
             WHERE state = 'running'",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    for key in running {
        if desk.skipped.contains(&key) {
            continue;
        }
        let found = row::find(desk.conn(), &key);
        let result = match found {
            Ok(Some(mut life)) if life.state == State::Running => {
                let fate = decide(&mut life);
                let now_ms = life.changed_ms;
                let (conn, tally) = desk.parts();
                row::put(conn, tally, &key, State::Running, &life, fate, now_ms)
            }
            Ok(_) => Ok(()),
            Err(fault) => Err(fault),
        };
        match result {
            Err(fault) if fault.is_damage() => set_aside_unread(desk, key, fault, 0)?,
            result => result?,
        }
    }
    Ok(())
}
