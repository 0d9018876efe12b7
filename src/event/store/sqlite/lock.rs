//! One process at a time: a lock that the kernel holds for us on a file beside the database.
//!
//! Not a pid file: what counts is the lock, which the kernel drops with the process, however it
//! dies. So whoever gets it knows at once that nobody is running any delivery of this file, and
//! recovery needs no timeout. The text in it (`pid` and `since_ms`) is for the one who does not.
//!
//! Not on the database itself, because SQLite's own locks live there (a process that closes any handle of
//! that file loses them), and because the shell and the user's own connections must still get in. So whoever
//! deletes the file by hand takes the lock away; then the one on the [redo log](super::redo) holds, and if that
//! was deleted, too, the epoch in the database: a process that finds another one there writes no more.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use fs4::{FileExt, TryLockError};

use crate::event::store::StoreError;

/// The lock; dropping it lets go. The file stays: removing it would let two processes each lock a
/// file of that name.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock for the database at `path` (a [`real`] one), or says who has it.
    pub(super) fn take(path: &Path) -> Result<Self, StoreError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(side_file(path, "-lock"))
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                    StoreError::read_only(error)
                }
                _ => StoreError::io(error),
            })?;
        if !hold(&file).map_err(StoreError::io)? {
            let mut text = String::new();
            // Without a readable text the holder is unknown, and that is all.
            let _ = file.take(1_024).read_to_string(&mut text);
            return Err(StoreError::in_use(
                field(&text, "pid").and_then(|pid| u32::try_from(pid).ok()),
                field(&text, "since_ms"),
            ));
        }
        // The lock holds whether or not it can be signed: a full disk must not keep the store
        // from opening, since opening it is how what it holds gets done.
        let _ = sign(&mut file);
        Ok(Self { file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.file.set_len(0);
        // Closing the file unlocks it in any case.
        let _ = FileExt::unlock(&self.file);
    }
}

/// Writes who holds the lock and since when. The time is the file system's, which stamps the
/// first write: this room reads no clock.
fn sign(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "pid {}", std::process::id())?;
    let since = file
        .metadata()?
        .modified()?
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    writeln!(file, "since_ms {}", since.as_millis())
}

fn field(text: &str, name: &str) -> Option<i64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Whether the file is ours now, until it is closed: nobody else has locked it.
pub(super) fn hold(file: &File) -> std::io::Result<bool> {
    match FileExt::try_lock(file) {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// How many links may lead to each other, as on Linux.
const LINKS: usize = 40;

/// What a link names, also where nothing is yet: SQLite's own files lie beside that one, and so must ours.
pub(super) fn real(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let Ok(target) = std::fs::read_link(&path) else {
            break;
        };
        path.pop();
        path.push(target);
    }
    if let Ok(real) = std::fs::canonicalize(&path) {
        return real;
    }
    // What is not there yet has the whole name of its directory all the same: a process may change its own
    // while the file is open.
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    match (std::fs::canonicalize(directory), path.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => path,
    }
}

/// `events.db` → `events.db-lock`, in the manner of SQLite's own `-wal`.
pub(super) fn side_file(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
