//! Every store against the one suite that specifies them all.

#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::path::PathBuf;
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
        *current = (current.0 + 1, next.clone());
        Sqlite::open(next).unwrap()
    }
}

tower_defer::store_conformance!(memory, InMemory);
tower_defer::store_conformance!(sqlite, OnDisk::new());
