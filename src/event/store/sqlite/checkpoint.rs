//! When the log is moved into the database, and by which thread.
//!
//! Not in a commit, as SQLite does it by itself: requests would wait for thousands of pages. The
//! reader's thread moves them while the writer goes on, and the writer only the few that it has
//! written meanwhile, because the log begins anew when nothing is left in it. All of that is
//! `PASSIVE`: it waits for nobody.

use rusqlite::Connection;
use tokio::sync::mpsc;

use super::connection;
use super::fault::{self, Fault};
use super::worker::Message;
use crate::sync::{Arc, AtomicBool, Ordering};

/// From so many pages of 4 KiB the log is moved: rarely, because what was written twice is moved
/// once; and it should be read quickly at open.
const PAGES: i32 = 4_000;

/// At so many pages the writer moves them itself: the reader's thread is not fast enough.
const TOO_MANY: i32 = 4 * PAGES;

/// What the writer knows of the checkpoints.
#[derive(Debug)]
pub(super) struct Checkpoints {
    reader: mpsc::Sender<Message>,
    /// The reader's thread has been asked and has not finished.
    under_way: Arc<AtomicBool>,
    /// It has been asked since the log began.
    asked: bool,
    /// The length of the log when the writer last moved it.
    tried: i32,
}

impl Checkpoints {
    pub(super) fn new(reader: mpsc::Sender<Message>) -> Self {
        Self {
            reader,
            under_way: Arc::default(),
            asked: false,
            tried: 0,
        }
    }

    /// After a commit, when its requests are answered. Whether a sync failed.
    #[must_use]
    pub(super) fn after_commit(&mut self, conn: Option<&Connection>) -> bool {
        let pages = connection::log_pages();
        if pages < PAGES {
            self.asked = false;
            self.tried = 0;
            return false;
        }
        // Acquire, with the release below: what the reader has moved is moved.
        let under_way = self.under_way.load(Ordering::Acquire);
        if !self.asked {
            self.under_way.store(true, Ordering::Release);
            let done = Done(Arc::clone(&self.under_way));
            // If its queue is full or closed, `done` is dropped, and the writer does it.
            let _ = self.reader.try_send(Message::Checkpoint(done));
            self.asked = true;
        } else if (!under_way && self.tried == 0) || pages >= self.tried.max(PAGES) + TOO_MANY {
            self.tried = pages;
            return conn.is_some_and(run);
        }
        false
    }
}

/// Says when it is dropped that the reader's thread is through.
#[derive(Debug)]
pub(super) struct Done(Arc<AtomicBool>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Moves all of the log and truncates it, or fails: it waits for readers no longer than for a lock.
pub(super) fn empty(conn: &Connection) -> Result<(), Fault> {
    let is_busy: bool = conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if is_busy {
        let busy = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
        return Err(rusqlite::Error::SqliteFailure(busy, None).into());
    }
    Ok(())
}

/// Moves what it can of the log. If it fails, the log stays, and the next one moves it. Whether a sync
/// failed.
pub(super) fn run(conn: &Connection) -> bool {
    let result = conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    result.is_err_and(|error| {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "a checkpoint failed"
        );
        fault::is_failed_sync(&error)
    })
}
