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
#[cfg(defer_loom)]
pub(crate) use locks::{Condvar, Mutex, MutexGuard};
#[cfg(defer_loom)]
pub(crate) use ordered::AtomicUsize;
/// parking_lot's: a panic does not poison them. What they guard is only touched between calls of user
/// code, so a user's panic never finds it half written, and it must not take the executor down. std asks
/// twice a lock whether its thread panics: about 30 of 712 instructions of a task.
#[cfg(not(defer_loom))]
pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
/// For statics, which loom's atomics cannot be; never part of a model.
pub(crate) use std::sync::atomic::AtomicU64 as StaticU64;
pub(crate) use std::sync::{Arc, OnceLock, Weak};

#[cfg(defer_loom)]
mod locks;
#[cfg(defer_loom)]
mod ordered;

/// What the models are written with.
#[cfg(all(test, defer_loom))]
pub(crate) mod model;
