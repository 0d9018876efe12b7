//! loom's mutex and condition variable, with parking_lot's interface.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::Duration;

use super::imp;

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

/// None while its thread waits.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T>(Option<imp::MutexGuard<'a, T>>);

#[derive(Debug, Default)]
pub(crate) struct Condvar(imp::Condvar);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Some(guard) => guard,
            None => unreachable!("it waits"),
        }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.0 {
            Some(guard) => guard,
            None => unreachable!("it waits"),
        }
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(imp::Condvar::new())
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn wait_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        time: Duration,
    ) -> imp::WaitTimeoutResult {
        let Some(held) = guard.0.take() else {
            unreachable!("it waits")
        };
        let (held, result) = self
            .0
            .wait_timeout(held, time)
            .unwrap_or_else(PoisonError::into_inner);
        guard.0 = Some(held);
        result
    }
}
