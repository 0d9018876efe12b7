//! A place in the capacity, as it is handed from the reservation to the task.

use std::ops::Deref;

use super::Shared;
use crate::sync::Arc;

/// A reserved place in the capacity. Given back when dropped. `H` is how it holds the executor: one
/// that is used at once borrows it.
#[derive(Debug)]
pub(crate) struct Place<H: Deref<Target = Shared> = Arc<Shared>>(Option<H>);

impl<H: Deref<Target = Shared>> Place<H> {
    pub(super) fn new(holder: H) -> Self {
        Self(Some(holder))
    }

    /// The task has it from now on.
    #[inline]
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl<H: Deref<Target = Shared>> Drop for Place<H> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.give_back();
        }
    }
}
