//! How an embedded store is opened: its options, its recovery, its threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::checkpoint::{self, Checkpoints};
use super::connection::{self, Access};
use super::desk::{Desk, Durable};
use super::fault::Fault;
use super::lock::{self, Lock};
use super::redo::{Found, Redo};
use super::shared::Shared;
use super::worker::{Message, QUEUE, Worker};
use super::{Sqlite, append, flow, schema, tally};
use crate::event::store::StoreError;

/// How an embedded store is opened.
#[derive(Clone, Debug)]
#[must_use]
pub struct SqliteOptions {
    path: PathBuf,
    patience_ms: u64,
}

impl SqliteOptions {
    /// The file at `path`, with the defaults.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            patience_ms: 30_000,
        }
    }

    /// How long a write waits while somebody else (a shell, a backup, the user's own transaction)
    /// keeps the database locked, before it fails with [`StoreError::is_locked`]. In steps of
    /// 250 ms; 30 s by default, since requests wait meanwhile, and a client rarely waits longer.
    pub fn lock_patience(mut self, patience: std::time::Duration) -> Self {
        self.patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// Opens the file, creates or updates its tables, and makes due again what was running when
    /// the last process died. Blocks on the disk: call it before serving.
    ///
    /// # Errors
    ///
    /// [`is_in_use`](StoreError::is_in_use): another process has it;
    /// [`is_read_only`](StoreError::is_read_only), [`is_corrupt`](StoreError::is_corrupt),
    /// [`is_schema`](StoreError::is_schema) (written by a newer version),
    /// [`is_full`](StoreError::is_full), [`is_io`](StoreError::is_io).
    pub fn open(self) -> Result<Sqlite, StoreError> {
        let directory = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        if directory.is_some_and(|it| !it.is_dir()) {
            return Err(
                StoreError::missing(std::io::Error::from(std::io::ErrorKind::NotFound))
                    .at(&self.path),
            );
        }
        let path = self.path.clone();
        self.open_here().map_err(|error| error.at(&path))
    }

    fn open_here(self) -> Result<Sqlite, StoreError> {
        let path = lock::real(&self.path);
        let lock = Lock::take(&path)?;
        let mut log = Found::take(&path)?;
        let shared = Arc::<Shared>::default();
        let desk = |access| {
            let conn = connection::open(&path, access)?;
            let shared = Arc::clone(&shared);
            Ok::<_, Fault>(Desk::new(path.clone(), access, conn, shared))
        };
        let mut writing = desk(Access::Write)?;
        // The last process may have died of a sync that failed: what is left of SQLite's log is made durable
        // by moving it, before what the redo log has of it is void. Where a reader or a full disk is in the
        // way, it is as durable as SQLite has made it.
        let _ = writing.idle_conn().map(checkpoint::empty);
        let epoch = writing.transact(0, self.patience_ms, Durable::Yes, |desk| {
            schema::migrate(desk.conn())?;
            let epoch = make_good(desk, &mut log)?;
            flow::recover(desk)?;
            Ok(epoch)
        })?;
        writing.epoch = Some(epoch);
        let counted = writing.transact(0, self.patience_ms, Durable::Yes, |desk| {
            tally::recount(desk.conn())
        });
        if let Err(error) = counted {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the deliveries cannot be counted"
            );
        }
        match log.begin(epoch) {
            Ok(redo) => writing.redo = Some(redo),
            Err(error) if error.is_in_use() => return Err(error),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no redo log can be made: recording an event will take longer"
            ),
        }
        let reading = desk(Access::Read)?;
        let reader = spawn("defer-store-read", reading, self.patience_ms, None)?;
        let checkpoints = Checkpoints::new(reader.clone());
        let writer = spawn(
            "defer-store-write",
            writing,
            self.patience_ms,
            Some((lock, checkpoints)),
        )?;
        shared.meet(&writer);
        Ok(Sqlite {
            writer,
            reader,
            shared,
        })
    }
}

/// Records again what a power cut has taken from SQLite's log, and begins a new epoch: it is done once.
fn make_good(desk: &mut Desk, log: &mut Found) -> Result<i64, Fault> {
    if let Some(epoch) = schema::epoch(desk.conn())? {
        let lost = log.read(epoch, tally::logged(desk.conn())?)?;
        if !lost.is_empty() {
            tracing::info!(
                events = lost.len(),
                "events recorded again from the redo log"
            );
            let (conn, tally) = desk.parts();
            append::append_again(conn, tally, &lost)?;
        }
    }
    schema::new_epoch(desk.conn())
}

fn spawn(
    name: &str,
    desk: Desk,
    patience_ms: u64,
    writes: Option<(Lock, Checkpoints)>,
) -> Result<mpsc::Sender<Message>, StoreError> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let (lock, checkpoints) = writes.unzip();
    let mut worker = Worker {
        desk,
        queue,
        patience_ms,
        now_ms: 0,
        checkpoints,
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let (closers, result) = worker.run(|desk| match lock {
                Some(_) => flow::hand_back(desk),
                None => Ok(()),
            });
            // Whoever has it now needs both logs.
            let is_ours = !result.as_ref().is_err_and(StoreError::is_in_use);
            if let (Some(_), Some(conn), true) = (&lock, worker.desk.idle_conn(), is_ours) {
                // So that an orderly close leaves one file, and an empty one to lock.
                match checkpoint::empty(conn) {
                    Ok(()) => {
                        connection::leave(conn);
                        worker.desk.redo.take().into_iter().for_each(Redo::remove);
                    }
                    // Both logs stay, for the next open.
                    Err(fault) if fault.is_busy() => {}
                    Err(fault) => {
                        let error = StoreError::from(fault);
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the last checkpoint failed"
                        );
                    }
                }
            }
            drop(worker);
            // Last, so that the next process finds everything done.
            drop(lock);
            for closer in closers {
                let _ = closer.send(result.clone());
            }
        })
        .map_err(StoreError::io)?;
    Ok(sender)
}
