//! What a thread keeps for its next use: shared things that nobody has any more.
//!
//! Invariant: what is kept holds nothing of the user's, and drops nothing of theirs.
//!
//! Nothing is done with a pool itself at the end of its thread, so that who looks at it need not ask whether
//! that has come, nor whether somebody else looks at the same moment: 9 of the 1,018 instructions that
//! the layer adds to a request, which puts one thing in and takes one out. An [`Attendant`], which comes with the
//! first thing that is kept, does what is to be done.

use std::cell::Cell;
use std::mem::ManuallyDrop;

use crate::sync::Arc;

/// A thread keeps at most so many of a kind: 16 KiB.
const KEPT: usize = 64;

pub(crate) struct Pool<T> {
    /// Those below `len` are taken.
    places: [Cell<Option<Arc<T>>>; KEPT],
    len: Cell<usize>,
    /// None while there is no attendant.
    room: Cell<usize>,
}

/// Empties a pool at the end of the thread.
pub(crate) struct Attendant(pub(crate) fn());

impl Drop for Attendant {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl<T> Pool<T> {
    pub(crate) const fn new() -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self {
            places: [const { Cell::new(None) }; KEPT],
            len: Cell::new(0),
            room: Cell::new(0),
        })
    }

    #[inline]
    pub(crate) fn take(&self) -> Option<Arc<T>> {
        let last = self.len.get().checked_sub(1)?;
        self.len.set(last);
        self.places[last % KEPT].take()
    }

    /// Of something that nobody else has. `attend` sees to it that there is an attendant, or says that the
    /// thread is ending.
    #[inline]
    pub(crate) fn put(&self, unused: Arc<T>, attend: fn() -> bool) {
        if self.len.get() < self.room.get() || self.make_room(attend) {
            let len = self.len.get();
            // The place is free; the compiler does not know it, and would ask whether there is something to drop.
            let before = ManuallyDrop::new(self.places[len % KEPT].replace(Some(unused)));
            debug_assert!(before.is_none(), "the place is free");
            self.len.set(len + 1);
        }
    }

    #[cold]
    #[inline(never)]
    fn make_room(&self, attend: fn() -> bool) -> bool {
        let opened = self.room.get() == 0 && attend();
        if opened {
            self.room.set(KEPT);
        }
        opened
    }

    /// Keeps nothing any more.
    pub(crate) fn close(&self) {
        self.room.set(0);
        while self.take().is_some() {}
    }
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use super::*;
    use crate::sync::Weak;

    thread_local! {
        static POOL: ManuallyDrop<Pool<usize>> = const { Pool::new() };
        static ATTENDANT: Attendant = const { Attendant(|| POOL.with(|pool| pool.close())) };
    }

    fn put(thing: Arc<usize>) {
        let attend = || ATTENDANT.try_with(|_| {}).is_ok();
        POOL.with(|pool| pool.put(thing, attend));
    }

    #[test]
    fn what_is_kept_is_bounded_and_ends_with_its_thread() {
        let kept = std::thread::spawn(|| {
            let things: Vec<_> = (0..KEPT + 5).map(Arc::new).collect();
            let weak: Vec<_> = things.iter().map(Arc::downgrade).collect();
            things.into_iter().for_each(put);
            let alive = weak.iter().filter(|thing| thing.strong_count() == 1);
            assert_eq!(alive.count(), KEPT);
            let last = POOL.with(|pool| pool.take());
            assert_eq!(last.as_deref(), Some(&(KEPT - 1)));
            weak
        });
        let kept: Vec<Weak<usize>> = kept.join().expect("the thread ends well");
        assert!(kept.iter().all(|thing| thing.strong_count() == 0));
    }

    #[test]
    fn a_closed_pool_keeps_nothing() {
        let pool = Pool::new();
        pool.put(Arc::new(1), || true);
        pool.close();
        pool.put(Arc::new(2), || false);
        assert_eq!(pool.take(), None);
    }
}
