//! What a thread keeps for its next use: shared things that nobody has any more.
//!
//! Invariant: what is kept holds nothing of the user's, and drops nothing of theirs.

use std::cell::RefCell;

use crate::sync::Arc;

/// A thread keeps at most so many of a kind: 16 KiB.
const KEPT: usize = 64;

pub(crate) struct Pool<T>(RefCell<Vec<Arc<T>>>);

impl<T> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self(RefCell::new(Vec::new()))
    }

    #[inline]
    pub(crate) fn take(&self) -> Option<Arc<T>> {
        self.0.try_borrow_mut().ok()?.pop()
    }

    /// Of something that nobody else has.
    #[inline]
    pub(crate) fn put(&self, unused: Arc<T>) {
        if let Ok(mut pool) = self.0.try_borrow_mut() {
            if pool.len() < KEPT {
                pool.push(unused);
            }
        }
    }
}
