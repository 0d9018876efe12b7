//! How many tasks came to each end, since the executor was made.

use crate::sync::{AtomicU64, Ordering};

/// Each is counted once, where the transition happens. Who reads that a task has ended (acquire) also
/// reads that it was accepted: that was counted before, and the end was counted with release.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) accepted: Count,
    pub(crate) completed: Count,
    pub(crate) discarded: Count,
    pub(crate) skipped: Count,
    pub(crate) cancelled: Count,
    pub(crate) kept: Count,
    pub(crate) rejected_full: Count,
    pub(crate) rejected_request: Count,
    pub(crate) rejected_closed: Count,
    pub(crate) retries: Count,
    pub(crate) replayed: Count,
    pub(crate) stuck: Count,
    pub(crate) dead_letters_lost: Count,
}

#[derive(Debug)]
pub(crate) struct Count(AtomicU64);

impl Default for Count {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Count {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Release);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}
