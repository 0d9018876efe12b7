//! The append inside a transaction: the batches of a whole group at once.
//!
//! Not durable by itself: the [`worker`](super::worker) commits, and answers only then.
//!
//! Several rows go in with one statement, because starting a statement costs as much as a row.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Statement, ToSql};

use super::fault::Fault;
use super::redo::{Logged, Redo};
use super::schema;
use super::tally::Tally;
use crate::event::store::life::Life;
use crate::event::store::record::{AttemptToken, EventId, NewEvent, Receipt, Start};

/// Rows that go in with one statement. More make the statements longer and save little.
const ROWS: usize = 16;

const EVENT: &str = "INSERT INTO defer_events (id, key, name, recorded_ms, sum, context, payload) \
                     VALUES ";
const EVENT_ROW: &str = "(?,?,?,?,?,?,?)";

/// A new delivery has no crashes, no reason and no error.
const DELIVERY: &str = "INSERT INTO defer_deliveries (event, subscriber, state, due_ms, attempt, \
                        generation, crashes, changed_ms, since_ms) VALUES ";
const DELIVERY_ROW: &str = "(?,?,?,?,?,?,0,?,?)";

/// What goes in: the rows of all batches of a group.
#[derive(Default)]
struct Rows<'a> {
    events: Vec<(i64, &'a NewEvent, i64)>,
    deliveries: Vec<(i64, &'a Arc<str>, Life)>,
    /// The keys among them, which no statement finds yet.
    keys: HashMap<(&'a str, &'a str), EventId>,
}

/// Records batches, each with its time; the receipts are in their order. `may_claim`: whether
/// [`Start::Claimed`] is possible here. `redo`: what is to be durable by the redo log. The transaction
/// must hold the write lock.
pub(super) fn append<'a>(
    conn: &Connection,
    tally: &mut Tally,
    redo: Option<&mut Redo>,
    batches: impl Iterator<Item = (&'a [NewEvent], i64)>,
    may_claim: bool,
) -> Result<Vec<Vec<Receipt>>, Fault> {
    // By the second invariant of the schema, the highest number is there.
    let mut last = last(conn)?;
    let mut rows = Rows::default();
    let mut receipts = Vec::new();
    for (events, now_ms) in batches {
        let mut batch = Vec::with_capacity(events.len());
        for event in events {
            batch.push(match rows.find(conn, event)? {
                Some(first) => Receipt {
                    event: first,
                    duplicate: true,
                    claimed: Vec::new(),
                },
                None => {
                    last += 1;
                    rows.add(last, event, now_ms, may_claim)
                }
            });
        }
        receipts.push(batch);
    }
    rows.write(conn, tally)?;
    if let Some(redo) = redo {
        for (id, event, now_ms) in &rows.events {
            redo.add(*id, event, *now_ms);
        }
    }
    Ok(receipts)
}

/// Records what a power cut has taken from SQLite's log, as it was. Where somebody's `append_in` has
/// given a number away since, the event gets another one, that no other of them had; where its key is
/// known, it is there already.
pub(super) fn append_again(
    conn: &Connection,
    tally: &mut Tally,
    lost: &[Logged],
) -> Result<(), Fault> {
    let taken = last(conn)?;
    let mut last = lost.iter().map(|it| it.id).fold(taken, i64::max);
    let mut rows = Rows::default();
    for logged in lost {
        if rows.find(conn, &logged.event)?.is_none() {
            let mut id = logged.id;
            if id <= taken {
                last += 1;
                id = last;
            }
            rows.add(id, &logged.event, logged.recorded_ms, true);
        }
    }
    rows.write(conn, tally)
}

fn last(conn: &Connection) -> Result<i64, Fault> {
    let last: Option<i64> = conn
        .prepare_cached("SELECT max(id) FROM defer_events")?
        .query_row([], |row| row.get(0))?;
    Ok(last.unwrap_or(0))
}

impl<'a> Rows<'a> {
    /// The event that has this one's key already.
    fn find(&self, conn: &Connection, event: &NewEvent) -> Result<Option<EventId>, Fault> {
        let Some(key) = &event.key else {
            return Ok(None);
        };
        if let Some(first) = self.keys.get(&(&*event.name, &**key)) {
            return Ok(Some(*first));
        }
        let first = conn
            .prepare_cached("SELECT id FROM defer_events WHERE key = ?1 AND name = ?2")?
            .query_row([key, &*event.name], |row| row.get(0))
            .optional()?;
        Ok(first.map(EventId::new))
    }

    fn add(&mut self, id: i64, event: &'a NewEvent, now_ms: i64, may_claim: bool) -> Receipt {
        let number = EventId::new(id);
        let mut claimed = Vec::new();
        for delivery in &event.deliveries {
            let mut life = match delivery.start {
                Start::At(due_ms) => Life::queued(due_ms, now_ms),
                Start::Claimed => Life::queued(now_ms, now_ms),
            };
            if delivery.start == Start::Claimed && may_claim {
                life.start(now_ms);
                let subscriber = Arc::clone(&delivery.subscriber);
                claimed.push(AttemptToken::new(number, subscriber, life.generation));
            }
            self.deliveries.push((id, &delivery.subscriber, life));
        }
        if let Some(key) = &event.key {
            self.keys.insert((&event.name, key), number);
        }
        self.events.push((id, event, now_ms));
        Receipt {
            event: number,
            duplicate: false,
            claimed,
        }
    }

    fn write(&self, conn: &Connection, tally: &mut Tally) -> Result<(), Fault> {
        insert(conn, EVENT, EVENT_ROW, &self.events, |row, bind| {
            let (id, event, now_ms) = row;
            let context = event.context.as_deref();
            let sum = schema::sum(&event.name, &event.payload, context);
            bind(id)?;
            bind(&event.key)?;
            bind(&event.name)?;
            bind(now_ms)?;
            bind(&sum)?;
            bind(&context)?;
            bind(&event.payload)
        })?;
        insert(
            conn,
            DELIVERY,
            DELIVERY_ROW,
            &self.deliveries,
            |row, bind| {
                let (id, subscriber, life) = row;
                bind(id)?;
                bind(subscriber)?;
                bind(&life.state.as_str())?;
                bind(&life.due_ms)?;
                bind(&life.attempt)?;
                bind(&life.generation)?;
                bind(&life.changed_ms)?;
                bind(&life.since_ms)
            },
        )?;
        tally.recorded(self.events.len());
        for (_, _, life) in &self.deliveries {
            tally.add(life.state);
        }
        Ok(())
    }
}

/// Binds the next value of a statement.
type Bind<'a> = dyn FnMut(&dyn ToSql) -> rusqlite::Result<()> + 'a;

/// Inserts rows, [`ROWS`] at a time as long as there are so many.
fn insert<T>(
    conn: &Connection,
    head: &str,
    row: &str,
    rows: &[T],
    values: impl Fn(&T, &mut Bind<'_>) -> rusqlite::Result<()>,
) -> Result<(), Fault> {
    let run = |statement: &mut Statement<'_>, rows: &[T]| -> rusqlite::Result<()> {
        let mut index = 0;
        for row in rows {
            values(row, &mut |value| {
                index += 1;
                statement.raw_bind_parameter(index, value)
            })?;
        }
        statement.raw_execute().map(drop)
    };
    let many = rows.chunks_exact(ROWS);
    let single = many.remainder();
    if many.len() > 0 {
        let list = vec![row; ROWS].join(",");
        let mut statement = conn.prepare_cached(&format!("{head}{list}"))?;
        for rows in many {
            run(&mut statement, rows)?;
        }
    }
    if !single.is_empty() {
        let mut statement = conn.prepare_cached(&format!("{head}{row}"))?;
        for row in single.chunks(1) {
            run(&mut statement, row)?;
        }
    }
    Ok(())
}
