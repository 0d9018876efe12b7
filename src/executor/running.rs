//! What runs at this moment: one slot per worker, for snapshots, for the watch and for the drain.

use std::panic::Location;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::Tick;
use crate::sync::{Arc, Mutex};
use crate::task::{Name, TaskId};

/// All slots. A worker adds its own when it starts and takes it away when it ends.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<Vec<Arc<Slot>>>);

#[derive(Debug, Default)]
pub(crate) struct Slot {
    running: Mutex<Option<Running>>,
    abort: Mutex<Option<AbortHandle>>,
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
    /// A drain has counted it as cancelled; its worker must not count it again.
    pub(crate) abandoned: bool,
    /// It is kept elsewhere, and its place is its keeper's.
    pub(crate) lent: bool,
}

impl Slots {
    pub(crate) fn add(&self) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
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
        self.0
            .lock()
            .iter()
            .filter_map(|slot| slot.running.lock().clone())
            .collect()
    }
}

impl Slot {
    #[inline]
    pub(crate) fn begin(&self, running: Running) {
        *self.running.lock() = Some(running);
    }

    /// The attempt is over. Returns whether a drain had abandoned it.
    #[inline]
    pub(crate) fn end(&self) -> bool {
        let mut running = self.running.lock();
        let abandoned = running.as_ref().is_some_and(|running| running.abandoned);
        *running = None;
        abandoned
    }

    pub(crate) fn with<R>(&self, see: impl FnOnce(&mut Running) -> R) -> Option<R> {
        self.running.lock().as_mut().map(see)
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
