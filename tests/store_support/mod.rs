//! What the tests of the store share.

#![allow(
    dead_code,
    reason = "each test binary uses another part of this module"
)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tower_defer::event::store::{NewEvent, Start};

/// A directory that goes when the test ends.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only the number counts.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("defer-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies a database and its log, as a killed process leaves them.
pub(crate) fn copy_store(from: &Path, to: &Path) {
    for suffix in ["", "-wal"] {
        let name = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        if name(from).exists() {
            std::fs::copy(name(from), name(to)).unwrap();
        }
    }
}

/// An event with an empty payload for one subscriber.
pub(crate) fn event(name: &str, subscriber: &str, due_ms: i64) -> NewEvent {
    NewEvent::new(name, "{}").deliver(subscriber, Start::At(due_ms))
}

/// Polls `future` until `probe` finds something; the future must not be ready before.
pub(crate) async fn eventually<F: Future + Unpin, T>(
    future: &mut F,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    for _ in 0..60_000 {
        if let Some(found) = probe() {
            return found;
        }
        let tick = tokio::time::sleep(Duration::from_millis(1));
        tokio::select! {
            _ = &mut *future => panic!("ready before the probe found anything"),
            () = tick => {}
        }
    }
    panic!("nothing found in a minute");
}
