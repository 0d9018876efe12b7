//! The identity of a task.

use std::fmt;
use std::num::NonZeroU64;

use crate::clock;
use crate::sync::{OnceLock, Ordering, StaticU64};

/// The identity of a task: the same over all its attempts and replays, and different from that of
/// every other task of this and (but for a chance of 1 in 2⁶⁴) every other process. Good as an
/// idempotency key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId {
    process: u64,
    sequence: NonZeroU64,
}

/// Half of a [`TaskId`], all that a queued task needs to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sequence(NonZeroU64);

impl Sequence {
    pub(crate) fn next() -> Self {
        static NEXT: StaticU64 = StaticU64::new(1);
        // Relaxed: only uniqueness is asked of it.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(NonZeroU64::new(number).unwrap_or(NonZeroU64::MAX))
    }

    pub(crate) fn id(self) -> TaskId {
        static PROCESS: OnceLock<u64> = OnceLock::new();
        TaskId {
            process: *PROCESS.get_or_init(clock::random),
            sequence: self.0,
        }
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:x}", self.process, self.sequence)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskId({self})")
    }
}
