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

/// The first two things that are asked of a queued task, in one word: its [`Sequence`], once it has one,
/// and whether it blocks its thread. To ask the body for the latter took 10 of 620 instructions of a task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks(u64);

impl Marks {
    /// No process counts so far.
    const BLOCKING: u64 = 1 << 63;

    pub(super) fn new(blocking: bool) -> Self {
        Self(if blocking { Self::BLOCKING } else { 0 })
    }

    pub(super) fn is_blocking(self) -> bool {
        self.0 & Self::BLOCKING != 0
    }

    pub(crate) fn sequence(self) -> Option<Sequence> {
        NonZeroU64::new(self.0 & !Self::BLOCKING).map(Sequence)
    }

    pub(super) fn number(&mut self, sequence: Sequence) {
        self.0 |= sequence.0.get();
    }

    pub(super) fn forget_number(&mut self) {
        self.0 &= Self::BLOCKING;
    }
}

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
