//! Room for deliveries in this process: how many a store may lend at once, and their places in the
//! executor.

use tokio::sync::Notify;

use crate::executor::Place;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering};

/// How many deliveries are lent. At most `limit` of them may run or wait for a worker; those that wait
/// for their response to be out are not among these, so that open streams do not hold up all others.
#[derive(Debug)]
pub(super) struct Window {
    limit: AtomicUsize,
    /// With those that wait for a response.
    most: AtomicUsize,
    lent: AtomicUsize,
    /// Of these, waiting for a response.
    held: AtomicUsize,
    /// Nothing is lent for a while.
    closed: AtomicBool,
    /// Told when one has come back or waits, and when all have come back.
    pub(super) freed: Notify,
    pub(super) empty: Notify,
}

/// Room for one delivery: given back when what became of it is written down.
#[derive(Debug)]
pub(super) struct Room {
    _place: Place,
    lent: Lent,
}

#[derive(Debug)]
struct Lent {
    window: Arc<Window>,
    held: AtomicBool,
}

impl Window {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: AtomicUsize::new(limit.max(1)),
            most: AtomicUsize::new(usize::MAX),
            lent: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            freed: Notify::new(),
            empty: Notify::new(),
        }
    }

    /// From now on no more than this many in all; at least 1.
    pub(super) fn at_most(&self, lent: usize) {
        self.most.store(lent.max(1), Ordering::SeqCst);
    }

    pub(super) fn lent(&self) -> usize {
        self.lent.load(Ordering::SeqCst)
    }

    pub(super) fn free(&self) -> usize {
        self.free_beside(self.lent())
    }

    fn free_beside(&self, lent: usize) -> usize {
        let running = lent.saturating_sub(self.held.load(Ordering::SeqCst));
        let limit = self.limit.load(Ordering::SeqCst).saturating_sub(running);
        limit.min(self.most.load(Ordering::SeqCst).saturating_sub(lent))
    }

    /// Lends nothing until what is returned is dropped.
    pub(super) fn close(&self) -> impl Drop + '_ {
        self.closed.store(true, Ordering::SeqCst);
        Closed(self)
    }

    /// Takes room for one. The place comes second, so that a full window costs the executor nothing.
    pub(super) fn try_take(
        self: &Arc<Self>,
        place: impl FnOnce() -> Option<Place>,
    ) -> Option<Room> {
        if self.closed.load(Ordering::SeqCst) {
            return None;
        }
        self.lent
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lent| {
                (self.free_beside(lent) > 0).then_some(lent + 1)
            })
            .ok()?;
        let lent = Lent {
            window: self.clone(),
            held: AtomicBool::new(false),
        };
        Some(Room {
            _place: place()?,
            lent,
        })
    }
}

struct Closed<'a>(&'a Window);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
    }
}

impl Room {
    /// Its delivery waits for a response.
    pub(super) fn hold(&self) {
        if !self.lent.held.swap(true, Ordering::SeqCst) {
            self.lent.window.held.fetch_add(1, Ordering::SeqCst);
            self.lent.window.freed.notify_one();
        }
    }

    /// The response is out.
    pub(super) fn release(&self) {
        self.lent.release();
    }
}

impl Lent {
    fn release(&self) {
        if self.held.swap(false, Ordering::SeqCst) {
            self.window.held.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.release();
        if self.window.lent.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.window.empty.notify_one();
        }
        self.window.freed.notify_one();
    }
}
