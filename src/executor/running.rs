//! What runs at this moment: one slot per worker, for snapshots, for the watch and for the drain.

use std::panic::Location;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::Tick;
use crate::sync::{Arc, AtomicU32, Mutex, Ordering};
use crate::task::{Marks, Name, TaskId};

/// All slots. A worker adds its own when it starts and takes it away when it ends.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<Vec<Arc<Slot>>>);

/// Where an attempt is written while it runs.
///
/// Invariants:
/// 1. `state` says whether what is recorded runs. Only its worker begins an attempt, under the lock: who
///    holds the lock sees one attempt, though it may end meanwhile.
/// 2. An attempt is ended by its worker or abandoned by a drain, never both: `state` is swapped once.
///
/// An attempt of a plain task ends without the lock, and its record stays until the next one: it holds
/// nothing. Both saved 70 of a ready task's 845 instructions.
///
/// What an attempt of a plain task writes is one line of memory: when it ends after some milliseconds, that
/// line is in no cache any more.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct Slot {
    state: AtomicU32,
    record: Mutex<Record>,
    /// How long an attempt of a plain task may take.
    limit: Duration,
    abort: Mutex<Option<AbortHandle>>,
}

const IDLE: u32 = 0;
const RUNNING: u32 = 1;
const ABANDONED: u32 = 2;

#[derive(Debug, Default)]
#[repr(C)]
enum Record {
    #[default]
    Nothing,
    Plain(Plain, Option<Learnt>),
    Full(Running),
}

/// An attempt, the first, of a task of which nothing was said.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain {
    /// With the number of the task, which who reads this looks for.
    pub(super) marks: Marks,
    pub(super) function: fn() -> &'static str,
    pub(super) location: &'static Location<'static>,
}

/// What is learnt of an attempt of a plain task while it runs.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Learnt {
    since: Option<Tick>,
    first_seen: Option<Instant>,
    stuck: Option<Duration>,
}

/// An attempt under way.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) id: TaskId,
    pub(crate) name: Name,
    pub(crate) location: &'static Location<'static>,
    pub(crate) attempt: u32,
    pub(crate) limit: Duration,
    pub(crate) blocking: bool,
    pub(crate) token: Option<CancellationToken>,
    /// Known once the attempt has waited: one that never does costs no look at the clock.
    pub(crate) since: Option<Tick>,
    /// When the watch saw it first. Kept here: a replay has the id and the numbers of the run before it,
    /// and must not inherit its time.
    pub(crate) first_seen: Option<Instant>,
    /// How long the watch has seen it run, past its limit.
    pub(crate) stuck: Option<Duration>,
    /// As it was when this copy was made: a drain has counted it as cancelled, its worker must not count it
    /// again.
    pub(crate) abandoned: bool,
    /// It is kept elsewhere, and its place is its keeper's.
    pub(crate) lent: bool,
}

impl Slots {
    pub(crate) fn add(&self, limit: Duration) -> Arc<Slot> {
        let slot = Arc::new(Slot {
            limit,
            ..Slot::default()
        });
        self.0.lock().push(slot.clone());
        slot
    }

    pub(crate) fn remove(&self, slot: &Arc<Slot>) {
        self.0.lock().retain(|other| !Arc::ptr_eq(other, slot));
    }

    pub(crate) fn all(&self) -> Vec<Arc<Slot>> {
        self.0.lock().clone()
    }

    /// How many run, without those that a drain has given up.
    #[cfg(feature = "metrics")]
    pub(crate) fn count(&self) -> usize {
        let slots = self.0.lock();
        let runs = |slot: &&Arc<Slot>| slot.with(|running| !running.abandoned) == Some(true);
        slots.iter().filter(runs).count()
    }

    /// A copy of what runs.
    pub(crate) fn running(&self) -> Vec<Running> {
        let slots = self.0.lock();
        let copies = slots
            .iter()
            .map(|slot| slot.with(|running| running.clone()));
        copies.flatten().collect()
    }
}

impl Slot {
    pub(super) fn begin(&self, running: Running) {
        let mut record = self.record.lock();
        *record = Record::Full(running);
        self.state.store(RUNNING, Ordering::Release);
    }

    #[inline(always)]
    pub(super) fn begin_plain(&self, plain: Plain) {
        let mut record = self.record.lock();
        match &mut *record {
            Record::Plain(last, learnt) => {
                *last = plain;
                *learnt = None;
            }
            other => *other = Record::Plain(plain, None),
        }
        self.state.store(RUNNING, Ordering::Release);
    }

    /// The attempt is over. Returns whether a drain had abandoned it.
    pub(super) fn end(&self) -> bool {
        let abandoned = self.end_plain();
        *self.record.lock() = Record::Nothing;
        abandoned
    }

    #[inline(always)]
    pub(super) fn end_plain(&self) -> bool {
        self.state.swap(IDLE, Ordering::AcqRel) == ABANDONED
    }

    /// A drain gives up the attempt, once. What it was, if it still ran.
    pub(super) fn abandon(&self) -> Option<Running> {
        let record = self.record.lock();
        self.state
            .compare_exchange(RUNNING, ABANDONED, Ordering::AcqRel, Ordering::Acquire)
            .ok()?;
        record.running(self.limit, false)
    }

    pub(crate) fn with<R>(&self, see: impl FnOnce(&mut Running) -> R) -> Option<R> {
        let mut record = self.record.lock();
        let state = self.state.load(Ordering::Acquire);
        if state == IDLE {
            return None;
        }
        let mut running = record.running(self.limit, state == ABANDONED)?;
        let seen = see(&mut running);
        match &mut *record {
            Record::Nothing => {}
            Record::Plain(_, learnt) => {
                *learnt = Some(Learnt {
                    since: running.since,
                    first_seen: running.first_seen,
                    stuck: running.stuck,
                });
            }
            Record::Full(full) => *full = running,
        }
        Some(seen)
    }

    /// The attempt has waited.
    pub(super) fn set_since(&self, now: Tick) {
        let since = Some(now);
        match &mut *self.record.lock() {
            Record::Nothing => {}
            Record::Plain(_, learnt) => learnt.get_or_insert_default().since = since,
            Record::Full(running) => running.since = since,
        }
    }

    pub(crate) fn set_abort(&self, handle: AbortHandle) {
        *self.abort.lock() = Some(handle);
    }

    /// Has the runtime drop the worker at its next await point.
    pub(crate) fn abort(&self) {
        if let Some(handle) = &*self.abort.lock() {
            handle.abort();
        }
    }
}

impl Record {
    fn running(&self, limit: Duration, abandoned: bool) -> Option<Running> {
        match self {
            Record::Nothing => None,
            Record::Plain(plain, learnt) => Some(Running {
                id: plain.marks.sequence()?.id(),
                name: Name::Function(plain.function),
                location: plain.location,
                attempt: 1,
                limit,
                blocking: false,
                token: None,
                since: learnt.and_then(|learnt| learnt.since),
                first_seen: learnt.and_then(|learnt| learnt.first_seen),
                stuck: learnt.and_then(|learnt| learnt.stuck),
                abandoned,
                lent: false,
            }),
            Record::Full(running) => Some(Running {
                abandoned,
                ..running.clone()
            }),
        }
    }
}
