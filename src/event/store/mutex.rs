//! A mutex that ignores poisoning, because a panic in one caller must not end the others.
//!
//! Not a general wrapper: it is here until the crate has one in `sync`, and has the same `lock`.

use std::sync::{MutexGuard, PoisonError};

/// A mutex whose data is valid at every unlock, panic or not: each critical section of this room
/// leaves it so.
#[derive(Debug, Default)]
pub(super) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(super) fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
