//! What became of emissions on their way into the store, counted: each of them in exactly one place.

use crate::sync::{AtomicU64, Ordering};

/// How many events came to which end on their way into the store, since these events were put together;
/// see [`Events::emissions`](super::Events::emissions).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Emissions {
    /// Recorded, or known already by their key.
    pub recorded: u64,
    /// Not recorded: the store failed, or the runtime ended before. Their requests were answered with a
    /// 503, if there was still somebody to answer.
    pub not_recorded: u64,
    /// Not emitted: the handler's answer did not fulfil their condition.
    pub skipped: u64,
}

/// The counters behind it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    recorded: AtomicU64,
    not_recorded: AtomicU64,
    skipped: AtomicU64,
}

impl Tally {
    pub(super) fn recorded(&self, events: usize) {
        add(&self.recorded, events);
    }

    pub(super) fn not_recorded(&self, events: usize) {
        add(&self.not_recorded, events);
    }

    pub(super) fn skipped(&self) {
        add(&self.skipped, 1);
    }

    pub(super) fn so_far(&self) -> Emissions {
        let get = |count: &AtomicU64| count.load(Ordering::Acquire);
        Emissions {
            recorded: get(&self.recorded),
            not_recorded: get(&self.not_recorded),
            skipped: get(&self.skipped),
        }
    }
}

fn add(count: &AtomicU64, events: usize) {
    count.fetch_add(events as u64, Ordering::Release);
}
