//! What was handled, kept outside of the store: a file that every process appends to. What is written
//! before a SIGKILL is there after it, because the file is the kernel's by then.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// One process's pen.
#[derive(Debug)]
pub(crate) struct Ledger {
    file: File,
    /// The number of the process.
    run: usize,
    opened: Instant,
}

/// What a handler has begun to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The store is open.
    Opened,
    /// An attempt that succeeds, or fails for good.
    Handled,
    /// An attempt that fails and is tried again.
    Failed,
    /// An attempt that never ends.
    Stuck,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) run: usize,
    pub(crate) subscriber: String,
    pub(crate) id: String,
    /// Since the store was open.
    pub(crate) micros: u128,
}

impl Ledger {
    /// The store is open.
    pub(crate) fn open(directory: &Path, run: usize) -> Self {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(file(directory))
            .expect("a ledger");
        let ledger = Self {
            file,
            run,
            opened: Instant::now(),
        };
        ledger.note(Kind::Opened, "-", "-");
        ledger
    }

    /// With one call, so that it is whole or not there.
    pub(crate) fn note(&self, kind: Kind, subscriber: &str, id: &str) {
        let micros = self.opened.elapsed().as_micros();
        let line = format!("{kind:?} {} {subscriber} {id} {micros} ;\n", self.run);
        (&self.file).write_all(line.as_bytes()).expect("room");
    }
}

/// Everything that all processes have written.
pub(crate) fn read(directory: &Path) -> Vec<Entry> {
    // The first process may have died before it made one.
    let text = std::fs::read_to_string(file(directory)).unwrap_or_default();
    text.lines().filter_map(entry).collect()
}

fn entry(line: &str) -> Option<Entry> {
    let mut words = line.strip_suffix(" ;")?.split(' ');
    let kind = match words.next()? {
        "Opened" => Kind::Opened,
        "Handled" => Kind::Handled,
        "Failed" => Kind::Failed,
        _ => Kind::Stuck,
    };
    Some(Entry {
        kind,
        run: words.next()?.parse().ok()?,
        subscriber: words.next()?.to_owned(),
        id: words.next()?.to_owned(),
        micros: words.next()?.parse().ok()?,
    })
}

fn file(directory: &Path) -> PathBuf {
    directory.join("ledger")
}
