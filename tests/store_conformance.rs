//! Every store against the one suite that specifies them all.

#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use scratch::Scratch;
use tower_defer::event::store::conformance::Harness;
use tower_defer::event::store::{Memory, Sqlite};

struct InMemory;

impl Harness for InMemory {
    type Store = Memory;

    async fn open(&self) -> Memory {
        Memory::new()
    }

    async fn crash(&self, store: &Memory) -> Memory {
        store.after_crash()
    }
}

/// A crash is an image of the files, taken while the store has them open: what a killed process
/// leaves behind.
struct OnDisk {
    scratch: Scratch,
    current: Mutex<(u32, PathBuf)>,
}

impl OnDisk {
    fn new() -> Self {
        let scratch = Scratch::new("conformance");
        let first = scratch.path("0.db");
        Self {
            scratch,
            current: Mutex::new((0, first)),
        }
    }
}

impl Harness for OnDisk {
    type Store = Sqlite;

    async fn open(&self) -> Sqlite {
        Sqlite::open(&self.current.lock().unwrap().1).unwrap()
    }

    async fn crash(&self, _store: &Sqlite) -> Sqlite {
        let mut current = self.current.lock().unwrap();
        let next = self.scratch.path(&format!("{}.db", current.0 + 1));
        image::copy_store(&current.1, &next);
        counters_agree(&next);
        *current = (current.0 + 1, next.clone());
        Sqlite::open(next).unwrap()
    }
}

/// The counters against the rows, in whatever state a promise left them.
fn counters_agree(path: &Path) {
    let image = rusqlite::Connection::open(path).unwrap();
    let all = |sql: &str| -> Vec<i64> {
        let columns = |row: &rusqlite::Row<'_>| (0..8).map(|i| row.get(i)).collect();
        image.query_row(sql, [], columns).unwrap()
    };
    let counters = all(
        "SELECT queued, running, retrying, parked, discarded, finished, unknown, events
         FROM defer_counts",
    );
    let rows = all("SELECT
            (SELECT count(*) FROM defer_deliveries WHERE state = 'queued'),
            (SELECT count(*) FROM defer_deliveries WHERE state = 'running'),
            (SELECT count(*) FROM defer_deliveries WHERE state = 'retrying'),
            (SELECT count(*) FROM defer_deliveries WHERE state = 'parked'),
            (SELECT count(*) FROM defer_dead_letters),
            (SELECT count(*) FROM defer_history),
            0,
            (SELECT count(*) FROM defer_events)");
    assert_eq!(counters, rows);
}

tower_defer::store_conformance!(memory, InMemory);
tower_defer::store_conformance!(sqlite, OnDisk::new());
