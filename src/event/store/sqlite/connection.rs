//! How a connection is set up, and why so.
//!
//! Not a pool: one connection writes, one reads.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::fault::Fault;

/// How long SQLite waits for a foreign lock before we report it and wait on.
pub(super) const LOCK_STEP_MS: u64 = 250;

/// Statements kept prepared: about twice as many as there are in this room.
const STATEMENTS: usize = 64;

/// Page cache, in KiB: the hot table and its indexes of some ten thousand deliveries.
const CACHE_KIB: i64 = 16 * 1024;

/// A checkpoint after so many pages (of 4 KiB) of log: each one syncs twice and holds the writer,
/// so it should be rare; and the log should stay small enough to be read quickly at open.
const CHECKPOINT_PAGES: i64 = 4_000;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Write,
    Read,
}

/// Opens a connection; the writer creates the file.
pub(super) fn open(path: &Path, access: Access) -> Result<Connection, Fault> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if access == Access::Write {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(Duration::from_millis(LOCK_STEP_MS))?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS);
    conn.pragma_update(None, "cache_size", -CACHE_KIB)?;
    // Closing is part of recovering from an error: it must not start to write. An orderly close
    // makes its checkpoint itself.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    match access {
        Access::Write => {
            conn.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            sync(&conn, true)?;
            conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        }
        Access::Read => conn.pragma_update(None, "query_only", true)?,
    }
    Ok(conn)
}

/// Whether commits are synced from now on. In WAL only `FULL` syncs at every commit; with `NORMAL`
/// a power cut may take the last ones, and nothing else can.
pub(super) fn sync(conn: &Connection, durable: bool) -> rusqlite::Result<()> {
    conn.pragma_update(None, "synchronous", if durable { "FULL" } else { "NORMAL" })
}

/// Moves the log into the database and empties it, so that an orderly close leaves one file. If it
/// fails, the next open reads the log.
pub(super) fn checkpoint(conn: &Connection) {
    let result = conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    if let Err(error) = result {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the last checkpoint failed"
        );
    }
}
