//! The only file that names the primitives of std or of loom.
//!
//! With `--cfg defer_loom` the concurrent parts run on loom's primitives and are model checked. The
//! cfg has a name of its own because the customary `--cfg loom` reconfigures tokio as well, and then
//! `tokio::net` is gone and axum no longer compiles.

#[cfg(defer_loom)]
use loom::sync as imp;
#[cfg(all(test, defer_loom))]
use loom::{model::Builder, thread};
#[cfg(not(defer_loom))]
use std::sync as imp;

#[cfg(not(defer_loom))]
pub(crate) use imp::atomic::AtomicUsize;
pub(crate) use imp::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(crate) use imp::{Condvar, MutexGuard};
#[cfg(defer_loom)]
pub(crate) use ordered::AtomicUsize;
/// For statics, which loom's atomics cannot be; never part of a model.
pub(crate) use std::sync::atomic::AtomicU64 as StaticU64;
pub(crate) use std::sync::{Arc, OnceLock, Weak};

#[cfg(defer_loom)]
mod ordered;

/// What the models are written with.
#[cfg(all(test, defer_loom))]
pub(crate) mod model;

/// A mutex that a panic does not poison: what it guards is only touched between calls of user code,
/// so a user's panic never finds it half written, and it must not take the executor down.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
