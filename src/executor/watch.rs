//! The watch: reports attempts that run on past their timeout without being stoppable.
//!
//! A timeout acts at an await point. A task that never reaches one, and a blocking task, can only be
//! reported; and because a task that never yields may hold the runtime's only thread, the one who
//! reports must be a thread of its own. It looks twice a second while something runs, measures real
//! time by itself, and so costs an attempt nothing but one relaxed load.
//!
//! When nothing has run for a while, it retires the parked workers before it ends, so that none of them
//! needs a timer for that.

use std::task::Waker;
use std::time::{Duration, Instant};

use super::Shared;
use crate::clock;
use crate::observe;
use crate::sync::{Arc, AtomicBool, Ordering, Weak};

const INTERVAL: Duration = Duration::from_millis(500);

/// After so many looks at nothing the thread ends; the next attempt starts another.
const IDLE_LOOKS: u32 = 20;

#[derive(Debug, Default)]
pub(crate) struct Watch {
    awake: Awake,
}

#[derive(Debug)]
struct Awake(AtomicBool);

impl Default for Awake {
    fn default() -> Self {
        Self(AtomicBool::new(false))
    }
}

impl Watch {
    /// Called when an attempt has been written into its slot. Relaxed: a watch that ends clears the
    /// mark and then looks into the slots, under their locks, so it finds the attempt there, or the
    /// attempt finds the mark cleared.
    #[inline]
    pub(super) fn wake(&self, shared: &Arc<Shared>) {
        if !self.awake.0.load(Ordering::Relaxed) {
            self.start(shared);
        }
    }

    #[cold]
    fn start(&self, shared: &Arc<Shared>) {
        if self.awake.0.swap(true, Ordering::Relaxed) {
            return;
        }
        let watched = Arc::downgrade(shared);
        let started = std::thread::Builder::new()
            .name("tower-defer-watch".to_owned())
            .spawn(move || watch(&watched));
        if let Err(error) = started {
            self.awake.0.store(false, Ordering::Relaxed);
            observe::no_thread(&error);
        }
    }
}

fn watch(watched: &Weak<Shared>) {
    let mut looks_at_nothing = 0;
    loop {
        std::thread::park_timeout(INTERVAL);
        let Some(shared) = watched.upgrade() else {
            return;
        };
        if look(&shared, clock::real_now()) {
            looks_at_nothing = 0;
            continue;
        }
        looks_at_nothing += 1;
        if looks_at_nothing >= IDLE_LOOKS {
            let awake = &shared.watch.awake.0;
            awake.store(false, Ordering::Relaxed);
            let nobody = shared.slots.running().is_empty() && shared.retire_workers();
            if nobody || awake.swap(true, Ordering::Relaxed) {
                return;
            }
            looks_at_nothing = 0;
        }
    }
}

impl Shared {
    /// Ends the parked workers; whether that were all. One that has run something meanwhile and is about to
    /// park would be forgotten otherwise.
    fn retire_workers(&self) -> bool {
        let (retired, left) = self.queue.retire();
        retired.into_iter().for_each(Waker::wake);
        !left
    }
}

/// One look: what has been seen running for longer than its limit is stuck. Returns whether anything runs.
fn look(shared: &Shared, now: Instant) -> bool {
    let mut runs = false;
    for slot in shared.slots.all() {
        let late = slot.with(|attempt| {
            runs = true;
            let ran = now.duration_since(*attempt.first_seen.get_or_insert(now));
            if ran <= attempt.limit {
                return None;
            }
            let first = attempt.stuck.replace(ran).is_none();
            first.then(|| (attempt.clone(), ran))
        });
        // Not under the slot's lock: a subscriber that takes a snapshot would wait for itself, and the
        // worker for both.
        if let Some((attempt, ran)) = late.flatten() {
            if let Some(token) = &attempt.token {
                token.cancel();
            }
            if !attempt.abandoned {
                shared.counters.stuck.add(1);
                observe::stuck(shared, &attempt, ran);
            }
        }
    }
    runs
}
