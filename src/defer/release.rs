//! The release: by the last holder of a collector, or earlier by force.
//!
//! What was registered is handed over to its executors, with the record of the response. Nothing of the
//! user's runs here.

use super::Collector;
use super::collector::Beside;
use super::ending::Ending;
use crate::clock::Tick;
use crate::observe;
use crate::sync::Arc;
use crate::task::Origin;

impl Collector {
    /// One more holder.
    pub(super) fn hold(&self) {
        self.gate.hold();
    }

    /// One holder less; the last one releases.
    #[inline(never)]
    pub(super) fn let_go(this: Arc<Self>) {
        if this.gate.let_go() {
            Self::leave(this);
        }
    }

    /// The last holder has let go.
    #[inline(never)]
    fn leave(this: Arc<Self>) {
        this.release_ended();
        Self::reuse_if_last(this);
    }

    /// There will be no answer: its future is over, and no holder any more.
    pub(super) fn fail(mut this: Arc<Self>, ending: Ending) {
        if Self::untouched(&mut this).is_some() {
            this.close();
            return Self::reuse_if_last(this);
        }
        this.end(ending);
        this.close();
        Self::let_go(this);
    }

    /// The body is over, and no holder any more.
    pub(crate) fn finish(mut this: Arc<Self>, ending: Ending) {
        if !this.is_used() && Self::untouched(&mut this).is_some() {
            this.close();
            return Self::reuse_if_last(this);
        }
        if this.gate.is_held_once() {
            // One look under the lock instead of two. No event waits for it: with the head, those that were
            // emitted before it went to be recorded.
            this.close();
            this.release(|_| ending);
            return Self::reuse_if_last(this);
        }
        // A sign of life, and no waiting for the next frame any more.
        this.asked(false);
        this.end(ending);
        this.close();
        Self::let_go(this);
    }

    /// The collector, if nothing is or will be registered, and nobody will ask for the response. Being the
    /// only one is asked first, and orders what another thread registered before it let go.
    #[inline]
    pub(super) fn untouched(this: &mut Arc<Self>) -> Option<&mut Self> {
        Arc::get_mut(this).filter(|only| only.is_untouched())
    }

    /// The response has ended, as it was learnt.
    pub(super) fn release_ended(self: &Arc<Self>) {
        self.release(|beside| beside.known.ending.take().unwrap_or_else(|| self.stalled()));
    }

    /// Releases by force what is registered so far: for the sweep, or a drain. The response goes on. Returns
    /// how many tasks were released.
    #[cold]
    pub(crate) fn force(self: &Arc<Self>) -> usize {
        self.release(|_| self.stalled())
    }

    fn stalled(&self) -> Ending {
        Ending::stalled(self.progress.bytes())
    }

    /// Returns how many tasks were released. `end` is asked only if this is the release. In line in its
    /// three callers: what a body's end has to say is not moved about: 61 of 3,052 instructions of a request
    /// that defers one task.
    #[inline(always)]
    fn release(self: &Arc<Self>, end: impl FnOnce(&mut Beside) -> Ending) -> usize {
        let scope = self.scope();
        let shared = scope.executor.shared();
        let used = self.is_used();
        let now = if used { shared.clock.now() } else { Tick::ZERO };
        let Some(mut opened) = self.gate.open() else {
            return 0;
        };
        let beside = opened.beside();
        let ending = end(beside);
        let (end, bytes) = (ending.end, ending.bytes);
        let origin = Origin::new(|origin| {
            beside.known.record(now, ending, &mut origin.response);
            origin.others_first = !self.seen.is_written_at_once(bytes);
            origin.follows = beside.follows.take();
        });
        let place = beside.place_in_sweep.take();
        // Unless nobody is left who could ask for it: the caller goes, and the sweep asks for less.
        if Arc::strong_count(self) > 1 + usize::from(place.is_some()) {
            beside.origin = Some(origin.clone());
        }
        let elsewhere = beside.elsewhere.take();
        let tasks = opened.into_items();
        if let Some(place) = place {
            scope.sweep.remove(place);
        }
        let mut count = tasks.len();
        let others = elsewhere.map(|elsewhere| (elsewhere, origin.clone()));
        if !tasks.is_empty() {
            // The hint above may have missed what another thread pushed.
            let now = if used { now } else { shared.clock.now() };
            shared.enqueue(tasks, origin, now);
        }
        if let Some((elsewhere, origin)) = others {
            for (executor, tasks) in elsewhere {
                count += tasks.len();
                // Its clock is another one.
                let shared = executor.shared();
                shared.enqueue(tasks, origin.clone(), shared.clock.now());
            }
        }
        if count == 0 {
            return 0;
        }
        // Last: a subscriber that panics takes nothing with it.
        observe::released(shared, count, end);
        count
    }
}
