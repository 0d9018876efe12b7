//! The tables, for us, for `append_in`, and for people with the `sqlite3` shell.
//!
//! Not a hidden format: states are words, times are unix milliseconds, payloads are JSON text.
//! All names begin with `defer_`, because the file may be the user's own database; for the same
//! reason the version is a row of `defer_meta` and not the file's `user_version`.
//!
//! | table | holds | leaves when |
//! | --- | --- | --- |
//! | `defer_events` | what happened, once | pruned by a policy, when nothing needs it |
//! | `defer_deliveries` | the unfinished deliveries, and only these: the hot table | completed → history, discarded → dead letters |
//! | `defer_dead_letters` | discarded deliveries | replayed → deliveries, discarded by a person → history |
//! | `defer_history` | which subscriber has had which event, and how that ended | pruned with its event |
//! | `defer_replays` | which replay has replayed what | pruned with its event |
//! | `defer_counts` | one row: how many there are of each state, kept in the same transactions | never |
//! | `defer_meta` | `schema`: the version of these tables; `probed_ms`: when it was last tried whether a write is possible; `epoch`: whose records in the redo log count | never |
//!
//! Columns that need a word:
//!
//! - `defer_events.sum`: a checksum of name, payload and context (FNV-1a, 64 bits), by which a
//!   flipped byte is found. `NULL` is not checked: set it so when you repair a payload by hand.
//! - `due_ms`: set while a delivery waits, `NULL` while it runs or is parked. The partial index
//!   on it is what a claim reads, so what is not due costs nothing.
//! - `generation`: how often the delivery was claimed; it is the attempt token.
//! - `since_ms`: when the first attempt began; `Retry::give_up_after` counts from there.
//! - `error_group`: the error with numbers and ids blanked.
//! - `defer_counts`: set `is_exact = 0` when you have changed states or rows by hand; the next open
//!   counts them again, and until then every count reads the tables. `pruned` is how many events
//!   ever were; `logged` the last record of the redo log (`redo`) whose events are in the tables.
//! - `defer_events.payload` is the last column, so that a walk over the others need not read it.
//! - `state`: its check is a chain of `OR`, because SQLite builds a temporary table for `IN` with
//!   more than two values, at every insert: that was four fifths of an append's instructions.
//!
//! Useful in the shell, also beside a running server:
//!
//! ```sql
//! SELECT * FROM defer_counts;
//! SELECT subscriber, error_group, count(*) FROM defer_dead_letters GROUP BY 1, 2 ORDER BY 3 DESC;
//! SELECT d.*, e.payload FROM defer_dead_letters d JOIN defer_events e ON e.id = d.event;
//! ```
//!
//! Invariants:
//!
//! 1. A pair of event and subscriber is in exactly one of deliveries, dead letters and history.
//! 2. The event with the highest number is never pruned, so no number is given twice.
//! 3. `due_ms IS NOT NULL` exactly if the state is `queued` or `retrying`.

use rusqlite::{Connection, OptionalExtension};

use super::fault::Fault;
use super::tally;
use crate::event::store::StoreError;

/// One step for each version; the version is the number of steps taken. Steps are only ever
/// added.
const STEPS: &[&str] = &[
    "
    CREATE TABLE defer_events (
        id          INTEGER PRIMARY KEY,
        key         TEXT,
        name        TEXT NOT NULL,
        recorded_ms INTEGER NOT NULL,
        sum         INTEGER,
        context     TEXT,
        payload     TEXT NOT NULL
    );
    CREATE UNIQUE INDEX defer_events_key ON defer_events (key, name) WHERE key IS NOT NULL;

    CREATE TABLE defer_deliveries (
        event       INTEGER NOT NULL,
        subscriber  TEXT NOT NULL,
        state       TEXT NOT NULL CHECK (state = 'queued' OR state = 'running'
                                      OR state = 'retrying' OR state = 'parked'),
        due_ms      INTEGER,
        attempt     INTEGER NOT NULL,
        generation  INTEGER NOT NULL,
        crashes     INTEGER NOT NULL,
        reason      TEXT,
        error       TEXT,
        error_group TEXT,
        changed_ms  INTEGER NOT NULL,
        PRIMARY KEY (event, subscriber)
    ) WITHOUT ROWID;
    CREATE INDEX defer_deliveries_due ON defer_deliveries (due_ms) WHERE due_ms IS NOT NULL;
    CREATE INDEX defer_deliveries_running ON defer_deliveries (event) WHERE state = 'running';
    CREATE INDEX defer_deliveries_parked ON defer_deliveries (subscriber) WHERE state = 'parked';

    CREATE TABLE defer_dead_letters (
        event       INTEGER NOT NULL,
        subscriber  TEXT NOT NULL,
        state       TEXT NOT NULL,
        due_ms      INTEGER,
        attempt     INTEGER NOT NULL,
        generation  INTEGER NOT NULL,
        crashes     INTEGER NOT NULL,
        reason      TEXT,
        error       TEXT,
        error_group TEXT,
        changed_ms  INTEGER NOT NULL,
        PRIMARY KEY (event, subscriber)
    ) WITHOUT ROWID;
    CREATE INDEX defer_dead_letters_group ON defer_dead_letters (subscriber, error_group);

    CREATE TABLE defer_history (
        event       INTEGER NOT NULL,
        subscriber  TEXT NOT NULL,
        outcome     TEXT NOT NULL,
        attempt     INTEGER NOT NULL,
        finished_ms INTEGER NOT NULL,
        PRIMARY KEY (event, subscriber)
    ) WITHOUT ROWID;

    CREATE TABLE defer_replays (
        event       INTEGER NOT NULL,
        subscriber  TEXT NOT NULL,
        name        TEXT NOT NULL,
        replayed_ms INTEGER NOT NULL,
        PRIMARY KEY (event, subscriber, name)
    ) WITHOUT ROWID;
",
    "
    CREATE TABLE defer_counts (
        id          INTEGER PRIMARY KEY CHECK (id = 1),
        queued      INTEGER NOT NULL,
        running     INTEGER NOT NULL,
        retrying    INTEGER NOT NULL,
        parked      INTEGER NOT NULL,
        discarded   INTEGER NOT NULL,
        finished    INTEGER NOT NULL,
        unknown     INTEGER NOT NULL,
        events      INTEGER NOT NULL,
        pruned      INTEGER NOT NULL,
        is_exact    INTEGER NOT NULL
    );
    CREATE INDEX defer_dead_letters_subscriber ON defer_dead_letters (subscriber);
",
    "
    ALTER TABLE defer_deliveries ADD COLUMN since_ms INTEGER;
    ALTER TABLE defer_dead_letters ADD COLUMN since_ms INTEGER;
",
    "
    ALTER TABLE defer_counts ADD COLUMN logged INTEGER NOT NULL DEFAULT 0;
",
];

/// Writes a row that says nothing, to see whether that is possible.
pub(super) fn probe(conn: &Connection, now_ms: i64) -> Result<(), Fault> {
    conn.prepare_cached("INSERT OR REPLACE INTO defer_meta VALUES ('probed_ms', ?1)")?
        .execute([now_ms])?;
    Ok(())
}

/// Whose records in the redo log count.
pub(super) fn epoch(conn: &Connection) -> Result<Option<i64>, Fault> {
    let epoch = conn
        .prepare_cached("SELECT value FROM defer_meta WHERE key = 'epoch'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(epoch)
}

/// Draws a new epoch: no number that was ever drawn for this file or a copy of it.
pub(super) fn new_epoch(conn: &Connection) -> Result<i64, Fault> {
    conn.prepare_cached("INSERT OR REPLACE INTO defer_meta VALUES ('epoch', random())")?
        .execute([])?;
    tally::set_logged(conn, 0)?;
    Ok(epoch(conn)?.unwrap_or_default())
}

/// Brings the tables to the present version, or refuses a newer one. Runs inside the caller's
/// transaction, so that a crash leaves the old version whole.
pub(super) fn migrate(conn: &Connection) -> Result<(), Fault> {
    conn.execute_batch(
        "CREATE TABLE IF NOT EXISTS defer_meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    )?;
    let (found, known) = (version(conn)?, known());
    if found > known {
        return Err(Fault::Own(StoreError::schema(found, known)));
    }
    for step in STEPS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        conn.execute_batch(step)?;
    }
    if found < known {
        conn.execute(
            "INSERT OR REPLACE INTO defer_meta VALUES ('schema', ?1)",
            [known],
        )?;
    }
    Ok(())
}

/// Refuses every version but the present one, and changes nothing. The tables must be there.
pub(super) fn expect(conn: &Connection) -> Result<(), Fault> {
    let (found, known) = (version(conn)?, known());
    if found == known {
        return Ok(());
    }
    Err(Fault::Own(StoreError::schema(found, known)))
}

fn known() -> i64 {
    i64::try_from(STEPS.len()).unwrap_or(i64::MAX)
}

fn version(conn: &Connection) -> Result<i64, Fault> {
    let found = conn
        .prepare_cached("SELECT value FROM defer_meta WHERE key = 'schema'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(found.unwrap_or(0))
}

/// The checksum of an event's texts: FNV-1a, because it needs no table, no dependency, and is
/// written down in one line for whoever repairs a file. It finds accidents, not forgeries.
pub(super) fn sum(name: &str, payload: &str, context: Option<&str>) -> i64 {
    let context = context.unwrap_or_default();
    hash(&[name.as_bytes(), payload.as_bytes(), context.as_bytes()])
}

/// FNV-1a.
pub(super) fn hash(texts: &[&[u8]]) -> i64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for text in texts {
        // A byte that no UTF-8 text contains stands between them.
        for byte in text.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    i64::from_ne_bytes(hash.to_ne_bytes())
}
