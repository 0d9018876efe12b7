//! loom's `AtomicUsize`, with sequential consistency.
//!
//! loom takes a `SeqCst` access for an `AcqRel` one, and would report a lost wake-up wherever two
//! threads each write one word and then read the other's; `fence(SeqCst)` it does order. So a fence
//! goes before each access that asks for `SeqCst`, and before no other: an access that is weakened in
//! the code is weak in the model.

use super::Ordering;
use super::imp::atomic::{AtomicUsize as Plain, fence};

#[derive(Debug, Default)]
pub(crate) struct AtomicUsize(Plain);

impl AtomicUsize {
    pub(crate) fn new(value: usize) -> Self {
        Self(Plain::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> usize {
        self.at(order).load(order)
    }

    pub(crate) fn store(&self, value: usize, order: Ordering) {
        self.at(order).store(value, order);
    }

    pub(crate) fn fetch_add(&self, value: usize, order: Ordering) -> usize {
        self.at(order).fetch_add(value, order)
    }

    pub(crate) fn fetch_sub(&self, value: usize, order: Ordering) -> usize {
        self.at(order).fetch_sub(value, order)
    }

    pub(crate) fn fetch_or(&self, value: usize, order: Ordering) -> usize {
        self.at(order).fetch_or(value, order)
    }

    pub(crate) fn compare_exchange(
        &self,
        current: usize,
        new: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<usize, usize> {
        self.at(success)
            .compare_exchange(current, new, success, failure)
    }

    pub(crate) fn compare_exchange_weak(
        &self,
        current: usize,
        new: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<usize, usize> {
        self.at(success)
            .compare_exchange_weak(current, new, success, failure)
    }

    fn at(&self, order: Ordering) -> &Plain {
        if order == Ordering::SeqCst {
            fence(Ordering::SeqCst);
        }
        &self.0
    }
}
