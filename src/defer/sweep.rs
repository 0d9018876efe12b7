//! The sweep: no client holds the work hostage.
//!
//! A response whose client takes nothing is released after `max_hold`. One coarse look at all held
//! responses, four times per `max_hold`, instead of a timer per request: a stall is noticed after one
//! to one and a quarter times `max_hold`.

use std::time::Duration;

use super::Collector;
use crate::executor::{Shared, Source};
use crate::observe;
use crate::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering};

/// Looks per `max_hold`.
const LOOKS: u32 = 4;

/// The signs of life of a response. Relaxed throughout: each is a fact by itself, and a stale one only
/// makes the sweep look once more.
#[derive(Debug)]
pub(super) struct Progress {
    /// The sweep's count at the last sign of life.
    at: AtomicU32,
    /// The response is in the server's hands.
    begun: AtomicBool,
    /// Its body waits for its own next frame.
    idle: AtomicBool,
    bytes: AtomicU64,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            at: AtomicU32::new(0),
            begun: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn begin(&self, now: u32) {
        self.at.store(now, Ordering::Relaxed);
        self.begun.store(true, Ordering::Relaxed);
    }

    fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    pub(super) fn asked(&self, now: u32, idle: bool) {
        self.taken(now);
        self.idle.store(idle, Ordering::Relaxed);
    }

    /// The usual stream of events is asked for its next item before its last one is written: what the
    /// body waits for stays as it is.
    pub(super) fn taken(&self, now: u32) {
        self.at.store(now, Ordering::Relaxed);
    }

    /// The body, which has one owner, is the only one that counts.
    pub(super) fn count(&self, more: u64) -> u64 {
        let bytes = self.bytes().saturating_add(more);
        self.bytes.store(bytes, Ordering::Relaxed);
        bytes
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether nothing has happened for more than [`LOOKS`] looks, though the server has something to
    /// send. A body that waits for its own next frame, with nothing of it under way, is not stalled.
    fn is_stalled(&self, now: u32, holders: usize) -> bool {
        let waits_for_itself = self.idle.load(Ordering::Relaxed) && holders <= 1;
        self.has_begun()
            && !waits_for_itself
            && now.wrapping_sub(self.at.load(Ordering::Relaxed)) > LOOKS
    }
}

#[derive(Debug)]
pub(crate) struct Sweep {
    max_hold: Duration,
    /// How many looks there have been.
    count: AtomicU32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    places: Vec<Place>,
    /// The first one that is free; where all are taken, how many there are.
    free: usize,
    held: usize,
    runs: bool,
}

#[derive(Debug)]
enum Place {
    Held(Arc<Collector>),
    /// And the next one that is free.
    Free(usize),
}

impl Sweep {
    pub(crate) fn new(max_hold: Duration) -> Self {
        Self {
            max_hold,
            count: AtomicU32::new(0),
            state: Mutex::default(),
        }
    }

    pub(super) fn now(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// Watches a response. Returns its place, and whether the sweep has to be started.
    pub(super) fn add(&self, collector: Arc<Collector>) -> (usize, bool) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let at = state.free;
        match state.places.get_mut(at) {
            Some(place) => {
                if let Place::Free(next) = std::mem::replace(place, Place::Held(collector)) {
                    state.free = next;
                }
            }
            None => {
                state.places.push(Place::Held(collector));
                state.free += 1;
            }
        }
        state.held += 1;
        let start = !state.runs;
        state.runs = true;
        (at, start)
    }

    #[inline(always)]
    pub(super) fn remove(&self, at: usize) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let free = Place::Free(state.free);
        let removed = std::mem::replace(&mut state.places[at], free);
        state.free = at;
        state.held -= 1;
        drop(guard);
        // Not under the lock: it may be the last one.
        drop(removed);
    }

    pub(super) fn start(self: &Arc<Self>, shared: &Shared) {
        let running = Running {
            sweep: self.clone(),
            ended: false,
        };
        // Where it cannot be started it is dropped, and the next registration tries again.
        let _ = shared.spawn(running.run());
    }

    fn look(&self) {
        let now = self.count.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        for collector in self.all() {
            if collector.progress().is_stalled(now, collector.holders()) {
                observe::stalled(collector.force());
            }
        }
    }

    fn all(&self) -> Vec<Arc<Collector>> {
        let state = self.state.lock();
        let held = |place: &Place| match place {
            Place::Held(collector) => Some(collector.clone()),
            Place::Free(_) => None,
        };
        state.places.iter().filter_map(held).collect()
    }
}

impl Source for Sweep {
    fn release_now(&self, executor: &Shared, handlers: bool) {
        for collector in self.all() {
            if collector.is_of(executor) && collector.progress().has_begun() {
                collector.force();
            } else if handlers {
                collector.give_up(executor);
            }
        }
    }
}

/// The task that looks. It ends when it finds nothing to look at, and is started anew when there is.
struct Running {
    sweep: Arc<Sweep>,
    ended: bool,
}

impl Running {
    async fn run(mut self) {
        let pause = (self.sweep.max_hold / LOOKS).max(Duration::from_millis(1));
        loop {
            tokio::time::sleep(pause).await;
            self.sweep.look();
            let mut state = self.sweep.state.lock();
            if state.held == 0 {
                // Without the room that a burst left behind.
                *state = State::default();
                drop(state);
                self.ended = true;
                return;
            }
        }
    }
}

impl Drop for Running {
    /// Its runtime ended: the next registration starts it on another.
    fn drop(&mut self) {
        if !self.ended {
            self.sweep.state.lock().runs = false;
        }
    }
}
