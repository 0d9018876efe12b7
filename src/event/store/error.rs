//! Why a store could not do what it was asked.
//!
//! Not the subscribers' errors: those are texts in a delivery's record.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Why a store could not do what it was asked. Opaque, so that it can grow: ask the `is_*`
/// predicates. Cheap to clone, because everybody whose batch shared a failed commit gets it.
#[derive(Clone)]
pub struct StoreError {
    kind: Kind,
    /// Where that is worth saying: when it is opened.
    path: Option<Arc<Path>>,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Full,
    Locked,
    InUse {
        pid: Option<u32>,
        since_ms: Option<i64>,
    },
    ReadOnly,
    Corrupt,
    Io,
    Missing,
    NoStore,
    Closed,
    Invalid(&'static str),
    Schema {
        found: i64,
        known: i64,
    },
    Other(&'static str),
}

impl StoreError {
    /// There is no room left to write.
    pub fn full(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Full, source)
    }

    /// Somebody else kept the store locked for longer than we wait.
    pub fn locked(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Locked, source)
    }

    /// Another process has the store open.
    #[must_use]
    pub fn in_use(pid: Option<u32>, since_ms: Option<i64>) -> Self {
        Self {
            kind: Kind::InUse { pid, since_ms },
            path: None,
            source: None,
        }
    }

    /// The store may not be written.
    pub fn read_only(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::ReadOnly, source)
    }

    /// What the store holds contradicts itself.
    pub fn corrupt(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Corrupt, source)
    }

    /// Reading or writing failed below the store.
    pub fn io(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Io, source)
    }

    /// There is nothing where the store should be.
    pub fn missing(source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Missing, source)
    }

    /// What is there is no store.
    #[must_use]
    pub fn no_store() -> Self {
        Self {
            kind: Kind::NoStore,
            path: None,
            source: None,
        }
    }

    /// The store was closed.
    #[must_use]
    pub fn closed() -> Self {
        Self {
            kind: Kind::Closed,
            path: None,
            source: None,
        }
    }

    /// The caller asked for something that cannot be; says what.
    #[must_use]
    pub fn invalid(what: &'static str) -> Self {
        Self {
            kind: Kind::Invalid(what),
            path: None,
            source: None,
        }
    }

    /// The store was written by a version that we do not know.
    #[must_use]
    pub fn schema(found: i64, known: i64) -> Self {
        Self {
            kind: Kind::Schema { found, known },
            path: None,
            source: None,
        }
    }

    /// Anything else; says what failed.
    pub fn other(what: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self::with(Kind::Other(what), source)
    }

    /// No room left: it ends by itself when there is room again.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.kind == Kind::Full
    }

    /// Somebody else holds a lock on the data for too long: it ends by itself when they let go.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.kind == Kind::Locked
    }

    /// Another process has this store open; see [`holder`](Self::holder).
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        matches!(self.kind, Kind::InUse { .. })
    }

    /// The store may not be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.kind == Kind::ReadOnly
    }

    /// The data are damaged.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.kind == Kind::Corrupt
    }

    /// The device failed.
    #[must_use]
    pub fn is_io(&self) -> bool {
        self.kind == Kind::Io
    }

    /// There is nothing where the store should be.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.kind == Kind::Missing
    }

    /// What is there is no store.
    #[must_use]
    pub fn is_no_store(&self) -> bool {
        self.kind == Kind::NoStore
    }

    /// The store was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.kind == Kind::Closed
    }

    /// The request itself is wrong; trying again does not help.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        matches!(self.kind, Kind::Invalid(_))
    }

    /// The store was written by another version: a newer one, or, where nothing may be changed, an
    /// older one.
    #[must_use]
    pub fn is_schema(&self) -> bool {
        matches!(self.kind, Kind::Schema { .. })
    }

    /// Who has the store open: the process id, and since when (unix ms), as far as it is known.
    #[must_use]
    pub fn holder(&self) -> Option<(Option<u32>, Option<i64>)> {
        match self.kind {
            Kind::InUse { pid, since_ms } => Some((pid, since_ms)),
            _ => None,
        }
    }

    /// Whether the fault lies with the place where the store keeps its data, so that nobody else's
    /// request would fare better now.
    #[cfg(feature = "sqlite")]
    pub(crate) fn is_of_the_store(&self) -> bool {
        matches!(
            self.kind,
            Kind::Full | Kind::Locked | Kind::InUse { .. } | Kind::ReadOnly | Kind::Io
        )
    }

    /// Of the store that lies there.
    #[cfg(feature = "sqlite")]
    pub(crate) fn at(mut self, path: &Path) -> Self {
        self.path = Some(path.into());
        self
    }

    fn with(kind: Kind, source: impl Error + Send + Sync + 'static) -> Self {
        Self {
            kind,
            path: None,
            source: Some(Arc::new(source)),
        }
    }
}

/// As `Display`, with what lies below it: this is what `main` prints.
impl fmt::Debug for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut source = self.source();
        while let Some(below) = source {
            write!(f, ": {below}")?;
            source = below.source();
        }
        Ok(())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        match &self.kind {
            Kind::Full => f.write_str("the event store is full; make room, it goes on by itself"),
            Kind::Locked => f.write_str(
                "the event store is locked by somebody else; end their transaction, it goes on by itself",
            ),
            Kind::InUse { pid, since_ms } => {
                f.write_str("the event store is in use by ")?;
                match pid {
                    Some(pid) if *pid == std::process::id() => {
                        return f.write_str("this very process: open it once, and share it");
                    }
                    Some(pid) => write!(f, "process {pid}")?,
                    None => f.write_str("another process")?,
                }
                if let Some(since_ms) = since_ms {
                    write!(f, " since {since_ms} (unix ms)")?;
                }
                f.write_str("; end it, or give this process a file of its own")
            }
            Kind::ReadOnly => {
                f.write_str("the event store may not be written; check its file and directory")
            }
            Kind::Corrupt => f.write_str(
                "the event store is damaged; keep a copy and repair it, nothing was deleted",
            ),
            Kind::Io => f.write_str("the event store's device failed"),
            Kind::Missing => f.write_str("there is no event store here; check the path"),
            Kind::NoStore => f.write_str("this is no event store; check the path"),
            Kind::Closed => f.write_str("the event store is closed"),
            Kind::Invalid(what) => write!(f, "the event store cannot take this: {what}"),
            Kind::Schema { found, known } if found < known => write!(
                f,
                "the event store has schema {found}, this version knows {known}; have a server of this \
                 version open it first"
            ),
            Kind::Schema { found, known } => write!(
                f,
                "the event store has schema {found}, this version knows {known}; use a newer version"
            ),
            Kind::Other(what) => write!(f, "the event store failed: {what}"),
        }
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_its_own_level_and_what_to_do() {
        let error = StoreError::io(std::io::Error::other("EIO"));
        assert!(error.is_io());
        assert_eq!(error.to_string(), "the event store's device failed");
        assert_eq!(
            error.source().map(ToString::to_string).as_deref(),
            Some("EIO")
        );
        let error = StoreError::in_use(Some(7), Some(1_000));
        assert_eq!(
            error.to_string(),
            "the event store is in use by process 7 since 1000 (unix ms); \
             end it, or give this process a file of its own"
        );
        assert_eq!(error.holder(), Some((Some(7), Some(1_000))));
    }
}
