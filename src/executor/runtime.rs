//! Where the executor's own tasks run: the user's choice, else wherever it is used.

use std::panic::catch_unwind;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::Shared;
use crate::observe;
use crate::sync::{Arc, Ordering};

/// Why nothing can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Runtime,
    Timer,
}

/// There is no way to ask but to try: tokio panics where the timer is not enabled. A timer that is
/// never polled is not registered anywhere.
fn has_timer(runtime: &Handle) -> bool {
    let _entered = runtime.enter();
    catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO))).is_ok()
}

impl Shared {
    /// Starts a task of the executor's own, where there is a runtime to run it.
    pub(crate) fn spawn(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> Option<AbortHandle> {
        Some(self.usable_runtime()?.spawn(future).abort_handle())
    }

    /// Where to start something; that there is nowhere is said.
    pub(super) fn usable_runtime(&self) -> Option<Handle> {
        let runtime = self.runtime();
        if let Err(missing) = &runtime {
            if self.no_runtime.is_due(self.clock.now()) {
                observe::no_runtime(*missing);
            }
        }
        runtime.ok()
    }

    /// The user's choice; else that of the caller, else the one seen last. One without a timer is of no
    /// use: the first attempt that waits would panic there.
    fn runtime(&self) -> Result<Handle, Missing> {
        if let Some(runtime) = &self.config.runtime {
            return if has_timer(runtime) {
                Ok(runtime.clone())
            } else {
                Err(Missing::Timer)
            };
        }
        if let Some(threads) = self.config.threads {
            return self.own_runtime.handle(threads).ok_or(Missing::Runtime);
        }
        let current = Handle::try_current().ok();
        if let Some(current) = current.as_ref().filter(|current| has_timer(current)) {
            *self.last_runtime.lock() = Some(current.clone());
            return Ok(current.clone());
        }
        let last = self.last_runtime.lock().clone();
        let missing = match current {
            Some(_) => Missing::Timer,
            None => Missing::Runtime,
        };
        last.filter(has_timer).ok_or(missing)
    }

    /// Remembers the caller's runtime, where it has one.
    pub(super) fn see_runtime(&self) {
        if !self.has_its_own() {
            if let Ok(current) = Handle::try_current() {
                *self.last_runtime.lock() = Some(current);
            }
        }
    }

    /// Sees to it that what was accepted is under way: it may have been submitted outside of any
    /// runtime, or have outlived one.
    pub(super) fn kick(self: &Arc<Self>) {
        self.wake(self.queue.poke());
        self.blocking.poke(self);
        self.resume_timer();
        self.resume_sources();
    }

    /// A worker or the timer was dropped with its runtime: says what is left behind, once it is.
    pub(super) fn tell_if_stranded(&self) {
        let queued = if self.queue.is_stranded() {
            self.queue.len()
        } else {
            0
        };
        let waiting = if self.waiting.is_stranded() {
            self.waiting.len()
        } else {
            0
        };
        let left = queued + waiting > 0 && !self.drain.is_abandoned();
        if left && self.no_runtime.is_due(self.clock.now()) {
            observe::stranded(queued, waiting);
        }
    }

    /// Remembers the caller's runtime, for a release that happens outside of one.
    pub(crate) fn remember_runtime(&self) {
        // Relaxed: seen too late it is looked for once more.
        if self.has_its_own() || self.knows_runtime.load(Ordering::Relaxed) {
            return;
        }
        let mut last = self.last_runtime.lock();
        if last.is_none() {
            *last = Handle::try_current().ok();
        }
        self.knows_runtime.store(last.is_some(), Ordering::Relaxed);
    }

    fn has_its_own(&self) -> bool {
        self.config.runtime.is_some() || self.config.threads.is_some()
    }
}
