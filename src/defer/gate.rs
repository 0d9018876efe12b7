//! What is registered is released exactly once, by the last one who lets go.
//!
//! Free of tokio and of HTTP, so that it can be model checked.
//!
//! Invariants:
//! 1. The gate opens once: by the last holder, or earlier by force. Who opens it gets all items.
//! 2. An item is either among those, or was refused because the gate was open: none is lost between.
//!    Pushing and opening are under one lock.
//! 3. `pushed` grows only under the lock, and is read without it as a hint: who reads zero may have
//!    missed an item that is being pushed at this moment, never one that the same thread pushed.

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};
use crate::task::{Fifo, Link};

#[derive(Debug)]
pub(crate) struct Gate<T: Link, S> {
    holders: AtomicUsize,
    pushed: AtomicUsize,
    state: Mutex<State<T, S>>,
}

#[derive(Debug)]
struct State<T: Link, S> {
    open: bool,
    items: Fifo<T>,
    /// What the owner of the gate keeps under the same lock.
    beside: S,
}

/// Who takes something in, with the gate's lock. What was counted is pushed, or put beside.
#[must_use = "it counts already"]
pub(crate) struct Entered<'a, T: Link, S>(MutexGuard<'a, State<T, S>>);

/// Who opened the gate, still with its lock.
#[must_use = "the items are lost"]
pub(crate) struct Opened<'a, T: Link, S>(MutexGuard<'a, State<T, S>>);

/// Why an item was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Open,
    Limit,
}

impl<T: Link, S: Default> Gate<T, S> {
    /// Closed, with one holder.
    pub(crate) fn new() -> Self {
        Self {
            holders: AtomicUsize::new(1),
            pushed: AtomicUsize::new(0),
            state: Mutex::new(State {
                open: false,
                items: Fifo::new(),
                beside: S::default(),
            }),
        }
    }

    /// As new: nobody else has it. `renew` sees to what is kept beside.
    pub(crate) fn renew(&mut self, renew: impl FnOnce(&mut S)) {
        self.holders = AtomicUsize::new(1);
        self.pushed = AtomicUsize::new(0);
        let state = self.state.get_mut();
        state.open = false;
        if !state.items.is_empty() {
            state.items = Fifo::new();
        }
        renew(&mut state.beside);
    }

    /// The way in, for one item, which counts from now on.
    #[inline]
    pub(crate) fn enter(&self, limit: usize) -> Result<Entered<'_, T, S>, Refused> {
        let state = self.state.lock();
        if state.open {
            return Err(Refused::Open);
        }
        // Relaxed: written under the lock only.
        let pushed = self.pushed.load(Ordering::Relaxed);
        if pushed >= limit {
            return Err(Refused::Limit);
        }
        self.pushed.store(pushed + 1, Ordering::Relaxed);
        Ok(Entered(state))
    }

    /// Takes in what is kept beside, and counts like an item if `put` says that it was taken. Whether it
    /// was; once the gate is open, nothing is.
    #[cfg(feature = "events")]
    pub(crate) fn push_beside(&self, put: impl FnOnce(&mut S) -> bool) -> bool {
        let mut state = self.state.lock();
        let taken = !state.open && put(&mut state.beside);
        if taken {
            // Relaxed: written under the lock only.
            let pushed = self.pushed.load(Ordering::Relaxed);
            self.pushed.store(pushed + 1, Ordering::Relaxed);
        }
        taken
    }

    /// How many have been taken in, as a hint (invariant 3).
    pub(crate) fn pushed(&self) -> usize {
        self.pushed.load(Ordering::Relaxed)
    }

    pub(crate) fn with<R>(&self, see: impl FnOnce(&mut Fifo<T>, &mut S) -> R) -> R {
        let mut state = self.state.lock();
        let State { items, beside, .. } = &mut *state;
        see(items, beside)
    }

    pub(crate) fn holders(&self) -> usize {
        self.holders.load(Ordering::Relaxed)
    }

    /// One more holder. The caller is one already, so the gate cannot open meanwhile.
    pub(crate) fn hold(&self) {
        // Relaxed: a holder exists, and it orders what comes before.
        self.holders.fetch_add(1, Ordering::Relaxed);
    }

    /// One holder less; whether it was the last one. Release, and acquire for the last: what every
    /// holder did comes before what the last one does next.
    pub(crate) fn let_go(&self) -> bool {
        self.holders.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Whether the caller is the only holder: then there is nobody to count down for. Acquire, as for the
    /// last who lets go.
    pub(crate) fn is_held_once(&self) -> bool {
        self.holders.load(Ordering::Acquire) == 1
    }

    /// Opens the gate. Who opens it gets the items; for everyone else it is open already.
    #[inline]
    pub(crate) fn open(&self) -> Option<Opened<'_, T, S>> {
        let mut state = self.state.lock();
        if state.open {
            return None;
        }
        state.open = true;
        Some(Opened(state))
    }
}

impl<T: Link, S> Entered<'_, T, S> {
    #[inline]
    pub(crate) fn beside(&mut self) -> &mut S {
        &mut self.0.beside
    }

    #[inline]
    pub(crate) fn push(mut self, item: T) {
        self.0.items.push(item);
    }
}

impl<T: Link, S> Opened<'_, T, S> {
    #[inline]
    pub(crate) fn beside(&mut self) -> &mut S {
        &mut self.0.beside
    }

    #[inline]
    pub(crate) fn into_items(mut self) -> Fifo<T> {
        std::mem::replace(&mut self.0.items, Fifo::new())
    }
}
