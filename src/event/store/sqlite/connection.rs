//! How a connection is set up, and why so.
//!
//! Not a pool: one connection writes, one reads.

use std::cell::Cell;
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

thread_local! {
    /// The pages of the log after this thread's last commit: SQLite's hook has no other place.
    static LOG_PAGES: Cell<i32> = const { Cell::new(0) };
}

/// How long the log is, in pages of 4 KiB, as far as this thread has written it.
pub(super) fn log_pages() -> i32 {
    LOG_PAGES.get()
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Write,
    Read,
    /// To write beside the one who has the file: without making it, and without moving its log.
    Operate,
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
    // makes its checkpoint itself, and then [`leave`]s.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    if access != Access::Read {
        // On macOS a plain sync leaves it to the disk when to write; elsewhere this is without effect.
        conn.pragma_update(None, "fullfsync", true)?;
    }
    match access {
        Access::Write => {
            conn.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            sync(&conn, true)?;
            // In place of SQLite's own checkpoints, which hold the writer: see `checkpoint`.
            conn.wal_hook(Some(|_, pages| {
                LOG_PAGES.set(pages);
                Ok(())
            }));
        }
        Access::Read => conn.pragma_update(None, "query_only", true)?,
        Access::Operate => {
            sync(&conn, true)?;
            conn.pragma_update(None, "wal_autocheckpoint", 0)?;
        }
    }
    Ok(conn)
}

/// The log has been emptied: with the last connection that is closed, SQLite removes its two files.
pub(super) fn leave(conn: &Connection) {
    // Where that cannot be had, they stay, empty.
    let _ = conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false);
}

/// Whether commits are synced from now on. In WAL only `FULL` syncs at every commit; with `NORMAL`
/// a power cut may take the last ones, and nothing else can. Events that are among them come back from the
/// [redo log](super::redo).
pub(super) fn sync(conn: &Connection, durable: bool) -> rusqlite::Result<()> {
    conn.pragma_update(None, "synchronous", if durable { "FULL" } else { "NORMAL" })
}
