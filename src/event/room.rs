//! Room for deliveries in this process: how many a store may lend at once, and their places in the
//! executor.

use tokio::sync::Notify;

use crate::executor::Place;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering};

/// How many deliveries are lent, at most `limit`.
#[derive(Debug)]
pub(super) struct Window {
    limit: AtomicUsize,
    lent: AtomicUsize,
    /// Nothing is lent for a while.
    closed: AtomicBool,
    /// Told when one has come back, and when all have.
    pub(super) freed: Notify,
    pub(super) empty: Notify,
}

/// Room for one delivery: given back when what became of it is written down.
#[derive(Debug)]
pub(super) struct Room {
    _place: Place,
    _lent: Lent,
}

#[derive(Debug)]
struct Lent(Arc<Window>);

impl Window {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: AtomicUsize::new(limit.max(1)),
            lent: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            freed: Notify::new(),
            empty: Notify::new(),
        }
    }

    /// From now on no more than this many; at least 1.
    pub(super) fn at_most(&self, limit: usize) {
        self.limit.fetch_min(limit.max(1), Ordering::SeqCst);
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::SeqCst)
    }

    pub(super) fn lent(&self) -> usize {
        self.lent.load(Ordering::SeqCst)
    }

    pub(super) fn free(&self) -> usize {
        self.limit().saturating_sub(self.lent())
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
                (lent < self.limit()).then_some(lent + 1)
            })
            .ok()?;
        let lent = Lent(self.clone());
        Some(Room {
            _place: place()?,
            _lent: lent,
        })
    }
}

struct Closed<'a>(&'a Window);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.0.lent.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.empty.notify_one();
        }
        self.0.freed.notify_one();
    }
}
