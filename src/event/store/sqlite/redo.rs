//! The redo log: what makes an append durable, with one small write.
//!
//! SQLite's own log grows by some pages of 4 KiB for an event of 200 bytes, and a file that grows has to be
//! synced together with the file system's journal. So a transaction that records events is committed without a
//! sync (`synchronous = NORMAL`), and before that a record of its events is written here and synced: into a file
//! whose blocks were allocated and written when the store was opened, so that a sync writes one block and
//! nothing else. It brought what an event adds to a response from 3.3 times an append and `fdatasync` of a bare
//! file to 2.6 on an idle machine, from 2.3 to 1.8 on a busy one, and what 64 writers append from 0.51 to 0.76 of
//! what a bare file takes.
//!
//! Not a second store: nothing is read from it but at open, when a power cut has taken the end of SQLite's log
//! (an operator who looks into the file before that does not see what was in it), and only events go into it.
//! What else must be durable (settling, replays, and so on) is synced by SQLite, as are events for which there
//! is no room here.
//!
//! Invariants:
//!
//! 1. A record is synced before its transaction is committed, and so before anybody can see its events, be
//!    answered or be given them. If its sync fails, the transaction is rolled back, and SQLite syncs another
//!    one in its place.
//! 2. A transaction writes the number of its record into `defer_counts`. SQLite's log survives a power cut up
//!    to some transaction, and loses all that came after it: so what is lost are the records with a higher
//!    number than the one found there.
//! 3. No record is written over before SQLite has synced its log with the record's transaction in it.
//! 4. A sync that failed is never taken back by a later one that succeeds (the kernel may have dropped what
//!    it could not write): after it the log is not used until SQLite has synced its own, and then begins anew.
//! 5. Records of another epoch are none, and none that do not follow what the file knows: a log beside a file
//!    that was replaced changes nothing, nor does what is left of the last process's, once it has been made
//!    good. What cannot be told from a power cut is a copy from the days of the last process, so young that
//!    the log has not begun anew since: it is given what came after it.
//! 6. A record that was synced, but not committed, gives its number to the next transaction that SQLite syncs.
//! 7. The file is locked while it is used, so that no two processes write it, also where the
//!    [lock file](super::lock) was deleted.
//!
//! It is assumed, as SQLite does by default, that a write that is torn spoils no byte it does not change: the
//! block where a record ends is written again with the next one.

mod record;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use self::record::HEADER;
pub(super) use self::record::{Logged, size};
use super::fault::Fault;
use super::lock;
use crate::event::store::StoreError;
use crate::event::store::record::NewEvent;

/// The size of the file. With every event of 200 bytes alone some 2,700 of them, after which SQLite syncs its
/// own log once: more would leave it more to sync at a time.
pub(super) const SIZE: u64 = 1024 * 1024;

/// It is written in steps of this: in longer ones the kernel keeps it in pages of megabytes, whose sync took
/// a fifth longer.
const STEP: usize = 4096;

/// The log of a store that is open.
#[derive(Debug)]
pub(super) struct Redo {
    file: File,
    path: PathBuf,
    epoch: i64,
    /// The record of the last transaction that was committed.
    last: i64,
    /// Where the next record begins.
    at: u64,
    /// The next record.
    record: Vec<u8>,
    /// Whether the last record may be there in part or without its transaction.
    is_broken: bool,
    is_given_up: bool,
}

/// What lies where the log belongs, before it is begun. Locked: there is no second process that writes it,
/// whatever became of the [lock file](super::lock).
#[derive(Debug)]
pub(super) struct Found {
    database: PathBuf,
    path: PathBuf,
    file: Option<File>,
}

impl Found {
    /// Beside the database at `path`, or says that another process has it.
    pub(super) fn take(database: &Path) -> Result<Self, StoreError> {
        let path = lock::side_file(database, "-log");
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        // To read is enough for what must be made good.
        let file = match opened.or_else(|_| File::open(&path)) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io(error)),
        };
        if let Some(file) = &file {
            ours(file)?;
        }
        Ok(Self {
            database: database.to_owned(),
            path,
            file: file.filter(is_linked),
        })
    }

    /// The events of the records of `epoch` with numbers above `known`, in their order.
    pub(super) fn read(&mut self, epoch: i64, known: i64) -> io::Result<Vec<Logged>> {
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            file.rewind()?;
            file.take(SIZE).read_to_end(&mut bytes)?;
        }
        Ok(record::parse(&bytes, epoch, known))
    }

    /// Begins the log, empty: records of other epochs are void. Durable itself.
    pub(super) fn begin(self, epoch: i64) -> Result<Redo, StoreError> {
        let file = match self.file {
            Some(file) => file,
            None => create(&self.path, &self.database).map_err(Fault::from)?,
        };
        ours(&file)?;
        let mut redo = Redo {
            file,
            path: self.path,
            epoch,
            last: 0,
            at: 0,
            record: Vec::new(),
            is_broken: false,
            is_given_up: false,
        };
        redo.prepare(&self.database).map_err(Fault::from)?;
        Ok(redo)
    }
}

fn create(path: &Path, database: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
        options.mode(std::fs::metadata(database)?.permissions().mode());
    }
    // Elsewhere it has the permissions of its folder, as SQLite's own log.
    #[cfg(not(unix))]
    let _ = database;
    options.open(path)
}

/// Locks the file, if it is not.
fn ours(file: &File) -> Result<(), StoreError> {
    match lock::hold(file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(StoreError::in_use(None, None)),
        Err(error) => Err(StoreError::io(error)),
    }
}

/// Whether it still lies there: the last process has removed what it closed in order.
#[cfg(unix)]
fn is_linked(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|it| it.nlink() > 0)
}

#[cfg(not(unix))]
fn is_linked(_: &File) -> bool {
    true
}

impl Redo {
    fn prepare(&mut self, database: &Path) -> io::Result<()> {
        // What may not be read in the database may not be read here. It cannot be set by another than the
        // owner, who has.
        let readers = std::fs::metadata(database)?.permissions();
        let _ = self.file.set_permissions(readers);
        if self.file.metadata()?.len() != SIZE {
            if let Err(error) = allocate(&mut self.file) {
                // It must not keep what little room there is.
                let _ = std::fs::remove_file(&self.path);
                return Err(error);
            }
        }
        sync_directory(&self.path)
    }

    /// Whether so many bytes of events ([`size`]) can be recorded now.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        !self.is_broken && !self.is_given_up && self.at + (HEADER + bytes) as u64 <= SIZE
    }

    /// Begins the record of a transaction.
    pub(super) fn begin(&mut self) {
        self.record.clear();
        self.record.resize(HEADER, 0);
    }

    pub(super) fn add(&mut self, id: i64, event: &NewEvent, recorded_ms: i64) {
        record::put(&mut self.record, id, event, recorded_ms);
    }

    /// The number of the record, if there is anything in it.
    pub(super) fn number(&self) -> Option<i64> {
        (self.record.len() > HEADER).then_some(self.last + 1)
    }

    /// Writes the record and syncs it.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        let Some(number) = self.number() else {
            return Ok(());
        };
        record::seal(&mut self.record, self.epoch, number);
        // Until it is committed.
        self.is_broken = true;
        self.file.seek(SeekFrom::Start(self.at))?;
        self.file.write_all(&self.record)?;
        self.file.sync_data()
    }

    /// The record's transaction is committed.
    pub(super) fn committed(&mut self) {
        if let Some(number) = self.number() {
            self.last = number;
            self.at += self.record.len() as u64;
            self.is_broken = false;
        }
    }

    /// The record's transaction was rolled back. At a crash it might be taken for a lost one, so it is made
    /// void; if that fails, it may be until a transaction has written down that it is [`void`](Self::void),
    /// as the contract says of a batch whose recording failed.
    pub(super) fn rolled_back(&mut self) {
        if self.is_broken {
            let place = self.file.seek(SeekFrom::Start(self.at));
            let voided = place.and_then(|_| self.file.write_all(&[0; HEADER]));
            let _ = voided.and_then(|()| self.file.sync_data());
        }
    }

    /// The number that the next transaction synced by SQLite takes away from a record that has none.
    pub(super) fn void(&self) -> Option<i64> {
        self.is_broken.then_some(self.last + 1)
    }

    /// SQLite has synced its log: nothing here is needed any more.
    pub(super) fn restart(&mut self) {
        self.last = self.void().unwrap_or(self.last);
        self.at = 0;
        self.is_broken = false;
    }

    /// Nothing is recorded here any more; an orderly close removes it all the same.
    pub(super) fn give_up(&mut self) {
        self.is_given_up = true;
    }

    /// Everything is in the database.
    pub(super) fn remove(self) {
        // Before it is closed, and thereby anybody's.
        let _ = std::fs::remove_file(self.path);
    }
}

/// Writes every block of the file: allocated alone, each first write would have to be journalled.
fn allocate(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    for _ in 0..SIZE / STEP as u64 {
        file.write_all(&[0; STEP])?;
    }
    file.sync_all()
}

/// That a file is there is known to its directory only. The path is a [`real`](lock::real) one: not a bare name.
#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also if the power goes before the record is overwritten, wherever it is then.
    #[test]
    fn a_record_without_a_transaction_gives_its_number_away() {
        let directory = std::env::temp_dir().join(format!("defer-redo-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("events.db");
        File::create(&path).unwrap();
        let mut redo = Found::take(&path).unwrap().begin(7).unwrap();
        let read = |known| {
            let bytes = std::fs::read(lock::side_file(&path, "-log")).unwrap();
            record::parse(&bytes, 7, known)
        };
        let event = NewEvent::new("refused", "{}");
        redo.begin();
        redo.add(1, &event, 1);
        redo.sync().unwrap();
        assert!(!redo.fits(size(&event)));
        assert_eq!(read(0).len(), 1);

        let void = redo.void().unwrap();
        redo.restart();
        assert_eq!(read(void), []);
        redo.begin();
        redo.add(2, &event, 2);
        redo.sync().unwrap();
        redo.committed();
        assert_eq!(redo.void(), None);
        assert_eq!(read(void)[0].id, 2);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
