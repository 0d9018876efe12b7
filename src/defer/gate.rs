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

use crate::sync::{AtomicUsize, Mutex, Ordering};
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

    /// As new: nobody else has it.
    pub(crate) fn renew(&mut self) {
        self.holders = AtomicUsize::new(1);
        self.pushed = AtomicUsize::new(0);
        let state = self.state.get_mut();
        state.open = false;
        if !state.items.is_empty() {
            state.items = Fifo::new();
        }
        state.beside = S::default();
    }

    /// Takes something in: `put` gets it with the list, what is kept beside, and how many came before.
    pub(crate) fn push<I>(
        &self,
        item: I,
        limit: usize,
        put: impl FnOnce(I, &mut Fifo<T>, &mut S, usize),
    ) -> Result<(), (I, Refused)> {
        let mut state = self.state.lock();
        if state.open {
            return Err((item, Refused::Open));
        }
        // Relaxed: written under the lock only.
        let pushed = self.pushed.load(Ordering::Relaxed);
        if pushed >= limit {
            return Err((item, Refused::Limit));
        }
        self.pushed.store(pushed + 1, Ordering::Relaxed);
        let State { items, beside, .. } = &mut *state;
        put(item, items, beside, pushed);
        Ok(())
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
    pub(crate) fn open<R>(&self, see: impl FnOnce(&mut S) -> R) -> Option<(Fifo<T>, R)> {
        let mut state = self.state.lock();
        if state.open {
            return None;
        }
        let seen = see(&mut state.beside);
        state.open = true;
        Some((std::mem::replace(&mut state.items, Fifo::new()), seen))
    }
}
