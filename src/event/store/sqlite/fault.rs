//! What went wrong inside SQLite, in the store's words.
//!
//! Not public: a user meets [`StoreError`] only.

use rusqlite::{Error, ErrorCode};

use crate::event::store::StoreError;

/// Why a step of a transaction failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// SQLite said so.
    Sql(Error),
    /// We did.
    Own(StoreError),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Sql(error)
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind::{ReadOnlyFilesystem, StorageFull};
        Self::Own(match error.kind() {
            StorageFull => StoreError::full(error),
            ReadOnlyFilesystem => StoreError::read_only(error),
            _ => StoreError::io(error),
        })
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Sql(error) => classify(error),
            Fault::Own(error) => error,
        }
    }
}

impl Fault {
    /// Somebody else holds the write lock.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Sql(error) if matches!(
            error.sqlite_error_code(),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
        ))
    }

    /// SQLite found a damaged page: it refuses to write in this transaction from now on.
    pub(super) fn dooms_the_transaction(&self) -> bool {
        matches!(self, Self::Sql(error)
            if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt))
    }

    /// The row or the page under it cannot be trusted; its neighbours may well be whole.
    pub(super) fn is_damage(&self) -> bool {
        let Self::Sql(error) = self else { return false };
        match error {
            Error::FromSqlConversionFailure(..)
            | Error::IntegralValueOutOfRange(..)
            | Error::Utf8Error(..)
            | Error::InvalidColumnType(..) => true,
            error => error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt),
        }
    }
}

/// A sync failed: what it should have made durable may be lost, whatever a later one says.
pub(super) fn is_failed_sync(error: &Error) -> bool {
    error.sqlite_error().map(|error| error.extended_code) == Some(rusqlite::ffi::SQLITE_IOERR_FSYNC)
}

fn classify(error: Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::full(error),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::locked(error),
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => StoreError::read_only(error),
        Some(ErrorCode::NotADatabase) => StoreError::no_store(),
        Some(ErrorCode::DatabaseCorrupt) => StoreError::corrupt(error),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => StoreError::io(error),
        _ => StoreError::other("SQLite refused", error),
    }
}
