//! Walks over the recorded events, a bounded step at a time: past events for a new subscriber,
//! pruning, counting.
//!
//! Not by an index: such walks are rare, an index would cost every append.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension};

use super::desk::Desk;
use super::fault::Fault;
use super::row::{self, Table};
use super::tally;
use crate::event::store::contract::may_prune;
use crate::event::store::life::{Life, State};
use crate::event::store::query::{AddPast, Counts, Prune, Pruned, Walked};
use crate::event::store::record::EventId;

/// One event on the way: its number, name and time. The name is bytes, because a damaged one must
/// not stop the walk.
type Step = (i64, Vec<u8>, i64);

/// No step looks at more events than this: some milliseconds, so that appends go between two steps.
const STEP: usize = 500;

fn steps(
    conn: &Connection,
    after: Option<EventId>,
    limit: usize,
) -> Result<(Vec<Step>, Option<EventId>), Fault> {
    let limit = limit.min(STEP);
    let steps: Vec<Step> = conn
        .prepare_cached(
            "SELECT id, CAST(name AS BLOB), CAST(recorded_ms AS INTEGER) FROM defer_events
             WHERE id > ?1 ORDER BY id LIMIT ?2",
        )?
        .query_map(
            (
                after.map_or(i64::MIN, EventId::get),
                i64::try_from(limit).unwrap_or(i64::MAX),
            ),
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )?
        .collect::<Result<_, _>>()?;
    let next = steps
        .last()
        .filter(|_| steps.len() == limit)
        .map(|step| EventId::new(step.0));
    Ok((steps, next))
}

pub(super) fn add_past(desk: &mut Desk, past: &AddPast, now_ms: i64) -> Result<Walked, Fault> {
    let (conn, tally) = desk.parts();
    let (steps, next) = steps(conn, past.after, past.limit)?;
    let mut added = 0;
    for (id, name, recorded_ms) in steps {
        if *name != *past.event_name.as_bytes() || recorded_ms < past.since_ms {
            continue;
        }
        let mut known = false;
        for alias in &past.aliases {
            known |= row::exists(conn, &(id, Arc::clone(alias)))?;
        }
        let key = (id, Arc::clone(&past.subscriber));
        if !known && !row::exists(conn, &key)? {
            row::insert(conn, Table::Deliveries, &key, &Life::queued(now_ms, now_ms))?;
            tally.add(State::Queued);
            added += 1;
        }
    }
    Ok(Walked { added, next })
}

pub(super) fn prune(desk: &mut Desk, policy: &Prune) -> Result<Pruned, Fault> {
    let (conn, tally) = desk.parts();
    let (steps, next) = steps(conn, policy.after, policy.limit)?;
    let newest: Option<i64> =
        conn.query_row("SELECT max(id) FROM defer_events", [], |row| row.get(0))?;
    let newest = EventId::new(newest.unwrap_or(0));
    let mut pruned = Pruned {
        events: 0,
        deliveries: 0,
        next,
    };
    let mut needed = conn.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM defer_deliveries WHERE event = ?1)
             OR EXISTS (SELECT 1 FROM defer_dead_letters WHERE event = ?1)",
    )?;
    for (id, _, recorded_ms) in steps {
        if !may_prune(policy, EventId::new(id), recorded_ms, newest)
            || needed.query_row([id], |row| row.get(0))?
        {
            continue;
        }
        let finished = conn
            .prepare_cached("DELETE FROM defer_history WHERE event = ?1")?
            .execute([id])?;
        conn.prepare_cached("DELETE FROM defer_replays WHERE event = ?1")?
            .execute([id])?;
        conn.prepare_cached("DELETE FROM defer_events WHERE id = ?1")?
            .execute([id])?;
        pruned.events += 1;
        pruned.deliveries += finished as u64;
        tally.pruned(finished);
    }
    Ok(pruned)
}

pub(super) fn counts(conn: &Connection) -> Result<Counts, Fault> {
    Ok(Counts {
        oldest_due_ms: next_due(conn)?,
        ..tally::counts(conn)?
    })
}

pub(super) fn next_due(conn: &Connection) -> Result<Option<i64>, Fault> {
    let due = conn
        .prepare_cached(
            "SELECT due_ms FROM defer_deliveries INDEXED BY defer_deliveries_due
             WHERE due_ms IS NOT NULL ORDER BY due_ms LIMIT 1",
        )?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(due)
}
